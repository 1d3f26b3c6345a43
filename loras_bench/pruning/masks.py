"""Masks of pruned weights: True where a weight is zero for good."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def lowest(scores_gn: Tensor, count: int) -> Tensor:
    """True at the `count` lowest scores of each group g, equal ones by place: bool (g, n)."""
    order_gk = scores_gn.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores_gn, dtype=torch.bool).scatter_(1, order_gk, True)


def raised(pruned_gn: Tensor, scores_gn: Tensor, sparsity: float, *, two_of_four: bool = False) -> Tensor:
    """The masks of a higher sparsity: what is pruned stays pruned, and the lowest scores join it.

    Args:
        pruned_gn: The masks so far, bool; the weights of a group g are compared with each other.
        scores_gn: The higher, the longer a weight stays; those of pruned weights do not matter.
        sparsity: Each group has round(sparsity * n) zeros then, unless it has more already.
        two_of_four: Of each four neighbours in a group at most two are zero, so that at a sparsity of 0.5 two are.

    Returns:
        bool (g, n), a new tensor. Nothing is read to the host.
    """
    scores_gn = scores_gn.masked_fill(pruned_gn, -math.inf)
    if two_of_four:
        allowed_gn = lowest(scores_gn.reshape(-1, 4), 2).view_as(scores_gn)
        scores_gn = scores_gn.masked_fill(~allowed_gn, math.inf)
    return pruned_gn | lowest(scores_gn, round(sparsity * scores_gn.shape[1]))


def pack_bits(mask: Tensor) -> Tensor:
    """A mask of any shape as uint8 (elements / 8, rounded up); its first element is the first byte's lowest bit."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << _places(mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of a shape that `pack_bits` packed: bool."""
    bits = (packed[:, None] >> _places(packed.device)) & 1
    return bits.flatten()[: math.prod(shape)].view(*shape).bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
