"""Which layers make one group, and their parameters as views of its matrix: training, saving, merging, unpacking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from linear_checks import Layers, adapt, inputs, make, modules_of, run
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from loras_bench.kernels.linear import LinearGroup, why_not


def storages(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("kind", ["lora", "conv1d", "scalings", "full", "full conv1d"])
def test_packed_parameters_are_views_and_unpacked_ones_their_own(kind: str) -> None:
    model = make(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    group = LinearGroup.of(modules_of(model))
    group.pack()
    assert len(storages(model)) == 2  # the matrix and the biases
    for stage in ("packed", "unpacked"):
        assert dict(model.named_parameters()) == parameters, stage  # the same objects: an optimizer holds them
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items()), stage
        group.unpack()
    assert len(storages(model)) == len(parameters)
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("kind", ["lora", "conv1d", "full", "full conv1d"])
def test_rows_of_what_trains_are_in_one_piece(kind: str) -> None:
    """Else `StridedCopy` could not write the masters back; the gradient of a base weight lies as the weight does."""
    model = make(kind)
    group = LinearGroup.of(modules_of(model))
    group.pack()
    trained = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    assert trained and all(parameter.stride(1) == 1 for parameter in trained)
    x, dy = inputs()
    run(group, model, x, dy)
    if kind.startswith("full"):
        assert all(p.grad is not None and p.grad.stride(1) == 1 for p in trained)


def test_writing_in_place_is_all_an_optimizer_has_to_do() -> None:
    """As `MasterAdamW.write_back` does, and `load_state_dict`."""
    model = make("scalings")
    group = LinearGroup.of(modules_of(model))
    group.pack()
    other = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    x = inputs()[0].detach()
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), [other[name] for name, _ in model.named_parameters()])
        torch.testing.assert_close(group(x), torch.cat([module(x) for module in modules_of(model)], -1))
        model.load_state_dict({name: 2 * tensor for name, tensor in other.items()})
        torch.testing.assert_close(group(x), torch.cat([module(x) for module in modules_of(model)], -1))


@pytest.mark.parametrize("kind", ["lora", "conv1d"])
def test_saving_and_merging_stay_pefts(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    assert isinstance(model, PeftModel)
    group = LinearGroup.of(modules_of(model))
    group.pack()
    x = inputs()[0].detach()
    y = group(x)
    group.unpack()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.q.lora_A.weight"], modules_of(model)[0].lora_A.default.weight)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


def test_what_cannot_be_one_product_says_why() -> None:
    def reason(**fields: Any) -> str | None:
        return why_not(modules_of(adapt(Layers(), **fields)))

    assert reason() is None
    assert "dropout" in str(reason(lora_dropout=0.1))
    assert "variant: Dora" in str(reason(use_dora=True))
    assert "has a bias" in str(reason(lora_bias=True, target_modules=["q"]))
    assert "Embedding" in str(why_not([nn.Embedding(4, 4)]))
    assert "number of inputs" in str(why_not([nn.Linear(4, 4), nn.Linear(5, 4)]))
    several = adapt(Layers())
    several.add_adapter("other", LoraConfig(r=2, target_modules=["q"]))
    several.base_model.set_adapter(["default", "other"])
    assert "2 adapters" in str(why_not(modules_of(several)))
    with pytest.raises(ValueError, match="2 adapters"):
        LinearGroup.of(modules_of(several))
    saved = adapt(Layers(), target_modules=["q"], modules_to_save=["v"])
    assert "ModulesToSaveWrapper is not" in str(why_not(modules_of(saved)))
    merged = adapt(Layers())
    merged.merge_adapter()
    assert "merged" in str(why_not(modules_of(merged)))


def test_misuse_is_refused() -> None:
    model = make("lora")
    group = LinearGroup.of(modules_of(model))
    with pytest.raises(RuntimeError, match="pack"):
        group(inputs()[0])
    modules_of(model)[0].lora_A.float()
    with pytest.raises(ValueError, match="differ in type"):
        group.pack()
