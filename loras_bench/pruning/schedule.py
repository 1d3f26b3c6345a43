"""How sparsity rises in training: the cubic schedule of Zhu and Gupta (2017, arXiv 1710.01878, equation 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CubicSchedule:
    """From 0 to the target, fast at first, when many weights are redundant, and then ever slower.

    Args:
        target: Share of zeros at the end.
        first: Steps taken when it begins to rise.
        last: Steps taken when it has reached the target; with `first` the same, all is pruned there.
        every: Steps between two changes of the masks.
    """

    target: float
    first: int
    last: int
    every: int

    @classmethod
    def over(cls, steps: int, target: float, start: float, end: float, every: int) -> CubicSchedule:
        """From shares of the steps: the start is rounded down to whole steps, the end up."""
        return cls(target, math.floor(round(start * steps, 6)), math.ceil(round(end * steps, 6)), every)

    def sparsity(self, taken: int) -> float:
        """The share of zeros after so many steps."""
        if taken >= self.last:
            return self.target
        if taken <= self.first:
            return 0.0
        return self.target * (1 - (1 - (taken - self.first) / (self.last - self.first)) ** 3)

    def changes(self, taken: int) -> bool:
        """Whether masks change after so many steps."""
        return taken == self.last or (self.first < taken < self.last and (taken - self.first) % self.every == 0)
