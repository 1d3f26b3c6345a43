"""Scores of channels from low-rank estimates of projections, W ~ up @ down, in one launch: the criteria of SparseLoRA.

Khaki et al. 2025 (arXiv 2506.16500, section 3). Given z = x down^T of all tokens, a program first sums over the tokens
what its channels need, a few numbers, and then computes their scores in float32, without rounding in between. All
programs make the same sums: that costs less than a launch of its own, and needs no order among programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SMALLEST_DOT = 16
"""tl.dot takes no smaller dimension."""
CHANNELS = 128
"""Of a feed-forward layer, for one program."""
TOKENS = 256
"""Summed at once, at most."""
STAGE_BYTES = 32768
"""Of what is read for them at once: three such stages are under way in shared memory."""
SAMPLES = 32
"""Mean tokens of which a program holds the estimates at once, at most."""


@torch.library.custom_op("loras_bench::feed_forward_scores", mutates_args=())
def feed_forward_scores(z_tr: Tensor, mean_mt: Tensor, up_nr: Tensor) -> Tensor:
    """|| silu(gate) * up || of each hidden channel over the mean tokens of all samples: float32 (f,).

    Args:
        z_tr: Inputs times both down factors, (tokens, 2 r): gate's, then up's.
        mean_mt: What makes the mean token of each sample, (samples, tokens).
        up_nr: Both up factors, one below the other: (2 f, r).
    """
    width, rank = len(up_nr) // 2, up_nr.shape[1]
    scores_f = torch.empty(width, dtype=torch.float32, device=z_tr.device)
    samples = min(SAMPLES, _padded(len(mean_mt)))
    _feed_forward[(triton.cdiv(width, CHANNELS),)](
        z_tr, mean_mt, up_nr, scores_f, len(z_tr), len(mean_mt), width,
        rank=rank, padded=_padded(rank), channels=CHANNELS, samples=samples,
        tile=_tile((samples + 2 * _padded(rank)) * z_tr.element_size()),
    )  # fmt: skip
    return scores_f


@torch.library.custom_op("loras_bench::attention_scores", mutates_args=())
def attention_scores(
    z_tr: Tensor, real_t: Tensor | None, up_nr: Tensor, query_heads: int, key_heads: int
) -> tuple[Tensor, Tensor]:
    """|| q || || k || of each rotary pair and || v || of each value channel over the tokens: float32 (c / 2,), (c,).

    The norm of z u is the root of u^T (z^T z) u, so that no estimate of a token is made. See `query_key_scores` and
    `value_scores` in sparsity/criteria.py.

    Args:
        z_tr: Inputs times the three down factors, (tokens, 3 r): of q, k and v.
        real_t: bool, False for padding; None where every token is real.
        up_nr: The three up factors, one below the other.
        query_heads: How many heads the first has.
        key_heads: How many each of the others has.
    """
    rank, size = up_nr.shape[1], len(up_nr) // (query_heads + 2 * key_heads)
    scores_p = torch.empty(key_heads * size // 2, dtype=torch.float32, device=z_tr.device)
    scores_c = torch.empty(key_heads * size, dtype=torch.float32, device=z_tr.device)
    _attention[(key_heads, 2)](
        z_tr, z_tr if real_t is None else real_t, up_nr, scores_p, scores_c, len(z_tr),
        query_heads=query_heads, key_heads=key_heads, half=size // 2, channels=_padded(size // 2),
        rank=rank, padded=_padded(rank), tile=_tile(_padded(rank) * z_tr.element_size()), masked=real_t is not None,
    )  # fmt: skip
    return scores_p, scores_c


def _padded(size: int) -> int:
    """As `tl.dot` can take it."""
    return max(SMALLEST_DOT, int(triton.next_power_of_2(size)))


def _tile(token_bytes: int) -> int:
    """How many tokens to sum at once, a power of two."""
    return min(TOKENS, 1 << (STAGE_BYTES // token_bytes).bit_length() - 1)


@feed_forward_scores.register_fake
def _(z_tr: Tensor, mean_mt: Tensor, up_nr: Tensor) -> Tensor:
    return z_tr.new_empty(len(up_nr) // 2, dtype=torch.float32)


@attention_scores.register_fake
def _(z_tr: Tensor, real_t: Tensor | None, up_nr: Tensor, query_heads: int, key_heads: int) -> tuple[Tensor, Tensor]:
    channels = len(up_nr) // (query_heads + 2 * key_heads) * key_heads
    return z_tr.new_empty(channels // 2, dtype=torch.float32), z_tr.new_empty(channels, dtype=torch.float32)


@register_flop_formula(torch.ops.loras_bench.feed_forward_scores, get_raw=True)  # type: ignore[untyped-decorator]
def _feed_forward_flops(z_tr: Tensor, mean_mt: Tensor, up_nr: Tensor, **kwargs: Any) -> int:
    """The mean tokens, in every program; and their estimates."""
    programs = -(-len(up_nr) // 2 // CHANNELS)
    return 2 * len(mean_mt) * (programs * z_tr.numel() + up_nr.numel())


@register_flop_formula(torch.ops.loras_bench.attention_scores, get_raw=True)  # type: ignore[untyped-decorator]
def _attention_flops(
    z_tr: Tensor, real_t: Tensor | None, up_nr: Tensor, query_heads: int, key_heads: int, **kwargs: Any
) -> int:
    """The matrices z^T z of q, k and v, in every program that needs them; and their products with the up factors."""
    rank = up_nr.shape[1]
    return 2 * rank * (key_heads * z_tr.numel() + up_nr.numel())


@triton.jit(do_not_specialize=["mean_tokens"])  # type: ignore[untyped-decorator]
def _feed_forward(
    z: tl.tensor,
    mean: tl.tensor,
    up: tl.tensor,
    scores: tl.tensor,
    tokens: tl.tensor,
    mean_tokens: tl.tensor,
    width: tl.tensor,
    rank: tl.constexpr,
    padded: tl.constexpr,
    channels: tl.constexpr,
    tile: tl.constexpr,
    samples: tl.constexpr,
) -> None:
    """The scores of one block of channels."""
    channel, part = tl.program_id(0) * channels + tl.arange(0, channels), tl.arange(0, padded)
    factor = up + channel[None, :] * rank + part[:, None]
    inside = (part[:, None] < rank) & (channel[None, :] < width)
    gate_factor = tl.load(factor, mask=inside, other=0.0).to(tl.float32)
    up_factor = tl.load(factor + width * rank, mask=inside, other=0.0).to(tl.float32)
    squares = tl.zeros((channels,), dtype=tl.float32)
    for first in range(0, mean_tokens, samples):
        gate_mean, up_mean = _means(z, mean, first, tokens, mean_tokens, rank, padded, tile, samples)
        gate = tl.dot(gate_mean, gate_factor, input_precision="ieee")
        hidden = gate * tl.sigmoid(gate) * tl.dot(up_mean, up_factor, input_precision="ieee")
        squares += tl.sum(hidden * hidden, axis=0)
    tl.store(scores + channel, tl.sqrt(squares), mask=channel < width)


@triton.jit  # type: ignore[untyped-decorator]
def _means(
    z: tl.tensor,
    mean: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    mean_tokens: tl.tensor,
    rank: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
    samples: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The mean tokens from `first` on: of gate's z and of up's, (samples, padded)."""
    sample, part = first + tl.arange(0, samples), tl.arange(0, padded)
    gate_mean = tl.zeros((samples, padded), dtype=tl.float32)
    up_mean = tl.zeros((samples, padded), dtype=tl.float32)
    for start in range(0, tokens, tile):
        token = start + tl.arange(0, tile)
        inside = (sample[:, None] < mean_tokens) & (token[None, :] < tokens)
        weight = tl.load(mean + sample[:, None] * tokens + token[None, :], mask=inside, other=0.0)
        place = z + token[:, None] * (2 * rank) + part[None, :]
        inside = (token[:, None] < tokens) & (part[None, :] < rank)
        gate_mean = tl.dot(weight, tl.load(place, mask=inside, other=0.0), gate_mean, input_precision="ieee")
        up_mean = tl.dot(weight, tl.load(place + rank, mask=inside, other=0.0), up_mean, input_precision="ieee")
    return gate_mean, up_mean


