"""Quality of a trained model over a whole split: perplexity (per token, per word, bits per byte) or accuracy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loras_bench.data import IGNORED
from loras_bench.graphed import to_device
from loras_bench.models.objective import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

    from loras_bench.data import TaskData


@torch.no_grad()
def evaluate(
    objective: Objective, data: TaskData, split: str, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Score every row of a split once.

    Args:
        objective: The model with its loss, outside any data-parallel wrapper.
        data: Read in the order that pads least.
        split: `validation` or `test`.
        batch_size: Rows of one forward pass of one process.
        accelerator: Splits the rows over its processes and adds up.

    Returns:
        For language modelling `loss` (nats per token), `perplexity`, `word_perplexity` and `bits_per_byte`; for
        classification `loss` and `accuracy` (a share).
    """
    was_training = objective.training
    objective.eval()
    order = data.eval_order(split)[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(order), batch_size):
        batch = data.collate(split, order[start : start + batch_size])
        loss_sum, correct = objective(**to_device(batch, accelerator.device))
        sums += _row(loss_sum, (batch["targets"] != IGNORED).sum(), correct)
    objective.train(was_training)
    total = accelerator.reduce(sums, reduction="sum") if accelerator.num_processes > 1 else sums
    loss_sum, targets, correct = (float(value) for value in total)
    return _metrics(data, split, loss_sum, targets, correct)


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
