"""Groups of linear layers against their modules called one by one: results, gradients, products, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_checks import INPUTS, KINDS, WIDTHS, Layers, adapt, inputs, make, modules_of, run, with_borders
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loras_bench.kernels.linear import LinearGroup
from loras_bench.metering.flops import MatmulCounter

TOKENS = 2 * 5


@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_its_modules_side_by_side(kind: str, borders: bool) -> None:
    model = make(kind)
    x, dy = inputs()
    wanted = run(lambda x: torch.cat([module(x) for module in modules_of(model)], -1), model, x, dy)
    group = LinearGroup.of(modules_of(model))
    assert group.widths == list(WIDTHS)
    group.pack()
    got = run((lambda x: with_borders(group, x)) if borders else group, model, x, dy)
    assert got.keys() == wanted.keys()  # frozen parameters have no gradient
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    ("kind", "border"), [("lora", 16), ("two adapted", 16), ("scalings", 16), ("rank 16", 16), ("full", 0)]
)
def test_the_border_holds_all_ranks(kind: str, border: int) -> None:
    """9, 6, 11 and 16 columns are rounded up to 16; there are none without adapters."""
    assert LinearGroup.of(modules_of(make(kind))).border == border
    assert LinearGroup.of(modules_of(adapt(Layers(), r=6))).border == 32


@pytest.mark.parametrize("kind", ["lora", "conv1d", "scalings", "trained base"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    model = make(kind)
    group = LinearGroup.of(modules_of(model)[:1])
    group.pack()
    x = inputs()[0].detach()[:1, :2].clone().requires_grad_()
    trained = [p for p in modules_of(model)[0].parameters() if p.requires_grad]
    for call in (group, lambda x: with_borders(group, x)):
        assert torch.autograd.gradcheck(lambda x, *_, call=call: call(x), (x, *trained), fast_mode=True)


class Products(TorchDispatchMode):
    """The matrix products that ran, as (rows, depth, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.shapes.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))


def test_with_borders_base_and_adapters_are_one_product() -> None:
    model = make("lora")
    group = LinearGroup.of(modules_of(model))
    group.pack()
    x, dy = inputs()
    n, k, r = sum(WIDTHS), INPUTS, 16
    with Products() as seen:
        run(lambda x: with_borders(group, x), model, x, dy)
    assert seen.shapes == [
        (TOKENS, k, r), (TOKENS, k + r, n),
        (TOKENS, n, r), (TOKENS, n + r, k), (r, TOKENS, k), (r, TOKENS, n),
    ]  # fmt: skip


@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("needs_dx", [False, True])
def test_products_are_counted_and_none_is_done_in_vain(borders: bool, needs_dx: bool) -> None:
    """LoRA: u, y; v, dA, dB and dx only if it is wanted. Full: y, dW and dx. Frozen: y and dx."""
    n, k, r = sum(WIDTHS), INPUTS, 16
    adapters = 2 * TOKENS * r * (k + n)  # of each pass: u and y's part, v and dx's part, dA and dB
    base = 2 * TOKENS * n * k
    closed = {
        "lora": base + adapters + adapters + 2 * TOKENS * n * r + needs_dx * (base + 2 * TOKENS * k * r),
        "full": 2 * base + needs_dx * base,
        "frozen": base + needs_dx * base,
    }
    for kind, flops in closed.items():
        model = make(kind)
        group = LinearGroup.of(modules_of(model))
        group.pack()
        x = inputs()[0].detach().requires_grad_(needs_dx)
        with MatmulCounter() as counter:
            y = with_borders(group, x) if borders else group(x)
            if y.requires_grad:
                y.backward(inputs()[1])
        assert counter.flops == flops and not counter.unknown, kind


def test_without_dx_and_with_a_frozen_only_db_is_computed() -> None:
    model = make("lora")
    for module in modules_of(model):
        module.lora_A.requires_grad_(False)
    group = LinearGroup.of(modules_of(model))
    group.pack()
    x, dy = inputs()
    y = group(x.detach())
    with MatmulCounter() as counter:
        y.backward(dy)
    assert counter.flops == 2 * TOKENS * group.border * sum(WIDTHS)


def test_a_border_is_filled_only_in_a_buffer_made_for_it() -> None:
    """The right half of a wider matrix is not a border."""
    group = LinearGroup.of(modules_of(make("lora")))
    group.pack()
    wide = torch.randn(TOKENS, 2 * INPUTS, dtype=torch.float64)
    before = wide.clone()
    group(wide[:, :INPUTS])
    assert torch.equal(wide, before)


