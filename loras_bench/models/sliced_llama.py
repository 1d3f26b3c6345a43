"""Contextual sparsity in the forward passes of transformers' Llama: plain torch, on any device.

The reference of models/fused_llama.py, with the gradients that autograd finds. What a context token leaves out of a
frozen weight is sliced out of the weight; adapters are computed beside it, on whole inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loras_bench.kernels.linear import read_layer
from loras_bench.kernels.sliced_parts import Rows
from loras_bench.sparsity.contextual import AttentionChannels, BatchTokens, ContextualSparsity


def slice_modules(base: Any, sparsity: ContextualSparsity) -> Callable[[], None]:
    """Put sliced forward passes into the sparse layers of a base model with `ModelAttention`; returns what ends it."""
    sliced: list[nn.Module] = []
    for number, layer in enumerate(base.layers):
        if sparsity.schedule[number].attention:
            layer.self_attn.forward = SlicedAttention(layer.self_attn, sparsity)
            sliced.append(layer.self_attn)
        if sparsity.schedule[number].feed_forward:
            layer.mlp.forward = SlicedFeedForward(layer.mlp, number, sparsity)
            sliced.append(layer.mlp)

    def remove() -> None:
        for module in sliced:
            del module.forward

    return remove


class SlicedAttention:
    """The forward pass of a LlamaAttention whose context tokens use only kept channels of q, k, v and o."""

    def __init__(self, module: Any, sparsity: ContextualSparsity) -> None:
        self.module, self.sparsity, self.whole = module, sparsity, module.forward

    def __call__(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        """As the module's own, without a cache."""
        module, tokens = self.module, self.sparsity.tokens
        if tokens is None:
            return self.whole(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)  # type: ignore[no-any-return]
        x = _rows(hidden_states, tokens)
        channels = self.sparsity.attention(module.layer_idx, torch.cat(x), tokens)
        assert isinstance(channels, AttentionChannels)
        outputs = zip((module.q_proj, module.k_proj, module.v_proj), channels, strict=False)
        shape = *hidden_states.shape[:2], -1, module.head_dim
        q_bhsd, k_bgsd, v_bgsd = (
            _in_order(Rows(proj(x.dense), _outputs(proj, x.context, kept)), tokens).view(shape).transpose(1, 2)
            for proj, kept in outputs
        )
        q_bhsd, k_bgsd = apply_rotary_pos_emb(q_bhsd, k_bgsd, *position_embeddings)
        out_bhsd = module.model_attention.attend(
            module.layer_idx, q_bhsd, k_bgsd, v_bgsd, kwargs["attention_batch"], module.scaling
        )
        out = _rows(out_bhsd.transpose(1, 2).flatten(2), tokens)
        y = Rows(module.o_proj(out.dense), _inputs(module.o_proj, out.context, channels.output))
        return _in_order(y, tokens).view_as(hidden_states), None


class SlicedFeedForward:
    """The forward pass of a LlamaMLP whose context tokens use only kept hidden channels."""

    def __init__(self, module: Any, number: int, sparsity: ContextualSparsity) -> None:
        self.module, self.number, self.sparsity, self.whole = module, number, sparsity, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        """As the module's own."""
        module, tokens = self.module, self.sparsity.tokens
        if tokens is None:
            return self.whole(x)  # type: ignore[no-any-return]
        rows = _rows(x, tokens)
        kept_2c = self.sparsity.feed_forward(self.number, torch.cat(rows), tokens)
        assert kept_2c is not None
        kept_c = kept_2c[0]
        gate, up = (_outputs(layer, rows.context, kept_c) for layer in (module.gate_proj, module.up_proj))
        y = Rows(self.whole(rows.dense), _inputs(module.down_proj, F.silu(gate) * up, kept_c))
        return _in_order(y, tokens).view_as(x)


def _outputs(module: nn.Module, x_tk: Tensor, kept_c: Tensor) -> Tensor:
    """The module's outputs (t, n), those of the base only at the kept channels."""
    layer = read_layer(module)
    bias_c = None if layer.bias is None else layer.bias.index_select(0, kept_c)
    y_tc = F.linear(x_tk, layer.weight.index_select(0, kept_c), bias_c)
    y_tn = y_tc.new_zeros(len(x_tk), layer.shape[0]).index_copy(1, kept_c, y_tc)
    return y_tn if layer.a is None else y_tn + _adapter(layer, x_tk)


def _inputs(module: nn.Module, x_tk: Tensor, kept_c: Tensor) -> Tensor:
    """The module's outputs (t, n), the base's from the kept channels of x alone."""
    layer = read_layer(module)
    y_tn = F.linear(x_tk.index_select(1, kept_c), layer.weight.index_select(1, kept_c), layer.bias)
    return y_tn if layer.a is None else y_tn + _adapter(layer, x_tk)


def _adapter(layer: Any, x_tk: Tensor) -> Tensor:
    y_tn: Tensor = F.linear(F.linear(x_tk, layer.a), layer.b) * layer.scaling
    return y_tn


def _rows(x_bsd: Tensor, tokens: BatchTokens) -> Rows:
    """Dense and context tokens of a batch, in their order."""
    x_td = x_bsd.flatten(0, 1)
    if tokens.order_t is not None:
        x_td = x_td.index_select(0, tokens.order_t)
    return Rows(x_td[: tokens.dense], x_td[tokens.dense :])


def _in_order(rows: Rows, tokens: BatchTokens) -> Tensor:
    """All tokens as they stand in the batch: (t, d)."""
    y_td = torch.cat(rows)
    return y_td if tokens.place_t is None else y_td.index_select(0, tokens.place_t)
