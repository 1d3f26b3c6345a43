"""What a weight is worth, the higher the more; and what the inputs of matrices measure, from forward passes alone.

Weights come as (outputs, inputs). Scores of a whole unit, which is an input of its matrix, are norms over its column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loras_bench.data.batches import real_tokens
from loras_bench.graphed import to_device
from loras_bench.pruning.blocks import Matrix

UNUSED = 1e-6
"""The norm of an input that never came: below any other, and above 0, so that magnitudes order its weights."""


def weight_scores(weight_oi: Tensor, norm_i: Tensor | None = None) -> Tensor:
    """|W_oi|, times the norm of the input where there is one, float32 (outputs, inputs).

    With it, Wanda's score (Sun et al. 2023, arXiv 2306.11695, equation 1); without it, the magnitude (Han et al. 2015).
    """
    magnitude_oi = weight_oi.float().abs()
    return magnitude_oi if norm_i is None else magnitude_oi * norm_i


def unit_scores(weight_oi: Tensor, norm_i: Tensor | None = None) -> Tensor:
    """||W_:i||_2 of each input i, times its own norm where there is one: float32 (inputs,)."""
    norms_i: Tensor = torch.linalg.vector_norm(weight_oi.float(), dim=0)
    return norms_i if norm_i is None else norms_i * norm_i


def random_scores(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """The same for the same seed and device: uniform float32."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(*shape, generator=generator, device=device)


def movement(gradient: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """-gradient * weight, summed over what shares a mask of this shape: float32.

    Its sum over steps is the score of movement pruning (Sanh et al. 2020, arXiv 2005.07683, equation 5), which is high
    for weights that grow away from zero.
    """
    return (gradient.float() * weight.float()).neg_().sum_to_size(*shape)


@torch.no_grad()
def input_norms(
    objective: nn.Module, matrices: Sequence[Matrix], batches: Iterable[Mapping[str, Tensor]], tokens: int
) -> list[Tensor]:
    """The norm of each input of some matrices, over the real tokens of batches: ||x_i||_2, float32 (inputs,) each.

    The input of an embedding is one-hot, so that its norm is the root of how often the token comes. For that the ids
    of all batches are read; the forward passes, without dropout, end after some tokens.

    Args:
        objective: On its device, with transformers' forward pass.
        matrices: Linear layers that see (batch, length, inputs), and embeddings.
        batches: As `TaskData.collate` makes them, on the CPU.
        tokens: How many, padding excluded, the forward passes read at least, if there are as many.
    """
    squares = [
        torch.zeros(matrix.by_outputs(matrix.weight).shape[1], device=matrix.weight.device) for matrix in matrices
    ]
    sums = list(zip(matrices, squares, strict=True))
    real: dict[str, Tensor] = {}
    hooks = [
        matrix.module.register_forward_pre_hook(partial(_add_squares, total_i, real))
        for matrix, total_i in sums
        if not isinstance(matrix.module, nn.Embedding)
    ]
    was_training, read = objective.training, 0
    objective.eval()
    for batch in batches:
        real_bs = real_tokens(batch)
        for matrix, total_i in sums:
            if isinstance(matrix.module, nn.Embedding):
                ids_n = batch["input_ids"][real_bs]
                total_i += torch.bincount(ids_n, minlength=len(total_i)).to(total_i)
        if hooks and read < tokens:
            real["bs"] = real_bs.to(squares[0].device)
            objective(**to_device(dict(batch), squares[0].device))
            read += int(real_bs.sum())
        elif len(hooks) == len(matrices):
            break
    objective.train(was_training)
    for hook in hooks:
        hook.remove()
    return [total_i.sqrt_().clamp_(min=UNUSED) for total_i in squares]


def _add_squares(total_i: Tensor, real: Mapping[str, Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    total_i += inputs[0][real["bs"]].float().square().sum(dim=0)
