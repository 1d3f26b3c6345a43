"""Counting mode: the attention core replaced by an operation without arithmetic; its FLOPs come from pair counts.

Everything around the core runs for real (also on the meta device), and each core call leaves a record. Recomputation
under gradient checkpointing calls the core again, and is counted again, as it is executed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairCounts:
    """Query-key pairs of one head, summed over the samples of a batch."""

    dense: int
    """Every (causal) pair of real tokens of the same document."""
    allowed: int
    """The pairs that the pattern allows."""
    executed: int
    """The pairs that the backend computes: whole visited tiles."""


@dataclass
class CoreCall:
    """One execution of one layer's attention core."""

    layer: int
    heads: int
    head_dim: int
    value_dim: int
    pairs: PairCounts
    backward_factor: float
    """FLOPs of the backward pass over the forward pass: 2.5 where scores are recomputed, 2 where they are kept."""
    backward: bool = False
    """Whether its backward pass ran."""

    def flops(self, pairs: int) -> float:
        """FLOPs of this call if it computed `pairs` pairs: a product of each width, and the backward."""
        forward = 2 * pairs * (self.head_dim + self.value_dim) * self.heads
        return forward * (1 + self.backward_factor * self.backward)


class _CountedCore(torch.autograd.Function):
    """Zeros of the right shapes; keeps its inputs as a real core does, so that checkpointing recomputes as much."""

    @staticmethod
    def forward(ctx: Any, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, call: CoreCall) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q_bhsd, k_bgsd, v_bgsd)
        ctx.call = call
        out_bhsd = v_bgsd.new_zeros(*q_bhsd.shape[:3], v_bgsd.shape[3])
        return out_bhsd, torch.zeros(q_bhsd.shape[:3], dtype=torch.float32, device=q_bhsd.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        ctx.call.backward = True
        q_bhsd, k_bgsd, v_bgsd = ctx.saved_tensors
        return torch.zeros_like(q_bhsd), torch.zeros_like(k_bgsd), torch.zeros_like(v_bgsd), None


def count_core(q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, call: CoreCall) -> tuple[Tensor, Tensor]:
    """Zero out_bhsd and lse_bhs with zero gradients to q, k and v; notes in `call` that a backward pass ran."""
    out_bhsd, lse_bhs = _CountedCore.apply(q_bhsd, k_bgsd, v_bgsd, call)
    return out_bhsd, lse_bhs
