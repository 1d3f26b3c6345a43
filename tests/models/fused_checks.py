"""What the tests of the fused forward passes share: models and batches, what a step leaves, and what removal must."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from training_fixtures import attended, token_ids

from loras_bench.catalog import Task
from loras_bench.kernels import bordered, linear
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.models.objective import Objective, unwrapped


def prepared(family: str, lora: dict[str, Any] | None, device: torch.device | None = None, **options: Any) -> nn.Module:
    """A tiny model in training mode whose norms are not one, and whose biases and second factors are not zero.

    Args:
        family: As `tiny` takes it.
        lora: Options of LoRA; None trains everything.
        device: Where it will run; it stays on the CPU.
        **options: Of the model's configuration.
    """
    model: nn.Module = attended(family, device, **options)
    if lora is not None:
        model = Lora(LoraConfig.model_validate({"kind": "lora", "rank": 4, "alpha": 12} | lora)).prepare(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def text_batch(kind: Literal["plain", "packed", "padded"], twelfth: int = 1) -> dict[str, Tensor]:
    """Two rows of 12 * `twelfth` tokens of language modelling: whole, of two documents each, or one of them padded."""
    length = 12 * twelfth
    ids_bs = token_ids(2, length)
    batch = {"input_ids": ids_bs, "targets": torch.roll(ids_bs, -1, dims=1)}
    position_s = torch.arange(length)
    if kind == "packed":
        second_b1 = torch.tensor([[5], [9]]) * twelfth
        document_bs = (position_s >= second_b1).long()
        batch |= {"document_ids": document_bs, "position_ids": position_s - document_bs * second_b1}
    if kind == "padded":
        mask_bs = position_s < torch.tensor([[12], [7]]) * twelfth
        batch |= {"attention_mask": mask_bs, "targets": batch["targets"].masked_fill(~mask_bs, -100)}
    return batch


def outcome(
    model: nn.Module,
    batch: dict[str, Tensor],
    task: Task = "language_modeling",
    loss: Literal["torch", "fused"] = "torch",
) -> dict[str, Tensor]:
    """The loss, the last hidden states of real tokens, and all gradients by name."""
    model.zero_grad()
    seen: list[Tensor] = []
    hook = unwrapped(model).base_model.register_forward_hook(lambda module, args, out: seen.append(out[0].detach()))
    summed, _ = Objective(model, task, loss)(**batch)
    summed.backward()
    hook.remove()
    real_bs = batch.get("attention_mask", torch.ones_like(batch["input_ids"], dtype=torch.bool))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": summed.detach(), "hidden": seen[0][real_bs], **found}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], noise: float = 0.0) -> None:
    """Equal to 1e-5 of the largest element, and to `noise` of the largest of all where a gradient is 0 in theory."""
    assert got.keys() == expected.keys()
    largest = max(float(theirs.abs().max()) for theirs in expected.values())
    for name, theirs in expected.items():
        atol = 1e-5 * float(theirs.abs().max()) + noise * largest
        torch.testing.assert_close(
            got[name], theirs, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def checkpointed(model: nn.Module, fused: Any) -> list[int]:
    """Make a model checkpoint its layers; the list will hold the layers whose attention is computed, in order."""
    unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
    unwrapped(model).disable_input_require_grads()
    calls: list[int] = []
    attend = fused.attention.attend
    fused.attention.attend = lambda layer, *args: calls.append(layer) or attend(layer, *args)
    return calls


def found_borders(model: nn.Module, batch: dict[str, Tensor], patch: pytest.MonkeyPatch) -> list[bool]:
    """For each input and output gradient of the fused products in a step: whether it had room for the low-rank one."""
    kept: dict[int, tuple[Tensor, bool]] = {}  # kept alive, so that no address comes twice

    def watched(x_nd: Tensor, border: int) -> Tensor | None:
        whole = bordered.with_border(x_nd, border)
        kept[x_nd.data_ptr()] = x_nd, whole is not None
        return whole

    patch.setattr(linear, "with_border", watched)
    outcome(model, batch)
    return [has_border for _, has_border in kept.values()]


def check_removal(family: str, kind: Any, folder: Path) -> None:
    """Saved while fused, and saved, called and merged once it is removed: as if it had never been there."""
    model: Any = prepared(family, {})
    base = unwrapped(model).base_model
    expected = outcome(model, text_batch("plain"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = kind.install(base)
    assert "forward" in vars(base)
    model.save_pretrained(folder / "packed")
    fused.remove()
    assert "forward" not in vars(base)
    assert all(p.is_contiguous() and p._base is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = outcome(model, text_batch("plain"))
    assert all(torch.equal(again[name], expected[name]) for name in expected)

    loaded = PeftModel.from_pretrained(attended(family), folder / "packed")
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name])
    logits = model(input_ids=token_ids(2, 6)).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=token_ids(2, 6)).logits, logits, rtol=1e-4, atol=1e-4)
