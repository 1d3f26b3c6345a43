"""The encoder of a transformers BERT or RoBERTa as a chain of fused operations; embeddings and heads stay theirs.

A layer is: q/k/v -> attention -> output -> add + norm -> up -> GELU -> down -> add + norm. What a norm gives is both
the residual stream and what the next layer reads. Importing it needs Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from loras_bench.kernels.activations import gelu
from loras_bench.kernels.layer_norm import add_layer_norm
from loras_bench.kernels.rotary import head_split
from loras_bench.models.fused import TANH, FusedForward, refuse_unsupported

if TYPE_CHECKING:
    from loras_bench.attention.binding import AttentionBatch


class FusedBert(FusedForward):
    """The fused encoder of a BertModel or RobertaModel. `install` puts it in place, `remove` takes it out."""

    groups: ClassVar = {
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "out": ("attention.output.dense",),
        "up": ("intermediate.dense",),
        "down": ("output.dense",),
    }

    def __init__(self, base: Any) -> None:
        super().__init__(base, base.encoder, base.encoder.layer)

    @staticmethod
    def why_not(config: Any) -> str | None:
        if config.model_type not in ("bert", "roberta"):
            return f"this fused encoder is BERT's, the model is of type {config.model_type}"
        if config.hidden_act not in TANH:
            return f"the fused feed-forward layer is GELU, the model's activation is {config.hidden_act}"
        if config.attention_probs_dropout_prob:
            return "dropout on attention weights is not supported"
        if config.hidden_size // config.num_attention_heads % 2:
            return "the fused split needs heads of an even width"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        attention_batch: AttentionBatch,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As BertEncoder's, without a cache; padding and documents are read from `attention_batch` alone."""
        refuse_unsupported(past_key_values, kwargs)
        before, after = self.runner(self._before), self.runner(self._after)
        x_nd, delta_nd = hidden_states.flatten(0, 1), None
        for number in range(len(self.modules)):
            x_nd, (q_bhsd, k_bhsd, v_bhsd) = before(number, x_nd, delta_nd, attention_batch.length)
            out_bhsd = self.attention.attend(number, q_bhsd, k_bhsd, v_bhsd, attention_batch, q_bhsd.shape[3] ** -0.5)
            x_nd, delta_nd = after(number, x_nd, out_bhsd)
        _, hidden_nd = self._norm_after(len(self.modules) - 1, x_nd, delta_nd, 0)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_nd.view(hidden_states.shape))

    def _before(
        self, number: int, x_nd: Tensor, delta_nd: Tensor | None, length: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The norm that ends the layer before, and this layer up to its attention: residual stream, q, k, v_bhsd.

        So cut, no piece writes into a border of its inputs, which checkpointing forbids.
        """
        qkv, heads = self.linears[number]["qkv"], self.base.config.num_attention_heads
        normed_nd = x_nd
        if delta_nd is not None:
            x_nd, normed_nd = self._norm_after(number - 1, x_nd, delta_nd, qkv.border)
        return x_nd, head_split(qkv(normed_nd, not self.recomputes), length, heads, heads, qkv.border)

    def _after(self, number: int, x_nd: Tensor, out_bhsd: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of the layer up to its last norm: the residual stream and what adds to it."""
        module: Any = self.modules[number]
        _, out, up, down = self.linears[number].values()
        delta_nd = out(out_bhsd.transpose(1, 2).reshape(len(x_nd), -1))
        x_nd, normed_nd = self._add_norm(module.attention.output, x_nd, delta_nd, up.border, out.border)
        hidden_nf = gelu(up(normed_nd), TANH[self.base.config.hidden_act], down.border, up.border)
        return x_nd, down(hidden_nf, not self.recomputes)

    def _norm_after(self, number: int, x_nd: Tensor, delta_nd: Any, border: int) -> tuple[Tensor, Tensor]:
        """The last norm of a layer."""
        module: Any = self.modules[number]
        return self._add_norm(module.output, x_nd, delta_nd, border, self.linears[number]["down"].border)

    def _add_norm(
        self, block: Any, x_nd: Tensor, delta_nd: Tensor, border: int, grad_border: int
    ) -> tuple[Tensor, Tensor]:
        """What BertSelfOutput and BertOutput do after their product."""
        delta_nd = F.dropout(delta_nd, block.dropout.p, training=self.base.training)
        norm = block.LayerNorm
        return add_layer_norm(x_nd, delta_nd, norm.weight, norm.bias, norm.eps, "normed", border, grad_border)
