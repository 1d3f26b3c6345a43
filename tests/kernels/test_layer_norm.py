"""The fused residual addition and LayerNorm: a hand-computed row, torch's function and gradients."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import GPU, assert_near, check_gradients, gradients, randn
from torch import Tensor

pytest.importorskip("triton")
from loras_bench.kernels import tiles
from loras_bench.kernels.bordered import with_border
from loras_bench.kernels.layer_norm import add_layer_norm
from loras_bench.kernels.tiles import RowTiles

EPS = 1e-5
Carry = Literal["sum", "normed"]
CASES = [
    *[("cpu", torch.float32, *shape) for shape in [(1, 3), (5, 12), (70, 32), (3, 2500)]],
    *[
        pytest.param("cuda", dtype, *shape, marks=GPU)
        for shape in [(32768, 768), (1000, 384), (257, 4096), (3, 30)]
        for dtype in (torch.float32, torch.bfloat16)
    ],
]


class Norms:
    """Ours and torch's, for one way to go on."""

    def __init__(self, carry: Carry) -> None:
        self.carry = carry

    def ours(self, x_nd: Tensor, delta_nd: Tensor | None, weight_d: Tensor, bias_d: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x_nd, delta_nd, weight_d, bias_d, EPS, self.carry, border=16, grad_border=32)

    def reference(
        self, x_nd: Tensor, delta_nd: Tensor | None, weight_d: Tensor, bias_d: Tensor
    ) -> tuple[Tensor, Tensor]:
        total_nd = x_nd if delta_nd is None else x_nd + delta_nd
        normed_nd = F.layer_norm(total_nd, weight_d.shape, weight_d, bias_d, EPS)
        return (total_nd if self.carry == "sum" else normed_nd), normed_nd * 1


def draw(device: str, dtype: torch.dtype, rows: int, width: int) -> list[Tensor]:
    """Rows far from zero, so that their mean counts."""
    like = (device, dtype)
    shapes = [(rows, width), (rows, width), (width,), (width,)]
    inputs = [randn(seed, *shape, like=like) for seed, shape in enumerate(shapes)]
    inputs[0] += 3
    return inputs


def test_one_row_by_hand() -> None:
    """(1, 4) + (0, 2) = (1, 6): mean 3.5, deviation 2.5."""
    inputs = torch.tensor([[1.0, 4.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([1.0, 10.0]), torch.tensor([0.5, 0.0])
    total_nd, normed_nd = add_layer_norm(*inputs, 1e-12, "sum")
    torch.testing.assert_close(total_nd, torch.tensor([[1.0, 6.0]]))
    torch.testing.assert_close(normed_nd, torch.tensor([[-0.5, 10.0]]))


@pytest.mark.parametrize("carry", ["sum", "normed"])
@pytest.mark.parametrize("device, dtype, rows, width", CASES)
def test_equals_torch_with_all_gradients(device: str, dtype: torch.dtype, rows: int, width: int, carry: Carry) -> None:
    norms, inputs = Norms(carry), draw(device, dtype, rows, width)
    assert_near(norms.ours(*inputs), norms.reference(*inputs))
    check_gradients(norms.ours, norms.reference, inputs)
    check_gradients(lambda *x: norms.ours(*x)[1:], lambda *x: norms.reference(*x)[1:], inputs)


@pytest.mark.parametrize("carry", ["sum", "normed"])
def test_without_an_addition(carry: Carry) -> None:
    norms = Norms(carry)
    x_nd, _, weight_d, bias_d = draw("cpu", torch.float32, 6, 20)
    carried_nd, normed_nd = norms.ours(x_nd, None, weight_d, bias_d)
    assert carried_nd.data_ptr() == (x_nd if carry == "sum" else normed_nd).data_ptr()
    check_gradients(
        lambda x, w, b: norms.ours(x, None, w, b),
        lambda x, w, b: norms.reference(x, None, w, b),
        [x_nd, weight_d, bias_d],
    )


def test_where_the_normalised_rows_go_on_either_use_alone_is_enough() -> None:
    norms, inputs = Norms("normed"), draw("cpu", torch.float32, 5, 12)
    check_gradients(lambda *x: norms.ours(*x)[:1], lambda *x: norms.reference(*x)[:1], inputs)


def test_both_terms_share_one_bordered_gradient_and_frozen_inputs_get_none() -> None:
    x_nd, delta_nd, weight_d, bias_d = draw("cpu", torch.float32, 5, 12)
    received = []
    delta_nd.requires_grad_().register_hook(lambda gradient: received.append(gradient))
    _, normed_nd = Norms("sum").ours(x_nd.requires_grad_(), delta_nd, weight_d, bias_d)
    assert with_border(normed_nd, 16) is not None
    d_x, d_delta = torch.autograd.grad(normed_nd, [x_nd, delta_nd], torch.ones_like(normed_nd))
    assert d_x.data_ptr() == d_delta.data_ptr()
    assert with_border(received[0], 32) is not None
    assert weight_d.grad is None and bias_d.grad is None


def test_affine_gradients_are_deterministic_where_programs_take_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PARTIAL_SUMS", 3)
    width = 2048  # one row a tile
    assert RowTiles.of(width).rows == 1
    norms, inputs = Norms("sum"), draw("cpu", torch.float32, 8, width)
    check_gradients(norms.ours, norms.reference, inputs)
    for once, again in zip(gradients(norms.ours, inputs), gradients(norms.ours, inputs), strict=True):
        assert torch.equal(once, again)
