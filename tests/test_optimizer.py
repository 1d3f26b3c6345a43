"""AdamW on float32 masters: equal to torch's, exact to resume, and no update lost in bfloat16."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loras_bench.optimizer import MasterAdamW, cosine_with_warmup

BETAS = (0.9, 0.99)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def inputs(seed: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


def backward(model: nn.Module, seed: int) -> Tensor:
    x, y = inputs(seed)
    dtype = next(model.parameters()).dtype
    loss = (model(x.to(dtype)).float() - y).square().mean()
    loss.backward()
    return loss.detach()


def cast(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def optimizer_of(
    model: nn.Module, dtype: torch.dtype = torch.float32, decay: float = 0.1, rate: float = 0.01
) -> MasterAdamW:
    return MasterAdamW(model, [], rate, decay, BETAS, dtype)


def update(optimizer: MasterAdamW, max_grad_norm: float, scale: float = 1.0) -> Tensor:
    """A step of one micro-batch, whose gradients lie in the model."""
    optimizer.collect_gradients(first=True)
    optimizer.set_rate(scale)
    return optimizer.step(max_grad_norm)


@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_in_float32_it_is_torchs_adamw_with_clipping_and_schedule(max_norm: float) -> None:
    """Without clipping bit for bit; the norm is summed in another order than torch's, tensor by tensor."""
    model = network()
    twin = copy.deepcopy(model)
    ours = optimizer_of(model)
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=BETAS, fused=True)
    for step in range(20):
        factor = cosine_with_warmup(step, 20, 0.2)
        backward(model, step)
        norm = update(ours, max_norm, factor)
        backward(twin, step)
        expected_norm = torch.nn.utils.clip_grad_norm_([*matrices, *vectors], max_norm)
        for group in theirs.param_groups:
            group["lr"] = torch.tensor(0.01 * factor)  # float32, as on a device
        theirs.step()
        theirs.zero_grad()
        torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
        tolerance = 0.0 if max_norm == math.inf else 1e-6
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=tolerance, atol=tolerance)
    places = [[t.data_ptr() for t in tensors] for tensors in (ours.masters, ours.parameters)]
    assert places[0] == places[1], "in float32 the parameters are the masters: no copy"


def test_first_step_by_hand() -> None:
    """The first update of Adam is the learning rate times the sign of the gradient; decay shrinks the matrix first."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = optimizer_of(model, decay=0.5, rate=0.1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([-4.0])
    assert float(update(optimizer, 100.0)) == pytest.approx(5.0)
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
    assert model.bias.item() == pytest.approx(2.0 + 0.1, abs=1e-6), "vectors do not decay"
    assert model.weight.grad is None


def test_clipping_scales_all_gradients_together() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = MasterAdamW(model, [], 0.1, 0.0, (0.0, 0.0), torch.bfloat16)
    cast(model)
    model.weight.grad = torch.tensor([[6.0, 8.0]], dtype=torch.bfloat16)
    assert float(update(optimizer, 5.0)) == pytest.approx(10.0)
    # betas of 0: the first moment is the clipped gradient itself
    torch.testing.assert_close(optimizer.state_dict()["exp_avg.0"][:2], torch.tensor([3.0, 4.0]))


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    """An update of 1e-4 of a weight of 1 is below bfloat16's half unit of 1/512; 100 of them are 1 %."""

    def train(optimizer: MasterAdamW | torch.optim.AdamW, model: nn.Linear) -> float:
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            if isinstance(optimizer, MasterAdamW):
                update(optimizer, 10.0)
            else:
                optimizer.step()
        return model.weight.item()

    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ours = MasterAdamW(model, [], 1e-4, 0.0, BETAS, torch.bfloat16)
    cast(model)
    naive = copy.deepcopy(model)
    assert train(torch.optim.AdamW(naive.parameters(), lr=1e-4, weight_decay=0.0), naive) == 1.0
    assert train(ours, model) == pytest.approx(0.99, abs=1 / 256)
    assert ours.masters[0].item() == pytest.approx(0.99, abs=1e-5)


