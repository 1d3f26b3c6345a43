"""Sliced products against whole ones that are masked by token: outputs, every gradient, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from linear_checks import INPUTS, WIDTHS, GiveBorder, make, modules_of
from torch import Tensor, nn
from torch.nn.functional import pad

from loras_bench.kernels.bordered import take_rows, with_border
from loras_bench.kernels.linear import LinearGroup
from loras_bench.kernels.sliced import narrow_inputs, narrow_outputs, sliced_inputs, sliced_outputs
from loras_bench.kernels.sliced_parts import Rows, padded
from loras_bench.metering.flops import MatmulCounter

TOKENS, OUTPUTS = 10, sum(WIDTHS)
KINDS = ["lora", "two adapted", "scalings", "rank 16", "frozen"]
KEPT = {"outputs": torch.tensor([60, 3, 17, 16, 30, 41]), "inputs": torch.tensor([0, 23, 5, 7])}  # in no order


def frozen_base(kind: str) -> nn.Module:
    model = make(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def adapters(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def mask(width: int, dense: int, kept_c: Tensor) -> Tensor:
    """(tokens, width): 1 everywhere for the first tokens, and at the kept channels for the others."""
    kept_w = torch.zeros(width, dtype=torch.float64).index_fill(0, kept_c, 1.0)
    return torch.ones(TOKENS, width, dtype=torch.float64).index_put((torch.arange(dense, TOKENS),), kept_w)


def bases(model: nn.Module, x_tk: Tensor) -> Tensor:
    return torch.cat([getattr(module, "base_layer", module)(x_tk) for module in modules_of(model)], dim=1)


def masked_outputs(model: nn.Module, x_tk: Tensor, dense: int, kept_c: Tensor) -> Tensor:
    """By PEFT's own layers: their base outputs masked, their adapters' whole."""
    whole_tn = torch.cat([module(x_tk) for module in modules_of(model)], dim=1)
    return whole_tn - (1 - mask(OUTPUTS, dense, kept_c)) * bases(model, x_tk)


def masked_inputs(model: nn.Module, x_tk: Tensor, dense: int, kept_c: Tensor) -> Tensor:
    whole_tn = torch.cat([module(x_tk) for module in modules_of(model)], dim=1)
    return whole_tn - bases(model, x_tk) + bases(model, x_tk * mask(INPUTS, dense, kept_c))


def compare(
    model: nn.Module, expected: Callable[[Tensor], list[Tensor]], got: Callable[[Tensor], list[Tensor]]
) -> None:
    """Outputs and gradients of the input and of all adapters, in float64."""
    torch.manual_seed(2)
    x_tk = torch.randn(TOKENS, INPUTS, dtype=torch.float64, requires_grad=True)
    theirs = expected(x_tk)
    dys = [torch.randn_like(y) for y in theirs]
    wanted = [*theirs, *torch.autograd.grad(theirs, [x_tk, *adapters(model)], dys)]
    ours = got(x_tk)
    for mine, other in zip([*ours, *torch.autograd.grad(ours, [x_tk, *adapters(model)], dys)], wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def bordered_or_not(group: LinearGroup, borders: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What gives an input, and an output's gradient, a border; NaN where nobody wrote."""
    if not borders:
        return (lambda x: x), (lambda y: y)
    return (lambda x: GiveBorder.apply(x, group.border, False)), (lambda y: GiveBorder.apply(y, group.border, True))


@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("dense", [0, 3, TOKENS])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_masked_bases(kind: str, dense: int, borders: bool) -> None:
    model, kept_c = frozen_base(kind), KEPT["outputs"]
    group = LinearGroup.of(modules_of(model))
    group.pack()
    give, back = bordered_or_not(group, borders)

    def whole(x_tk: Tensor) -> list[Tensor]:
        return [back(sliced_outputs(group, give(x_tk), dense, kept_c))]

    def narrow(parts: int, x_tk: Tensor) -> list[Tensor]:
        rows, each = narrow_outputs(group, give(x_tk), dense, kept_c.view(parts, -1)), len(kept_c) // parts
        y_dense, y_context = (back(part) for part in rows)
        y_context = y_context.unflatten(1, (parts, padded(each)))
        assert not y_context[..., each:].any()
        return [y_dense, y_context[..., :each].flatten(1)]

    def pieces(x_tk: Tensor) -> list[Tensor]:
        y_tn = masked_outputs(model, x_tk, dense, kept_c)
        return [y_tn[:dense], y_tn[dense:, kept_c]]

    compare(model, lambda x_tk: [masked_outputs(model, x_tk, dense, kept_c)], whole)
    compare(model, pieces, partial(narrow, 1))
    compare(model, pieces, partial(narrow, 2))


