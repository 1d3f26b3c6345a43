"""The closed formula against the tables of the paper, and against what is known by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from paper_schedules import LLAMA2_7B, LLAMA3_8B, SETTINGS, Setting
from transformers import LlamaConfig, LlamaForCausalLM

from loras_bench.sparsity.criteria import DENSE, Heads, LayerSparsity
from loras_bench.sparsity.estimator import load_estimators
from loras_bench.sparsity.flops import Shape, estimator_weights, step_flops, training_ratio


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_papers_column_within_a_fortieth(setting: Setting) -> None:
    ratio = training_ratio(setting.shape, setting.schedule(), setting.start, setting.context, setting.output)
    assert abs(ratio - setting.printed) <= 0.025


def test_the_papers_schedules_name_the_layers_of_the_official_files() -> None:
    """The layers counted by hand: A11 = 17-19, 21-23, 25-29; A14 = 14-19, 21-23, 25-29."""
    counts = {
        name: tuple(sum(map(bool, part)) for part in zip(*s.schedule(), strict=True)) for name, s in SETTINGS.items()
    }
    assert counts == {
        "llama2-7b-csr": (17, 11),
        "llama2-7b-math10k": (17, 11),
        "llama2-7b-codefeedback": (28, 14),
        "llama2-13b-csr": (24, 20),
        "llama2-13b-math10k": (24, 20),
        "llama3-8b-csr": (14, 11),
        "llama3-8b-math10k": (28, 14),
        "llama3-8b-glue": (15, 13),
        "llama3.1-8b-codefeedback": (28, 14),
        "llama3.1-8b-wizardlm": (28, 14),
    }


def test_widths_of_a_layer_that_keeps_a_part() -> None:
    assert LLAMA3_8B.linears(LayerSparsity(feed_forward=0.99, attention=0.75)) == {
        "q": (4096, 1024),
        "k": (4096, 256),
        "v": (4096, 256),
        "o": (1024, 4096),
        "gate": (4096, 143),
        "up": (4096, 143),
        "down": (143, 4096),
    }


def test_a_small_step_by_hand() -> None:
    """One layer of width 4 with 2 query heads on 1 key head of 2 channels, and a hidden width of 10."""
    shape = Shape(hidden=4, inner=10, heads=Heads(query=2, key=1, size=2))
    weights = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 10
    adapters = (4 + 4) + (4 + 2) + (4 + 2) + (4 + 4)
    core = 3.5 * 4 * 4 * (1 + 2 + 3)  # 3 causal tokens of 4 query channels
    assert step_flops(shape, [DENSE], 2, 1, lora_rank=1) == 3 * 4 * weights + 3 * 6 * adapters + core
    sliced = 48 + 3 * 4 * 5  # half the hidden width
    halved = step_flops(shape, [LayerSparsity(feed_forward=0.5)], 2, 1, lora_rank=1)
    assert halved == 4 * (2 * sliced + weights) + 3 * 6 * adapters + core


def test_without_sparsity_without_context_or_always_dense_nothing_is_saved() -> None:
    sparse = [LayerSparsity(0.99, 0.75)] * 32
    assert training_ratio(LLAMA2_7B, [DENSE] * 32, 0.0, 384, 128) == 1
    assert training_ratio(LLAMA2_7B, sparse, 0.0, 0, 512) == 1
    assert training_ratio(LLAMA2_7B, sparse, 1.0, 384, 128) == 1
    assert training_ratio(LLAMA2_7B, sparse, 0.0, 512, 0) < training_ratio(LLAMA2_7B, sparse, 0.0, 384, 128) < 1


def test_estimators_of_a_llama3_8b_layer_have_442368_parameters() -> None:
    assert estimator_weights(LLAMA3_8B, 8) == 442_368


def test_estimators_that_are_built_have_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    built = load_estimators(LlamaForCausalLM(config), rank=3, layers=[1])
    shape = Shape(24, 40, Heads(6, 2, 4))
    assert sum(f.down_rk.numel() + f.up_nr.numel() for f in built.values()) == estimator_weights(shape, 3)


def test_estimators_cost_a_thousandth_of_a_step() -> None:
    """Even if every token of every layer is estimated; the paper says 0.05 % of dense LoRA's for fewer layers."""
    estimated = 32 * 512 * 2 * estimator_weights(LLAMA3_8B, 8)
    assert estimated / step_flops(LLAMA3_8B, [DENSE] * 32, 384, 128) < 0.0011
