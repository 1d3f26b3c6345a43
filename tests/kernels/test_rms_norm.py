"""The fused residual addition and RMSNorm: a hand-computed row, transformers' module, and torch's gradients."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import GPU, check_gradients, gradients, randn
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("triton")
from loras_bench.kernels import tiles
from loras_bench.kernels.bordered import with_border
from loras_bench.kernels.rms_norm import add_rms_norm
from loras_bench.kernels.tiles import RowTiles

EPS = 1e-5
CASES = [
    *[("cpu", torch.float32, *shape) for shape in [(1, 1), (5, 12), (70, 32), (3, 2500)]],
    *[
        pytest.param("cuda", dtype, *shape, marks=GPU)
        for shape in [(32768, 576), (1000, 2048), (257, 4096), (3, 30)]
        for dtype in (torch.float32, torch.bfloat16)
    ],
]


def reference(x_nd: Tensor, delta_nd: Tensor | None, weight_d: Tensor) -> tuple[Tensor, Tensor]:
    """The addition and transformers' module, without casting its weight."""
    total_nd = x_nd if delta_nd is None else x_nd + delta_nd
    norm = LlamaRMSNorm(1, EPS)
    del norm.weight
    norm.weight = weight_d  # type: ignore[assignment]
    return total_nd, norm(total_nd)


def ours(x_nd: Tensor, delta_nd: Tensor | None, weight_d: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x_nd, delta_nd, weight_d, EPS, border=16, grad_border=32)


def draw(device: str, dtype: torch.dtype, rows: int, width: int) -> list[Tensor]:
    like = (device, dtype)
    return [randn(0, rows, width, like=like), randn(1, rows, width, like=like), randn(2, width, like=like)]


def test_one_row_by_hand() -> None:
    """(2, 4) + (1, 0) = (3, 4), whose mean square is 12.5."""
    x_nd, weight_d = torch.tensor([[2.0, 4.0]]), torch.tensor([1.0, 10.0])
    total_nd, normed_nd = add_rms_norm(x_nd, torch.tensor([[1.0, 0.0]]), weight_d, 1e-12)
    torch.testing.assert_close(total_nd, torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(normed_nd, torch.tensor([[3 / 12.5**0.5, 40 / 12.5**0.5]]))


@pytest.mark.parametrize("device, dtype, rows, width", CASES)
def test_equals_transformers_with_all_gradients(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    inputs = draw(device, dtype, rows, width)
    for mine, theirs in zip(ours(*inputs), reference(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-6 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    check_gradients(ours, reference, inputs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_without_an_addition_the_sum_is_the_input(device: str) -> None:
    x_nd, _, weight_d = draw(device, torch.float32, 6, 20)
    total_nd, _ = add_rms_norm(x_nd, None, weight_d, EPS)
    assert total_nd.data_ptr() == x_nd.data_ptr()
    check_gradients(lambda x, w: ours(x, None, w), lambda x, w: reference(x, None, w), [x_nd, weight_d])


def test_both_terms_share_one_bordered_gradient_and_frozen_inputs_get_none() -> None:
    x_nd, delta_nd, weight_d = draw("cpu", torch.float32, 5, 12)
    received = []
    delta_nd.requires_grad_()
    delta_nd.register_hook(lambda gradient: received.append(gradient))
    _, normed_nd = add_rms_norm(x_nd.requires_grad_(), delta_nd, weight_d, EPS, border=16, grad_border=32)
    assert with_border(normed_nd, 16) is not None
    d_x, d_delta = torch.autograd.grad(normed_nd, [x_nd, delta_nd], torch.ones_like(normed_nd))
    assert d_x.data_ptr() == d_delta.data_ptr()
    assert with_border(received[0], 32) is not None
    assert weight_d.grad is None


def test_a_gradient_of_one_output_alone_is_enough() -> None:
    """The last norm's sum goes nowhere."""
    inputs = draw("cpu", torch.float32, 5, 12)
    check_gradients(lambda *x: ours(*x)[1:], lambda *x: reference(*x)[1:], inputs)


def test_the_weight_gradient_is_deterministic_where_programs_take_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PARTIAL_SUMS", 3)
    width = 2048  # one row a tile
    assert RowTiles.of(width).rows == 1
    inputs = draw("cpu", torch.float32, 8, width)
    check_gradients(ours, reference, inputs)
    assert torch.equal(gradients(ours, inputs)[2], gradients(ours, inputs)[2])
