"""What the row-wise kernels share: the size of their tiles, and matrices as they can read them."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

TILE_ELEMENTS = 2048
"""Elements of a matrix that a program holds at once: 16 for each thread of four warps, two wide loads in bfloat16."""
PARTIAL_SUMS = 1024
"""Programs that share a weight's gradient: each sums its rows in a fixed order, so that the result is deterministic."""


class RowTiles(NamedTuple):
    """Tiles of whole rows: a program holds `rows` x `columns` elements; columns is a power of two, masked."""

    rows: int
    columns: int
    warps: int

    @classmethod
    def of(cls, width: int) -> RowTiles:
        """Several short rows a program, or one long one on more warps."""
        columns = triton.next_power_of_2(width)
        rows = max(1, TILE_ELEMENTS // columns)
        return cls(rows, columns, max(4, min(16, rows * columns // 512)))


def with_unit_columns(x_nd: Tensor) -> Tensor:
    """The matrix with neighbouring elements of a row side by side; rows may lie any distance apart."""
    return x_nd if x_nd.stride(1) == 1 else x_nd.contiguous()
