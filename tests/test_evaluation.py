"""Perplexities and accuracy of models whose every probability is known, against sums written out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from training_fixtures import Rows, attended, token_ids

from loras_bench.catalog import DatasetSpec
from loras_bench.data.language_modeling import PackedText
from loras_bench.data.sources import Source, Split
from loras_bench.evaluation import evaluate
from loras_bench.models.objective import Objective
from loras_bench.models.tokenizer import train_tokenizer

TEXTS = ["ab abba\nbaab", "bb aé b"]


class Bigram(nn.Module):
    """A decoder whose next-token logits are a row of a table, chosen by the token before."""

    def __init__(self, table_vv: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(len(table_vv), len(table_vv), bias=False)
        self.head.weight = nn.Parameter(table_vv.T.contiguous())
        self.modes: list[bool] = []

    def base_model(self, input_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
        assert not use_cache and not torch.is_grad_enabled()
        self.modes.append(self.training)
        return (nn.functional.one_hot(input_ids, self.head.in_features).float(),)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class Classifier(nn.Module):
    """Logits that follow from a text's first token alone."""

    def __init__(self, table_vc: Tensor) -> None:
        super().__init__()
        self.table_vc = table_vc

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.table_vc[input_ids[:, 0]])


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PackedText:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = Source(DatasetSpec("memory", "language_modeling"), "memory", {"test": Split((TEXTS,))}, (), "none")
    return PackedText(source, train_tokenizer([], 258, mark_ends=False), 6, ["test"])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_perplexities_by_hand_over_the_whole_text(text: PackedText, batch_size: int) -> None:
    """Blocks of 6 predict 12 + 1 + 8 = 21 tokens (bytes, and the separator between): the last block holds 3.

    The bigram model gives its distribution whatever the context, so the loss is the sum over neighbours of the stream.
    """
    table_vv = torch.randn(258, 258, generator=torch.Generator().manual_seed(0))
    objective = Objective(Bigram(table_vv), "language_modeling", "torch").train()
    metrics = evaluate(objective, text, "test", batch_size, Accelerator(cpu=True))

    stream = [
        token for start in range(0, 24, 6) for token in text.collate("test", [start // 6])["input_ids"][0].tolist()
    ]
    last = text.collate("test", [3])["targets"][0].tolist()
    assert last[3:] == [-100] * 3
    pairs = [*pairwise(stream[:21]), (stream[20], last[2])]
    nats = 0.0
    for before, after in pairs:
        row = table_vv[before].double().exp()
        nats -= math.log(row[after] / row.sum())
    assert text.protocol("test")["tokens"] == 21 == len(pairs)
    assert metrics["loss"] == pytest.approx(nats / 21, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / 21), rel=1e-5)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(nats / 6), rel=1e-5), "ab abba baab bb aé b"
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / 20, rel=1e-6), "12 + 8 bytes, é has two"


def test_a_uniform_model_has_the_vocabulary_as_perplexity(text: PackedText) -> None:
    objective = Objective(Bigram(torch.zeros(258, 258)), "language_modeling", "torch")
    metrics = evaluate(objective, text, "test", 2, Accelerator(cpu=True))
    assert metrics["perplexity"] == pytest.approx(258, rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(258) * 21 / 20, rel=1e-5)


def test_a_hopeless_model_has_infinite_perplexity_and_no_error(text: PackedText) -> None:
    table_vv = torch.zeros(258, 258)
    table_vv[:, 7] = 1e5
    metrics = evaluate(
        Objective(Bigram(table_vv), "language_modeling", "torch"), text, "test", 2, Accelerator(cpu=True)
    )
    assert metrics["loss"] == pytest.approx(1e5)
    assert metrics["perplexity"] == math.inf


@pytest.mark.parametrize("training", [True, False])
def test_it_reads_in_evaluation_mode_and_restores_the_mode(text: PackedText, training: bool) -> None:
    model = Bigram(torch.zeros(258, 258))
    objective = Objective(model, "language_modeling", "torch").train(training)
    evaluate(objective, text, "test", 2, Accelerator(cpu=True))
    assert model.modes == [False, False] and objective.training is training


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_accuracy_by_hand(batch_size: int) -> None:
    """First tokens 2, 3, 4, 2, 3: the table says classes 0, 1, 2, 0, 1; the labels agree in three of five."""
    ids_ns = torch.tensor([[2, 9, 9], [3, 9, 9], [4, 9, 9], [2, 9, 9], [3, 9, 9]])
    table_vc = torch.zeros(48, 3)
    table_vc[2, 0] = table_vc[3, 1] = table_vc[4, 2] = 2.0
    data = Rows(ids_ns, lengths=[3, 1, 2, 3, 2], labels=[0, 1, 0, 0, 2])
    metrics = evaluate(
        Objective(Classifier(table_vc), "classification", "torch"), data, "test", batch_size, Accelerator(cpu=True)
    )
    right, wrong = -math.log(math.exp(2) / (math.exp(2) + 2)), -math.log(1 / (math.exp(2) + 2))
    assert metrics["accuracy"] == 0.6
    assert metrics["loss"] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2-classifier"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_packed_rows_are_scored_as_padded_ones(family: str, batch_size: int) -> None:
    ids_ns, lengths, labels = token_ids(7, 16), [16, 3, 9, 16, 5, 12, 1], [0, 1, 2, 1, 0, 2, 2]
    objective = Objective(attended(family, initializer_range=0.2), "classification", "torch")
    padded, packed = (
        evaluate(objective, Rows(ids_ns, lengths, labels, packed), "test", batch_size, Accelerator(cpu=True))
        for packed in (False, True)
    )
    assert packed == pytest.approx(padded, rel=1e-5)
    assert padded["loss"] > 0.5


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_result_does_not_depend_on_the_batch_size(family: str) -> None:
    labels = None if family == "gpt2" else [0, 1, 2, 1, 0, 2, 2]
    data = Rows(token_ids(7, 16), lengths=[16, 3, 9, 16, 5, 12, 1], labels=labels)
    objective = Objective(attended(family), data.task, "torch")
    results = [evaluate(objective, data, "test", size, Accelerator(cpu=True)) for size in (1, 2, 7)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)
