"""The forward pass of a transformers Llama as a chain of fused operations.

A layer is: add + norm -> q/k/v -> rotary embedding -> attention -> output -> add + norm -> gate/up -> SwiGLU -> down.
The residual stream travels as (x, delta), so that every addition is part of the norm after it. Under contextual
sparsity it travels with the dense tokens first, and attention alone sees the order of the batch (docs/kernels.md,
"Sliced products"). Importing it needs Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from loras_bench.errors import ConfigError
from loras_bench.kernels.activations import swiglu
from loras_bench.kernels.bordered import take_rows
from loras_bench.kernels.rms_norm import add_rms_norm
from loras_bench.kernels.rotary import rotary_split
from loras_bench.kernels.sliced import narrow_inputs, narrow_outputs, sliced_inputs, sliced_outputs
from loras_bench.kernels.sliced_parts import Rows
from loras_bench.models.fused import FusedForward, Separate, refuse_unsupported
from loras_bench.sparsity.contextual import BatchTokens, ContextualSparsity

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
        self.sparsity = ContextualSparsity.of(base)
        for groups, shares in zip(self.linears, self.sparsity.schedule if self.sparsity else (), strict=False):
            if any(shares) and (reasons := [group.reason for group in groups.values() if isinstance(group, Separate)]):
                raise ConfigError(
                    f"sparse_lora: a sparse layer cannot be fused: {reasons[0]}", "use plain `lora` on it"
                )

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
        tokens = None if self.sparsity is None else self.sparsity.tokens
        x_bsd = self.base.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x_bsd.shape[1], device=x_bsd.device)[None]
        angles = self.base.rotary_emb(x_bsd, position_ids=position_ids)
        before, after = self.runner(self._before), self.runner(self._after)
        x_nd, delta_nd, made_delta = _dense_first(x_bsd.flatten(0, 1), tokens), None, 0
        for number, groups in enumerate(self.linears):
            x_nd, (q_bhsd, k_bgsd, v_bgsd), kept_c = before(number, x_nd, delta_nd, made_delta, angles, tokens)
            module: Any = self.modules[number]
            out_bhsd = self.attention.attend(number, q_bhsd, k_bgsd, v_bgsd, attention_batch, module.self_attn.scaling)
            x_nd, delta_nd = after(number, x_nd, out_bhsd, kept_c, tokens)
            made_delta = groups["down"].border
        _, hidden_nd = _add_norm(self.base.norm, x_nd, delta_nd, 0, made_delta)
        if tokens is not None and tokens.order_t is not None and tokens.place_t is not None:
            hidden_nd = take_rows(hidden_nd, tokens.place_t, tokens.order_t)
        return BaseModelOutputWithPast(last_hidden_state=hidden_nd.view(x_bsd.shape))

    def _before(
        self,
        number: int,
        x_nd: Tensor,
        delta_nd: Tensor | None,
        made_delta: int,
        angles: tuple[Tensor, Tensor],
        tokens: BatchTokens | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """A decoder layer up to its attention.

        `made_delta` is the border that the layer before asks for beside the gradient of delta.

        Returns:
            The residual stream; q_bhsd, k_bgsd and v_bgsd in the order of the batch; and of attention's output the
            channels that context tokens keep, None for all.
        """
        qkv = self._group(number, "qkv")
        x_nd, normed_nd = _add_norm(self.modules[number].input_layernorm, x_nd, delta_nd, qkv.border, made_delta)
        channels = self.sparsity.attention(number, normed_nd, tokens) if self.sparsity and tokens else None
        if channels is None or tokens is None:
            qkv_nd = qkv(normed_nd, not self.recomputes)
        else:
            qkv_nd = sliced_outputs(qkv, normed_nd, tokens.dense, channels.qkv, not self.recomputes)
        heads = self.base.config.num_attention_heads, self.base.config.num_key_value_heads
        order_n = None if tokens is None else tokens.order_t
        split = rotary_split(qkv_nd, *angles, *heads, qkv.border, order_n)
        return x_nd, split, None if channels is None else channels.output

    def _after(
        self, number: int, x_nd: Tensor, out_bhsd: Tensor, kept_c: Tensor | None, tokens: BatchTokens | None
    ) -> tuple[Tensor, Tensor]:
        """The rest of the layer: the residual stream, and what its feed-forward part adds to it."""
        module: Any = self.modules[number]
        out, gate_up = self._group(number, "out"), self._group(number, "gate_up")
        out_nd = _dense_first(out_bhsd.transpose(1, 2).reshape(len(x_nd), -1), tokens, out.border)
        delta_nd = out(out_nd) if kept_c is None or tokens is None else sliced_inputs(out, out_nd, tokens.dense, kept_c)
        x_nd, normed_nd = _add_norm(module.post_attention_layernorm, x_nd, delta_nd, gate_up.border, out.border)
        return x_nd, self._feed_forward(number, normed_nd, tokens)

    def _group(self, number: int, name: str) -> Any:
        """A linear group of a layer; `Separate` ones are called alike, and are in no sparse layer."""
        return self.linears[number][name]

    def _feed_forward(self, number: int, x_nd: Tensor, tokens: BatchTokens | None) -> Tensor:
        """Gate and up, SwiGLU, and down, from normalised rows.

        Hidden channels that are not kept are zero for context tokens, and are not even stored, unless adapters on all
        of gate, up and down make them something else.
        """
        gate_up, down = self._group(number, "gate_up"), self._group(number, "down")
        kept_2c = self.sparsity.feed_forward(number, x_nd, tokens) if self.sparsity and tokens else None
        if kept_2c is None or tokens is None:
            hidden_nf = swiglu(gate_up(x_nd), down.border, gate_up.border)
            return down(hidden_nf, not self.recomputes)  # type: ignore[no-any-return]
        if gate_up.border and down.border:
            gate_up_nf = sliced_outputs(gate_up, x_nd, tokens.dense, kept_2c.flatten())
            hidden_nf = swiglu(gate_up_nf, down.border, gate_up.border)
            return sliced_inputs(down, hidden_nf, tokens.dense, kept_2c[0], not self.recomputes)
        parts = narrow_outputs(gate_up, x_nd, tokens.dense, kept_2c)
        hidden = Rows(*(swiglu(part, down.border, gate_up.border) for part in parts))
        return narrow_inputs(down, hidden, kept_2c[0], not self.recomputes)


def _dense_first(x_nd: Tensor, tokens: BatchTokens | None, border: int = 0) -> Tensor:
    """The rows of a batch in the order of the residual stream, with a border if they have to be moved."""
    if tokens is None or tokens.order_t is None or tokens.place_t is None:
        return x_nd
    return take_rows(x_nd, tokens.order_t, tokens.place_t, border)


def _add_norm(norm: Any, x_nd: Tensor, delta_nd: Tensor | None, border: int, grad_border: int) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x_nd, delta_nd, norm.weight, norm.variance_epsilon, border, grad_border)
