"""The fused forward passes on a GPU in bfloat16: no further from float32 than transformers is, at real widths."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from fused_checks import checkpointed, outcome, prepared, text_batch
from torch import Tensor, nn
from training_fixtures import Rows, task_of, token_ids

pytest.importorskip("triton")
from loras_bench.models.fused_bert import FusedBert
from loras_bench.models.fused_gpt2 import FusedGpt2
from loras_bench.models.fused_llama import FusedLlama
from loras_bench.models.objective import unwrapped

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (FusedLlama, SIZES),
    "gpt2": (FusedGpt2, {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_inner": 768, "n_positions": 512}),
    "bert": (FusedBert, SIZES),
}


def model_of(family: str, lora: bool, dtype: torch.dtype) -> nn.Module:
    """The same weights whatever the type: those that bfloat16 can hold, as small as those of trained models."""
    model = prepared(family, {"rank": 16} if lora else None, CUDA, **FAMILIES[family][1])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 0.3
    return model.to(CUDA, torch.bfloat16).to(dtype)


def batch_of(family: str, kind: Literal["packed", "padded"]) -> dict[str, Tensor]:
    if family == "bert":
        rows = Rows(token_ids(3, 384), lengths=[384, 200, 61], labels=[0, 1, 2], packed=kind == "packed")
        batch = rows.collate("train", range(3))
    else:
        batch = text_batch(kind, twelfth=32)
    return {name: tensor.cuda() for name, tensor in batch.items()}


def distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative, of everything but the biases of keys, which shift all scores of a query alike: in theory 0."""
    assert found.keys() == truth.keys()
    return {
        name: float(
            _without_keys(name, found[name].float() - truth[name]).norm() / _without_keys(name, truth[name]).norm()
        )
        for name in truth
        if "key.bias" not in name
    }


def _without_keys(name: str, tensor: Tensor) -> Tensor:
    """GPT-2's bias of queries, keys and values loses its second third."""
    return torch.cat(tensor.chunk(3)[::2]) if "c_attn.bias" in name else tensor


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_about_as_near_to_float32_as_those_of_transformers(
    family: str, lora: bool, kind: Any, checkpointing: bool
) -> None:
    """Within 1.5 times their distance and 0.002."""
    batch, task = batch_of(family, kind), task_of(family)
    truth = outcome(model_of(family, lora, torch.float32), batch, task)
    theirs = distances(outcome(model_of(family, lora, torch.bfloat16), batch, task), truth)
    model = model_of(family, lora, torch.bfloat16)
    fused = FAMILIES[family][0].install(unwrapped(model).base_model)
    if checkpointing:
        checkpointed(model, fused)
    loss = "fused" if task == "language_modeling" else "torch"
    ours = distances(outcome(model, batch, task, loss), truth)
    far = {name: (ours[name], theirs[name]) for name in ours if ours[name] > 1.5 * theirs[name] + 2e-3}
    assert far == {}
    assert ours["hidden"] < 0.05
