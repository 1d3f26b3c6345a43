"""The folded attention block: what is left of a block's query, key and value matrices, and its forward pass.

    a = u x + c    b = w x                              (r of each for a group of heads)
    P = softmax(mask(scaling E / r  a b^T))             (E rows of a head, of which r are left)
    y = W_o (P (v * x)) + b_o                           or W_o (P W_V x) + b_o

A group is one head, or all of them. Logits are a product of width r, not E. Rotary embedding multiplies them by a fixed
function of the distance (at r = 1 by sum_p 2 cos(theta_p (i - j)) / E), which is of rank E: there, a and b
are spread over the E rotated channels, and the logits cost what dense ones do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loras_bench.errors import UserError

if TYPE_CHECKING:
    from loras_bench.attention.binding import AttentionBatch
    from loras_bench.attention.dispatch import ModelAttention

ALIGNMENT = 8
"""Columns of q and k are filled up with zeros to a multiple of this on CUDA: its attention kernels ask for rows of 16
bytes, which are as many in bfloat16. In float32 fewer would do, but costs must not depend on when they are counted.
"""


@dataclass(frozen=True)
class FoldShape:
    """The sizes of a folded block.

    `hidden` channels come in; the dense block had `heads`, of `key_heads` different keys and values, of `head_dim`
    rows. It has `groups` of heads with `rank` rows each now.
    """

    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    groups: int
    rank: int
    rotary: bool
    scaling: float


class FoldedAttention(nn.Module):
    """Takes a transformers attention module's place; its core goes through `ModelAttention`, as every arm's.

    Args:
        shape: Of the block.
        layer_idx: Of the layer.
        is_causal: Whether tokens see only their past.
        value: The value projection; None for a diagonal.
        output: What follows the core within the module, by name: the output projection and its dropout, if they are
            parts of it.
    """

    model_attention: ModelAttention

    def __init__(
        self,
        shape: FoldShape,
        layer_idx: int,
        is_causal: bool,
        value: nn.Module | None,
        output: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.shape, self.layer_idx, self.is_causal = shape, layer_idx, is_causal
        rows = shape.groups, shape.rank
        self.query = nn.Parameter(torch.zeros(*rows, shape.hidden))
        self.query_bias = nn.Parameter(torch.zeros(rows))
        self.key = nn.Parameter(torch.zeros(*rows, shape.hidden))
        self.value = value
        self.value_scale = nn.Parameter(torch.ones(shape.hidden)) if value is None else None
        self.scale = shape.scaling if shape.rotary else shape.scaling * shape.head_dim / shape.rank
        self.output_names = tuple(output)
        for name, module in output.items():
            self.add_module(name, module)

    @property
    def undecayed(self) -> list[nn.Parameter]:
        """What was made of the query, key and value matrices, but for a dense one; `MasterAdamW` asks for this name."""
        rows = [self.query, self.query_bias, self.key]
        return rows if self.value_scale is None else [*rows, self.value_scale]

    @property
    def fill(self) -> int:
        """Columns of zeros that queries and keys get where the model will run, and where its steps are counted."""
        return 0 if self.shape.rotary or self.model_attention.device.type != "cuda" else -self.shape.rank % ALIGNMENT

    @property
    def equal_widths(self) -> bool:
        """Whether the core's queries and values have as many columns."""
        shape = self.shape
        values = shape.hidden if self.value is None else shape.heads * shape.head_dim
        queries = shape.head_dim if shape.rotary else shape.rank + self.fill
        return queries == values // shape.groups

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        attention_batch: AttentionBatch | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers' attention modules: (batch, length, hidden) to (batch, length, hidden)."""
        if past_key_values is not None:
            raise UserError("folded attention keeps no key/value cache", "pass use_cache=False")
        if attention_batch is None:  # a layer called by itself, outside its model
            attention_batch = self.model_attention.batch(
                hidden_states.shape[1], hidden_states.device, padding_bs=attention_mask
            )
        out_bsd = self.mix(hidden_states, attention_batch, position_embeddings)
        for name in self.output_names:
            out_bsd = self.get_submodule(name)(out_bsd)
        return out_bsd, None

    def mix(self, x_bsd: Tensor, batch: AttentionBatch, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the output projection reads: (batch, length, width)."""
        a_bgsr = self._grouped(F.linear(x_bsd, self.query.flatten(0, 1), self.query_bias.flatten()))
        b_bgsr = self._grouped(F.linear(x_bsd, self.key.flatten(0, 1)))
        if self.shape.rotary:
            assert rotation is not None
            a_bgsr, b_bgsr = apply_rotary_pos_emb(self._spread(a_bgsr), self._spread(b_bgsr), *rotation)
        elif self.fill:
            a_bgsr, b_bgsr = F.pad(a_bgsr, (0, self.fill)), F.pad(b_bgsr, (0, self.fill))
        v_bgsd = self._grouped(self._values(x_bsd))
        out_bgsd: Tensor = self.model_attention.attend(self.layer_idx, a_bgsr, b_bgsr, v_bgsd, batch, self.scale)
        return out_bgsd.transpose(1, 2).flatten(2)

    def _spread(self, x_bgsr: Tensor) -> Tensor:
        """Each row at the rotated channels that it stands for (`factors.bands`): (b, g, s, r) to (b, g, s, E)."""
        half = x_bgsr.repeat_interleave(self.shape.head_dim // 2 // self.shape.rank, dim=-1)
        return torch.cat([half, half], dim=-1)

    def _values(self, x_bsd: Tensor) -> Tensor:
        if self.value is None:
            assert self.value_scale is not None
            return x_bsd * self.value_scale
        v_bsd: Tensor = self.value(x_bsd)
        sharing = self.shape.heads // self.shape.key_heads
        if sharing == 1:
            return v_bsd
        v_bsgd = v_bsd.view(*v_bsd.shape[:2], self.shape.key_heads, -1)
        return v_bsgd.repeat_interleave(sharing, dim=2).flatten(2)

    def _grouped(self, x_bsd: Tensor) -> Tensor:
        return x_bsd.view(*x_bsd.shape[:2], self.shape.groups, -1).transpose(1, 2)
