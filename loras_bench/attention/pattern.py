"""What a pattern is, and the pattern without sparsity. The patterns are listed in patterns.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from loras_bench.attention.binding import AttentionBatch

    Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


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

    @abstractmethod
    def rule(self, batch: AttentionBatch) -> Rule:
        """Build allows(b, q, k) -> bool tensor, without the causal condition; captures ints and device tensors only."""

    @abstractmethod
    def count_pairs(self, length: int, causal: bool) -> int:
        """Exact number of allowed pairs of one head and one sequence of `length` tokens, nothing padded."""


class Dense(PatternBase):
    """Every pair; every pair with k <= q for a causal model."""

    kind: Literal["dense"] = "dense"

    def rule(self, batch: AttentionBatch) -> Rule:
        return lambda b, q, k: k >= 0

    def count_pairs(self, length: int, causal: bool) -> int:
        return length * (length + 1) // 2 if causal else length * length
