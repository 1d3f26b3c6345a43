"""What a pattern is, and the pattern without sparsity. The patterns are listed in patterns.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from loras_bench.attention.binding import AttentionBatch

    Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
    Bounds = tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]


@dataclass(frozen=True)
class IntervalPart:
    """A part of a pattern in which the keys of a query are at most two intervals, and so are the queries of a key.

    With `step` > 1 it holds in each residue class of the positions modulo `step`: the positions p of a class count
    0, 1, 2, ..., and a class is a sequence of its own. Both functions map (p, n), the position and the length of its
    sequence, to (first, end, first, end) of two disjoint intervals in ascending order, ends exclusive; an interval
    whose end is not beyond its first position is empty.
    """

    keys: Callable[[Tensor, Tensor], Bounds]
    """Keys of the query at p."""
    queries: Callable[[Tensor, Tensor], Bounds]
    """Queries of the key at p."""
    step: int = 1


class PatternBase(BaseModel, ABC):
    """What all patterns share. Frozen, so that a pattern is a key of the caches of bound patterns."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: str

    def check(self, causal: bool) -> None:
        """Refuse what this pattern cannot do for a causal (or bidirectional) model.

        Raises:
            ConfigError: Naming the field at fault and what to write instead.
        """

    def reads_samples(self, batch: AttentionBatch) -> bool:
        """Whether the rule depends on the samples of this batch, beyond padding and documents."""
        return False

    def sample_globals_bs(self, batch: AttentionBatch) -> Tensor | None:
        """Tokens of this batch that see every token and are seen by every token, besides what the rule says."""
        return None

    @abstractmethod
    def rule(self, batch: AttentionBatch) -> Rule:
        """Build allows(b, q, k) -> bool tensor, without the causal condition; captures ints and device tensors only.

        Positions count from the start of the document.
        """

    @abstractmethod
    def count_pairs(self, length: int, causal: bool) -> int:
        """Exact number of allowed pairs of one head and one sequence of `length` tokens, nothing padded."""

    def interval_parts(self, causal: bool) -> tuple[IntervalPart, ...] | None:
        """The pattern as disjoint interval parts, causality included; None where its masks are irregular."""
        return None


class Dense(PatternBase):
    """Every pair; every pair with k <= q for a causal model."""

    kind: Literal["dense"] = "dense"

    def rule(self, batch: AttentionBatch) -> Rule:
        return lambda b, q, k: k >= 0

    def interval_parts(self, causal: bool) -> tuple[IntervalPart, ...]:
        if causal:
            return (IntervalPart(lambda p, n: (0, 0, 0, p + 1), lambda p, n: (0, 0, p, n)),)
        return (IntervalPart(lambda p, n: (0, 0, 0, n), lambda p, n: (0, 0, 0, n)),)

    def count_pairs(self, length: int, causal: bool) -> int:
        return length * (length + 1) // 2 if causal else length * length