@triton.jit  # type: ignore[untyped-decorator]
def _attention(
    z: tl.tensor,
    real: tl.tensor,
    up: tl.tensor,
    pair_scores: tl.tensor,
    value_scores: tl.tensor,
    tokens: tl.tensor,
    query_heads: tl.constexpr,
    key_heads: tl.constexpr,
    half: tl.constexpr,
    channels: tl.constexpr,
    rank: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
) -> None:
    """The rotary pairs of one key head, or the channels of one value head."""
    head = tl.program_id(0)
    channel = tl.arange(0, channels)
    if tl.program_id(1) == 0:
        group: tl.constexpr = query_heads // key_heads
        q_product = _self_product(z, real, tokens, 3 * rank, rank, padded, tile, masked)
        k_product = _self_product(z + rank, real, tokens, 3 * rank, rank, padded, tile, masked)
        q_squares = tl.zeros((channels,), dtype=tl.float32)
        for half_head in range(2 * group):
            first = head * 2 * group + half_head
            q_squares += _squares(up + first * half * rank, q_product, half, channels, rank, padded)
        keys = up + (query_heads + head) * 2 * half * rank
        k_squares = _squares(keys, k_product, half, channels, rank, padded)
        k_squares += _squares(keys + half * rank, k_product, half, channels, rank, padded)
        tl.store(pair_scores + head * half + channel, tl.sqrt(q_squares / group * k_squares), mask=channel < half)
    else:
        v_product = _self_product(z + 2 * rank, real, tokens, 3 * rank, rank, padded, tile, masked)
        for half_head in range(2):
            first = (head * 2 + half_head) * half
            values = up + ((query_heads + key_heads) * 2 * half + first) * rank
            squares = _squares(values, v_product, half, channels, rank, padded)
            tl.store(value_scores + first + channel, tl.sqrt(squares), mask=channel < half)


