"""The fused encoder of BERT and RoBERTa against transformers': logits, every gradient, packed documents, dropout."""

from __future__ import annotations

from functools import partial
from typing import Any

import fused_checks
import pytest
import torch
from fused_checks import checkpointed, prepared
from torch import Tensor, nn
from training_fixtures import Rows, attended, token_ids

pytest.importorskip("triton")
from loras_bench.attention.patterns import Window
from loras_bench.errors import UserError
from loras_bench.models.fused_bert import FusedBert
from loras_bench.models.objective import unwrapped

ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {  # family, model options, options of LoRA
    "full": ("bert", {}, None),
    "full, roberta": ("roberta", {}, None),
    "full, tanh": ("bert", {"hidden_act": "gelu_new"}, None),
    "lora": ("bert", {}, {}),
    "lora, norms": ("roberta", {}, {"train_norms": True}),
    "lora, some": ("bert", {}, {"targets": ("query", "value")}),
}


def model_of(arm: str, **more: Any) -> nn.Module:
    family, options, lora = ARMS[arm]
    return prepared(family, lora, **options, **more)


def padded_batch() -> dict[str, Tensor]:
    """Three rows of 12, 7 and 4 tokens."""
    return Rows(token_ids(3, 12), lengths=[12, 7, 4], labels=[0, 1, 2]).collate("train", range(3))


def packed_batch() -> dict[str, Tensor]:
    """The same three texts one after the other."""
    batch, lengths = padded_batch(), [12, 7, 4]
    real_bs = batch["attention_mask"]
    ends = torch.tensor(lengths).cumsum(0) - 1
    return {
        "input_ids": batch["input_ids"][real_bs][None],
        "attention_mask": torch.ones(1, sum(lengths), dtype=torch.bool),
        "document_ids": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "starts": ends + 1 - torch.tensor(lengths),
        "ends": ends,
        "targets": batch["targets"],
    }


outcome = partial(fused_checks.outcome, task="classification")
assert_same = partial(fused_checks.assert_same, noise=1e-7)  # the gradients of key biases are 0 in theory


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("batch", [padded_batch, packed_batch], ids=["padded", "packed"])
def test_equals_transformers_in_loss_and_gradients(arm: str, batch: Any) -> None:
    model = model_of(arm)
    expected = outcome(model, batch())
    fused = FusedBert.install(unwrapped(model).base_model)
    assert_same(outcome(model, batch()), expected)
    assert fused.describe() == {"forward": "FusedBert", "fused_groups": 8, "separate_groups": {}}


def test_sparse_patterns_are_asked_layer_by_layer() -> None:
    model = model_of("lora")
    attention = unwrapped(model).base_model.model_attention
    attention.set_patterns([Window(kind="window", half_width=2), Window(kind="window", half_width=1, global_tokens=1)])
    expected = outcome(model, padded_batch())
    FusedBert.install(unwrapped(model).base_model)
    assert_same(outcome(model, padded_batch()), expected)


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_checkpointing_recomputes_the_same_with_the_same_dropout(arm: str) -> None:
    model = model_of(arm, hidden_dropout_prob=0.3)
    fused = FusedBert.install(unwrapped(model).base_model)
    torch.manual_seed(5)
    expected = outcome(model, padded_batch())
    calls = checkpointed(model, fused)
    torch.manual_seed(5)
    assert_same(outcome(model, padded_batch()), expected)
    assert calls == [0, 1], "attention is computed once"


def test_dropout_drops_in_training_alone() -> None:
    model = model_of("full", hidden_dropout_prob=0.5)
    batch = {name: tensor for name, tensor in padded_batch().items() if name != "targets"}
    plain = model.eval()(**batch).logits
    FusedBert.install(unwrapped(model).base_model)
    torch.testing.assert_close(model(**batch).logits, plain)
    torch.manual_seed(0)
    first, second = model.train()(**batch).logits, model(**batch).logits
    assert not torch.allclose(first, second) and not torch.allclose(first, plain)


def test_removed_it_leaves_the_model_as_it_was() -> None:
    model = model_of("lora")
    encoder = unwrapped(model).base_model.encoder
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, outcome(model, padded_batch())
    fused = FusedBert.install(unwrapped(model).base_model)
    assert "forward" in vars(encoder)
    fused.remove()
    assert "forward" not in vars(encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = outcome(model, padded_batch())
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "option, word",
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"attention_probs_dropout_prob": 0.1}, "dropout"),
        ({"hidden_size": 36}, "even"),
    ],
)
def test_models_it_cannot_compute_are_refused_with_the_reason(option: dict[str, Any], word: str) -> None:
    config = attended("bert").config
    assert FusedBert.why_not(config) is None
    for name, value in option.items():
        setattr(config, name, value)
    assert word in str(FusedBert.why_not(config))
    base = attended("llama").base_model
    with pytest.raises(ValueError, match="llama"):
        FusedBert.install(base)


def test_hidden_states_of_every_layer_are_refused() -> None:
    model = attended("bert").eval()
    FusedBert.install(model.base_model)
    for request in ({"output_hidden_states": True}, {"output_attentions": True}):
        with pytest.raises(UserError, match="last hidden states"):
            model(input_ids=token_ids(1, 4), **request)
