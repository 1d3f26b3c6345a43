"""Hugging Face's Longformer as a backend: what a user gets who takes its sliding chunks instead of a kernel.

Its layer projects hidden states to q, k and v itself; here the projections are replaced by modules that hand over the
given tensors, and the layer's own forward pass does the rest (Beltagy et al. 2020, section 3.2; transformers'
`LongformerSelfAttention`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loras_bench.attention.backend import Backend
from loras_bench.attention.binding import BoundPattern
from loras_bench.attention.patterns import PatternBase, Window
from loras_bench.errors import UserError

GLOBAL = 10_000.0
"""How the layer's mask marks a global token; local ones are 0."""


class _Given(nn.Module):
    """Stands for a projection; a copy, because the layer divides its queries in place."""

    def __init__(self, projected: Tensor) -> None:
        super().__init__()
        self.projected = projected

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projected.clone()


class LongformerChunks(Backend):
    """Bidirectional windows, with a global prefix or without; keeps the weights of 2 w + 1 keys for each query."""

    name = "HF Longformer"
    backward_factor = 2.0  # keeps the weights, recomputes nothing

    def refusal(self, pattern: PatternBase, device: torch.device, head_dim: int) -> str | None:
        if not isinstance(pattern, Window) or not pattern.half_width:
            return "not applicable: it knows bidirectional windows only"
        return None

    def attend(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, bound: BoundPattern, scale: float
    ) -> tuple[Tensor, None]:
        """The length must be a multiple of twice the half width; `scale` is the layer's own, head_dim^-0.5."""
        batch, heads, length, head_dim = q_bhsd.shape
        pattern = bound.pattern
        assert isinstance(pattern, Window) and pattern.half_width
        if heads != k_bgsd.shape[1]:
            raise UserError("not applicable: it has no grouped-query heads")
        if length % (2 * pattern.half_width):
            raise UserError(f"not applicable: {length} is no multiple of its chunks of {2 * pattern.half_width}")
        q, k, v = (tensor.permute(2, 0, 1, 3).flatten(2) for tensor in (q_bhsd, k_bgsd, v_bgsd))
        prefix = pattern.global_tokens
        layer = _layer(heads * head_dim, heads, pattern.half_width)
        layer.query, layer.key, layer.value = _Given(q), _Given(k), _Given(v)
        layer.query_global, layer.key_global, layer.value_global = _Given(q[:prefix]), _Given(k), _Given(v)
        mask_bs = torch.zeros(batch, length, dtype=q.dtype, device=q.device)
        mask_bs[:, :prefix] = GLOBAL
        (out_bsd,) = layer(
            q.transpose(0, 1),  # read for its shape alone
            attention_mask=mask_bs,
            is_index_masked=mask_bs < 0,
            is_index_global_attn=mask_bs > 0,
            is_global_attn=prefix > 0,
        )
        return out_bsd.unflatten(2, (heads, head_dim)).transpose(1, 2), None

    def executed_pairs(self, bound: BoundPattern, batch_size: int, head_dim: int) -> int:
        """The mean of its two products: scores of chunks of 2 w by 2 w, each w apart; weights of w queries by 3 w keys.

        Global tokens add a column and a row, each over the whole length.
        """
        pattern, length = bound.pattern, bound.batch.length
        assert isinstance(pattern, Window) and pattern.half_width
        half = pattern.half_width
        scores, weights = (length // half - 1) * 4 * half**2, length * 3 * half
        return batch_size * ((scores + weights) // 2 + 2 * pattern.global_tokens * length)


def _layer(width: int, heads: int, half_width: int) -> Any:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=1,
        attention_window=[2 * half_width],
        attention_probs_dropout_prob=0.0,
    )
    with torch.device("meta"):  # its projections are replaced
        return LongformerSelfAttention(config, layer_id=0)
