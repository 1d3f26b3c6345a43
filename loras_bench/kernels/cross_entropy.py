"""The output layer and its cross-entropy in one place, the same for every arm; never all logits at once.

At 32,768 tokens and a vocabulary of 49,152 they would be 3.2 GB in bfloat16.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 4096
"""Tokens whose logits the torch path holds at once."""
IGNORED = -100
"""Target of a position that predicts nothing: cross_entropy's default."""


def linear_cross_entropy(
    hidden_bsd: Tensor, weight_vd: Tensor, targets_bs: Tensor, backend: Literal["fused", "torch"]
) -> Tensor:
    """Sum over the targets of -log softmax(hidden @ weight^T)[target], in float32; targets of -100 are left out.

    Args:
        hidden_bsd: Last hidden states (batch, length, width).
        weight_vd: Output embedding (vocabulary, width).
        targets_bs: The token that each position has to predict (batch, length).
        backend: `fused` (our Triton kernel, CUDA) or `torch`.
    """
    hidden_nd, targets_n = hidden_bsd.flatten(0, 1), targets_bs.flatten()
    if backend == "fused":
        from loras_bench.kernels.fused_cross_entropy import fused_linear_cross_entropy

        return fused_linear_cross_entropy(hidden_nd, weight_vd, targets_n)
    total = hidden_nd.new_zeros((), dtype=hidden_nd.dtype).float()
    for start in range(0, targets_n.numel(), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits_nv = F.linear(hidden_nd[part], weight_vd).float()
        total = total + F.cross_entropy(logits_nv, targets_n[part], reduction="sum", ignore_index=IGNORED)
    return total
