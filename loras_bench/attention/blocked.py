"""Patterns of strides and blocks: strided and fixed (Child et al. 2019), block-local, BigBird (Zaheer et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from loras_bench.attention.banded import band_part
from loras_bench.attention.pattern import IntervalPart, PatternBase
from loras_bench.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from loras_bench.attention.binding import AttentionBatch
    from loras_bench.attention.pattern import Bounds, Rule

    Rows = np.ndarray[Any, np.dtype[np.int64]]


class Strided(PatternBase):
    """Child et al. 2019, the union of its two heads: |q - k| < stride, or (q - k) mod stride = 0."""

    kind: Literal["strided"] = "strided"
    stride: int = Field(ge=1)
    """About the square root of the length."""

    def rule(self, batch: AttentionBatch) -> Rule:
        stride = self.stride
        return lambda b, q, k: ((q - k < stride) & (k - q < stride)) | ((q - k) % stride == 0)

    def interval_parts(self, causal: bool) -> tuple[IntervalPart, ...]:
        """The band, and in each residue class everyone but oneself, whom the band holds already."""
        band = band_part((self.stride - 1, self.stride - 1), causal)
        if causal:
            return band, IntervalPart(lambda p, n: (0, 0, 0, p), lambda p, n: (0, 0, p + 1, n), self.stride)

        def others(p: Tensor, n: Tensor) -> Bounds:
            return 0, p, p + 1, n

        return band, IntervalPart(others, others, self.stride)

    def count_pairs(self, length: int, causal: bool) -> int:
        import numpy as np

        def side(available: Rows) -> Rows:
            return np.minimum(available, self.stride - 1) + available // self.stride

        q = np.arange(length)
        rows = 1 + side(q) + (0 if causal else side(length - 1 - q))
        return int(rows.sum())


class Fixed(PatternBase):
    """Child et al. 2019: the query's own block of `stride` positions, and the last `summary` of every block."""

    kind: Literal["fixed"] = "fixed"
    stride: int = Field(ge=1)
    """Positions of a block."""
    summary: int = Field(ge=1)
    """Positions at the end of each block that everyone sees."""

    @model_validator(mode="after")
    def _summary_fits(self) -> Fixed:
        if self.summary > self.stride:
            raise ValueError(f"`summary` ({self.summary}) cannot exceed `stride` ({self.stride})")
        return self

    def rule(self, batch: AttentionBatch) -> Rule:
        stride, first = self.stride, self.stride - self.summary
        return lambda b, q, k: (q // stride == k // stride) | (k % stride >= first)

    def count_pairs(self, length: int, causal: bool) -> int:
        import numpy as np

        q = np.arange(length)
        start = q - q % self.stride
        if causal:  # earlier blocks are complete
            return int((q - start + 1 + start // self.stride * self.summary).sum())
        own = np.minimum(start + self.stride, length) - start
        own_summary = np.maximum(own - (self.stride - self.summary), 0)
        summaries = np.count_nonzero(q % self.stride >= self.stride - self.summary)
        return int((own + summaries - own_summary).sum())


class BlockLocal(PatternBase):
    """The query's own block; with `overlap` also the previous block, and the next one in a bidirectional model."""

    kind: Literal["block_local"] = "block_local"
    block: int = Field(ge=1)
    """Positions of a block."""
    overlap: bool = True
    """Without it blocks never exchange anything: a block-diagonal mask."""

    def rule(self, batch: AttentionBatch) -> Rule:
        block, reach = self.block, int(self.overlap)
        return lambda b, q, k: (q // block - k // block <= reach) & (k // block - q // block <= reach)

    def interval_parts(self, causal: bool) -> tuple[IntervalPart, ...]:
        block, reach = self.block, self.block * self.overlap

        def keys(p: Tensor, n: Tensor) -> Bounds:
            start = p - p % block
            return 0, 0, (start - reach).clamp(min=0), p + 1 if causal else (start + block + reach).minimum(n)

        def queries(p: Tensor, n: Tensor) -> Bounds:
            return (0, 0, p, (p - p % block + block + reach).minimum(n)) if causal else keys(p, n)

        return (IntervalPart(keys, queries),)

    def count_pairs(self, length: int, causal: bool) -> int:
        import numpy as np

        q = np.arange(length)
        start = q - q % self.block
        first = np.maximum(start - self.block * self.overlap, 0)
        last = q if causal else np.minimum(start + self.block * (1 + self.overlap), length) - 1
        return int((last - first + 1).sum())


class BigBird(PatternBase):
    """Zaheer et al. 2020 on blocks of positions: window, global prefix and seeded random blocks.

    A causal query block sees itself and the `window_blocks - 1` before it; a bidirectional one sees
    (`window_blocks` - 1) / 2 on each side. Random blocks never repeat, and none lies in the window or the prefix; a row
    with too few other blocks takes them all. Blocks of the prefix see everything.
    """

    kind: Literal["bigbird"] = "bigbird"
    block: int = Field(default=64, ge=1)
    """Positions of a block."""
    window_blocks: int = Field(default=3, ge=1)
    """Blocks of the window, the query's own included."""
    global_blocks: int = Field(default=2, ge=0)
    """The first so many blocks are global."""
    random_blocks: int = Field(default=3, ge=0)
    """Random key blocks of each query block; the same for all heads."""
    seed: int = Field(default=0, ge=0)
    """Layers with the same seed share their random blocks."""

    def check(self, causal: bool) -> None:
        """Refuse a bidirectional window that has no middle block."""
        if not causal and self.window_blocks % 2 == 0:
            raise ConfigError(
                f"bigbird: `window_blocks: {self.window_blocks}` has no middle block, and this model is bidirectional",
                f"write an odd number, such as {self.window_blocks + 1}",
            )

    def block_table(self, length: int, causal: bool) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which key block each query block sees: bool (blocks, blocks)."""
        import numpy as np

        blocks = -(-length // self.block)
        row, column = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
        visible = column <= row if causal else np.ones((blocks, blocks), dtype=bool)
        window = row - column < self.window_blocks if causal else abs(row - column) <= self.window_blocks // 2
        table = (window | (row < self.global_blocks) | (column < self.global_blocks)) & visible
        for index in range(self.global_blocks, blocks):
            others = np.flatnonzero(visible[index] & ~table[index])
            table[index, np.random.default_rng((self.seed, index)).permutation(others)[: self.random_blocks]] = True
        return table

    def rule(self, batch: AttentionBatch) -> Rule:
        import torch

        block = self.block
        table = torch.from_numpy(self.block_table(batch.length, batch.causal)).to(batch.device)
        return lambda b, q, k: table[q // block, k // block]

    def count_pairs(self, length: int, causal: bool) -> int:
        import numpy as np

        table = self.block_table(length, causal)
        sizes = np.full(len(table), self.block, dtype=np.int64)
        sizes[-1] = length - self.block * (len(table) - 1)
        pairs = int(sizes @ table @ sizes)
        # every block sees itself; a causal one only the lower triangle of itself
        return pairs - int((sizes * (sizes - 1) // 2).sum()) if causal else pairs
