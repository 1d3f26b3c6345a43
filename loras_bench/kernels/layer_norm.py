"""The residual addition and the LayerNorm after it (Ba et al. 2016) in one pass over memory.

For layers that normalise before they compute (GPT-2: the sum goes on) and after (BERT: the normalised rows go on, and
are what the next layer reads too). Everything is float32 until it is written, as in torch's own LayerNorm.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loras_bench.kernels.bordered import bordered
from loras_bench.kernels.tiles import RowTiles, load_sum, with_unit_columns


def add_layer_norm(
    x_nd: Tensor,
    delta_nd: Tensor | None,
    weight_d: Tensor,
    bias_d: Tensor,
    eps: float,
    carry: Literal["sum", "normed"],
    border: int = 0,
    grad_border: int = 0,
) -> tuple[Tensor, Tensor]:
    """What goes on as the residual stream, and weight * (sum - mean) / sqrt(variance + eps) + bias of sum = x + delta.

    Args:
        x_nd: The residual stream, one token a row.
        delta_nd: What the last linear layer adds to it; None where nothing has to be added.
        weight_d: The norm's weight.
        bias_d: The norm's bias.
        eps: Keeps the root away from zero.
        carry: Whether the sum or the normalised rows go on. The two results are one matrix if it is `normed`; the
            gradients of its two uses are added inside the backward pass.
        border: Spare columns beside the normalised rows, for the linear layer that reads them.
        grad_border: Spare columns beside the gradient of x and delta, for the linear layer that made delta.
    """
    arguments = (x_nd, delta_nd, weight_d, bias_d, eps, carry == "normed", border, grad_border)
    carried_nd, normed_nd = _AddLayerNorm.apply(*arguments)
    return carried_nd, normed_nd


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_nd: Tensor,
        delta_nd: Tensor | None,
        weight_d: Tensor,
        bias_d: Tensor,
        eps: float,
        carries_normed: bool,
        border: int,
        grad_border: int,
    ) -> tuple[Tensor, Tensor]:
        x_nd = with_unit_columns(x_nd)
        rows, width = x_nd.shape
        sum_nd = x_nd if delta_nd is None else torch.empty_like(x_nd, memory_format=torch.contiguous_format)
        delta = sum_nd if delta_nd is None else with_unit_columns(delta_nd)
        normed_nd = bordered(rows, width, border, x_nd)
        mean_n, rstd_n = torch.empty(2, rows, dtype=torch.float32, device=x_nd.device)
        tiles = RowTiles.of(width)
        _forward[(tiles.programs(rows),)](
            x_nd, delta, weight_d, bias_d, sum_nd, normed_nd, mean_n, rstd_n,
            rows, x_nd.stride(0), delta.stride(0), sum_nd.stride(0), normed_nd.stride(0), eps,
            width=width, add=delta_nd is not None,
            **tiles.options,
        )  # fmt: skip
        ctx.save_for_backward(sum_nd, weight_d, mean_n, rstd_n)
        ctx.carries_normed, ctx.grad_border = carries_normed, grad_border
        ctx.set_materialize_grads(False)
        return normed_nd.detach() if carries_normed else sum_nd, normed_nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_carried_nd: Tensor | None, d_normed_nd: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_nd, weight_d, mean_n, rstd_n = ctx.saved_tensors
        if d_normed_nd is None and ctx.carries_normed:
            d_carried_nd, d_normed_nd = None, d_carried_nd
        assert d_normed_nd is not None, "the normalised rows were not used"
        rows, width = sum_nd.shape
        d_normed = with_unit_columns(d_normed_nd)
        d_carried = d_normed if d_carried_nd is None else with_unit_columns(d_carried_nd)
        d_x_nd = bordered(rows, width, ctx.grad_border, sum_nd)
        tiles = RowTiles.of(width)
        needs_x, needs_delta, *trained = ctx.needs_input_grad[:4]
        programs = tiles.programs(rows, sums=any(trained))
        partials = torch.empty(2, programs if any(trained) else 0, width, dtype=torch.float32, device=sum_nd.device)
        _backward[(programs,)](
            sum_nd, weight_d, mean_n, rstd_n, d_carried, d_normed, d_x_nd, partials[0], partials[1],
            rows, sum_nd.stride(0), d_carried.stride(0), d_normed.stride(0), d_x_nd.stride(0), width=width,
            carried=d_carried_nd is not None, carries_normed=ctx.carries_normed, trained=any(trained),
            **tiles.options,
        )  # fmt: skip
        d_weight_d, d_bias_d = (
            part.sum(0).to(weight_d.dtype) if wanted else None for part, wanted in zip(partials, trained, strict=True)
        )
        d_x, d_delta = d_x_nd if needs_x else None, d_x_nd if needs_delta else None
        return d_x, d_delta, d_weight_d, d_bias_d, None, None, None, None


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    mean: tl.tensor,
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
    centre = tl.sum(value, axis=1, keep_dims=True) / width
    value = tl.where(inside, value - centre, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / width + eps)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    result = factor * (value * scale) + shift
    tl.store(normed + row * normed_stride + column, result.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward(
    total: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    d_carried: tl.tensor,
    d_normed: tl.tensor,
    d_x: tl.tensor,
    d_weight: tl.tensor,
    d_bias: tl.tensor,
    rows: tl.tensor,
    total_stride: tl.tensor,
    d_carried_stride: tl.tensor,
    d_normed_stride: tl.tensor,
    d_x_stride: tl.tensor,
    width: tl.constexpr,
    carried: tl.constexpr,
    carries_normed: tl.constexpr,
    trained: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    column = tl.arange(0, tile_columns)[None, :]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    weight_sums = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    bias_sums = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, tile_rows), tl.num_programs(0)):
        row = (tile * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < width)
        centre = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = tl.load(total + row * total_stride + column, mask=inside, other=0.0).to(tl.float32) - centre
        normal = tl.where(inside, normal * scale, 0.0)
        gradient = tl.load(d_normed + row * d_normed_stride + column, mask=inside, other=0.0).to(tl.float32)
        if carried:
            through = tl.load(d_carried + row * d_carried_stride + column, mask=inside, other=0.0).to(tl.float32)
            if carries_normed:
                gradient += through
        if trained:
            weight_sums += gradient * normal
            bias_sums += gradient
        gradient *= factor
        along = tl.sum(gradient * normal, axis=1, keep_dims=True) / width
        gradient = scale * (gradient - tl.sum(gradient, axis=1, keep_dims=True) / width - normal * along)
        if carried and not carries_normed:
            gradient += through
        tl.store(d_x + row * d_x_stride + column, gradient.to(d_x.dtype.element_ty), mask=inside)
    if trained:
        place = tl.program_id(0) * width + column
        tl.store(d_weight + place, tl.sum(weight_sums, axis=0, keep_dims=True), mask=column < width)
        tl.store(d_bias + place, tl.sum(bias_sums, axis=0, keep_dims=True), mask=column < width)
