"""Patterns around the diagonal: window, Longformer (Beltagy et al. 2020), dilated window."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from loras_bench.attention.pattern import IntervalPart, PatternBase
from loras_bench.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from loras_bench.attention.binding import AttentionBatch
    from loras_bench.attention.pattern import Bounds, Rule


class Banded(PatternBase):
    """A pattern with a band around the diagonal: `window` for causal models, `half_width` for bidirectional ones."""

    window: int | None = Field(default=None, ge=1)
    """Causal models: keys of a query, the query itself included."""
    half_width: int | None = Field(default=None, ge=0)
    """Bidirectional models: keys on each side of a query."""

    @model_validator(mode="after")
    def _one_width(self) -> Banded:
        if (self.window is None) == (self.half_width is None):
            raise ValueError("give either `window` (causal models) or `half_width` (bidirectional models)")
        return self

    def check(self, causal: bool) -> None:
        """Refuse `half_width` for a causal model and `window` for a bidirectional one."""
        if causal and self.window is None:
            raise ConfigError(
                f"{self.kind}: `half_width` is for bidirectional models, and this model is causal",
                f"write `window: {(self.half_width or 0) + 1}` (keys, the query itself included)",
            )
        if not causal and self.half_width is None:
            raise ConfigError(
                f"{self.kind}: `window` is for causal models, and this model is bidirectional",
                f"write `half_width: {((self.window or 1) - 1) // 2}` (keys on each side)",
            )

    @property
    def reach(self) -> tuple[int, int]:
        """Steps to the left and to the right of a query."""
        return (self.window - 1, 0) if self.window is not None else (self.half_width or 0, self.half_width or 0)


class Window(Banded):
    """Sliding window (0 <= q - k < window, or |q - k| <= half_width) plus a prefix of global tokens.

    In a bidirectional model the prefix is symmetric: its queries see every key ([CLS] is `global_tokens: 1`).
    """

    kind: Literal["window"] = "window"
    global_tokens: int = Field(default=0, ge=0)
    """The first so many positions are global."""

    def rule(self, batch: AttentionBatch) -> Rule:
        (left, right), prefix = self.reach, self.global_tokens
        if batch.causal:  # a query of the prefix sees all its keys anyway: they lie in the prefix too
            return lambda b, q, k: (q - k <= left) | (k < prefix)
        return lambda b, q, k: ((q - k <= left) & (k - q <= right)) | (k < prefix) | (q < prefix)

    def interval_parts(self, causal: bool) -> tuple[IntervalPart, ...]:
        return (band_part(self.reach, causal, self.global_tokens),)

    def count_pairs(self, length: int, causal: bool) -> int:
        return _count_band_and_globals(length, causal, self.reach, range(min(self.global_tokens, length)))


class Longformer(Banded):
    """Sliding window plus global tokens anywhere: a global query sees every key, and every query sees a global key.

    Global tokens are the union of the prefix, the listed positions, the positions of the listed token ids, and the
    positions that `global_mask` marks in the batch. `count_pairs` knows the first two only: the others need a batch.
    """

    kind: Literal["longformer"] = "longformer"
    global_tokens: int = Field(default=0, ge=0)
    """The first so many positions are global."""
    global_positions: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """These positions are global in every sample."""
    global_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """These token ids are global wherever they stand in a sample (ids of the model's tokenizer)."""

    def reads_samples(self, batch: AttentionBatch) -> bool:
        return batch.global_bs is not None or (bool(self.global_token_ids) and batch.input_ids_bs is not None)

    def sample_globals_bs(self, batch: AttentionBatch) -> Tensor | None:
        """Compares with one id at a time: a list copied to the GPU could not be captured in a CUDA graph."""
        found = [] if batch.global_bs is None else [batch.global_bs]
        if batch.input_ids_bs is not None:
            found += [batch.input_ids_bs == token_id for token_id in self.global_token_ids]
        return reduce(or_, found) if found else None

    def rule(self, batch: AttentionBatch) -> Rule:
        import torch

        left, right = self.reach
        position = torch.arange(batch.length, device=batch.device)
        is_global = position < self.global_tokens
        for listed in self.global_positions:
            is_global = is_global | (position == listed)
        return lambda b, q, k: ((q - k <= left) & (k - q <= right)) | is_global[q] | is_global[k]

    def count_pairs(self, length: int, causal: bool) -> int:
        positions = {*range(min(self.global_tokens, length)), *(p for p in self.global_positions if p < length)}
        return _count_band_and_globals(length, causal, self.reach, sorted(positions))


class Dilated(Banded):
    """Every `dilation`-th key of a window: |q - k| <= half_width * dilation and (q - k) mod dilation = 0."""

    kind: Literal["dilated"] = "dilated"
    dilation: int = Field(ge=1)
    """Distance between two keys of a query."""

    def rule(self, batch: AttentionBatch) -> Rule:
        (left, right), step = self.reach, self.dilation
        return lambda b, q, k: (q - k <= left * step) & (k - q <= right * step) & ((q - k) % step == 0)

    def interval_parts(self, causal: bool) -> tuple[IntervalPart, ...]:
        return (band_part(self.reach, causal, step=self.dilation),)

    def count_pairs(self, length: int, causal: bool) -> int:
        import numpy as np

        q = np.arange(length)
        left, right = self.reach
        rows = 1 + np.minimum(left, q // self.dilation) + np.minimum(right, (length - 1 - q) // self.dilation)
        return int(rows.sum())


def band_part(reach: tuple[int, int], causal: bool, prefix: int = 0, step: int = 1) -> IntervalPart:
    """A band around the diagonal with a global prefix (symmetric in bidirectional models)."""
    (left, right) = reach

    def band(p: Tensor, n: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
        return (p - before).clamp(min=0), (p + after + 1).minimum(n)

    def keys(p: Tensor, n: Tensor) -> Bounds:
        first, end = band(p, n, left, 0 if causal else right)
        if not causal:  # a query of the prefix sees everything
            first, end = first.where(p >= prefix, 0), end.where(p >= prefix, n)
        return 0, first.clamp(max=prefix) if prefix else 0, first, end

    def queries(p: Tensor, n: Tensor) -> Bounds:
        if not causal:
            return keys(p, n)  # the pattern is symmetric
        first, end = band(p, n, 0, left)
        return 0, 0, first, end.where(p >= prefix, n)

    return IntervalPart(keys, queries, step)


def _count_band_and_globals(length: int, causal: bool, reach: tuple[int, int], positions: range | list[int]) -> int:
    """Pairs of a band with symmetric global tokens: band + visible globals - globals inside the band, row by row."""
    import numpy as np

    q = np.arange(length)
    first = np.maximum(q - reach[0], 0)
    last = q if causal else np.minimum(q + reach[1], length - 1)
    is_global = np.zeros(length, dtype=bool)
    is_global[list(positions)] = True
    before = np.concatenate([[0], np.cumsum(is_global)])  # globals left of each position
    visible = before[q + 1] if causal else before[length]
    rows = last - first + 1 + visible - (before[last + 1] - before[first])
    return int(np.where(is_global, q + 1 if causal else length, rows).sum())
