"""The inputs that all backends of a case share, and the float32 truth that they are held to.

Shapes: b batch, h query heads, g key heads, r query heads of one key head, s length, q and k positions, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loras_bench.attention.binding import AttentionBatch, BoundPattern
from loras_bench.attention.reference import masked_attention
from loras_bench.benchmarking.cases import Case, Shape

SEED = 0
SCORES_AT_ONCE = 2**27
"""Largest piece of the reference's score matrix, in elements: 512 MiB, and a few times that in its backward pass."""
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Random normal values: zeros or constants would draw less power and run faster than real data."""

    q_bhsd: Tensor
    k_bgsd: Tensor
    v_bgsd: Tensor
    grad_bhsd: Tensor
    """Gradient of the output."""

    @property
    def scale(self) -> float:
        return float(self.q_bhsd.shape[-1] ** -0.5)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_bhsd, self.k_bgsd, self.v_bgsd


def random_inputs(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """The same numbers for the same shape and device."""
    generator = torch.Generator(device).manual_seed(SEED)

    def draw(heads: int, trained: bool) -> Tensor:
        sizes = (shape.batch, heads, shape.length, shape.head_dim)
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype).requires_grad_(trained)

    return Inputs(
        draw(shape.heads, True), draw(shape.key_heads, True), draw(shape.key_heads, True), draw(shape.heads, False)
    )


def bind(case: Case, device: torch.device) -> BoundPattern:
    """The case's pattern bound to full rows of its length: no padding, one document a row."""
    return AttentionBatch(case.shape.length, case.causal, device).bound(case.pattern)


def reference_of(inputs: Inputs, bound: BoundPattern) -> Gradients:
    """out, dq, dk and dv in float32 of the first sample's first key head and the query heads that read it.

    Goes through the queries in bands, so that any length fits: no head sees another, and dk and dv add up over queries.
    """
    heads = inputs.q_bhsd.shape[1] // inputs.k_bgsd.shape[1]
    q, k, v = (leaf[:1, :count].detach().float() for leaf, count in zip(inputs.leaves, (heads, 1, 1), strict=True))
    grad = inputs.grad_bhsd[:1, :heads].float()
    length = q.shape[2]
    band = max(1, min(length, SCORES_AT_ONCE // (length * heads)))
    found = {
        "out": torch.empty_like(q),
        "dq": torch.empty_like(q),
        "dk": torch.zeros_like(k),
        "dv": torch.zeros_like(v),
    }
    for first in range(0, length, band):
        rows = slice(first, min(first + band, length))
        mask_1qk = bound.mask_rows(rows.start, rows.stop)[:1]
        keys = mask_1qk.shape[2]
        leaves = [part.detach().requires_grad_() for part in (q[:, :, rows], k[:, :, :keys], v[:, :, :keys])]
        q_band, k_seen, v_seen = leaves
        out, _ = masked_attention(q_band, k_seen, v_seen, mask_1qk, inputs.scale)
        dq, dk, dv = torch.autograd.grad(out, leaves, grad[:, :, rows])
        found["out"][:, :, rows], found["dq"][:, :, rows] = out.detach(), dq
        found["dk"][:, :, :keys] += dk
        found["dv"][:, :, :keys] += dv
    return found


def relative_errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Largest difference over the largest exact value, for out, dq, dk and dv.

    Args:
        found: Whole tensors of a backend; the heads that `exact` holds are compared.
        exact: What `reference_of` gave.
    """
    errors = {}
    for name, truth in exact.items():
        difference = found[name][:1, : truth.shape[1]].float() - truth
        errors[name] = float(difference.abs().max() / truth.abs().max())
    return errors
