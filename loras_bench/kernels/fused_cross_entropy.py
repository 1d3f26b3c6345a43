"""Output layer, cross-entropy and their gradients, chunk by chunk of tokens: logits live once, and become gradients.

The loss's gradient with respect to the logits is softmax - onehot, known as soon as the logits are; so the forward pass
writes it over them and multiplies it with the weights at once. The backward pass only scales. No step waits for the
GPU. A frozen output layer costs no weight gradient, and evaluation no gradient at all.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loras_bench.kernels.bordered import bordered
from loras_bench.kernels.cross_entropy import IGNORED

LOGITS_BYTES = 2**30
"""The piece of the logits that is held, but for rounding up to whole tiles."""
TILE = 4096
"""Logits of one token that a program holds at once."""


def fused_linear_cross_entropy(hidden_nd: Tensor, weight_vd: Tensor, targets_n: Tensor) -> Tensor:
    """As `linear_cross_entropy`, for flat tokens. Logits are rounded to the model's number format, as are gradients."""
    loss: Tensor = _FusedLinearCrossEntropy.apply(hidden_nd, weight_vd, targets_n, torch.is_grad_enabled())
    return loss


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, training: bool) -> Tensor:
        tokens, vocabulary = len(hidden_nd), len(weight_vd)
        trains_hidden, trains_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        losses_n = torch.empty(tokens, dtype=torch.float32, device=hidden_nd.device)
        d_hidden_nd = torch.empty_like(hidden_nd) if trains_hidden else None
        d_weight_vd = torch.empty_like(weight_vd) if trains_weight else None
        chunk = _chunk(tokens, vocabulary * hidden_nd.element_size())
        buffer_nv = bordered(chunk, vocabulary, 0, hidden_nd)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            hidden = hidden_nd[part]
            logits_nv = torch.mm(hidden, weight_vd.t(), out=buffer_nv[: len(hidden)])
            _loss_of_row[(len(hidden),)](
                logits_nv, targets_n[part], losses_n[part],
                stride=logits_nv.stride(0), vocabulary=vocabulary, ignored=IGNORED,
                differentiate=trains_hidden or trains_weight, tile=TILE, num_warps=8,
            )  # fmt: skip
            if d_hidden_nd is not None:
                torch.mm(logits_nv, weight_vd, out=d_hidden_nd[part])
            if d_weight_vd is not None:  # few and large chunks: each rounds the sum once
                torch.addmm(d_weight_vd, logits_nv.t(), hidden, beta=float(start > 0), out=d_weight_vd)
        ctx.save_for_backward(d_hidden_nd, d_weight_vd)
        return losses_n.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_nd, d_weight_vd = (None if d is None else _scaled(d, d_loss) for d in ctx.saved_tensors)
        return d_hidden_nd, d_weight_vd, None, None


def _chunk(tokens: int, bytes_per_token: int) -> int:
    """Tokens of a chunk: as few chunks as fit, of nearly equal size, in whole tiles of the matrix product."""
    chunks = -(-tokens * bytes_per_token // LOGITS_BYTES)
    return max(1, min(tokens, -(-tokens // (chunks * 128)) * 128))


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a factor in float32: torch would round the factor to bfloat16 first, up to 0.4 % off everywhere."""
    out = torch.empty_like(gradient)
    _scale[(triton.cdiv(gradient.numel(), TILE),)](gradient, factor, out, gradient.numel(), tile=TILE, num_warps=8)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _loss_of_row(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    stride: tl.constexpr,
    vocabulary: tl.constexpr,
    ignored: tl.constexpr,
    differentiate: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    number = logits.dtype.element_ty
    lane = tl.arange(0, tile)
    # Masks end at the stride, a multiple of eight: at an odd vocabulary, each element would be an access of its own.
    if target == ignored:
        tl.store(losses + row, 0.0)
        if differentiate:
            for start in range(0, stride, tile):
                column = start + lane
                tl.store(logits + column, tl.zeros((tile,), dtype=number), mask=column < stride)
    else:
        hit = tl.load(logits + target).to(tl.float32)  # before the reductions, whose barriers keep it from the stores
        largest = -float("inf")
        total = 0.0
        for start in range(0, stride, tile):
            column = start + lane
            logit = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32)
            logit = tl.where(column < vocabulary, logit, -float("inf"))
            before = largest
            largest = tl.maximum(before, tl.max(logit, axis=0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(logit - largest), axis=0)
        tl.store(losses + row, tl.log(total) + largest - hit)
        if differentiate:
            for start in range(0, stride, tile):
                column = start + lane
                logit = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32)
                gradient = tl.exp(logit - largest) / total - tl.where(column == target, 1.0, 0.0)
                tl.store(logits + column, gradient.to(number), mask=column < stride)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(gradient: tl.tensor, factor: tl.tensor, out: tl.tensor, elements: tl.tensor, tile: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    value = tl.load(gradient + at, mask=at < elements, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < elements)
