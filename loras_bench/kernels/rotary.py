"""From the output of the fused q/k/v projection to its heads, where it lies, with or without a rotary embedding.

The rotary position embedding (Su et al. 2021) turns halves of a head as transformers' `rotate_half` does, and rounds
after each product: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). Nobody else keeps the projection's output, so that
it is overwritten: q, k and v are views of it. Rows that are not in the order of the batch are brought into it on the
way, and their gradients back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loras_bench.kernels.bordered import bordered
from loras_bench.kernels.tiles import TILE_ELEMENTS, with_unit_columns


def rotary_split(
    qkv_nd: Tensor,
    cos_bsd: Tensor,
    sin_bsd: Tensor,
    heads: int,
    key_heads: int,
    grad_border: int = 0,
    order_n: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q_bhsd and k_bgsd, and v_bgsd, as views of `qkv_nd`, whose q and k columns are overwritten.

    With `order_n` they are views of a new matrix, in the order of the batch.

    Args:
        qkv_nd: One token a row: the columns of all query heads, then of all key heads, then of all value heads.
        cos_bsd: Cosines of the angles (batch or 1, length, head_dim); 1 where all samples have the same positions.
        sin_bsd: Their sines.
        heads: Query heads h.
        key_heads: Key (and value) heads g.
        grad_border: Spare columns beside the gradient of `qkv_nd`, for the linear layer that made it.
        order_n: int64, the place in the batch of each row of `qkv_nd`, each once; None where they are the same.
    """
    angles = cos_bsd.flatten(0, 1).contiguous(), sin_bsd.flatten(0, 1).contiguous()
    sizes = cos_bsd.shape[1], heads, key_heads
    q_bhsd, k_bgsd, v_bgsd = _HeadSplit.apply(qkv_nd, *angles, *sizes, grad_border, order_n)
    return q_bhsd, k_bgsd, v_bgsd


