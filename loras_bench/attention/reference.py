"""Masked attention in float32, as written in the textbook: the CPU backend, and the truth that tests hold kernels to.

Shapes: b batch, h query heads, g key heads, r query heads of one key head (h = g r), q and k positions, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loras_bench.attention.backend import Backend
from loras_bench.attention.binding import BoundPattern


def masked_attention(
    q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, mask_bqk: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v with its log-sum-exp, differentiable in both.

    Grouped-query heads are grouped, not repeated: query head h reads key head h // r. A row without any allowed key
    gives 0 and a log-sum-exp of -inf, and its gradients are 0.

    Returns:
        out_bhsd in the type of v, lse_bhs in float32 (float64 for float64 inputs), natural logarithm.
    """
    batch, heads, length, _ = q_bhsd.shape
    groups = k_bgsd.shape[1]
    exact = torch.float64 if q_bhsd.dtype == torch.float64 else torch.float32
    with torch.autocast(q_bhsd.device.type, enabled=False):
        q_bgrqd = q_bhsd.to(exact).reshape(batch, groups, heads // groups, length, -1)
        scores = torch.einsum("bgrqd,bgkd->bgrqk", q_bgrqd, k_bgsd.to(exact)) * scale
        scores = scores.masked_fill(~mask_bqk[:, None, None], float("-inf"))
        row_max = scores.detach().amax(dim=-1, keepdim=True)
        row_max = torch.where(row_max.isfinite(), row_max, 0)
        weights = torch.exp(scores - row_max)
        total = weights.sum(dim=-1, keepdim=True)
        empty = total == 0
        total = torch.where(empty, 1, total)  # divides and takes the logarithm of 1 there: no NaN in the gradients
        out = torch.einsum("bgrqk,bgkd->bgrqd", weights / total, v_bgsd.to(exact))
        lse = torch.where(empty, float("-inf"), row_max + torch.log(total))
    return out.reshape(batch, heads, length, -1).to(v_bgsd.dtype), lse.reshape(batch, heads, length)


class ReferenceBackend(Backend):
    """Every pattern on every device, at the cost of a length x length matrix for each head."""

    name = "reference"
    backward_factor = 2.0  # four products, the forward pass has two: the weights are kept, not recomputed

    def attend(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, bound: BoundPattern, scale: float
    ) -> tuple[Tensor, Tensor]:
        return masked_attention(q_bhsd, k_bgsd, v_bgsd, bound.mask_bqk, scale)

    def executed_pairs(self, bound: BoundPattern, batch_size: int, head_dim: int) -> int:
        return batch_size * bound.batch.length**2
