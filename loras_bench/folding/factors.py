"""Few rows in the place of a head's query and key matrices: identical-row compression, and ranks above one.

A head's logits depend on its weights through M = [W_Q, b_Q]^T W_K alone; the key's bias adds the same to every key of a
query, and softmax drops it. A fold of rank r keeps r rows u of queries and r rows w of keys for the E rows of the head:

    logits = scaling E / r sum_i (u_i [x, 1]) (w_i y)

which for r = 1 is the dense head whose rows are all u, and all w. Rows are output units, however a layer stores them:
folded over inputs, a query after a layer norm is its bias alone, because a normed x sums to 0.

Shapes: h heads that share the rows, e rows of a head, c = d + 1 inputs and the constant 1, d inputs, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Initialisation = Literal["row_mean", "svd", "whitened"]
SMALLEST = 1e-10
"""Directions of inputs whose variance is less than this share of the largest are taken as absent."""


@dataclass(frozen=True)
class Moments:
    """Second moments of an attention layer's inputs over tokens, float64.

    `query_cc` is E[x' x'^T] of x' = [x, 1]; `key_dd` is the covariance of x, centred because softmax ignores what a
    query adds to all of its keys.
    """

    query_cc: Tensor
    key_dd: Tensor

    @classmethod
    def of(cls, query_cc: Tensor) -> Moments:
        """From the first alone: its last column holds the mean."""
        mean_d = query_cc[:-1, -1]
        return cls(query_cc, query_cc[:-1, :-1] - torch.outer(mean_d, mean_d))

    @cached_property
    def roots(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The symmetric square root of each, and its pseudo-inverse; computed once for all heads of a layer."""
        return _roots(self.query_cc), _roots(self.key_dd)


def bands(head_dim: int, rank: int, rotary: bool) -> Tensor:
    """Which of the r rows stands for each row of a head: int64 (e,), equal shares.

    Under rotary embedding a share is a run of frequencies: the pairs (i, i + e / 2) stay together.
    """
    row_e = torch.arange(head_dim)
    return row_e % (head_dim // 2) // (head_dim // 2 // rank) if rotary else row_e // (head_dim // rank)


def fold_rows(
    query_hec: Tensor,
    key_hed: Tensor,
    rank: int,
    initialisation: Initialisation,
    *,
    rotary: bool = False,
    moments: Moments | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows u_rc and w_rd in the place of those of one head, or of several that will share them; float64.

    Args:
        query_hec: [W_Q, b_Q] of the heads.
        key_hed: W_K of the heads.
        rank: Divides e; e / 2 under rotary embedding.
        initialisation: `row_mean` is the nearest matrix of identical rows (in each of `bands`). `svd` is the best
            product of this rank for M (Eckart and Young 1936), `whitened` the best for the logits of the inputs that
            `moments` describes, in the mean square. Heads that share take the mean of their M.
        rotary: Positions multiply each pair of rows by an angle of its own: `svd` and `whitened` fit every band by
            itself, to its logits at distance 0.
        moments: For `whitened`.
    """
    query_hec, key_hed = query_hec.double(), key_hed.double()
    heads, size = query_hec.shape[:2]
    band_e = bands(size, rank, rotary).to(query_hec.device)
    if initialisation == "row_mean":
        means = [[rows[:, band_e == r].mean((0, 1)) for r in range(rank)] for rows in (query_hec, key_hed)]
        return torch.stack(means[0]), torch.stack(means[1])
    spread = moments if initialisation == "whitened" else None
    members = [band_e == r for r in range(rank)] if rotary else [torch.ones_like(band_e, dtype=torch.bool)]
    found = [
        best_product(query_hec[:, rows].flatten(0, 1), key_hed[:, rows].flatten(0, 1), rank // len(members), spread)
        for rows in members
    ]
    share = (rank / (size * heads)) ** 0.5  # of each side, so that the logits carry E / r
    return share * torch.cat([u_rc for u_rc, _ in found]), share * torch.cat([w_rd for _, w_rd in found])


def best_product(a_nc: Tensor, b_nd: Tensor, rank: int, moments: Moments | None = None) -> tuple[Tensor, Tensor]:
    """u_rc and w_rd whose u^T w is nearest to a^T b, or with `moments` nearest in x'^T a^T b y over the inputs."""
    back_cc = back_dd = None
    if moments is not None:
        (root_cc, back_cc), (root_dd, back_dd) = moments.roots
        a_nc, b_nd = a_nc @ root_cc, b_nd @ root_dd
    q_cm, left = torch.linalg.qr(a_nc.t())
    q_dm, right = torch.linalg.qr(b_nd.t())
    p_mm, sigma_m, q_mm = torch.linalg.svd(left @ right.t())
    root_r1 = sigma_m[:rank, None].sqrt()
    u_rc, w_rd = root_r1 * (q_cm @ p_mm[:, :rank]).t(), root_r1 * (q_dm @ q_mm[:rank].t()).t()
    return (u_rc, w_rd) if back_cc is None else (u_rc @ back_cc, w_rd @ back_dd)


def ridge(gram_mm: Tensor, cross_mn: Tensor, penalty: float, intercept: bool) -> tuple[Tensor, Tensor | None]:
    """The weights W (n, m - 1) and bias b (n,) that minimise sum |W z + b - y|^2 + l |W|^2 over tokens.

    Args:
        gram_mm: Sum of z' z'^T for z' = [z, 1].
        cross_mn: Sum of z' y^T.
        penalty: l as a share of the mean diagonal of the sum of z z^T.
        intercept: Whether there is a bias; None is returned where there is none.
    """
    used = len(gram_mm) if intercept else len(gram_mm) - 1
    weight_m = torch.full((used,), penalty * float(gram_mm.diagonal()[:-1].mean()), dtype=gram_mm.dtype)
    if intercept:
        weight_m[-1] = 0
    solved_mn = torch.linalg.solve(gram_mm[:used, :used] + weight_m.to(gram_mm.device).diag(), cross_mn[:used])
    return (solved_mn[:-1].t(), solved_mn[-1]) if intercept else (solved_mn.t(), None)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    there = values > SMALLEST * values[-1]
    roots = torch.where(there, values, 0).sqrt()
    back = torch.where(there, 1 / torch.where(there, roots, 1), 0)
    return (vectors * roots) @ vectors.t(), (vectors * back) @ vectors.t()