@pytest.mark.parametrize("borders", [False, True])
def test_it_is_recomputed_under_checkpointing(borders: bool) -> None:
    model = make("lora")
    group = LinearGroup.of(modules_of(model))
    group.pack()

    def call(x: Tensor) -> Tensor:
        return with_borders(group, x.tanh()) if borders else group(x.tanh())

    x, dy = inputs()
    plain = run(call, model, x, dy)
    again = run(lambda x: checkpoint(call, x, use_reentrant=False), model, x, dy)
    with torch.autograd.graph.save_on_cpu():
        moved = run(call, model, x, dy)
    for name, tensor in plain.items():
        assert torch.equal(again[name], tensor) and torch.equal(moved[name], tensor), name


def test_it_runs_without_gradients() -> None:
    model = make("lora")
    group = LinearGroup.of(modules_of(model))
    group.pack()
    x = inputs()[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = with_borders(group, x)
            assert not y.requires_grad
            torch.testing.assert_close(y, torch.cat([module(x) for module in modules_of(model)], -1))


@settings(deadline=None, max_examples=10)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), width=st.integers(1, 9), inputs=st.integers(1, 9))
def test_any_shape(shape: Sequence[int], width: int, inputs: int) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(inputs, width)), LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    nn.init.normal_(model.base_model.model[0].lora_B.default.weight)
    group = LinearGroup.of([model.base_model.model[0]])
    x = torch.randn(*shape, inputs)
    wanted = model(x)
    group.pack()
    torch.testing.assert_close(group(x), wanted)
    torch.testing.assert_close(with_borders(group, x), wanted)


def test_bfloat16_is_rounded_less_often_than_by_peft() -> None:
    """PEFT rounds base, A x, B A x, their multiple and the sum; the group u and y. Against the same weights exactly."""
    model = make("lora", torch.bfloat16)
    x, dy = inputs(torch.bfloat16)
    theirs = run(lambda x: torch.cat([module(x) for module in modules_of(model)], -1), model, x, dy)
    exact_model = make("lora").to(torch.float64)
    exact_model.load_state_dict(model.state_dict())
    exact = run(
        lambda x: torch.cat([module(x) for module in modules_of(exact_model)], -1),
        exact_model,
        x.detach().double().requires_grad_(),
        dy.double(),
    )
    group = LinearGroup.of(modules_of(model))
    group.pack()
    ours = run(lambda x: with_borders(group, x), model, x, dy)
    for name, tensor in exact.items():
        assert ours[name].dtype is torch.bfloat16
        error, their_error = (float((got[name] - tensor).norm() / tensor.norm()) for got in (ours, theirs))
        assert error < 0.004 and error < 1.2 * their_error, name  # one rounding is 0.0017 on average
        if name in ("x", "y"):
            assert error < 0.8 * their_error, name


def test_gradients_add_up_over_micro_batches() -> None:
    model = make("lora")
    x, dy = inputs()
    group = LinearGroup.of(modules_of(model))
    group.pack()
    once = run(lambda x: with_borders(group, x), model, x, dy)
    with_borders(group, x).backward(dy)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, 2 * once[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_gpu_in_bfloat16(kind: str, borders: bool) -> None:
    """Against the same weights in float64 on the CPU; the small shapes of the other tests and a long batch."""
    model = make(kind, torch.bfloat16).cuda()
    exact_model = make(kind)
    exact_model.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 999, INPUTS, generator=generator).bfloat16()
    dy = torch.randn(4, 999, sum(WIDTHS), generator=generator).bfloat16()
    exact = run(
        lambda x: torch.cat([module(x) for module in modules_of(exact_model)], -1),
        exact_model,
        x.double().requires_grad_(),
        dy.double(),
    )
    group = LinearGroup.of(modules_of(model))
    group.pack()
    call = (lambda x: with_borders(group, x)) if borders else group
    ours = run(call, model, x.cuda().requires_grad_(), dy.cuda())
    assert ours.keys() == exact.keys()
    for name, tensor in exact.items():
        assert float((ours[name].cpu() - tensor).norm() / tensor.norm()) < 0.006, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_can_be_captured_in_a_cuda_graph() -> None:
    model = make("scalings", torch.bfloat16).cuda()
    group = LinearGroup.of(modules_of(model))
    group.pack()
    x, dy = (tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in inputs(torch.bfloat16))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            wanted = run(lambda x: with_borders(group, x), model, x, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    model.zero_grad()
    x.grad = None
    with torch.cuda.graph(graph):
        y = with_borders(group, x)
        y.backward(dy)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted["y"]) and torch.equal(x.grad, wanted["x"])
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, wanted[name]), name
