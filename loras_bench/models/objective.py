"""A model with its task's loss in one module, so that data parallelism and torch.compile see one forward pass."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from loras_bench.catalog import Task
from loras_bench.kernels.cross_entropy import linear_cross_entropy


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

    def __init__(self, model: nn.Module, task: Task, loss: Literal["fused", "torch"]) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.loss = loss

    def forward(
        self, targets: Tensor, label_rows: Tensor | None = None, **inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Score a batch as `TaskData.collate` makes it.

        Args:
            targets: (batch, length) tokens to predict with -100 where nothing is, or (batch,) classes.
            label_rows: int64, the places, among all of the batch, that the output layer reads; default all. The others
                have no target.
            **inputs: `input_ids`, and where there are any `attention_mask` and `token_type_ids`, all (batch, length);
                for documents packed into one row what `class_logits_of_packed` takes.
        """
        inner = unwrapped(self.model)
        if self.task == "classification":
            packed = "document_ids" in inputs
            logits_bc = (class_logits_of_packed(inner, **inputs) if packed else inner(**inputs).logits).float()
            correct = (logits_bc.argmax(-1) == targets).sum()
            return F.cross_entropy(logits_bc, targets, reduction="sum"), correct
        hidden_bsd = inner.base_model(**inputs, use_cache=False)[0]
        if label_rows is not None:
            hidden_bsd = hidden_bsd.flatten(0, 1).index_select(0, label_rows)[None]
            targets = targets.flatten().index_select(0, label_rows)[None]
        head = inner.get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None:
            return linear_cross_entropy(hidden_bsd, head.weight, targets, self.loss), None
        logits_bsv = head(hidden_bsd).float()  # an adapted or biased output layer has no single weight to fuse
        return F.cross_entropy(logits_bsv.flatten(0, 1), targets.flatten(), reduction="sum"), None


def class_logits_of_packed(
    inner: Any, *, position_ids: Tensor, starts: Tensor, ends: Tensor, **inputs: Tensor
) -> Tensor:
    """The logits of a transformers classifier for documents packed into one row, as it gives them for padded rows.

    Only the tokens that the model pools reach its head: the last of each document in decoders, the first in encoders.

    Args:
        inner: The classifier, unwrapped.
        position_ids: (1, length), counted from 0 in each document.
        starts: (documents,), the place of each document's first token.
        ends: (documents,), the place of its last token.
        **inputs: `input_ids`, `attention_mask`, `document_ids` and where there are any `token_type_ids`, (1, length).

    Returns:
        (documents, classes).
    """
    family = inner.config.model_type
    if family == "roberta":  # counts from the row after its padding token's
        position_ids = position_ids + inner.config.pad_token_id + 1
    hidden_sd = inner.base_model(**inputs, position_ids=position_ids, use_cache=False)[0][0]
    if family in ("gpt2", "llama"):
        return inner.score(hidden_sd.index_select(0, ends))  # type: ignore[no-any-return]
    first_b1d = hidden_sd.index_select(0, starts)[:, None]
    if family == "roberta":
        return inner.classifier(first_b1d)  # type: ignore[no-any-return]
    return inner.classifier(inner.dropout(inner.base_model.pooler(first_b1d)))  # type: ignore[no-any-return]
