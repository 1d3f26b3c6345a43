"""The residual addition and the RMSNorm after it (Zhang and Sennrich 2019) in one pass over memory.

Rounds where transformers' Llama does: after the addition, after the normalisation, after the weight. Gradients stay in
float32 until they are written; the addition has one gradient for both of its terms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loras_bench.kernels.bordered import bordered
from loras_bench.kernels.tiles import RowTiles, load_sum, with_unit_columns


def add_rms_norm(
    x_nd: Tensor, delta_nd: Tensor | None, weight_d: Tensor, eps: float, border: int = 0, grad_border: int = 0
) -> tuple[Tensor, Tensor]:
    """The sum x + delta, and weight * sum / sqrt(mean(sum^2) + eps).

    Args:
        x_nd: The residual stream, one token a row.
        delta_nd: What the last linear layer adds to it; None where nothing has to be added.
        weight_d: The norm's weight.
        eps: Keeps the root away from zero.
        border: Spare columns beside the normalised rows, for the linear layer that reads them.
        grad_border: Spare columns beside the gradient of x and delta, for the linear layer that made delta.
    """
    sum_nd, normed_nd = _AddRmsNorm.apply(x_nd, delta_nd, weight_d, eps, border, grad_border)
    return sum_nd, normed_nd


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_nd: Tensor, delta_nd: Tensor | None, weight_d: Tensor, eps: float, border: int, grad_border: int
    ) -> tuple[Tensor, Tensor]:
        x_nd = with_unit_columns(x_nd)
        rows, width = x_nd.shape
        sum_nd = x_nd if delta_nd is None else torch.empty_like(x_nd, memory_format=torch.contiguous_format)
        delta = sum_nd if delta_nd is None else with_unit_columns(delta_nd)
        normed_nd = bordered(rows, width, border, x_nd)
        rstd_n = torch.empty(rows, dtype=torch.float32, device=x_nd.device)
        tiles = RowTiles.of(width)
        _forward[(tiles.programs(rows),)](
            x_nd, delta, weight_d, sum_nd, normed_nd, rstd_n,
            rows, x_nd.stride(0), delta.stride(0), sum_nd.stride(0), normed_nd.stride(0), eps,
            width=width, add=delta_nd is not None,
            **tiles.options,
        )  # fmt: skip
        ctx.save_for_backward(sum_nd, weight_d, rstd_n)
        ctx.grad_border = grad_border
        ctx.set_materialize_grads(False)
        return sum_nd, normed_nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum_nd: Tensor | None, d_normed_nd: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_nd, weight_d, rstd_n = ctx.saved_tensors
        assert d_normed_nd is not None, "the normalised rows were not used"
        rows, width = sum_nd.shape
        d_normed = with_unit_columns(d_normed_nd)
        d_sum = d_normed if d_sum_nd is None else with_unit_columns(d_sum_nd)
        d_x_nd = bordered(rows, width, ctx.grad_border, sum_nd)
        tiles = RowTiles.of(width)
        trained = ctx.needs_input_grad[2]
        programs = tiles.programs(rows, sums=trained)
        d_weight_pd = torch.empty(programs if trained else 0, width, dtype=torch.float32, device=sum_nd.device)
        _backward[(programs,)](
            sum_nd, weight_d, rstd_n, d_sum, d_normed, d_x_nd, d_weight_pd,
            rows, sum_nd.stride(0), d_sum.stride(0), d_normed.stride(0), d_x_nd.stride(0),
            width=width, add=d_sum_nd is not None, trained=trained,
            **tiles.options,
        )  # fmt: skip
        d_weight_d = d_weight_pd.sum(0).to(weight_d.dtype) if trained else None
        needs_x, needs_delta = ctx.needs_input_grad[:2]
        return d_x_nd if needs_x else None, d_x_nd if needs_delta else None, d_weight_d, None, None, None


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    rstd: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    total_stride: tl.tensor,
    normed_stride: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    add: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    column = tl.arange(0, tile_columns)[None, :]
    inside = (row < rows) & (column < width)
    value = load_sum(x, delta, total, row, column, inside, x_stride, delta_stride, total_stride, add)
    scale = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / width + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    normal = (value * scale).to(x.dtype.element_ty).to(tl.float32)
    tl.store(normed + row * normed_stride + column, (factor * normal).to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward(
    total: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    d_total: tl.tensor,
    d_normed: tl.tensor,
    d_x: tl.tensor,
    d_weight: tl.tensor,
    rows: tl.tensor,
    total_stride: tl.tensor,
    d_total_stride: tl.tensor,
    d_normed_stride: tl.tensor,
    d_x_stride: tl.tensor,
    width: tl.constexpr,
    add: tl.constexpr,
    trained: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    column = tl.arange(0, tile_columns)[None, :]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    sums = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, tile_rows), tl.num_programs(0)):
        row = (tile * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < width)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = tl.load(total + row * total_stride + column, mask=inside, other=0.0).to(tl.float32) * scale
        gradient = tl.load(d_normed + row * d_normed_stride + column, mask=inside, other=0.0).to(tl.float32)
        if trained:
            sums += gradient * normal.to(total.dtype.element_ty).to(tl.float32)
        gradient *= factor
        gradient = scale * (gradient - normal * (tl.sum(gradient * normal, axis=1, keep_dims=True) / width))
        if add:
            gradient += tl.load(d_total + row * d_total_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + row * d_x_stride + column, gradient.to(d_x.dtype.element_ty), mask=inside)
    if trained:
        partial = tl.sum(sums, axis=0, keep_dims=True)
        tl.store(d_weight + tl.program_id(0) * width + column, partial, mask=column < width)
