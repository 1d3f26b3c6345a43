"""The forward pass of sparse attention as a Triton kernel; names: triton_tiles.py.

Each program owns one tile of queries and visits the tiles of keys that a schedule names (schedule.py): nothing else is
read. A tile in which every pair is allowed takes a path without a mask. Online softmax after Dao et al. 2022
(FlashAttention) and Dao 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loras_bench.attention.triton_tiles import (
    LN2,
    LOG2E,
    full_tile,
    load_bits,
    load_bounds,
    load_rows,
    load_runs,
    load_tokens,
    masked_tile,
    within,
)


@triton.jit
def _forward_tile(
    q, k_ptr, v_ptr, order_ptr, masks_ptr, peak, total, acc, tile, key_tile, first_b, last_b, first_a, last_a,
    k_s, v_s, d, length, scale2,
    D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
    LISTED: tl.constexpr, HAS_PREFIX: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys."""
    columns = key_tile * N + tl.arange(0, N)
    inside = columns < length
    token = load_tokens(order_ptr, columns, inside, ORDERED)
    k = load_rows(k_ptr, token, k_s, d, inside, D, D_PAD, EVEN or not MASKED)
    v = load_rows(v_ptr, token, v_s, d, inside, D, D_PAD, EVEN or not MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        if LISTED:
            allowed = load_bits(masks_ptr, tile, key_tile, (length + N - 1) // N, M, N)
        else:
            allowed = within(first_b, last_b, first_a, last_a, columns, HAS_PREFIX)
        s = tl.where(allowed, s, float("-inf"))
    fresh = tl.maximum(peak, tl.max(s, 1) * scale2)
    shift = fresh
    if MASKED:
        shift = tl.where(fresh == float("-inf"), 0.0, fresh)
    p = tl.exp2(s * scale2 - shift[:, None])
    shrink = tl.exp2(peak - shift)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return fresh, total, acc


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, items_ptr, tiles_ptr, counts_ptr, masks_ptr, order_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, tiles_b, counts_b, masks_b, order_b,
    slots, length, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LISTED: tl.constexpr, HAS_PREFIX: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr,
    CONTINUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and log-sum-exp of one tile of queries; with CONTINUE, merged with those of the parts before."""
    tile = tl.load(items_ptr + tl.program_id(0) * 6)
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_ptr += sample * tiles_b
    masks_ptr += sample * masks_b
    order_ptr += sample * order_b
    masked, full, low, run, other_low, full_low, full_end = load_runs(
        tiles_ptr, counts_ptr + sample * counts_b, tile, LISTED
    )
    d = tl.arange(0, D_PAD)
    rows = tile * M + tl.arange(0, M)
    real = rows < length
    token = load_tokens(order_ptr, rows, real, ORDERED)
    first_b, last_b, first_a, last_a = load_bounds(masks_ptr, rows, length, real, HAS_PREFIX, LISTED)
    q = load_rows(q_ptr + sample * q_b + head * q_h, token, q_s, d, real, D, D_PAD, EVEN)
    k_ptr += sample * k_b + (head // GROUP) * k_h
    v_ptr += sample * v_b + (head // GROUP) * v_h
    lse_at = lse_ptr + (sample * heads + head) * length + token
    out_at = out_ptr + sample * o_b + head * o_h + token[:, None] * o_s + d[None, :]
    stored = real[:, None] & (d < D)[None, :]
    scale2 = scale * LOG2E
    if CONTINUE:
        peak = tl.load(lse_at, mask=real, other=float("-inf")) * LOG2E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
        acc = tl.load(out_at, mask=stored, other=0.0).to(tl.float32)
    else:
        peak = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D_PAD], tl.float32)
    for t in range(masked):
        key_tile = masked_tile(tiles_ptr, tile * slots, t, low, run, other_low, full_low, full_end, LISTED)
        peak, total, acc = _forward_tile(
            q, k_ptr, v_ptr, order_ptr, masks_ptr, peak, total, acc, tile, key_tile, first_b, last_b, first_a, last_a,
            k_s, v_s, d, length, scale2, D, D_PAD, M, N, True, LISTED, HAS_PREFIX, ORDERED, EVEN, PRECISION,
        )  # fmt: skip
    for t in range(full):
        key_tile = full_tile(tiles_ptr, tile * slots, t, masked, full_low, LISTED)
        peak, total, acc = _forward_tile(
            q, k_ptr, v_ptr, order_ptr, masks_ptr, peak, total, acc, tile, key_tile, first_b, last_b, first_a, last_a,
            k_s, v_s, d, length, scale2, D, D_PAD, M, N, False, LISTED, HAS_PREFIX, ORDERED, EVEN, PRECISION,
        )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(lse_at, tl.where(empty, float("-inf"), peak * LN2 + tl.log(total)), mask=real)
