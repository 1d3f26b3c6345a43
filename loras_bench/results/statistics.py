"""Means, 95 % Student-t intervals, and comparisons paired by seed within blocks.

With 3 to 5 seeds a percentile bootstrap under-covers; the t-interval is exact for normal errors. Arms share the data
order of a seed and, within a block, the GPU and its temperature, so differences are taken pair by pair and these
differences get the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loras_bench.results.record import Record

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and its interval; `low` and `high` are None when n = 1, which tells nothing about noise."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval; None without an interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def excludes(self, value: float) -> bool | None:
        """Whether the interval leaves the value out; None without an interval."""
        return None if self.low is None or self.high is None else not self.low <= value <= self.high


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and Student-t interval: mean +- t(n - 1) s / sqrt(n), with s of n - 1 degrees of freedom.

    Args:
        values: At least one number, one per seed.
        level: Coverage of the interval.
    """
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(n, mean)
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


def paired_difference(pairs: Sequence[tuple[float, float]], level: float = LEVEL) -> Interval:
    """The mean of `value - baseline` over the pairs, with its interval."""
    return t_interval([value - baseline for value, baseline in pairs], level)


def paired_ratio(pairs: Sequence[tuple[float, float]], level: float = LEVEL) -> Interval:
    """The geometric mean of `value / baseline` over the pairs; the interval is taken on the logarithms.

    Args:
        pairs: Positive numbers (value, baseline), one pair per seed.
        level: Coverage of the interval.
    """
    logs = t_interval([math.log(value / baseline) for value, baseline in pairs], level)
    if logs.low is None or logs.high is None:
        return Interval(logs.n, math.exp(logs.mean))
    return Interval(logs.n, math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))


def seed_pairs(
    runs: Sequence[Record],
    baseline_runs: Sequence[Record],
    read: Callable[[Record], float | None],
    within_blocks: bool,
) -> list[tuple[float, float]]:
    """The values of two arms, paired by seed.

    Args:
        runs: Runs of an arm, one per seed.
        baseline_runs: Runs of the arm to compare with.
        read: Takes the value from a record; None drops the pair.
        within_blocks: Also ask that both runs belong to one block. Joules, seconds and watts depend on the card and its
            temperature; perplexity and FLOPs do not.
    """
    by_seed = {run.seed: run for run in baseline_runs}
    pairs = []
    for run in runs:
        other = by_seed.get(run.seed)
        if other is None or (within_blocks and not _same_block(run, other)):
            continue
        value, baseline = read(run), read(other)
        if value is not None and baseline is not None:
            pairs.append((value, baseline))
    return pairs


def _same_block(run: Record, other: Record) -> bool:
    return run.block is not None and other.block is not None and run.block.id == other.block.id
