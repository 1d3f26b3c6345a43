"""Matrices with spare columns at their right, where a LoRA layer puts its low-rank product beside its input.

With u = x A^T in the border of x, base and adapter are one matrix product: [x | u] [W | B]^T = x W^T + u B^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