def head_split(
    qkv_nd: Tensor, length: int, heads: int, key_heads: int, grad_border: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rotary_split`, for models whose positions are in their embeddings: nothing is turned.

    Args:
        qkv_nd: As there.
        length: Tokens of each sample.
        heads: Query heads h.
        key_heads: Key (and value) heads g.
        grad_border: As there.
    """
    q_bhsd, k_bgsd, v_bgsd = _HeadSplit.apply(qkv_nd, None, None, length, heads, key_heads, grad_border, None)
    return q_bhsd, k_bgsd, v_bgsd


class _HeadSplit(torch.autograd.Function):
    """Takes cosines and sines as (positions, head_dim), or None."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_nd: Tensor,
        cos_pd: Tensor | None,
        sin_pd: Tensor | None,
        length: int,
        heads: int,
        key_heads: int,
        grad_border: int,
        order_n: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        source_nd = with_unit_columns(qkv_nd.detach())
        data_nd = source_nd if order_n is None else torch.empty_like(source_nd, memory_format=torch.contiguous_format)
        tokens, dim = len(data_nd), data_nd.shape[1] // (heads + 2 * key_heads)
        if cos_pd is not None:
            tile_half, tile_tokens = _tile(dim)
            turned, moved = heads + key_heads, order_n is not None
            visited = turned + key_heads if moved else turned
            _turn[(triton.cdiv(tokens, tile_tokens) * visited,)](
                source_nd, data_nd, order_n if moved else data_nd, cos_pd, sin_pd,
                tokens, len(cos_pd), source_nd.stride(0), data_nd.stride(0),
                heads=visited, turned=turned, moved=moved,
                half=dim // 2, tile_half=tile_half, tile_tokens=tile_tokens,
            )  # fmt: skip
        ctx.save_for_backward(cos_pd, sin_pd, order_n)
        ctx.grad_border = grad_border
        data_bhsd = data_nd.view(tokens // length, length, heads + 2 * key_heads, dim).transpose(1, 2)
        q_bhsd, k_bgsd, v_bgsd = data_bhsd.split([heads, key_heads, key_heads], dim=1)
        return q_bhsd, k_bgsd, v_bgsd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_bhsd: Tensor, dk_bgsd: Tensor, dv_bgsd: Tensor) -> tuple[Tensor | None, ...]:
        cos_pd, sin_pd, order_n = ctx.saved_tensors
        batch, heads, length, dim = dq_bhsd.shape
        key_heads = dk_bgsd.shape[1]
        tokens = batch * length
        d_qkv_nd = bordered(tokens, (heads + 2 * key_heads) * dim, ctx.grad_border, dq_bhsd)
        turn, moved = cos_pd is not None, order_n is not None
        tile_half, tile_tokens = _tile(dim)
        _gather[(triton.cdiv(tokens, tile_tokens) * (heads + 2 * key_heads),)](
            dq_bhsd, dk_bgsd, dv_bgsd, d_qkv_nd, order_n if moved else d_qkv_nd,
            cos_pd if turn else d_qkv_nd, sin_pd if turn else d_qkv_nd,
            *dq_bhsd.stride(), *dk_bgsd.stride(), *dv_bgsd.stride(),
            tokens, length, len(cos_pd) if turn else 1, d_qkv_nd.stride(0),
            heads=heads, key_heads=key_heads, turn=turn, moved=moved,
            half=dim // 2, tile_half=tile_half, tile_tokens=tile_tokens,
        )  # fmt: skip
        return d_qkv_nd, None, None, None, None, None, None, None


def _tile(dim: int) -> tuple[int, int]:
    """Columns of a half head (a power of two, masked) and tokens in a tile."""
    tile_half = triton.next_power_of_2(dim // 2)
    return tile_half, max(1, TILE_ELEMENTS // tile_half)


@triton.jit(do_not_specialize=["tokens", "positions"])  # type: ignore[untyped-decorator]
def _turn(
    qkv: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    tokens: tl.tensor,
    positions: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    heads: tl.constexpr,
    turned: tl.constexpr,
    moved: tl.constexpr,
    half: tl.constexpr,
    tile_half: tl.constexpr,
    tile_tokens: tl.constexpr,
) -> None:
    """Turns the q and k heads of a tile of rows, the first `turned`; all go to their places if rows are `moved`."""
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads * tile_tokens + tl.arange(0, tile_tokens))[:, None]
    column = tl.arange(0, tile_half)[None, :]
    inside = (row < tokens) & (column < half)
    token = _token(order, row, tokens, moved)
    low = qkv + row.to(tl.int64) * stride + head * 2 * half + column
    target = out + token.to(tl.int64) * out_stride + head * 2 * half + column
    first = tl.load(low, mask=inside, other=0.0)
    second = tl.load(low + half, mask=inside, other=0.0)
    if head < turned:
        angle = token % positions * 2 * half + column
        cos_low, cos_high, sin_low, sin_high = _angles(cos, sin, angle, inside, half)
        number = out.dtype.element_ty
        x1, x2 = first.to(tl.float32), second.to(tl.float32)
        first = ((x1 * cos_low).to(number).to(tl.float32) - (x2 * sin_low).to(number).to(tl.float32)).to(number)
        second = ((x2 * cos_high).to(number).to(tl.float32) + (x1 * sin_high).to(number).to(tl.float32)).to(number)
    tl.store(target, first, mask=inside)
    tl.store(target + half, second, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _token(order: tl.tensor, row: tl.tensor, tokens: tl.tensor, moved: tl.constexpr) -> tl.tensor:
    """The places in the batch of a tile of rows."""
    return tl.load(order + row, mask=row < tokens, other=0) if moved else row


@triton.jit(do_not_specialize=["tokens", "length", "positions"])  # type: ignore[untyped-decorator]
def _gather(
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    d_qkv: tl.tensor,
    order: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    dq_b: tl.tensor,
    dq_h: tl.tensor,
    dq_s: tl.tensor,
    dq_d: tl.tensor,
    dk_b: tl.tensor,
    dk_h: tl.tensor,
    dk_s: tl.tensor,
    dk_d: tl.tensor,
    dv_b: tl.tensor,
    dv_h: tl.tensor,
    dv_s: tl.tensor,
    dv_d: tl.tensor,
    tokens: tl.tensor,
    length: tl.tensor,
    positions: tl.tensor,
    stride: tl.tensor,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    turn: tl.constexpr,
    moved: tl.constexpr,
    half: tl.constexpr,
    tile_half: tl.constexpr,
    tile_tokens: tl.constexpr,
) -> None:
    """Writes one head of the gradient of a tile of rows: of q and k turned back, of v as it is."""
    head = tl.program_id(0) % (heads + 2 * key_heads)
    row = (tl.program_id(0) // (heads + 2 * key_heads) * tile_tokens + tl.arange(0, tile_tokens))[:, None]
    column = tl.arange(0, tile_half)[None, :]
    inside = (row < tokens) & (column < half)
    token = _token(order, row, tokens, moved)
    sample = (token // length).to(tl.int64)
    position = (token % length).to(tl.int64)
    angle = token % positions * 2 * half + column
    low = d_qkv + row.to(tl.int64) * stride + head * 2 * half + column
    if head < heads:
        source = dq + sample * dq_b + head * dq_h + position * dq_s + column * dq_d
        _write(source, dq_d, low, cos, sin, angle, inside, turn, half)
    elif head < heads + key_heads:
        source = dk + sample * dk_b + (head - heads) * dk_h + position * dk_s + column * dk_d
        _write(source, dk_d, low, cos, sin, angle, inside, turn, half)
    else:
        source = dv + sample * dv_b + (head - heads - key_heads) * dv_h + position * dv_s + column * dv_d
        _write(source, dv_d, low, cos, sin, angle, inside, False, half)


@triton.jit  # type: ignore[untyped-decorator]
def _write(
    source: tl.tensor,
    step: tl.tensor,
    low: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    angle: tl.tensor,
    inside: tl.tensor,
    turn: tl.constexpr,
    half: tl.constexpr,
) -> None:
    """One head of a tile of tokens, by the transposed rotation or as it is."""
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half * step, mask=inside, other=0.0).to(tl.float32)
    if turn:
        cos_low, cos_high, sin_low, sin_high = _angles(cos, sin, angle, inside, half)
        turned = first * cos_low + second * sin_high
        second = second * cos_high - first * sin_low
        first = turned
    tl.store(low, first.to(low.dtype.element_ty), mask=inside)
    tl.store(low + half, second.to(low.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _angles(cos: tl.tensor, sin: tl.tensor, angle: tl.tensor, inside: tl.tensor, half: tl.constexpr) -> tl.tensor:
    """Cosines and sines of the two halves of a head, in float32."""
    cos_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    return cos_low, cos_high, sin_low, sin_high
