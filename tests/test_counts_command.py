"""`loras-bench counts`: the abstract's numbers, from configurations, and that they are those of real folded models."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, T5Config

from loras_bench.errors import ConfigError
from loras_bench.folding.attention import FoldedAttention
from loras_bench.folding.counts import count, sizes

EMBEDDINGS = ("dense embeddings", "zeroed embeddings", "zeroed words")


@pytest.fixture
def counted(invoke):
    called = invoke("counts", "--format", "json")
    assert (called.status, called.err) == (0, "")
    tables = json.loads(called.out)
    assert list(tables) == ["bert-base", "gpt2"]
    return {name: {row["part"]: row for row in rows} for name, rows in tables.items()}


def test_the_numbers_of_the_abstract(counted):
    """Of the notes: 3 d^2 to 3 d, or to 2 d H + d; and 70 % of feed-forward and embedding weights."""
    for model, total, share, words in (
        ("bert-base", 109_482_240, 70.81, 30_522),
        ("gpt2", 124_439_808, 71.05, 50_257),
    ):
        rows = counted[model]
        shared, own = rows["Q, K, V of a layer, shared rows"], rows["Q, K, V of a layer, rows per head"]
        block, linear = rows["attention of a layer, shared rows"], rows["feed-forward of all layers"]
        without, whole, ours = (rows[f"model, shared rows, {what}"] for what in EMBEDDINGS)
        for what in EMBEDDINGS:
            per_head = rows[f"model, rows per head, {what}"]
            assert per_head["after"] - rows[f"model, shared rows, {what}"]["after"] == 12 * (19_200 - 2_304)
        claims = {part: row["claim"] for part, row in rows.items() if row["claim"]}
        assert list(claims.values()) == ["99 %", "99 %", "70 %", *4 * ["about 70 %"]]
        assert without["after"] - ours["after"] == round(0.7 * words * 768), "positions and segments stay"
        assert 100 * ours["gone_or_zero"] == pytest.approx(70.6, abs=0.05)
        assert (shared["before"], shared["after"]) == (1_769_472, 2_304)
        assert 100 * shared["gone_or_zero"] == pytest.approx(99.8698, abs=5e-5)
        assert own["after"] == 19_200
        assert 100 * own["gone_or_zero"] == pytest.approx(98.915, abs=5e-4)
        assert 100 * block["gone_or_zero"] == pytest.approx(74.9, abs=0.05)
        assert 100 * linear["gone_or_zero"] == pytest.approx(70, abs=1e-3)
        assert whole["before"] == without["before"] == total
        assert 100 * whole["gone_or_zero"] == pytest.approx(share, abs=0.005)
    untouched = "model, shared rows, dense embeddings"
    assert 100 * counted["bert-base"][untouched]["gone_or_zero"] == pytest.approx(55.6, abs=0.05)
    assert 100 * counted["gpt2"][untouched]["gone_or_zero"] == pytest.approx(48.9, abs=0.05)


def test_a_table_for_each_model(invoke):
    called = invoke("counts", "gpt2", "bert-base", "--sparsity", "0.5", "--rank", "2")
    assert (called.status, called.err) == (0, "")
    first, second = called.out.split("\n\nbert-base, rank 2, sparsity 0.5\n")
    assert first.startswith("gpt2, rank 2, sparsity 0.5\n")
    lines = [line for line in second.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["weights", "before", "not zero", "gone or zero", "claimed"]
    # four rows of 768 and a diagonal
    assert rows[2][1:] == ["1,769,472", "3,840", "99.78%", "99 %"]
    assert rows[6][1:] == ["56,623,104", "28,311,552", "50.00%", "70 %"]
    assert "saved" not in called.out, "zeros are stored"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bert-bas"], "no model, and no folder of one, is called `bert-bas`; did you mean `bert-base`?"),
        (["gpt2", "--sparsity", "1.5"], "--sparsity"),
        (["gpt2", "--sparsity", "1"], "--sparsity 1 leaves no weights"),
        (["gpt2", "--rank", "65"], "rank 65 does not divide the 64 rows of a head"),
        (["gpt2", "--rank", "3"], "rank 3 does not divide the 64 rows of a head"),
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
    weights = sum(row.numel() for row in block.undecayed) - block.query_bias.numel()
    assert weights == (shared if heads == "shared" else own).after
