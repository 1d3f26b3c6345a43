"""The forward pass of a transformers Llama as a chain of fused operations.

A layer is: add + norm -> q/k/v -> rotary embedding -> attention -> output -> add + norm -> gate/up -> SwiGLU -> down.
The residual stream travels as (x, delta), so that every addition is part of the norm after it. Importing it needs
Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from loras_bench.kernels.activations import swiglu
from loras_bench.kernels.rms_norm import add_rms_norm
from loras_bench.kernels.rotary import rotary_split
from loras_bench.models.fused import FusedForward, refuse_unsupported

if TYPE_CHECKING:
    from loras_bench.attention.binding import AttentionBatch


class FusedLlama(FusedForward):
    """The fused forward pass of a LlamaModel: `install` puts it in place of transformers', `remove` takes it out."""

    groups: ClassVar = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }

    def __init__(self, base: Any) -> None:
        super().__init__(base, base, base.layers)

    @staticmethod
    def why_not(config: Any) -> str | None:
        if config.model_type != "llama":
            return f"this fused forward pass is Llama's, the model is of type {config.model_type}"
        if config.hidden_act != "silu":
            return f"the fused feed-forward layer is SwiGLU, the model's activation is {config.hidden_act}"
        if config.attention_dropout:
            return "dropout on attention weights is not supported"
        if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0 or config.head_dim % 2:
            return "the fused rotary embedding turns whole heads of an even width"
        if config.rope_parameters.get("rope_type") in ("dynamic", "longrope"):
            return "the rotary frequencies depend on the length of the batch, which the host would wait for"
        if config.pretraining_tp != 1:
            return "pretraining_tp slices the linear layers"
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        attention_batch: AttentionBatch,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel's, without a cache; padding and documents are read from `attention_batch` alone."""
        refuse_unsupported(past_key_values, kwargs)
        x_bsd = self.base.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x_bsd.shape[1], device=x_bsd.device)[None]
        angles = self.base.rotary_emb(x_bsd, position_ids=position_ids)
        before, after = self.runner(self._before), self.runner(self._after)
        x_nd, delta_nd, made_delta = x_bsd.flatten(0, 1), None, 0
        for number, groups in enumerate(self.linears):
            x_nd, (q_bhsd, k_bgsd, v_bgsd) = before(number, x_nd, delta_nd, made_delta, angles)
            module: Any = self.modules[number]
            out_bhsd = self.attention.attend(number, q_bhsd, k_bgsd, v_bgsd, attention_batch, module.self_attn.scaling)
            x_nd, delta_nd = after(number, x_nd, out_bhsd)
            made_delta = groups["down"].border
        _, hidden_nd = _add_norm(self.base.norm, x_nd, delta_nd, 0, made_delta)
        return BaseModelOutputWithPast(last_hidden_state=hidden_nd.view(x_bsd.shape))

    def _before(
        self, number: int, x_nd: Tensor, delta_nd: Tensor | None, made_delta: int, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """A decoder layer up to its attention: the residual stream, q_bhsd, k_bgsd and v_bgsd.

        `made_delta` is the border that the layer before asks for beside the gradient of delta.
        """
        qkv, config = self.linears[number]["qkv"], self.base.config
        x_nd, normed_nd = _add_norm(self.modules[number].input_layernorm, x_nd, delta_nd, qkv.border, made_delta)
        heads = config.num_attention_heads, config.num_key_value_heads
        return x_nd, rotary_split(qkv(normed_nd, not self.recomputes), *angles, *heads, qkv.border)

    def _after(self, number: int, x_nd: Tensor, out_bhsd: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of the layer: the residual stream, and what its feed-forward part adds to it."""
        module: Any = self.modules[number]
        _, out, gate_up, down = self.linears[number].values()
        delta_nd = out(out_bhsd.transpose(1, 2).reshape(len(x_nd), -1))
        x_nd, normed_nd = _add_norm(module.post_attention_layernorm, x_nd, delta_nd, gate_up.border, out.border)
        hidden_nf = swiglu(gate_up(normed_nd), down.border, gate_up.border)
        return x_nd, down(hidden_nf, not self.recomputes)


def _add_norm(norm: Any, x_nd: Tensor, delta_nd: Tensor | None, border: int, grad_border: int) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x_nd, delta_nd, norm.weight, norm.variance_epsilon, border, grad_border)
