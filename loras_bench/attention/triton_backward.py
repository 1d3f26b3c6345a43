"""The backward pass of sparse attention as two Triton kernels; names: triton_tiles.py.

One makes the gradient of the queries, the other those of keys and values; each program owns one tile of its side and
visits those of the other, as in triton_forward.py. Both recompute the weights from the log-sum-exp, 7 products instead
of 5, so that no sum depends on the order in which programs finish: results are the same to the bit in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loras_bench.attention.triton_tiles import (
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
def _query_gradient_tile(
    q, do, k_ptr, v_ptr, order_ptr, masks_ptr, lse2, delta, acc, tile, key_tile, first_b, last_b, first_a, last_a,
    k_s, v_s, d, length, scale2,
    D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
    LISTED: tl.constexpr, HAS_PREFIX: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dq / scale."""
    columns = key_tile * N + tl.arange(0, N)
    inside = columns < length
    token = load_tokens(order_ptr, columns, inside, ORDERED)
    k = load_rows(k_ptr, token, k_s, d, inside, D, D_PAD, EVEN or not MASKED)
    v = load_rows(v_ptr, token, v_s, d, inside, D, D_PAD, EVEN or not MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    p = tl.exp2(s * scale2 - lse2[:, None])
    if MASKED:
        if LISTED:
            allowed = load_bits(masks_ptr, tile, key_tile, (length + N - 1) // N, M, N)
        else:
            allowed = within(first_b, last_b, first_a, last_a, columns, HAS_PREFIX)
        p = tl.where(allowed, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    items_ptr, tiles_ptr, counts_ptr, masks_ptr, order_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    tiles_b, counts_b, masks_b, order_b, slots, length, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LISTED: tl.constexpr, HAS_PREFIX: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr,
    CONTINUE: tl.constexpr, HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq of one tile of queries, and delta = sum(out * dout) - dlse, which the next kernel reads."""
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
    do = load_rows(do_ptr + sample * do_b + head * do_h, token, do_s, d, real, D, D_PAD, EVEN)
    out = load_rows(out_ptr + sample * o_b + head * o_h, token, o_s, d, real, D, D_PAD, EVEN)
    at = (sample * heads + head) * length + token
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=real, other=0.0)
    if not CONTINUE:
        tl.store(delta_ptr + at, delta, mask=real)
    lse = tl.load(lse_ptr + at, mask=real, other=float("-inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)  # rows without a key: every weight is 0
    k_ptr += sample * k_b + (head // GROUP) * k_h
    v_ptr += sample * v_b + (head // GROUP) * v_h
    scale2 = scale * LOG2E
    acc = tl.zeros([M, D_PAD], tl.float32)
    for t in range(masked):
        key_tile = masked_tile(tiles_ptr, tile * slots, t, low, run, other_low, full_low, full_end, LISTED)
        acc = _query_gradient_tile(
            q, do, k_ptr, v_ptr, order_ptr, masks_ptr, lse2, delta, acc, tile, key_tile,
            first_b, last_b, first_a, last_a, k_s, v_s, d, length, scale2,
            D, D_PAD, M, N, True, LISTED, HAS_PREFIX, ORDERED, EVEN, PRECISION,
        )  # fmt: skip
    for t in range(full):
        key_tile = full_tile(tiles_ptr, tile * slots, t, masked, full_low, LISTED)
        acc = _query_gradient_tile(
            q, do, k_ptr, v_ptr, order_ptr, masks_ptr, lse2, delta, acc, tile, key_tile,
            first_b, last_b, first_a, last_a, k_s, v_s, d, length, scale2,
            D, D_PAD, M, N, False, LISTED, HAS_PREFIX, ORDERED, EVEN, PRECISION,
        )  # fmt: skip
    acc *= scale
    dq_at = dq_ptr + sample * dq_b + head * dq_h + token[:, None] * dq_s + d[None, :]
    stored = real[:, None] & (d < D)[None, :]
    if CONTINUE:
        acc += tl.load(dq_at, mask=stored, other=0.0).to(tl.float32)
    tl.store(dq_at, acc.to(dq_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _key_gradient_tile(
    k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, order_ptr, masks_ptr, dk, dv, tile, query_tile,
    first_b, last_b, first_a, last_a, q_s, do_s, d, length, scale2,
    D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
    LISTED: tl.constexpr, HAS_PREFIX: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dk / scale and dv."""
    columns = query_tile * M + tl.arange(0, M)
    inside = columns < length
    token = load_tokens(order_ptr, columns, inside, ORDERED)
    q = load_rows(q_ptr, token, q_s, d, inside, D, D_PAD, EVEN or not MASKED)
    do = load_rows(do_ptr, token, do_s, d, inside, D, D_PAD, EVEN or not MASKED)
    if EVEN or not MASKED:
        lse2 = tl.load(lse_ptr + token) * LOG2E
        delta = tl.load(delta_ptr + token)
    else:
        lse2 = tl.load(lse_ptr + token, mask=inside, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + token, mask=inside, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # keys x queries
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p = tl.exp2(s * scale2 - lse2[None, :])
    if MASKED:  # the row of a query that sees nothing is never full: its weights become 0 here
        if LISTED:
            allowed = tl.trans(load_bits(masks_ptr, query_tile, tile, (length + N - 1) // N, M, N))
        else:
            allowed = within(first_b, last_b, first_a, last_a, columns, HAS_PREFIX)
        p = tl.where(allowed, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, work_ptr, arrived_ptr,
    items_ptr, tiles_ptr, counts_ptr, masks_ptr, order_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    tiles_b, counts_b, masks_b, order_b, slots, length, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LISTED: tl.constexpr, HAS_PREFIX: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr,
    CONTINUE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dk and dv of one tile of keys, summed over the query heads of its group.

    A tile that nearly all queries see (global tokens) is split over several programs: the last one to arrive adds
    their float32 parts, always in the same order.
    """
    item = items_ptr + tl.program_id(0) * 6
    tile, first, stop = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    key_head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_ptr += sample * tiles_b
    masks_ptr += sample * masks_b
    order_ptr += sample * order_b
    masked, full, low, run, other_low, full_low, full_end = load_runs(
        tiles_ptr, counts_ptr + sample * counts_b, tile, LISTED
    )
    stop = tl.where(stop < 0, (masked + full) * GROUP, stop)
    d = tl.arange(0, D_PAD)
    rows = tile * N + tl.arange(0, N)
    real = rows < length
    token = load_tokens(order_ptr, rows, real, ORDERED)
    first_b, last_b, first_a, last_a = load_bounds(masks_ptr, rows, length, real, HAS_PREFIX, LISTED)
    k = load_rows(k_ptr + sample * k_b + key_head * k_h, token, k_s, d, real, D, D_PAD, EVEN)
    v = load_rows(v_ptr + sample * v_b + key_head * v_h, token, v_s, d, real, D, D_PAD, EVEN)
    q_ptr += sample * q_b + key_head * GROUP * q_h
    do_ptr += sample * do_b + key_head * GROUP * do_h
    line = (sample * heads + key_head * GROUP) * length
    scale2 = scale * LOG2E
    dk = tl.zeros([N, D_PAD], tl.float32)
    dv = tl.zeros([N, D_PAD], tl.float32)
    border = masked * GROUP  # visits that need a mask come first
    for t in range(tl.minimum(first, border), tl.minimum(stop, border)):
        member = t // masked
        at = t - member * masked
        query_tile = masked_tile(tiles_ptr, tile * slots, at, low, run, other_low, full_low, full_end, LISTED)
        dk, dv = _key_gradient_tile(
            k, v, q_ptr + member * q_h, do_ptr + member * do_h, lse_ptr + line + member * length,
            delta_ptr + line + member * length, order_ptr, masks_ptr, dk, dv, tile, query_tile,
            first_b, last_b, first_a, last_a, q_s, do_s, d, length, scale2,
            D, D_PAD, M, N, True, LISTED, HAS_PREFIX, ORDERED, EVEN, PRECISION,
        )  # fmt: skip
    for t in range(tl.maximum(first, border) - border, tl.maximum(stop, border) - border):
        member = t // full
        query_tile = full_tile(tiles_ptr, tile * slots, t - member * full, masked, full_low, LISTED)
        dk, dv = _key_gradient_tile(
            k, v, q_ptr + member * q_h, do_ptr + member * do_h, lse_ptr + line + member * length,
            delta_ptr + line + member * length, order_ptr, masks_ptr, dk, dv, tile, query_tile,
            first_b, last_b, first_a, last_a, q_s, do_s, d, length, scale2,
            D, D_PAD, M, N, False, LISTED, HAS_PREFIX, ORDERED, EVEN, PRECISION,
        )  # fmt: skip
    dk *= scale
    ours = masked >= 0  # a tensor that is true: one that is split asks who arrived last
    if SPLIT:
        parts, base, index = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
        if parts > 1:
            lane = tl.arange(0, N)[:, None] * D_PAD + d[None, :]
            plane = (sample * tl.num_programs(1) + key_head) * 2
            planes = tl.num_programs(1) * tl.num_programs(2) * 2
            mine = work_ptr + ((base + index).to(tl.int64) * planes + plane) * (N * D_PAD) + lane
            tl.store(mine, dk)
            tl.store(mine + N * D_PAD, dv)
            tl.debug_barrier()
            counter = arrived_ptr + (sample * tl.num_programs(1) + key_head) * tl.num_programs(0) + base
            ours = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
            if ours:
                dk = tl.zeros([N, D_PAD], tl.float32)
                dv = tl.zeros([N, D_PAD], tl.float32)
                for part in range(parts):
                    other = work_ptr + ((base + part).to(tl.int64) * planes + plane) * (N * D_PAD) + lane
                    dk += tl.load(other, cache_modifier=".cg")
                    dv += tl.load(other + N * D_PAD, cache_modifier=".cg")
    if ours:
        stored = real[:, None] & (d < D)[None, :]
        dk_at = dk_ptr + sample * dk_b + key_head * dk_h + token[:, None] * dk_s + d[None, :]
        dv_at = dv_ptr + sample * dv_b + key_head * dv_h + token[:, None] * dv_s + d[None, :]
        if CONTINUE:
            dk += tl.load(dk_at, mask=stored, other=0.0).to(tl.float32)
            dv += tl.load(dv_at, mask=stored, other=0.0).to(tl.float32)
        tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=stored)
        tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=stored)
