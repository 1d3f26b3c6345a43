"""The plug into transformers: a registered attention function, a registered mask function, a hook on the base model.

The mask function must be registered too: without one, transformers drops the mask, and a causal model silently sees
its future. Ours hands the (batch, length) padding mask through; causality comes from the pattern's binding. The hook
turns the arguments of the base model into one `AttentionBatch`, which transformers passes on to every layer.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loras_bench.attention.binding import AttentionBatch
from loras_bench.attention.families import check_architecture, is_causal
from loras_bench.errors import UserError

if TYPE_CHECKING:
    from loras_bench.attention.dense import DenseKernel
    from loras_bench.attention.dispatch import ModelAttention

NAME = "loras_bench"
"""Name of our attention implementation in transformers' registry."""


def plug_in(
    kind: type[ModelAttention], model: nn.Module, dense_kernel: DenseKernel, device: torch.device | None
) -> ModelAttention:
    """Create the attention of a model and connect it; see `ModelAttention.install`."""
    config: Any = model.config
    check_architecture(config)
    layers = [m for m in model.modules() if hasattr(m, "is_causal") and isinstance(getattr(m, "layer_idx", None), int)]
    causal = is_causal(config)
    if [m.layer_idx for m in layers] != list(range(config.num_hidden_layers)):
        raise UserError(f"the attention layers of this {config.model_type} model were not found")
    if any(bool(m.is_causal) != causal for m in layers) or getattr(config, "is_causal", causal) != causal:
        raise UserError("the model's layers and its configuration disagree on causality")
    base: Any = model.base_model
    if hasattr(base, "model_attention"):
        raise RuntimeError("ModelAttention is installed in this model already")

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = kind(len(layers), causal, head_dim, device or base.device, dense_kernel)
    base.model_attention = attention
    for layer in layers:
        attention.take(layer)
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    base.register_forward_pre_hook(
        partial(announce_batch, list(inspect.signature(base.forward).parameters)), with_kwargs=True
    )
    return attention


def announce_batch(
    names: list[str], base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the base model: read the facts of the batch once, and hand them to all layers.

    Besides the model's own arguments a caller may pass `document_ids` (batch, length), which keep packed documents
    apart, and `global_mask` (batch, length), true at tokens that are global in their sample.
    """
    attention: ModelAttention = base.model_attention  # type: ignore[assignment]
    given = dict(zip(names, args, strict=False)) | kwargs
    ids, padding_bs = given.get("input_ids"), given.get("attention_mask")
    tokens = ids if ids is not None else given["inputs_embeds"]
    given["attention_batch"] = attention.batch(
        tokens.shape[1],
        tokens.device,
        padding_bs=padding_bs,
        document_bs=given.pop("document_ids", None),
        global_bs=given.pop("global_mask", None),
        input_ids_bs=ids,
    )
    if padding_bs is None:  # without a mask, transformers looks at the positions for packing, which waits for the GPU
        given["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return (), given


# a compiled layer is compiled around the core, which brings its own compiled kernel
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_batch: AttentionBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: (batch, heads, length, head_dim) -> (batch, length, heads, head_dim)."""
    attention: ModelAttention = module.model_attention  # type: ignore[assignment]
    if dropout:
        raise UserError("dropout on attention weights is not supported", "set it to 0 in the model's configuration")
    if attention_batch is None:  # a layer called by itself, outside its model
        attention_batch = attention.batch(query.shape[2], query.device, padding_bs=attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_bhsd = attention.attend(int(module.layer_idx), query, key, value, attention_batch, scale)  # type: ignore[arg-type]
    return out_bhsd.transpose(1, 2).contiguous(), None


def mask_function(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """What transformers calls once a forward pass to build its mask: the padding mask as it is, or None."""
    return attention_mask
