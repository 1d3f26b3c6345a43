"""A model with its loss: equal to transformers' own loss, with and without adapters, for each head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_fixtures import Rows, attended, task_of, tiny, token_ids

from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.models.objective import Objective, unwrapped


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_modelling_is_transformers_loss(family: str) -> None:
    model, twin = attended(family), tiny(family)
    ids_bs = token_ids(3, 10)
    targets_bs = torch.roll(ids_bs, -1, dims=1)
    targets_bs[:, -1] = -100  # transformers shifts its labels itself, so its last position predicts nothing
    loss_sum, correct = Objective(model, "language_modeling", "torch")(input_ids=ids_bs, targets=targets_bs)
    assert correct is None and loss_sum.dtype is torch.float32
    torch.testing.assert_close(loss_sum / 27, twin(input_ids=ids_bs, labels=ids_bs).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2-classifier"])
def test_classification_is_transformers_loss_and_its_hits(family: str) -> None:
    model, twin = attended(family), tiny(family)
    batch = Rows(token_ids(5, 12), lengths=[12, 7, 4, 9, 12], labels=[0, 1, 2, 1, 0]).collate("train", range(5))
    targets_b = batch["targets"]
    loss_sum, correct = Objective(model, "classification", "torch")(**batch)
    theirs = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=targets_b)
    torch.testing.assert_close(loss_sum / 5, theirs.loss, rtol=1e-4, atol=1e-5)
    assert correct == (theirs.logits.argmax(-1) == targets_b).sum()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_adapters_act_inside_the_model_that_is_called(family: str) -> None:
    """The objective calls the model under PEFT's wrapper: adapters in its layers must still act and get gradients."""
    labels = None if task_of(family) == "language_modeling" else [0, 1, 2]
    batch = Rows(token_ids(3, 8), labels=labels).collate("train", range(3))
    plain, _ = Objective(attended(family), task_of(family), "torch")(**batch)
    model = Lora(LoraConfig(kind="lora", rank=2)).prepare(attended(family))
    objective = Objective(model, task_of(family), "torch")
    assert type(unwrapped(model)) is type(tiny(family)) and unwrapped(unwrapped(model)) is unwrapped(model)
    start, _ = objective(**batch)
    assert torch.equal(start, plain)
    start.backward()
    matrices = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert matrices and all(p.grad is not None and p.grad.abs().sum() > 0 for p in matrices)
    with torch.no_grad():
        for matrix in matrices:
            matrix.normal_()
    assert not torch.allclose(objective(**batch)[0], plain)


@pytest.mark.parametrize("kind", ["adapted", "biased"])
def test_an_output_layer_that_cannot_be_fused_is_computed_as_it_stands(kind: str) -> None:
    model = attended("llama")
    if kind == "adapted":
        model = Lora(LoraConfig(kind="lora", rank=2, targets=("lm_head",))).prepare(model)
        nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    else:
        head = nn.Linear(32, 48)
        model.set_output_embeddings(head)
    batch = Rows(token_ids(2, 6)).collate("train", range(2))
    logits_bsv = unwrapped(model)(input_ids=batch["input_ids"]).logits
    expected = F.cross_entropy(logits_bsv.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(Objective(model, "language_modeling", "torch")(**batch)[0], expected)
