"""Facts of a collated batch that are not written in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Which places of a batch, as `TaskData.collate` made it, hold a token and no padding: bool (batch, length)."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a base model is given of a batch: all but what only the loss needs."""
    return {name: tensor for name, tensor in batch.items() if name not in ("targets", "label_rows")}
