"""A model with its task's loss in one module, so that data parallelism and torch.compile see one forward pass."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from loras_bench.kernels.cross_entropy import linear_cross_entropy

Task = Literal["language_modeling", "classification"]


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper; adapters live in its layers, so calling it applies them."""
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


class Objective(nn.Module):
    """Maps a batch to the sum of its losses (float32) and, for classification, the number of right answers.

    Args:
        model: A transformers model, or a PEFT model around one.
        task: Decides which head is read.
        loss: Backend of the cross-entropy of language models.
    """

    def __init__(self, model: nn.Module, task: Task, loss: Literal["liger", "torch"]) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.loss = loss

    def forward(self, targets: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score a batch as `TaskData.collate` makes it.

        Args:
            targets: (batch, length) tokens to predict with -100 where nothing is, or (batch,) classes.
            **inputs: `input_ids`, and where there are any `attention_mask` and `token_type_ids`, all (batch, length).
        """
        inner = unwrapped(self.model)
        if self.task == "classification":
            logits_bc = inner(**inputs).logits.float()
            correct = (logits_bc.argmax(-1) == targets).sum()
            return F.cross_entropy(logits_bc, targets, reduction="sum"), correct
        hidden_bsd = inner.base_model(**inputs, use_cache=False)[0]
        head = inner.get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None:
            return linear_cross_entropy(hidden_bsd, head.weight, targets, self.loss), None
        logits_bsv = head(hidden_bsd).float()  # an adapted or biased output layer has no single weight to fuse
        return F.cross_entropy(logits_bsv.flatten(0, 1), targets.flatten(), reduction="sum"), None
