"""The fused forward pass of Llama against transformers': outputs, every gradient, and PEFT's saving and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_checks import assert_same, check_removal, checkpointed, found_borders, outcome, prepared, text_batch
from torch import nn
from training_fixtures import HEADS, INNER, LAYERS, WIDTH, attended, token_ids

pytest.importorskip("triton")
from loras_bench.attention.patterns import Window
from loras_bench.errors import ConfigError, UserError
from loras_bench.kernels.linear import LinearGroup
from loras_bench.metering.flops import MatmulCounter
from loras_bench.methods.sparse_lora import SparseLora, SparseLoraConfig
from loras_bench.models.fused_llama import FusedLlama
from loras_bench.models.objective import unwrapped

ARMS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {  # model options, options of LoRA
    "full": ({}, None),
    "full, biases": ({"attention_bias": True, "mlp_bias": True}, None),
    "full, wide heads": ({"head_dim": 12, "num_key_value_heads": 1}, None),
    "full, scaled positions": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
        None,
    ),
    "full, tied": ({"tie_word_embeddings": True}, None),
    "lora": ({}, {}),
    "lora, biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "lora, norms": ({}, {"train_norms": True}),
    "lora, embeddings": ({}, {"train_embeddings": True}),
    "lora, some": ({}, {"targets": ("q_proj", "down_proj")}),
    "dora": ({}, {"variant": "dora"}),
}


def model_of(arm: str) -> nn.Module:
    options, lora = ARMS[arm]
    return prepared("llama", lora, **options)


@pytest.mark.parametrize("arm", ARMS)
def test_equals_transformers_in_outputs_and_gradients(arm: str) -> None:
    model = model_of(arm)
    expected = outcome(model, text_batch("plain"))
    fused = FusedLlama.install(unwrapped(model).base_model)
    assert_same(outcome(model, text_batch("plain")), expected)
    assert (fused.describe()["fused_groups"] == 8) == (arm != "dora")


@pytest.mark.parametrize("arm", ["full", "full, tied", "lora"])
def test_with_the_fused_loss_too(arm: str) -> None:
    """Embeddings that are also the output layer get both gradients."""
    model = model_of(arm)
    expected = outcome(model, text_batch("padded"))
    FusedLlama.install(unwrapped(model).base_model)
    assert_same(outcome(model, text_batch("padded"), loss="fused"), expected)


@pytest.mark.parametrize("arm", ["full", "lora"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_documents_and_padding(kind: Any, arm: str) -> None:
    model = model_of(arm)
    expected = outcome(model, text_batch(kind))
    FusedLlama.install(unwrapped(model).base_model)
    assert_same(outcome(model, text_batch(kind)), expected)


def test_sparse_patterns_are_asked_layer_by_layer() -> None:
    model = model_of("lora")
    attention = unwrapped(model).base_model.model_attention
    attention.set_patterns([Window(kind="window", window=3), Window(kind="window", window=6, global_tokens=1)])
    expected = outcome(model, text_batch("plain"))
    FusedLlama.install(unwrapped(model).base_model)
    assert_same(outcome(model, text_batch("plain")), expected)


@pytest.mark.parametrize("arm", ["full", "lora", "dora"])
def test_checkpointing_recomputes_the_same(arm: str) -> None:
    model = model_of(arm)
    fused = FusedLlama.install(unwrapped(model).base_model)
    expected = outcome(model, text_batch("packed"))
    calls = checkpointed(model, fused)
    assert_same(outcome(model, text_batch("packed")), expected)
    assert calls == [0, 1], "attention is computed once"
    model.eval()
    with torch.no_grad():
        model(input_ids=token_ids(1, 4))
    assert calls == [0, 1, 0, 1]


def test_checkpointing_computes_neither_attention_nor_what_a_piece_ends_with_again() -> None:
    """Of the products: those of attention's output and of gate/up, and x A^T of all groups, for gradients."""
    model = model_of("lora")
    fused = FusedLlama.install(unwrapped(model).base_model)
    flops = []
    for again in (False, True):
        if again:
            checkpointed(model, fused)
        with MatmulCounter() as counter:
            outcome(model, text_batch("plain"))
        flops.append(counter.flops)
    rank = 16  # the ranks of a group, rounded up
    keys = WIDTH // HEADS * 2  # two key heads
    out, gate_up = (WIDTH, WIDTH), (WIDTH, 2 * INNER)
    qkv, down = (WIDTH, WIDTH + 2 * keys), (INNER, WIDTH)
    low_rank = sum(inputs * rank for inputs, _ in (qkv, out, gate_up, down))
    whole = sum((inputs + rank) * outputs for inputs, outputs in (out, gate_up))
    assert flops[1] - flops[0] == 2 * 24 * LAYERS * (low_rank + whole)