def test_a_bfloat16_model_tracks_float32_training() -> None:
    exact, rounded = network(), network()
    first, second = optimizer_of(exact), optimizer_of(rounded, torch.bfloat16)
    cast(rounded)
    losses = []
    for step in range(100):
        losses.append(float(backward(exact, step % 4)))
        update(first, 1.0)
        loss = float(backward(rounded, step % 4))
        update(second, 1.0)
        assert loss == pytest.approx(losses[-1], rel=0.05)
    assert losses[-1] < 0.75 * losses[3], "it learned something"
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(second.parameters, second.masters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up(dtype: torch.dtype) -> None:
    """Gradients that bfloat16 holds exactly, in sums that it cannot hold: they are added in float32."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = MasterAdamW(model, [], 0.1, 0.0, (0.0, 0.0), dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for steps in range(2):
        for number, gradient in enumerate((256.0, 1.0, 1.0)):
            model.weight.grad = torch.full((1, 2), gradient, dtype=dtype)
            optimizer.collect_gradients(first=number == 0)
            assert model.weight.grad is None
        assert torch.equal(optimizer.gradients[0], torch.full((1, 2), 258.0)), f"{steps} earlier steps are forgotten"


def test_a_parameter_that_no_loss_reaches_keeps_no_earlier_gradient() -> None:
    model = nn.Linear(2, 2)
    optimizer = optimizer_of(model, torch.bfloat16, decay=0.0)
    cast(model)
    for number, reached in enumerate(([model.weight, model.bias], [model.bias], [model.weight])):
        for parameter in reached:
            parameter.grad = torch.ones_like(parameter)
        optimizer.collect_gradients(first=number < 2)
    assert [float(gradient.sum()) for gradient in optimizer.gradients] == [4.0, 2.0]


def test_masters_hold_what_was_loaded_not_its_rounding() -> None:
    model = network()
    loaded = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_of(model, torch.bfloat16)
    cast(model)
    held = {id(p): m for p, m in zip(optimizer.parameters, optimizer.masters, strict=True)}
    assert all(torch.equal(held[id(p)], before) for p, before in zip(model.parameters(), loaded, strict=True))
    assert all(m.dtype is torch.float32 for m in optimizer.masters)


def test_frozen_parameters_are_left_out_and_tied_ones_taken_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    assert [id(p) for p in optimizer_of(model).parameters] == [id(model[0].weight)]


def test_groups_of_methods_keep_their_own_settings() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    optimizer = MasterAdamW(
        model, [{"params": [model.bias], "lr": 0.5, "weight_decay": 0.0}], 0.1, 0.0, BETAS, torch.float32
    )
    model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
    update(optimizer, 100.0, 0.5)
    assert model.weight.item() == pytest.approx(-0.05)
    assert model.bias.item() == pytest.approx(-0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 3])
def test_state_is_restored_exactly(dtype: torch.dtype, before: int) -> None:
    """Also before the first step, into the very tensors that a CUDA graph may have recorded."""
    model = network()
    optimizer = optimizer_of(model, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

    def steps(count: int, start: int) -> list[Tensor]:
        for step in range(start, start + count):
            backward(model, step)
            update(optimizer, 1.0)
        return [p.detach().clone() for p in (*model.parameters(), *optimizer.masters)]

    steps(before, 0)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in optimizer.state_dict().items()}
    expected = steps(4, before)
    optimizer.load_state_dict(saved)
    now = optimizer.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in now.items()} == places
    assert now.keys() == saved.keys() and all(torch.equal(now[name], saved[name]) for name in saved)
    assert all(torch.equal(a, b) for a, b in zip(steps(4, before), expected, strict=True))

    fresh_model = network()
    for parameter in fresh_model.parameters():
        parameter.data = parameter.data.to(dtype)
    fresh = optimizer_of(fresh_model, dtype)
    fresh.load_state_dict(saved)
    model, optimizer = fresh_model, fresh
    assert all(torch.equal(a, b) for a, b in zip(steps(4, before), expected, strict=True)), "in another process too"


def test_schedule_by_hand() -> None:
    assert [cosine_with_warmup(step, 10, 0.2) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine_with_warmup(6, 10, 0.2) == pytest.approx(0.5)
    assert cosine_with_warmup(4, 10, 0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine_with_warmup(10, 10, 0.2) == pytest.approx(0.0)
    assert cosine_with_warmup(0, 10, 0.0) == 1.0, "without warm-up the first step is taken at the peak"
    assert cosine_with_warmup(0, 1, 0.5) == 1.0


@given(steps=st.integers(1, 400), fraction=st.floats(0, 0.99))
def test_schedule_rises_then_falls_within_bounds(steps: int, fraction: float) -> None:
    factors = [cosine_with_warmup(step, steps, fraction) for step in range(steps)]
    peak = factors.index(max(factors))
    assert max(factors) == 1.0 and min(factors) > 0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_slots_are_aligned_and_apart() -> None:
    model = nn.ParameterList(
        [nn.Parameter(torch.full(shape, 1.0 + n)) for n, shape in enumerate([(3, 1), (5, 1), (4, 2)])]
    )
    optimizer = optimizer_of(model, torch.bfloat16)
    start = optimizer.masters[0].data_ptr()
    assert [(master.data_ptr() - start) % 16 for master in optimizer.masters] == [0, 0, 0]
    buffer = optimizer.state_dict()["master.0"]
    assert buffer.tolist() == [1, 1, 1, 0, 2, 2, 2, 2, 2, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3]


def test_the_number_of_operations_does_not_grow_with_that_of_the_parameters() -> None:
    """Each is one launch or a few: 40 adapters must not cost 40 of them."""

    def operations(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        optimizer = optimizer_of(model, torch.bfloat16)
        cast(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.collect_gradients(first=True)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        counter = _Launches()
        with counter:
            optimizer.collect_gradients(first=False)
            optimizer.set_rate(1.0)
            optimizer.step(1.0)
        return counter.count

    assert operations(40) == operations(2) < 30


class _Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_are_views_of_a_matrix_are_written_in_place(device: str, dtype: torch.dtype) -> None:
    """As fused layers hold their adapters: rebound after the optimizer was made."""
    model = network().to(device)
    optimizer = optimizer_of(model, dtype)
    matrix = torch.full((20, 30), 7.0, device=device, dtype=dtype)
    for top, parameter in ((0, model[0].weight), (10, model[3].weight)):
        view = matrix[top : top + parameter.shape[0], 1 : 1 + parameter.shape[1]]
        parameter.data = view.copy_(parameter.detach())
    for parameter in (model[0].bias, model[1].weight, model[1].bias, model[3].bias):
        parameter.data = parameter.data.to(dtype)
    twin = network().to(device)
    straight = optimizer_of(twin, dtype)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    for step in range(3):
        for one, its in ((model, optimizer), (twin, straight)):
            for seed, parameter in enumerate(one.parameters()):
                generator = torch.Generator().manual_seed(10 * step + seed)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, dtype)
            update(its, 1.0)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert model[0].weight.data_ptr() == matrix[0, 1].data_ptr(), "still a view"
    assert (matrix == 7.0).sum() == matrix.numel() - model[0].weight.numel() - model[3].weight.numel()
