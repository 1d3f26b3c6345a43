"""What the Triton kernels of attention share: how they read rows, schedules (schedule.py) and masks.

Names, also in the kernels: M tile of queries, N tile of keys, D head dim (padded to a power of two), GROUP query heads
of one key head. `*_b`, `*_h`, `*_s` are strides of samples, heads and positions; positions of a schedule may be a
permutation of the tokens (ORDERED), which is how residue classes become sequences. LISTED: the schedule lists tiles,
with bits for masks; else each row has one interval of columns, with HAS_PREFIX two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tokens(order_ptr, position, real, ORDERED: tl.constexpr):
    """The tokens at some positions of the schedule."""
    if ORDERED:
        return tl.load(order_ptr + position, mask=real, other=0)
    else:
        return position


@triton.jit
def load_rows(ptr, token, stride, d, real, D: tl.constexpr, D_PAD: tl.constexpr, EVEN: tl.constexpr):
    """Rows of a (positions, D) matrix, 0 beyond its ends."""
    address = ptr + token[:, None] * stride + d[None, :]
    if EVEN and D == D_PAD:
        return tl.load(address)
    else:
        return tl.load(address, mask=real[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_runs(tiles_ptr, counts_ptr, tile, LISTED: tl.constexpr):
    """What a tile visits: tiles that need a mask and full ones, as numbers and, for interval patterns, as runs."""
    masked = tl.load(counts_ptr + tile * 2)
    full = tl.load(counts_ptr + tile * 2 + 1)
    if LISTED:
        return masked, full, masked, masked, masked, masked, masked
    else:
        at = tiles_ptr + tile * 5
        low, run, other_low = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        return masked, full, low, run, other_low, tl.load(at + 3), tl.load(at + 4)


@triton.jit
def masked_tile(tiles_ptr, at, t, low, run, other_low, full_low, full_end, LISTED: tl.constexpr):
    """The t-th tile that needs a mask: those of the first run, then those before and after the full ones."""
    if LISTED:
        return tl.load(tiles_ptr + at + t)
    else:
        other = other_low + t - run
        other = tl.where(other < full_low, other, other + full_end - full_low)
        return tl.where(t < run, low + t, other)


@triton.jit
def full_tile(tiles_ptr, at, t, masked, full_low, LISTED: tl.constexpr):
    """The t-th full tile."""
    if LISTED:
        return tl.load(tiles_ptr + at + masked + t)
    else:
        return full_low + t


@triton.jit
def load_bounds(bounds_ptr, rows, length, real, HAS_PREFIX: tl.constexpr, LISTED: tl.constexpr):
    """The two intervals of each row; zeros where there are none."""
    if LISTED:
        return rows, rows, rows, rows
    else:
        first = tl.load(bounds_ptr + 2 * length + rows, mask=real, other=0)
        end = tl.load(bounds_ptr + 3 * length + rows, mask=real, other=0)
        if HAS_PREFIX:
            other_first = tl.load(bounds_ptr + rows, mask=real, other=0)
            other_end = tl.load(bounds_ptr + length + rows, mask=real, other=0)
            return first, end, other_first, other_end
        else:
            return first, end, first, end


@triton.jit
def within(first, end, other_first, other_end, columns, HAS_PREFIX: tl.constexpr):
    """Which columns lie in the intervals of which rows: (rows, columns)."""
    allowed = (columns[None, :] >= first[:, None]) & (columns[None, :] < end[:, None])
    if HAS_PREFIX:
        allowed |= (columns[None, :] >= other_first[:, None]) & (columns[None, :] < other_end[:, None])
    return allowed


@triton.jit
def load_bits(bits_ptr, query_tile, key_tile, tiles, M: tl.constexpr, N: tl.constexpr):
    """The packed mask of one 64 x 64 tile: (queries, keys)."""
    words = tl.load(bits_ptr + (query_tile * tiles + key_tile).to(tl.int64) * M + tl.arange(0, M))
    return ((words[:, None] >> tl.arange(0, N)[None, :]) & 1) != 0
