"""The output layer and its cross-entropy in one place, the same for every arm.

`liger` never holds all logits: at 32,768 tokens and a vocabulary of 49,152 they would be 3.2 GB in bfloat16. It
computes no weight gradient for a frozen output layer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 4096


def linear_cross_entropy(
    hidden_bsd: Tensor, weight_vd: Tensor, targets_bs: Tensor, backend: Literal["liger", "torch"]
) -> Tensor:
    """Sum over the targets of -log softmax(hidden @ weight^T)[target], in float32; targets of -100 are left out.

    Args:
        hidden_bsd: Last hidden states (batch, length, width).
        weight_vd: Output embedding (vocabulary, width).
        targets_bs: The token that each position has to predict (batch, length).
        backend: `liger` (fused Triton kernels, CUDA) or `torch`.
    """
    hidden_nd, targets_n = hidden_bsd.flatten(0, 1), targets_bs.flatten()
    if backend == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        summed: Tensor = loss(weight_vd, hidden_nd, targets_n)
        return summed.float()
    total = hidden_nd.new_zeros((), dtype=torch.float32)
    for start in range(0, targets_n.numel(), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits_nv = F.linear(hidden_nd[part], weight_vd).float()
        total = total + F.cross_entropy(logits_nv, targets_n[part], reduction="sum")
    return total
