"""The method: its YAML form, its refusals, and that it changes the patterns of a model and nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, T5Config

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.attention.patterns import Dense, Window
from loras_bench.errors import ConfigError
from loras_bench.methods.sparse_attention import SparseAttention, SparseAttentionConfig

WINDOW = {"kind": "window", "window": 8, "global_tokens": 2}
LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def method(**fields: Any) -> SparseAttention:
    return SparseAttention(
        SparseAttentionConfig.model_validate({"kind": "sparse_attention", "pattern": WINDOW} | fields)
    )


def test_single_layers_and_ranges_get_their_own_patterns() -> None:
    config = method(layers={"0-1": {"kind": "dense"}, 3: {"kind": "window", "window": 4}}).config
    window = Window(window=8, global_tokens=2)
    assert config.patterns(5) == [Dense(), Dense(), window, Window(window=4), window]


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        ({"4": {"kind": "dense"}}, "has 4 layers"),
        ({"2-9": {"kind": "dense"}}, "has 4 layers"),
        ({"3-1": {"kind": "dense"}}, "names no layers"),
        ({"first": {"kind": "dense"}}, "names no layers"),
        ({"0-2": {"kind": "dense"}, "1": {"kind": "dense"}}, "layer 1 is named by `0-2` and by `1`"),
    ],
)
def test_wrong_layers_are_refused_before_any_work(layers: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        method(layers=layers).check([], LLAMA)


def test_patterns_must_fit_the_direction_of_the_model() -> None:
    method().check([], LLAMA)
    bert = BertConfig(attention_probs_dropout_prob=0.0)
    with pytest.raises(ConfigError, match="bidirectional"):
        method().check([], bert)
    both_ways = method(pattern={"kind": "window", "half_width": 8})
    both_ways.check([], bert)
    with pytest.raises(ConfigError, match="causal"):
        both_ways.check([], LLAMA)


def test_conflicts_and_unsupported_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        method().check([method()], LLAMA)
    with pytest.raises(ConfigError, match="t5"):
        method().check([], T5Config())
    with pytest.raises(ConfigError, match="attn_pdrop"):
        method().check([], GPT2Config())
    with pytest.raises(ValidationError):
        method(backend="magic")
    with pytest.raises(ValidationError):
        method(patern=WINDOW)


def test_prepare_changes_patterns_and_no_weight() -> None:
    model = LlamaForCausalLM(LLAMA).eval()
    attention = ModelAttention.install(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(40)[None]
    dense = model(ids).logits
    assert method(layers={"0": {"kind": "dense"}}).prepare(model) is model
    assert [pattern.kind for pattern in attention.patterns] == ["dense", "window", "window", "window"]
    assert not torch.allclose(model(ids).logits, dense)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    with attention.override(Dense()):
        assert torch.equal(model(ids).logits, dense)


def test_the_configuration_is_read_without_torch() -> None:
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, loras_bench.methods.sparse_attention; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