@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("dense", [0, 3, TOKENS])
@pytest.mark.parametrize("kind", KINDS)
def test_bases_read_masked_inputs(kind: str, dense: int, borders: bool) -> None:
    model, kept_c = frozen_base(kind), KEPT["inputs"]
    group = LinearGroup.of(modules_of(model))
    group.pack()
    give, back = bordered_or_not(group, borders)

    def narrow(x_tk: Tensor) -> list[Tensor]:
        rows = Rows(give(x_tk[:dense]), give(pad(x_tk[dense:, kept_c], (0, padded(len(kept_c)) - len(kept_c)))))
        return [back(narrow_inputs(group, rows, kept_c))]

    def expected(x_tk: Tensor) -> list[Tensor]:
        return [masked_inputs(model, x_tk, dense, kept_c)]

    compare(model, expected, lambda x_tk: [back(sliced_inputs(group, give(x_tk), dense, kept_c))])
    compare(model, lambda x_tk: expected(x_tk * mask(INPUTS, dense, kept_c)), narrow)


@pytest.mark.parametrize("call", [sliced_outputs, sliced_inputs], ids=lambda call: call.__name__)
def test_gradients_are_finite_differences(call: Any) -> None:
    model = frozen_base("lora")
    group = LinearGroup.of(modules_of(model))
    group.pack()
    kept_c = KEPT["outputs" if call is sliced_outputs else "inputs"]
    x_tk = torch.randn(TOKENS, INPUTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x_tk, *_: call(group, x_tk, 3, kept_c), (x_tk, *adapters(model)))


def test_multiplications_are_those_of_the_kept_channels() -> None:
    """2 FLOPs each: u and y of dense rows, u, u B^T and kept outputs of context rows."""
    model = frozen_base("rank 16")  # one adapter of rank 16 on v: no zeros fill the border
    group = LinearGroup.of(modules_of(model))
    group.pack()
    x_tk, kept_c, dense, rank = torch.randn(TOKENS, INPUTS, dtype=torch.float64), KEPT["outputs"], 3, 16
    width = 8  # six channels, and zeros
    low_rank, both = TOKENS * INPUTS * rank, INPUTS + rank
    for call, expected in (
        (sliced_outputs, low_rank + dense * both * OUTPUTS + (TOKENS - dense) * (both * width + rank * OUTPUTS)),
        (narrow_outputs, low_rank + dense * both * OUTPUTS + (TOKENS - dense) * both * width),
    ):
        with MatmulCounter() as counter, torch.no_grad():
            call(group, x_tk, dense, kept_c.view(1, -1) if call is narrow_outputs else kept_c)
        assert counter.flops == 2 * expected
        assert not counter.unknown


def test_what_is_left_out_is_not_even_stored() -> None:
    """Narrow rows are as wide as the kept channels, with aligned strides; gathered weights are not the whole ones."""
    model = frozen_base("frozen")
    group = LinearGroup.of(modules_of(model))
    group.pack()
    saved: list[Tensor] = []
    x_tk = torch.randn(TOKENS, INPUTS, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rows = narrow_outputs(group, x_tk, 3, KEPT["outputs"].view(2, 3))
    assert rows.context.shape == (TOKENS - 3, 16) and rows.context.stride(0) % 16 == 0
    assert {tuple(t.shape) for t in saved} == {(2, 3), (INPUTS, 16)}, "the channels, and their weights"


def test_trained_bases_are_refused() -> None:
    model = make("trained base")
    group = LinearGroup.of(modules_of(model))
    group.pack()
    with pytest.raises(RuntimeError, match="frozen"):
        sliced_outputs(group, torch.randn(4, INPUTS, dtype=torch.float64), 2, KEPT["outputs"])


def test_rows_are_taken_and_brought_back_with_a_border() -> None:
    torch.manual_seed(0)
    order_t = torch.randperm(TOKENS)
    place_t = order_t.argsort()
    x_td = torch.randn(TOKENS, 6, dtype=torch.float64, requires_grad=True)
    y_td = take_rows(x_td, order_t, place_t, border=16)
    assert torch.equal(y_td, x_td[order_t]) and with_border(y_td, 16) is not None
    assert torch.equal(take_rows(y_td, place_t, order_t), x_td)
    dy_td = torch.randn_like(y_td)
    (got,) = torch.autograd.grad(y_td, x_td, dy_td)
    assert torch.equal(got, dy_td[place_t])


def test_kept_channels_may_be_all() -> None:
    """In any order: the product of the whole group, to rounding."""
    model = frozen_base("lora")
    group = LinearGroup.of(modules_of(model))
    group.pack()
    x_tk = torch.randn(TOKENS, INPUTS, dtype=torch.float64)
    y_tn = group(x_tk)
    for channels, call in ((OUTPUTS, sliced_outputs), (INPUTS, sliced_inputs)):
        for kept_c in (torch.arange(channels), torch.randperm(channels)):
            torch.testing.assert_close(call(group, x_tk, 4, kept_c), y_tn, rtol=1e-12, atol=1e-12)
