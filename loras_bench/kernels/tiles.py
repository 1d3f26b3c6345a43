"""What the row-wise kernels share: the size of their tiles, matrices as they can read them, the residual addition."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
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

    @property
    def options(self) -> dict[str, int]:
        """As the kernels take them."""
        return {"tile_rows": self.rows, "tile_columns": self.columns, "num_warps": self.warps}

    def programs(self, rows: int, sums: bool = False) -> int:
        """Programs for a matrix of so many rows; few enough to sum a weight's gradient, if they do."""
        tiles = -(-rows // self.rows)
        return min(tiles, PARTIAL_SUMS) if sums else tiles


def with_unit_columns(x_nd: Tensor) -> Tensor:
    """The matrix with neighbouring elements of a row side by side; rows may lie any distance apart."""
    return x_nd if x_nd.stride(1) == 1 else x_nd.contiguous()


@triton.jit  # type: ignore[untyped-decorator]
def load_sum(
    x: tl.tensor,
    delta: tl.tensor,
    total: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    total_stride: tl.tensor,
    add: tl.constexpr,
) -> tl.tensor:
    """A tile of x in float32; with `add`, of x + delta, which is rounded as torch would and written to `total`."""
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if add:
        step = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + step.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * total_stride + column, value, mask=inside)
    return value.to(tl.float32)
