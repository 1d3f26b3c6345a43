"""Activations of feed-forward layers, forward and backward in one pass over memory each.

SwiGLU (Shazeer 2020) rounds where transformers' Llama does, after silu and after the product; GELU (Hendrycks and
Gimpel 2016) rounds once. Gradients are computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loras_bench.kernels.bordered import bordered
from loras_bench.kernels.tiles import TILE_ELEMENTS, with_unit_columns

TILE_COLUMNS = 512
TILE = {"tile_rows": TILE_ELEMENTS // TILE_COLUMNS, "tile_columns": TILE_COLUMNS}


def swiglu(gate_up_nf: Tensor, border: int = 0, grad_border: int = 0) -> Tensor:
    """silu(gate) * up: (tokens, f) from (tokens, 2 f), whose first f columns are the gate.

    Args:
        gate_up_nf: Output of the fused gate and up projections.
        border: Spare columns beside the result, for the linear layer that reads it.
        grad_border: Spare columns beside the gradient of `gate_up_nf`, for the linear layer that made it.
    """
    hidden_nf: Tensor = _SwiGlu.apply(gate_up_nf, border, grad_border)
    return hidden_nf


def gelu(x_nf: Tensor, tanh: bool, border: int = 0, grad_border: int = 0) -> Tensor:
    """GELU: x times the normal distribution function of x, or its approximation by a hyperbolic tangent.

    Args:
        x_nf: Output of the linear layer before, bias included.
        tanh: True for GPT-2's `gelu_new`, False for BERT's `gelu`.
        border: Spare columns beside the result, for the linear layer that reads it.
        grad_border: Spare columns beside the gradient of `x_nf`, for the linear layer that made it.
    """
    hidden_nf: Tensor = _Gelu.apply(x_nf, tanh, border, grad_border)
    return hidden_nf


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_nf: Tensor, border: int, grad_border: int) -> Tensor:
        gate_up_nf = with_unit_columns(gate_up_nf)
        rows, width = len(gate_up_nf), gate_up_nf.shape[1] // 2
        hidden_nf = bordered(rows, width, border, gate_up_nf)
        _swiglu_forward[_grid(rows, width)](
            gate_up_nf, hidden_nf, rows, gate_up_nf.stride(0), hidden_nf.stride(0), width=width, **TILE
        )
        ctx.save_for_backward(gate_up_nf)
        ctx.grad_border = grad_border
        return hidden_nf

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden_nf: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up_nf,) = ctx.saved_tensors
        d_hidden_nf = with_unit_columns(d_hidden_nf)
        rows, width = d_hidden_nf.shape
        d_gate_up_nf = bordered(rows, 2 * width, ctx.grad_border, gate_up_nf)
        _swiglu_backward[_grid(rows, width)](
            gate_up_nf, d_hidden_nf, d_gate_up_nf,
            rows, gate_up_nf.stride(0), d_hidden_nf.stride(0), d_gate_up_nf.stride(0), width=width, **TILE,
        )  # fmt: skip
        return d_gate_up_nf, None, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nf: Tensor, tanh: bool, border: int, grad_border: int) -> Tensor:
        x_nf = with_unit_columns(x_nf)
        rows, width = x_nf.shape
        hidden_nf = bordered(rows, width, border, x_nf)
        _gelu_forward[_grid(rows, width)](
            x_nf, hidden_nf, rows, x_nf.stride(0), hidden_nf.stride(0), width=width, tanh=tanh, **TILE
        )
        ctx.save_for_backward(x_nf)
        ctx.tanh, ctx.grad_border = tanh, grad_border
        return hidden_nf

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden_nf: Tensor) -> tuple[Tensor | None, ...]:
        (x_nf,) = ctx.saved_tensors
        d_hidden_nf = with_unit_columns(d_hidden_nf)
        rows, width = x_nf.shape
        d_x_nf = bordered(rows, width, ctx.grad_border, x_nf)
        _gelu_backward[_grid(rows, width)](
            x_nf, d_hidden_nf, d_x_nf,
            rows, x_nf.stride(0), d_hidden_nf.stride(0), d_x_nf.stride(0), width=width, tanh=ctx.tanh, **TILE,
        )  # fmt: skip
        return d_x_nf, None, None, None


def _grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, TILE["tile_rows"]) * triton.cdiv(width, TILE["tile_columns"]),)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(rows: tl.tensor, width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr) -> tl.tensor:
    """Rows, columns and mask of this program's tile; neighbouring programs take neighbouring columns."""
    across: tl.constexpr = (width + tile_columns - 1) // tile_columns
    row = (tl.program_id(0) // across * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % across * tile_columns + tl.arange(0, tile_columns))[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _swiglu_forward(
    gate_up: tl.tensor,
    hidden: tl.tensor,
    rows: tl.tensor,
    gate_up_stride: tl.tensor,
    hidden_stride: tl.tensor,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    row, column, inside = _tile(rows, width, tile_rows, tile_columns)
    source = gate_up + row * gate_up_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(hidden.dtype.element_ty).to(tl.float32)
    tl.store(hidden + row * hidden_stride + column, (silu * up).to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _swiglu_backward(
    gate_up: tl.tensor,
    d_hidden: tl.tensor,
    d_gate_up: tl.tensor,
    rows: tl.tensor,
    gate_up_stride: tl.tensor,
    d_hidden_stride: tl.tensor,
    d_gate_up_stride: tl.tensor,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    row, column, inside = _tile(rows, width, tile_rows, tile_columns)
    source = gate_up + row * gate_up_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(d_hidden + row * d_hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    d_gate = gradient * up * (share + silu * (1.0 - share))
    target = d_gate_up + row * d_gate_up_stride + column
    tl.store(target, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(target + width, (gradient * silu).to(d_gate_up.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _distribution(x: tl.tensor, tanh: tl.constexpr) -> tl.tensor:
    """The normal distribution function of x and its derivative; for tanh, those of its approximation."""
    if tanh:
        # (1 + tanh(z)) / 2 = sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3)
        below = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        density = below * (1.0 - below) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return below, density


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _gelu_forward(
    x: tl.tensor,
    hidden: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    hidden_stride: tl.tensor,
    width: tl.constexpr,
    tanh: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    row, column, inside = _tile(rows, width, tile_rows, tile_columns)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    below, _ = _distribution(value, tanh)
    tl.store(hidden + row * hidden_stride + column, (value * below).to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _gelu_backward(
    x: tl.tensor,
    d_hidden: tl.tensor,
    d_x: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    d_hidden_stride: tl.tensor,
    d_x_stride: tl.tensor,
    width: tl.constexpr,
    tanh: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    row, column, inside = _tile(rows, width, tile_rows, tile_columns)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(d_hidden + row * d_hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
    below, density = _distribution(value, tanh)
    gradient *= below + value * density
    tl.store(d_x + row * d_x_stride + column, gradient.to(d_x.dtype.element_ty), mask=inside)