def test_low_rank_products_lie_beside_what_the_operations_before_left_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs but for attention's output, and gradients: one product each, forward and backward."""
    model = model_of("lora")
    FusedLlama.install(unwrapped(model).base_model)
    found = found_borders(model, text_batch("plain"), monkeypatch)
    assert (found.count(True), found.count(False)) == (6 + 8, 2)  # eight groups; one output of attention in each layer


def sliced(model: nn.Module, **fields: Any) -> dict[str, Any]:
    """Makes both layers sparse; the rows of two texts of twelve tokens whose last five are dense."""
    config = {"kind": "sparse_lora", "layers": {"0-1": {"attention": 0.5, "feed_forward": 0.75}}, "rank": 4} | fields
    SparseLora(SparseLoraConfig.model_validate(config)).prepare(model)
    is_dense = (torch.arange(24) % 12) > 6
    return {"dense_rows": is_dense.nonzero()[:, 0], "sparse_rows": (~is_dense).nonzero()[:, 0]}


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("arm", ["lora", "lora, biases", "lora, norms", "lora, embeddings", "lora, some"])
def test_contextual_sparsity_equals_the_sliced_modules(arm: str, kind: Any) -> None:
    model = model_of(arm)
    batch = text_batch(kind) | sliced(model)
    expected = outcome(model, batch)
    FusedLlama.install(unwrapped(model).base_model)
    assert_same(outcome(model, batch), expected)


def test_sliced_products_have_room_for_the_low_rank_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's output too, which is copied into the order of the residual stream."""
    model = model_of("lora")
    batch = text_batch("plain") | sliced(model)
    FusedLlama.install(unwrapped(model).base_model)
    found = found_borders(model, batch, monkeypatch)
    assert (found.count(True), found.count(False)) == (8 + 8, 0)


def test_a_sparse_layer_that_cannot_be_fused_is_refused() -> None:
    model = model_of("lora")
    base = unwrapped(model).base_model
    sliced(model)
    base.layers[1].mlp.down_proj = nn.Sequential(base.layers[1].mlp.down_proj)
    with pytest.raises(ConfigError, match="Sequential"):
        FusedLlama.install(base)


def test_steps_of_the_optimizer_are_seen() -> None:
    """Parameters are views of the packed matrices: what is written to them counts in the next forward pass."""
    model = model_of("lora")
    FusedLlama.install(unwrapped(model).base_model)
    outcome(model, text_batch("plain"))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    twin = model_of("lora")
    twin.load_state_dict(model.state_dict())
    assert_same(outcome(model, text_batch("plain")), outcome(twin, text_batch("plain")))


def test_removed_it_leaves_a_model_that_peft_saves_and_merges(tmp_path: Path) -> None:
    check_removal("llama", FusedLlama, tmp_path)


def test_a_group_that_cannot_be_fused_is_named_with_the_reason() -> None:
    model = model_of("lora")
    base = unwrapped(model).base_model
    base.layers[1].mlp.down_proj = nn.Sequential(base.layers[1].mlp.down_proj)
    expected = outcome(model, text_batch("plain"))
    fused = FusedLlama.install(base)
    assert_same(outcome(model, text_batch("plain")), expected)
    described = fused.describe()
    ((reason, names),) = described["separate_groups"].items()
    assert names == ["layers.1.down"] and "Sequential" in reason and described["fused_groups"] == 7
    assert isinstance(fused.linears[0]["down"], LinearGroup)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_models_it_cannot_compute_are_refused_with_the_reason(options: dict[str, Any], word: str) -> None:
    config = attended("llama").config
    assert FusedLlama.why_not(config) is None
    for name, value in options.items():
        setattr(config, name, value)
    assert word in str(FusedLlama.why_not(config))
    assert "gpt2" in str(FusedLlama.why_not(attended("gpt2").config))


def test_requests_it_cannot_serve_are_refused() -> None:
    model = attended("llama").eval()
    FusedLlama.install(model.base_model)
    for request in ({"output_hidden_states": True}, {"output_attentions": True}):
        with pytest.raises(UserError, match="last hidden states"):
            model.base_model(input_ids=token_ids(1, 4), **request)
    with pytest.raises(UserError, match="cache"):
        model.generate(token_ids(1, 4), max_new_tokens=2)
