"""Recall by induction: does a causal model copy what followed a token when it comes again (Olsson et al. 2022)?

A row is so many different random tokens, and then the same once more. In the second half each token but the first
follows from the context alone: attention has to find the place where the token before it stood. Attention of rank 1
ranks all keys alike for every query, so one head of it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loras_bench.errors import UserError

LOGITS_AT_ONCE = 2**26
"""Of one forward pass: 256 MiB in float32."""


@dataclass(frozen=True)
class Recall:
    """How well a model copies at one distance.

    Attributes:
        distance: Tokens from a token to its copy.
        accuracy: Share of the copies to which the model gives the highest logit; where several tokens share it, one
            part in so many. Guessing gives 1 / vocabulary.
        loss: Mean cross-entropy of the copies in nats; a model that knows nothing has ln(vocabulary).
        copies: How many were predicted.
    """

    distance: int
    accuracy: float
    loss: float
    copies: int


def repeated(tokens: Tensor, distance: int, rows: int, seed: int, first: int | None = None) -> Tensor:
    """Rows of `distance` different tokens, twice: int64 (rows, [1 +] 2 * distance).

    Args:
        tokens: Those to draw from, each as likely, int64 (tokens,).
        distance: At least 2.
        rows: How many.
        seed: Of the draw; it and the tokens decide everything.
        first: A token before each row, for models that were trained with one.

    Raises:
        UserError: There are not so many tokens.
    """
    if distance > len(tokens):
        raise UserError(f"distance {distance} needs as many tokens, and there are {len(tokens)}", "give a smaller one")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([tokens[torch.randperm(len(tokens), generator=generator)[:distance]] for _ in range(rows)])
    parts = [drawn, drawn] if first is None else [torch.full((rows, 1), first), drawn, drawn]
    return torch.cat(parts, dim=1)


def positions_of(distance: int, first: int | None = None) -> int:
    """How many tokens of such a row a model reads: the last one is only predicted."""
    return 2 * distance - (first is None)


def score(logits_nv: Tensor, targets_n: Tensor) -> tuple[float, float]:
    """The sums of hits (a tie of k tokens counts 1 / k) and of cross-entropies over n predictions."""
    logits_nv = logits_nv.float()
    best_n = logits_nv.amax(dim=1)
    hit_n = logits_nv.gather(1, targets_n[:, None])[:, 0] == best_n
    ties_n = (logits_nv == best_n[:, None]).sum(dim=1)
    return float((hit_n / ties_n).sum()), float(F.cross_entropy(logits_nv, targets_n, reduction="sum"))


@torch.no_grad()
def recall(model: nn.Module, ids_rs: Tensor, distance: int, vocabulary: int) -> Recall:
    """Read the second halves.

    Args:
        model: A causal language model: `model(input_ids=...).logits` is (rows, length, vocabulary).
        ids_rs: As `repeated` makes them, on the model's device.
        distance: Half of their length.
        vocabulary: Size of the logits; decides how many rows are read at once.
    """
    rows_at_once = max(1, LOGITS_AT_ONCE // ((ids_rs.shape[1] - 1) * vocabulary))
    hits = losses = 0.0
    for rows_rs in ids_rs.split(rows_at_once):
        logits_rsv = model(input_ids=rows_rs[:, :-1]).logits[:, 1 - distance :]
        found = score(logits_rsv.flatten(0, 1), rows_rs[:, 1 - distance :].flatten())
        hits, losses = hits + found[0], losses + found[1]
    copies = len(ids_rs) * (distance - 1)
    return Recall(distance, hits / copies, losses / copies, copies)
