"""Whole models with fused LoRA layers against PEFT's: logits, gradients, files; what cannot be fused stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_fixtures import LAYERS, tiny, token_ids

from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.models.fused_linears import FusedLinears

FAMILIES = {"gpt2": 4, "bert": 6, "roberta": 6, "gpt2-classifier": 4}
"""LoRA layers in each layer of the model."""


def adapted(family: str, **fields: Any) -> nn.Module:
    """A model with random adapters, as after a training."""
    model = Lora(LoraConfig.model_validate({"kind": "lora", "rank": 4, "alpha": 6} | fields)).prepare(tiny(family))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients by parameter name."""
    model.zero_grad()
    logits = model(input_ids=token_ids(3, 12), attention_mask=torch.ones(3, 12, dtype=torch.bool)).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(family: str) -> None:
    model = adapted(family)
    logits, gradients = step(model)
    fused = FusedLinears(model)
    assert len(fused) >= FAMILIES[family] * LAYERS and not fused.refusals
    for stage in ("fused", "undone"):
        its_logits, its_gradients = step(model)
        torch.testing.assert_close(its_logits, logits, rtol=1e-5, atol=1e-6, msg=stage)
        assert its_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(its_gradients[name], gradient, rtol=1e-4, atol=1e-7)
        fused.remove()
    assert len(fused) == 0


def operations(out: Tensor) -> set[str]:
    """Names of the functions in the autograd graph of a tensor."""
    found, open_nodes = set(), [out.grad_fn]
    while open_nodes:
        if (node := open_nodes.pop()) is not None:
            found.add(node.name())
            open_nodes += [following for following, _ in node.next_functions]
    return found


def test_the_products_are_the_groups() -> None:
    """A model that silently kept PEFT's forward would pass every comparison."""
    model = adapted("gpt2")
    layer: Any = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    fused = FusedLinears(model)
    x = torch.randn(2, 3, layer.in_features)
    assert "_GroupProductBackward" in operations(layer(x))
    fused.remove()
    assert "_GroupProductBackward" not in operations(layer(x))


def test_layers_with_dropout_keep_pefts_forward() -> None:
    model = adapted("gpt2", dropout=0.1)
    fused = FusedLinears(model)
    assert len(fused) == 0
    assert len(fused.refusals) == 4 * LAYERS and set(fused.refusals.values()) == {"its adapter has dropout"}


def test_files_are_those_of_peft(tmp_path: Path) -> None:
    model: Any = adapted("gpt2")
    model.save_pretrained(tmp_path / "before")
    fused = FusedLinears(model)
    fused.remove()
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
