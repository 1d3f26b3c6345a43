"""Which channels of a layer matter for a batch (SparseLoRA, Khaki et al. 2025, arXiv 2506.16500, section 3.1).

Scores are computed from the outputs of the projections: true ones (the paper's oracle) or estimates (estimator.py).
Sizes are known on the host and nothing is read from the device, so that a captured step can choose channels.

Two departures from the official code: a query channel is kept with the key channel that it is multiplied with, in
every head that shares the key head; and the two channels that the rotary embedding mixes are kept together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_SELECTION = 32_768
"""Scores that one program of our kernel holds; beyond it shared memory would not do for its running sums."""


class LayerSparsity(NamedTuple):
    """The shares of a layer's channels that context tokens leave out, from 0 (dense) to less than 1."""

    feed_forward: float = 0.0
    """Of the hidden width: outputs of gate and up, inputs of down."""
    attention: float = 0.0
    """Of the key and value channels, with the query channels and the inputs of the output projection they belong to."""


DENSE = LayerSparsity()


def kept(width: int, sparsity: float) -> int:
    """How many of `width` channels stay: floor(width * (1 - sparsity)), at least 1.

    Computed on the decimal number as it is written: 1000 * (1 - 0.9) is 99.99999999999997 in floating point.
    """
    return max(1, int(width * (1 - Fraction(str(sparsity)))))


def top(scores_c: Tensor, count: int) -> Tensor:
    """The places of the `count` highest scores in ascending order: int64 (count,), on the device of the scores."""
    return scores_c.topk(count).indices.sort().values


def select(scores: Sequence[Tensor], counts: Sequence[int], tables: Sequence[Tensor]) -> Tensor:
    """Of each list of scores `table[:, top(scores, count)]`, one after the other, flat: a single launch on CUDA.

    Args:
        scores: One or two lists (n,), in float32 on CUDA.
        counts: How many to take of each.
        tables: int64 (b, n), b numbers for each score.
    """
    if has_kernels(scores[0].device.type) and max(map(len, scores)) <= LARGEST_SELECTION:
        from loras_bench.kernels.selection import select as launch

        chosen: Tensor = launch(list(scores), list(counts), list(tables))
        return chosen
    triples = zip(scores, counts, tables, strict=True)
    return torch.cat([table_bn.index_select(1, top(one, count)).flatten() for one, count, table_bn in triples])


@cache
def has_kernels(device: str) -> bool:
    """Whether our Triton kernels run on this kind of device."""
    return device == "cuda" and find_spec("triton") is not None


@dataclass(frozen=True)
class Heads:
    """How attention channels are numbered, and which of them belong together.

    Channel h * size + e is element e of head h. Key head g serves the query heads g * G to g * G + G - 1, where G is
    `group` (grouped-query attention; G = 1 is multi-head attention). The rotary embedding turns the elements e and
    e + size / 2 of a head in one plane: pair g * size / 2 + e.
    """

    query: int
    """Query heads."""
    key: int
    """Key heads, as many as value heads."""
    size: int
    """Channels of a head, even."""

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query // self.key

    def kept_pairs(self, sparsity: float) -> int:
        """How many rotary pairs of query and key channels stay: half the channels, rounded down, at least 1."""
        return max(1, kept(self.key * self.size, sparsity) // 2)

    def pair_channels(self, pairs_p: Tensor) -> Tensor:
        """The key channels (2 p,) of rotary pairs: the first element of each, then the second of each."""
        half = self.size // 2
        first_p = pairs_p // half * self.size + pairs_p % half
        return torch.cat([first_p, first_p + half])

    def query_channels(self, channels_c: Tensor) -> Tensor:
        """The query channels (G c,) that meet these key channels in the scores q k^T.

        Of value channels these are the channels of the attention's output, the inputs of the output projection. For
        (g, e) they are ((g * G + m) * size + e) for every m < G: first all those of m = 0, then of m = 1, and so on.
        """
        first_c = channels_c // self.size * (self.group * self.size) + channels_c % self.size
        members_m1 = torch.arange(self.group, device=channels_c.device)[:, None] * self.size
        return (members_m1 + first_c).flatten()


def feed_forward_scores(gate_tf: Tensor, up_tf: Tensor, real_t: Tensor | None = None) -> Tensor:
    """|| silu(gate) * up || of each hidden channel over the tokens: (f,), summed in float32 at least.

    Args:
        gate_tf: Outputs of the gate projection (tokens, f).
        up_tf: Outputs of the up projection, of the same shape.
        real_t: bool (tokens,), False for padding, which does not count; None where every token is real.
    """
    return _norms(F.silu(gate_tf) * up_tf, real_t)


def value_scores(v_tc: Tensor, real_t: Tensor | None = None) -> Tensor:
    """|| v || of each value channel over the tokens: (c,). For `real_t` see `feed_forward_scores`."""
    return _norms(v_tc, real_t)


def query_key_scores(q_tn: Tensor, k_tc: Tensor, heads: Heads, real_t: Tensor | None = None) -> Tensor:
    """|| q || || k || of each rotary pair over the tokens: (key heads * size / 2,).

    The paper's QK norm of single channels, taken over both channels of a pair, where it is the same before and after
    the rotary embedding. || q || is the root mean square over the G query heads that share the key head.

    Args:
        q_tn: Queries (tokens, query heads * size).
        k_tc: Keys (tokens, key heads * size).
        heads: How the channels are numbered.
        real_t: See `feed_forward_scores`.
    """
    q_gmhe = _norms(q_tn, real_t).square().view(heads.key, heads.group, 2, -1)
    k_ghe = _norms(k_tc, real_t).square().view(heads.key, 2, -1)
    return (q_gmhe.mean(1).sum(1) * k_ghe.sum(1)).sqrt().flatten()


def _norms(x_tc: Tensor, real_t: Tensor | None) -> Tensor:
    if real_t is not None:
        x_tc = x_tc.masked_fill(~real_t[:, None], 0)
    norms_c: Tensor = torch.linalg.vector_norm(x_tc, dim=0, dtype=torch.promote_types(x_tc.dtype, torch.float32))
    return norms_c
