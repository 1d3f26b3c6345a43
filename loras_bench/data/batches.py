"""Facts of a collated batch that are not written in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Which places of a batch, as `TaskData.collate` made it, hold a token and no padding: bool (batch, length)."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
