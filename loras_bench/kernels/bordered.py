"""Matrices with spare columns at their right, where a LoRA layer puts its low-rank product beside its input.

With u = x A^T in the border of x, base and adapter are one matrix product: [x | u] [W | B]^T = x W^T + u B^T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNMENT = 16
"""Row strides are multiples of this many elements: what wide loads, cuBLAS and Triton's specialisation ask for."""


def bordered(rows: int, width: int, border: int, like: Tensor) -> Tensor:
    """An uninitialised (rows, width) matrix of `like`'s type and device with `border` columns to spare."""
    stride = _stride(width, border)
    # Longer than its rows, so that no slice of a wider matrix can be taken for one. No view in autograd's eyes: writing
    # into the border must not look like writing into the matrix.
    memory = torch.empty(rows * stride + ALIGNMENT, dtype=like.dtype, device=like.device)
    return memory.new_empty(0).set_(memory.untyped_storage(), 0, (rows, width), (stride, 1))  # type: ignore[call-overload,no-any-return]


def with_border(x_nd: Tensor, border: int) -> Tensor | None:
    """The (rows, width + border) matrix that a matrix made by `bordered` lies in; None if it was not made so."""
    rows, width = x_nd.shape
    stride = _stride(width, border)
    whole = x_nd.untyped_storage().nbytes() == (rows * stride + ALIGNMENT) * x_nd.element_size()
    if x_nd.stride() != (stride, 1) or x_nd.storage_offset() or not whole:
        return None
    return x_nd.detach().as_strided((rows, width + border), (stride, 1))


def _stride(width: int, border: int) -> int:
    return -(-(width + border) // ALIGNMENT) * ALIGNMENT


def take_rows(x_td: Tensor, order_t: Tensor, place_t: Tensor, border: int = 0) -> Tensor:
    """The rows of x in another order, with room beside them.

    Args:
        x_td: One token a row.
        order_t: int64, the row of x that each row of the result is; every row once.
        place_t: int64, its inverse: where each row of x goes.
        border: Spare columns beside the result, for the linear layer that reads it.
    """
    taken_td: Tensor = _TakeRows.apply(x_td, order_t, place_t, border)
    return taken_td


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_td: Tensor, order_t: Tensor, place_t: Tensor, border: int) -> Tensor:
        ctx.save_for_backward(place_t)
        return torch.index_select(x_td, 0, order_t, out=bordered(len(x_td), x_td.shape[1], border, x_td))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_td: Tensor) -> tuple[Tensor | None, ...]:
        (place_t,) = ctx.saved_tensors
        return dy_td.index_select(0, place_t), None, None, None
