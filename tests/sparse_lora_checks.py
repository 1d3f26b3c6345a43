"""What the tests of SparseLoRA share: models, batches with prompts, and the network that it stands for, by masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from training_fixtures import Rows, tiny, token_ids

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.data import IGNORED
from loras_bench.methods import sparse_lora
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.methods.sparse_lora import SparseLora, SparseLoraConfig
from loras_bench.models.objective import Objective, unwrapped
from loras_bench.sparsity.contextual import ContextualSparsity

SCHEDULE = {"0": {"feed_forward": 0.9}, "0-1": {"attention": 0.75}, 1: {"feed_forward": 0.5}}
ADAPTED = ["all-linear", "attention", "feed-forward", ("q_proj", "down_proj")]


def method(**fields: Any) -> SparseLora:
    settings = {"kind": "sparse_lora", "layers": SCHEDULE, "rank": 4} | fields
    return SparseLora(SparseLoraConfig.model_validate(settings))


def adapted(
    targets: Any = "all-linear", dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> nn.Module:
    """A tiny Llama in training mode with LoRA, all of whose parameters are random: as after some steps."""
    config = LoraConfig.model_validate({"kind": "lora", "rank": 4, "alpha": 12, "targets": targets})
    base = tiny("llama", **options)
    ModelAttention.install(base, device=torch.device(device))
    model = Lora(config).prepare(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).train()


def sparsity_of(model: nn.Module) -> ContextualSparsity:
    found = ContextualSparsity.of(unwrapped(model).base_model)
    assert found is not None
    return found


class PromptRows(Rows):
    """Rows of tokens of which the first, a different number in each row, are a prompt without labels."""

    def __init__(self, ids_ns: Tensor, prompts: Sequence[int], lengths: Sequence[int] | None = None) -> None:
        super().__init__(ids_ns, lengths)
        self.prompts = np.asarray(prompts)

    def collate(self, split: str, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        batch = super().collate(split, indices)
        prompt_b1 = torch.as_tensor(self.prompts[list(indices)])[:, None]
        batch["targets"] = batch["targets"].masked_fill(torch.arange(self.ids_ns.shape[1]) < prompt_b1, IGNORED)
        mask_bs = torch.arange(self.ids_ns.shape[1]) < torch.as_tensor(self.lengths[list(indices)])[:, None]
        return batch if mask_bs.all() else batch | {"attention_mask": mask_bs}


def batch_of(prompts: Sequence[int] = (9, 6), lengths: Sequence[int] = (16, 12)) -> dict[str, Tensor]:
    """Two rows, padded on the right."""
    return PromptRows(token_ids(2, 16), prompts, lengths).collate("train", [0, 1])


def with_tensors(one: SparseLora, batch: dict[str, Tensor], multiple: int = 4) -> dict[str, Tensor]:
    """The batch with the method's tensors, dense rows in multiples of so few that tiny batches are not all dense."""
    before, sparse_lora.ROW_MULTIPLE = sparse_lora.ROW_MULTIPLE, multiple
    try:
        return batch | one.batch_tensors(batch)
    finally:
        sparse_lora.ROW_MULTIPLE = before


def outcome(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradients by name."""
    model.zero_grad()
    loss, _ = Objective(model, "language_modeling", "torch")(**batch)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@contextmanager
def watched(model: nn.Module) -> Iterator[tuple[dict[int, tuple[Tensor, ...]], dict[int, Tensor]]]:
    """The channels that the layers choose inside the `with` block: of q, k, v and o, and of the feed-forward layers."""
    sparsity = sparsity_of(model)
    attention, feed_forward = sparsity.attention, sparsity.feed_forward
    chosen: tuple[dict[int, Any], dict[int, Any]] = ({}, {})

    def keep(found: dict[int, Any], call: Any, part: int | slice) -> Any:
        def watching(layer: int, *args: Any) -> Any:
            channels = call(layer, *args)
            found.setdefault(layer, None if channels is None else channels[part])
            return channels

        return watching

    sparsity.attention = keep(chosen[0], attention, slice(4))  # type: ignore[method-assign]
    sparsity.feed_forward = keep(chosen[1], feed_forward, 0)  # type: ignore[method-assign]
    try:
        yield chosen
    finally:
        sparsity.attention, sparsity.feed_forward = attention, feed_forward  # type: ignore[method-assign]


def mask_bases(
    model: nn.Module, context_bs: Tensor, attention: dict[int, tuple[Tensor, ...]], feed_forward: dict[int, Tensor]
) -> None:
    """Make plain LoRA the sliced network: the channels of frozen layers that are not kept are zero for context tokens.

    Outputs of q, k, v, gate and up, and inputs of o and down, by hooks on the frozen layers alone.
    """

    def hooked(module: nn.Module, kept_c: Tensor | None, outputs: bool) -> None:
        base: Any = getattr(module, "base_layer", module)
        if kept_c is None:
            return
        width = base.out_features if outputs else base.in_features
        kept_w = torch.zeros(width, dtype=base.weight.dtype).index_fill(0, kept_c, 1.0)
        mask_bsw = torch.where(context_bs[..., None], kept_w, torch.ones_like(kept_w))
        if outputs:
            base.register_forward_hook(lambda module, args, y: y * mask_bsw)
        else:
            base.register_forward_pre_hook(lambda module, args: (args[0] * mask_bsw,))

    for number, layer in enumerate(unwrapped(model).base_model.layers):
        own = attention.get(number) or (None,) * 4
        for name, kept_c in zip("qkvo", own, strict=True):
            hooked(layer.self_attn.get_submodule(f"{name}_proj"), kept_c, outputs=name != "o")
        for name in ("gate", "up", "down"):
            hooked(layer.mlp.get_submodule(f"{name}_proj"), feed_forward.get(number), outputs=name != "down")


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], forward: float, gradients: float) -> None:
    """Relative to the largest element of each."""
    assert got.keys() == expected.keys()
    for name, theirs in expected.items():
        limit = (forward if name == "loss" else gradients) * float(theirs.abs().max())
        assert float((got[name] - theirs).abs().max()) <= limit, name
