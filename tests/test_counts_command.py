"""`loras-bench counts`: the abstract's numbers, from configurations, and that they are those of real folded models."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, T5Config

from loras_bench.errors import ConfigError
from loras_bench.folding.attention import FoldedAttention
from loras_bench.folding.counts import count, sizes


@pytest.fixture
def counted(invoke):
    called = invoke("counts", "--format", "json")
    assert (called.status, called.err) == (0, "")
    tables = json.loads(called.out)
    assert list(tables) == ["bert-base", "gpt2"]
    return {name: {row["part"]: row for row in rows} for name, rows in tables.items()}


def test_the_numbers_of_the_abstract(counted):
    """Of the notes: 3 d^2 to 3 d, or to 2 d H + d; and 70 % of feed-forward and embedding weights."""
    for model, total, share in (("bert-base", 109_482_240, 70.81), ("gpt2", 124_439_808, 71.05)):
        rows = counted[model]
        shared, own, block, linear, without, whole = rows.values()
        assert (shared["before"], shared["after"]) == (1_769_472, 2_304)
        assert 100 * shared["saved"] == pytest.approx(99.8698, abs=5e-5)
        assert own["after"] == 19_200
        assert 100 * own["saved"] == pytest.approx(98.915, abs=5e-4)
        assert 100 * block["saved"] == pytest.approx(74.9, abs=0.05)
        assert 100 * linear["saved"] == pytest.approx(70, abs=1e-3)
        assert whole["before"] == without["before"] == total
        assert 100 * whole["saved"] == pytest.approx(share, abs=0.005)
    untouched = "whole model, shared rows, embeddings untouched"
    assert 100 * counted["bert-base"][untouched]["saved"] == pytest.approx(55.6, abs=0.05)
    assert 100 * counted["gpt2"][untouched]["saved"] == pytest.approx(48.9, abs=0.05)


def test_a_table_for_each_model(invoke):
    called = invoke("counts", "gpt2", "bert-base", "--sparsity", "0.5", "--rank", "2")
    assert (called.status, called.err) == (0, "")
    first, second = called.out.split("\n\nbert-base\n")
    assert first.startswith("gpt2\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in second.strip().splitlines()]
    assert rows[0] == ["weights", "before", "after", "saved"]
    # four rows of 768 and a diagonal
    assert rows[2][1:] == ["1,769,472", "3,840", "99.78%"]
    assert rows[5][1:] == ["56,623,104", "28,311,552", "50.00%"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["minilm"], "unknown model `minilm`; did you mean `minilm-l6`?"),
        (["gpt2", "--sparsity", "1.5"], "--sparsity"),
        (["gpt2", "--rank", "65"], "rank 65 is more than the 64 rows of a head"),
    ],
)
def test_what_cannot_be_counted_is_refused(invoke, words, message):
    called = invoke("counts", *words)
    assert (called.status, called.out) == (2, "")
    assert message in called.err.splitlines()[0]


def test_other_architectures_are_refused():
    with pytest.raises(ConfigError, match="t5"):
        sizes(T5Config())


def test_key_heads_and_untied_embeddings_of_llama():
    config = LlamaConfig(
        hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=70,
    )  # fmt: skip
    found = sizes(config)
    assert (found.query_key_value, found.output, found.feed_forward) == (48 * 8 * 12, 48 * 48, 3 * 48 * 100)
    assert found.embeddings == 48 * 70
    norms = (2 * 3 + 1) * 48
    layers = 3 * (found.query_key_value + found.output + found.feed_forward)
    assert found.total == layers + found.embeddings + norms


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("heads", ["per_head", "shared"])
def test_real_blocks_hold_as_many_weights_as_are_counted(family, heads):
    from training_fixtures import attended, token_ids

    from loras_bench.folding.fitting import Folding, fold_model

    model = attended(family)
    shared, own, *_ = count(model.config, 0.7)
    feed = lambda: model.base_model(token_ids(4, 20), use_cache=False)  # noqa: E731
    fold_model(model.base_model, [0], Folding(heads, 1, "row_mean", True, 0.1), feed)
    (block,) = (module for module in model.modules() if isinstance(module, FoldedAttention))
    weights = sum(row.numel() for row in block.folded_rows) - block.query_bias.numel()
    assert weights == (shared if heads == "shared" else own).after
