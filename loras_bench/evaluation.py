"""Quality of a trained model over a whole split: perplexity (per token, per word, bits per byte), accuracy, answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from loras_bench.answers import count_exact, score_choices
from loras_bench.data import IGNORED
from loras_bench.data.instruction import Instructions
from loras_bench.graphed import to_device
from loras_bench.models.objective import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

    from loras_bench.config import GenerationConfig
    from loras_bench.data import TaskData


@torch.no_grad()
def evaluate(
    objective: Objective,
    data: TaskData,
    split: str,
    batch_size: int,
    accelerator: Accelerator,
    generation: GenerationConfig | None = None,
) -> dict[str, float]:
    """Score every row of a split once.

    Args:
        objective: The model with its loss, outside any data-parallel wrapper.
        data: Read in the order that pads least.
        split: `validation` or `test`.
        batch_size: Rows of one forward pass of one process.
        accelerator: Splits the rows over its processes and adds up.
        generation: How many rows are answered, for instructions with final answers.

    Returns:
        For language modelling `loss` (nats per token), `perplexity`, `word_perplexity` and `bits_per_byte`; for
        classification `loss` and `accuracy` (a share); for instructions `loss` and `perplexity` of the right responses'
        tokens, and where prompts allow few responses `accuracy` and `accuracy_normalized`, with `generation`
        `exact_match` (shares).
    """
    was_training = objective.training
    objective.eval()
    if isinstance(data, Instructions):
        metrics = _read_answers(objective, data, split, batch_size, accelerator)
        if generation is not None:
            metrics["exact_match"] = _exact_match(objective, data, split, batch_size, accelerator, generation)
    else:
        metrics = _read_losses(objective, data, split, batch_size, accelerator)
    objective.train(was_training)
    return metrics


def _read_losses(
    objective: Objective, data: TaskData, split: str, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    order = data.eval_order(split)[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(order), batch_size):
        batch = data.collate(split, order[start : start + batch_size])
        loss_sum, correct = objective(**to_device(batch, accelerator.device))
        sums += _row(loss_sum, (batch["targets"] != IGNORED).sum(), correct)
    return _metrics(data, split, *_total(sums, accelerator))


def _read_answers(
    objective: Objective, data: Instructions, split: str, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    order = data.eval_order(split)[accelerator.process_index :: accelerator.num_processes]
    sums = np.zeros(4)
    for start in range(0, len(order), batch_size):
        sums += score_choices(objective.model, data, split, order[start : start + batch_size], accelerator.device)
    loss_sum, tokens, right, right_normalized = _total(torch.from_numpy(sums).to(accelerator.device), accelerator)
    rows = data.rows(split)
    metrics = {"loss": loss_sum / tokens, "perplexity": _exp(loss_sum / tokens)}
    if data.source.splits[split].choices is None:
        return metrics
    return {**metrics, "accuracy": right / rows, "accuracy_normalized": right_normalized / rows}


def _exact_match(
    objective: Objective,
    data: Instructions,
    split: str,
    batch_size: int,
    accelerator: Accelerator,
    generation: GenerationConfig,
) -> float:
    """The share of the first rows whose greedy answer has the right final number."""
    asked = min(generation.rows, data.rows(split))
    rows = range(asked)[accelerator.process_index :: accelerator.num_processes]
    exact = sum(
        count_exact(objective.model, data, split, rows[at : at + batch_size], generation.new_tokens, accelerator.device)
        for at in range(0, len(rows), batch_size)
    )
    (total,) = _total(torch.tensor([float(exact)], dtype=torch.float64, device=accelerator.device), accelerator)
    return total / asked


def _total(sums: Tensor, accelerator: Accelerator) -> list[float]:
    """Over all processes."""
    total = accelerator.reduce(sums, reduction="sum") if accelerator.num_processes > 1 else sums
    return [float(value) for value in total]  # type: ignore[union-attr]


def _row(loss_sum: Tensor, targets: Tensor, correct: Tensor | None) -> Tensor:
    right = torch.zeros_like(loss_sum) if correct is None else correct
    return torch.stack([loss_sum.double(), targets.to(loss_sum.device).double(), right.double()])


def _metrics(data: TaskData, split: str, loss_sum: float, targets: float, correct: float) -> dict[str, float]:
    if data.task == "classification":
        return {"loss": loss_sum / targets, "accuracy": correct / targets}
    protocol = data.protocol(split)
    return {
        "loss": loss_sum / targets,
        "perplexity": _exp(loss_sum / targets),
        "word_perplexity": _exp(loss_sum / protocol["words"]),
        "bits_per_byte": loss_sum / math.log(2) / protocol["bytes"],
    }


def _exp(nats: float) -> float:
    """A diverged model has no finite perplexity, and that is a result, not an error."""
    return math.exp(nats) if nats < 700 else math.inf
