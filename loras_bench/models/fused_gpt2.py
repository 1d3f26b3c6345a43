"""The forward pass of a transformers GPT-2 as a chain of fused operations.

A layer is: add + norm -> q/k/v -> attention -> output -> add + norm -> up -> GELU -> down. The residual stream travels
as (x, delta), so that every addition is part of the norm after it. Importing it needs Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from loras_bench.errors import UserError
from loras_bench.kernels.activations import gelu
from loras_bench.kernels.layer_norm import add_layer_norm
from loras_bench.kernels.rotary import head_split
from loras_bench.models.fused import TANH, FusedForward, refuse_unsupported

if TYPE_CHECKING:
    from loras_bench.attention.binding import AttentionBatch


class FusedGpt2(FusedForward):
    """The fused forward pass of a GPT2Model: `install` puts it in place of transformers', `remove` takes it out."""

    groups: ClassVar = {
        "qkv": ("attn.c_attn",),
        "out": ("attn.c_proj",),
        "up": ("mlp.c_fc",),
        "down": ("mlp.c_proj",),
    }

    def __init__(self, base: Any) -> None:
        super().__init__(base, base, base.h)

    @staticmethod
    def why_not(config: Any) -> str | None:
        if config.model_type != "gpt2":
            return f"this fused forward pass is GPT-2's, the model is of type {config.model_type}"
        if config.activation_function not in TANH:
            return f"the fused feed-forward layer is GELU, the model's activation is {config.activation_function}"
        if config.attn_pdrop:
            return "dropout on attention weights is not supported"
        if config.add_cross_attention:
            return "cross-attention is not supported"
        if config.hidden_size // config.num_attention_heads % 2:
            return "the fused split needs heads of an even width"
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *,
        attention_batch: AttentionBatch,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As GPT2Model's, without a cache; padding and documents are read from `attention_batch` alone."""
        refuse_unsupported(past_key_values, kwargs)
        if encoder_hidden_states is not None:
            raise UserError("this model has no layers for cross-attention", "leave encoder_hidden_states out")
        x_bsd = self._embed(input_ids, inputs_embeds, token_type_ids, position_ids)
        before, after = self.runner(self._before), self.runner(self._after)
        x_nd, delta_nd, made_delta = x_bsd.flatten(0, 1), None, 0
        for number, groups in enumerate(self.linears):
            x_nd, (q_bhsd, k_bhsd, v_bhsd) = before(number, x_nd, delta_nd, made_delta, attention_batch.length)
            module: Any = self.modules[number]
            out_bhsd = self.attention.attend(number, q_bhsd, k_bhsd, v_bhsd, attention_batch, module.attn.scaling)
            x_nd, delta_nd = after(number, x_nd, out_bhsd)
            made_delta = groups["down"].border
        _, hidden_nd = _add_norm(self.base.ln_f, x_nd, delta_nd, 0, made_delta)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_nd.view(x_bsd.shape))

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """What the first layer reads: tokens, positions (counted in each row, unless given), and types of tokens."""
        x_bsd = self.base.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x_bsd.shape[1], device=x_bsd.device)[None]
        x_bsd = x_bsd + self.base.wpe(position_ids)
        if token_type_ids is not None:
            x_bsd = x_bsd + self.base.wte(token_type_ids)
        embedded_bsd: Tensor = self.base.drop(x_bsd)
        return embedded_bsd

    def _before(
        self, number: int, x_nd: Tensor, delta_nd: Tensor | None, made_delta: int, length: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """A decoder layer up to its attention: the residual stream, q_bhsd, k_bhsd and v_bhsd.

        `made_delta` is the border that the layer before asks for beside the gradient of delta.
        """
        qkv, heads = self.linears[number]["qkv"], self.base.config.num_attention_heads
        x_nd, normed_nd = _add_norm(self.modules[number].ln_1, x_nd, delta_nd, qkv.border, made_delta)
        return x_nd, head_split(qkv(normed_nd, not self.recomputes), length, heads, heads, qkv.border)

    def _after(self, number: int, x_nd: Tensor, out_bhsd: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of the layer: the residual stream, and what its feed-forward part adds to it."""
        module: Any = self.modules[number]
        _, out, up, down = self.linears[number].values()
        delta_nd = module.attn.resid_dropout(out(out_bhsd.transpose(1, 2).reshape(len(x_nd), -1)))
        x_nd, normed_nd = _add_norm(module.ln_2, x_nd, delta_nd, up.border, out.border)
        hidden_nf = gelu(up(normed_nd), TANH[self.base.config.activation_function], down.border, up.border)
        return x_nd, module.mlp.dropout(down(hidden_nf, not self.recomputes))


def _add_norm(norm: Any, x_nd: Tensor, delta_nd: Tensor | None, border: int, grad_border: int) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x_nd, delta_nd, norm.weight, norm.bias, norm.eps, "sum", border, grad_border)
