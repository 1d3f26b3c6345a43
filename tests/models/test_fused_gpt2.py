"""The fused forward pass of GPT-2 against transformers': outputs, every gradient, dropout, saving and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_checks import assert_same, check_removal, checkpointed, found_borders, outcome, prepared, text_batch
from torch import nn
from training_fixtures import GPT2, NOTES, Rows, attended, build_run, experiment, make_loop, token_ids

pytest.importorskip("triton")
from loras_bench.attention.patterns import Window
from loras_bench.errors import UserError
from loras_bench.models.fused_gpt2 import FusedGpt2
from loras_bench.models.objective import unwrapped
from loras_bench.training import StepPlan

ARMS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {  # model options, options of LoRA
    "full": ({}, None),
    "full, exact GELU": ({"activation_function": "gelu"}, None),
    "full, untied": ({"tie_word_embeddings": False}, None),
    "full, unscaled": ({"scale_attn_weights": False}, None),
    "full, scaled by layer": ({"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, None),
    "lora": ({}, {}),
    "lora, norms": ({}, {"train_norms": True}),
    "lora, embeddings": ({}, {"train_embeddings": True}),
    "lora, some": ({}, {"targets": ("c_attn", "mlp.c_proj")}),
    "dora": ({}, {"variant": "dora"}),
}
DROPOUTS = {"resid_pdrop": 0.3, "embd_pdrop": 0.2}


def model_of(arm: str, **more: Any) -> nn.Module:
    options, lora = ARMS[arm]
    return prepared("gpt2", lora, **options, **more)


@pytest.mark.parametrize("arm", ARMS)
def test_equals_transformers_in_outputs_and_gradients(arm: str) -> None:
    model = model_of(arm)
    expected = outcome(model, text_batch("plain"))
    fused = FusedGpt2.install(unwrapped(model).base_model)
    assert_same(outcome(model, text_batch("plain")), expected)
    assert (fused.describe()["fused_groups"] == 8) == (arm != "dora")


def test_all_that_trains_got_a_gradient() -> None:
    """Comparisons by name would not miss what both paths leave out."""
    model = model_of("full")
    FusedGpt2.install(unwrapped(model).base_model)
    assert outcome(model, text_batch("plain")).keys() >= {name for name, _ in model.named_parameters()}
    model = model_of("lora, norms")
    FusedGpt2.install(unwrapped(model).base_model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert outcome(model, text_batch("plain")).keys() - {"loss", "hidden"} == trained
    assert len(trained) == 2 * (4 * 2 + 2 * 2) + 2, "two factors of four layers, two norms in each; the last norm"


@pytest.mark.parametrize("arm", ["full", "lora"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_documents_and_padding(kind: Any, arm: str) -> None:
    model = model_of(arm)
    expected = outcome(model, text_batch(kind))
    FusedGpt2.install(unwrapped(model).base_model)
    assert_same(outcome(model, text_batch(kind)), expected)


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_with_the_fused_loss_too(arm: str) -> None:
    """Embeddings that are also the output layer get both gradients."""
    model = model_of(arm)
    expected = outcome(model, text_batch("padded"))
    FusedGpt2.install(unwrapped(model).base_model)
    assert_same(outcome(model, text_batch("padded"), loss="fused"), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_classifiers(packed: bool) -> None:
    data = Rows(token_ids(3, 12), lengths=[12, 7, 4], labels=[0, 1, 2], packed=packed)
    batch = data.collate("train", range(3))
    model = prepared("gpt2-classifier", {})
    expected = outcome(model, batch, "classification")
    FusedGpt2.install(unwrapped(model).base_model)
    assert_same(outcome(model, batch, "classification"), expected)


def test_types_of_tokens_and_given_embeddings() -> None:
    model = attended("gpt2").eval()
    ids_bs, types_bs = token_ids(2, 6), token_ids(2, 6, seed=1)
    calls = [
        {"input_ids": ids_bs, "token_type_ids": types_bs},
        {"inputs_embeds": model.transformer.wte(ids_bs).detach() + 1},
        {"input_ids": ids_bs, "position_ids": torch.arange(6).flip(0)[None]},
    ]
    expected = [model(**call).logits for call in calls]
    FusedGpt2.install(model.base_model)
    for call, theirs in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(**call).logits, theirs, rtol=1e-5, atol=1e-5)


def test_sparse_patterns_are_asked_layer_by_layer() -> None:
    model = model_of("lora")
    attention = unwrapped(model).base_model.model_attention
    attention.set_patterns([Window(kind="window", window=3), Window(kind="window", window=6, global_tokens=1)])
    expected = outcome(model, text_batch("plain"))
    FusedGpt2.install(unwrapped(model).base_model)
    assert_same(outcome(model, text_batch("plain")), expected)


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_dropout_is_where_transformers_has_it(arm: str) -> None:
    """The same random numbers drop the same elements, so that outputs and gradients are the same."""
    model = model_of(arm, **DROPOUTS)
    torch.manual_seed(5)
    expected = outcome(model, text_batch("plain"))
    FusedGpt2.install(unwrapped(model).base_model)
    torch.manual_seed(5)
    assert_same(outcome(model, text_batch("plain")), expected)
    other = outcome(model, text_batch("plain"))
    assert not torch.allclose(other["hidden"], expected["hidden"])
    model.eval()
    first, second = (outcome(model, text_batch("plain"))["hidden"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("arm", ["full", "lora", "dora"])
def test_checkpointing_recomputes_the_same_with_the_same_dropout(arm: str) -> None:
    model = model_of(arm, **DROPOUTS)
    fused = FusedGpt2.install(unwrapped(model).base_model)
    torch.manual_seed(5)
    expected = outcome(model, text_batch("packed"))
    calls = checkpointed(model, fused)
    torch.manual_seed(5)
    assert_same(outcome(model, text_batch("packed")), expected)
    assert calls == [0, 1], "attention is computed once"
    model.eval()
    with torch.no_grad():
        model(input_ids=token_ids(1, 4))
    assert calls == [0, 1, 0, 1]


def test_low_rank_products_lie_beside_what_the_operations_before_left_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs but for attention's output, and gradients: one product each, forward and backward."""
    model = model_of("lora")
    FusedGpt2.install(unwrapped(model).base_model)
    found = found_borders(model, text_batch("plain"), monkeypatch)
    assert (found.count(True), found.count(False)) == (6 + 8, 2)  # eight groups; one output of attention in each layer


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_steps_of_the_optimizer_are_seen(arm: str) -> None:
    """Parameters are views of the packed matrices, Conv1D's transposed ones; a step writes to what is multiplied."""
    data, plan = Rows(token_ids(4, 12)), StepPlan(4, 4, 2, 3, 0)
    losses = []
    for fuse in (False, True):
        model = model_of(arm)
        loop = make_loop(model, data, plan)
        if fuse:
            FusedGpt2.install(unwrapped(model).base_model)
        losses.append(torch.stack([loop.step(step) for step in range(3)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    assert float((losses[0][2] - losses[0][0]).abs()) > 0.1, "the steps change what is computed"


def test_removed_it_leaves_a_model_that_peft_saves_and_merges(tmp_path: Path) -> None:
    check_removal("gpt2", FusedGpt2, tmp_path)


@pytest.mark.usefixtures("places")
def test_a_run_takes_it() -> None:
    run = build_run(experiment(data=NOTES, model=GPT2 | {"implementation": "fused"}), 0)
    assert run.fused is not None
    assert run.fused.describe() == {"forward": "FusedGpt2", "fused_groups": 8, "separate_groups": {}}


@pytest.mark.parametrize(
    "options, word",
    [
        ({"activation_function": "relu"}, "relu"),
        ({"attn_pdrop": 0.1}, "dropout"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"n_embd": 36}, "even"),
    ],
)
def test_models_it_cannot_compute_are_refused_with_the_reason(options: dict[str, Any], word: str) -> None:
    config = attended("gpt2").config
    assert FusedGpt2.why_not(config) is None
    for name, value in options.items():
        setattr(config, name, value)
    assert word in str(FusedGpt2.why_not(config))
    with pytest.raises(ValueError, match="llama"):
        FusedGpt2.install(attended("llama").base_model)


def test_requests_it_cannot_serve_are_refused() -> None:
    model = attended("gpt2").eval()
    FusedGpt2.install(model.base_model)
    for request in ({"output_hidden_states": True}, {"output_attentions": True}):
        with pytest.raises(UserError, match="last hidden states"):
            model.base_model(input_ids=token_ids(1, 4), **request)
    with pytest.raises(UserError, match="cache"):
        model.generate(token_ids(1, 4), max_new_tokens=2)
    with pytest.raises(UserError, match="cross-attention"):
        model.base_model(input_ids=token_ids(1, 4), encoder_hidden_states=torch.zeros(1, 4, 32))
