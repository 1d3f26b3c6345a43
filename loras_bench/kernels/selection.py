"""The places of the highest scores in ascending order, in one launch of one program for each list of scores.

A sort would order far more than is asked for. Here the lowest score that stays is found by bisection: float32 numbers
are read as integers of the same order, and each step counts in registers how many lie at or above the middle. It ends
as soon as the count is right, or at a single number; of its copies the first ones stay. A cumulative sum of what stays
tells each where it goes; the few that stay are then looked up in a table of what belongs to them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
"""int32; no number is as low, and NaN alone as high."""
LOOKED_UP = tl.constexpr(512)
"""Places at once whose numbers are read from the tables."""


@torch.library.custom_op("loras_bench::select", mutates_args=())
def select(scores: list[Tensor], counts: list[int], tables: list[Tensor]) -> Tensor:
    """Of each list of scores `table[:, places of the highest scores in ascending order]`, one after the other, flat.

    Args:
        scores: One or two lists, float32 and contiguous. NaN is higher than all else. The program of the one runs
            beside the other's.
        counts: How many to take of each, at least 1; of equal scores those that come first.
        tables: int64 and contiguous, (b, n) for n scores: b numbers for each of them.
    """
    sizes = [len(table_bn) * count for table_bn, count in zip(tables, counts, strict=True)]
    chosen = tables[0].new_empty(sum(sizes))
    bits = [max(8, (len(one) - 1).bit_length()) for one in (scores[0], scores[-1])]
    _select[(len(scores),)](
        scores[0], tables[0], chosen, len(scores[0]), counts[0], len(tables[0]),
        scores[-1], tables[-1], chosen[-sizes[-1] :], len(scores[-1]), counts[-1], len(tables[-1]),
        first_bits=bits[0], last_bits=bits[1], both=len(scores) == 2,
        num_warps=max(4, min(32, 2 ** max(bits) // 512)), num_stages=1,
    )  # fmt: skip
    return chosen


@select.register_fake
def _(scores: list[Tensor], counts: list[int], tables: list[Tensor]) -> Tensor:
    return tables[0].new_empty(sum(len(table_bn) * count for table_bn, count in zip(tables, counts, strict=True)))


@triton.jit(do_not_specialize=["first_count", "first_rows", "last_count", "last_rows"])  # type: ignore[untyped-decorator]
def _select(
    first_scores: tl.tensor,
    first_table: tl.tensor,
    first_chosen: tl.tensor,
    first_size: tl.tensor,
    first_count: tl.tensor,
    first_rows: tl.tensor,
    last_scores: tl.tensor,
    last_table: tl.tensor,
    last_chosen: tl.tensor,
    last_size: tl.tensor,
    last_count: tl.tensor,
    last_rows: tl.tensor,
    first_bits: tl.constexpr,
    last_bits: tl.constexpr,
    both: tl.constexpr,
) -> None:
    if tl.program_id(0) == 0:
        _take(first_scores, first_table, first_chosen, first_size, first_count, first_rows, first_bits)
    elif both:
        _take(last_scores, last_table, last_chosen, last_size, last_count, last_rows, last_bits)


@triton.jit  # type: ignore[untyped-decorator]
def _take(
    scores: tl.tensor,
    table: tl.tensor,
    chosen: tl.tensor,
    size: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    bits: tl.constexpr,
) -> None:
    """Scores lie in a nearly square matrix of 2^bits places, one row after the other."""
    columns: tl.constexpr = 2 ** ((bits + 1) // 2)
    index = tl.arange(0, 2 ** (bits // 2))[:, None] * columns + tl.arange(0, columns)[None, :]
    key = tl.where(index < size, _ordered(tl.load(scores + index, mask=index < size, other=0.0)), LOWEST)
    stays = _highest(key, tl.where(index < size, key, HIGHEST), size, count)
    places = chosen + (rows - 1) * count  # where the last numbers will be, when these have been read
    tl.store(places + _counted(stays.to(tl.int32)) - 1, index.to(tl.int64), mask=stays)
    tl.debug_barrier()
    for first in range(0, count, LOOKED_UP):
        order = first + tl.arange(0, LOOKED_UP)
        place = tl.load(places + order, mask=order < count, other=0)
        tl.debug_barrier()  # several threads may read what one of them overwrites
        for row in range(rows):
            number = tl.load(table + row * size + place, mask=order < count, other=0)
            tl.store(chosen + row * count + order, number, mask=order < count)


@triton.jit  # type: ignore[untyped-decorator]
def _ordered(score: tl.tensor) -> tl.tensor:
    """int32 in the order of float32: both zeros are one number, and every NaN is the highest."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score == score, tl.where(bits < 0, bits ^ HIGHEST, bits), HIGHEST)


@triton.jit  # type: ignore[untyped-decorator]
def _highest(key: tl.tensor, key_or_highest: tl.tensor, size: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Which of `size` keys are the `count` highest; those at or above `low` are enough, those at `high` too few."""
    low = tl.min(key_or_highest).to(tl.int64)
    high = tl.max(key).to(tl.int64) + 1
    found = tl.full((), size, tl.int32)  # a size of 1 comes as a constant
    while (found > count) & (high - low > 1):
        middle = low + (high - low) // 2
        above = tl.sum((key >= middle.to(tl.int32)).to(tl.int32))
        enough = above >= count
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        found = tl.where(enough, above, found)
    stays = key >= low.to(tl.int32)
    if found > count:  # then all that are too many equal `low`
        equal = (key == low.to(tl.int32)).to(tl.int32)
        stays = stays & ((equal == 0) | (_counted(equal) <= tl.sum(equal) - (found - count)))
    return stays


@triton.jit  # type: ignore[untyped-decorator]
def _counted(ones: tl.tensor) -> tl.tensor:
    """The sum of a matrix of zeros and ones up to each place, row by row: of all rows before, and within the row.

    A running sum of all places in one line would have every thread read the sums of all warps.
    """
    of_row, row = tl.sum(ones, 1), tl.arange(0, ones.shape[0])
    before = tl.sum(tl.where(row[None, :] < row[:, None], of_row[None, :], 0), 1)
    return before[:, None] + tl.cumsum(ones, 1)