@triton.jit  # type: ignore[untyped-decorator]
def _self_product(
    z: tl.tensor,
    real: tl.tensor,
    tokens: tl.tensor,
    stride: tl.constexpr,
    rank: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
) -> tl.tensor:
    """z^T z over the real tokens: (padded, padded)."""
    part = tl.arange(0, padded)
    product = tl.zeros((padded, padded), dtype=tl.float32)
    for start in range(0, tokens, tile):
        token = start + tl.arange(0, tile)
        counts = token < tokens
        if masked:
            counts = counts & (tl.load(real + token, mask=counts, other=0) != 0)
        place = z + token[:, None] * stride + part[None, :]
        value = tl.load(place, mask=counts[:, None] & (part[None, :] < rank), other=0.0)
        product = tl.dot(tl.trans(value), value, product, input_precision="ieee")
    return product


@triton.jit  # type: ignore[untyped-decorator]
def _squares(
    up: tl.tensor, product: tl.tensor, half: tl.constexpr, channels: tl.constexpr, rank: tl.constexpr,
    padded: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """u^T (z^T z) u of `half` rows u of an up factor; not below zero, as rounding might have it."""
    channel, part = tl.arange(0, channels), tl.arange(0, padded)
    inside = (channel[:, None] < half) & (part[None, :] < rank)
    rows = tl.load(up + channel[:, None] * rank + part[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.maximum(tl.sum(tl.dot(rows, product, input_precision="ieee") * rows, axis=1), 0.0)
