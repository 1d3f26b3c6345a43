"""Pairs of prompt and response: targets, truncation and layouts by hand; packing is one document a row."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_fixtures import WIDTH, attended

from loras_bench.catalog import DatasetSpec
from loras_bench.config import DataConfig
from loras_bench.data import IGNORED, load_data
from loras_bench.data.instruction import Instructions, label_rows
from loras_bench.data.prompts import PLAIN
from loras_bench.data.sources import Source, Split
from loras_bench.errors import UserError
from loras_bench.metering.flops import MatmulCounter
from loras_bench.models.objective import Objective

END = 0  # <|endoftext|> is the first token of tokenizers that we train
BEFORE, BETWEEN = PLAIN
AROUND = len(BEFORE + BETWEEN)


def made(tokenizer, pairs, length=128, choices=None, labels=None, packed=False) -> Instructions:
    prompts, responses = ([pair[number] for pair in pairs] for number in (0, 1))
    split = Split((prompts, responses), labels, choices)
    source = Source(DatasetSpec("mine", "instruction"), "here", {"train": split}, (), "none")
    return Instructions(source, tokenizer, length, ["train"], packed=packed)


def ids(tokenizer, text) -> list[int]:
    return tokenizer(text)["input_ids"]


PAIRS = [("ab", "cd"), ("e", "f")]


def test_targets_by_hand_padded(byte_tokenizer):
    c, d, f = ids(byte_tokenizer, "cdf")
    batch = made(byte_tokenizer, PAIRS).collate("train", [0, 1])
    assert batch.keys() == {"input_ids", "targets", "attention_mask", "label_rows"}
    assert batch["input_ids"].shape == (2, 64)
    first = [*ids(byte_tokenizer, BEFORE + "ab" + BETWEEN), c, d, END]
    assert batch["input_ids"][0, : len(first)].tolist() == first
    prompt = AROUND + 2
    assert batch["targets"][0].tolist() == [IGNORED] * (prompt - 1) + [c, d, END] + [IGNORED] * (64 - prompt - 2)
    prompt = AROUND + 1
    assert batch["targets"][1].tolist() == [IGNORED] * (prompt - 1) + [f, END] + [IGNORED] * (64 - prompt - 1)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(first), AROUND + 3]


def test_targets_by_hand_packed(byte_tokenizer):
    """No document predicts the first token of the next, and the fill predicts nothing."""
    c, d, f = ids(byte_tokenizer, "cdf")
    data = made(byte_tokenizer, PAIRS, packed=True)
    batch = data.collate("train", [1, 0])
    assert batch.keys() == {"input_ids", "targets", "attention_mask", "document_ids", "position_ids", "label_rows"}
    assert {tuple(tensor.shape) for name, tensor in batch.items() if name != "label_rows"} == {(1, 256)}
    first, second = AROUND + 3, AROUND + 5
    wanted = torch.full((256,), IGNORED)
    wanted[first - 3 : first - 1] = torch.tensor([f, END])
    wanted[first + second - 4 : first + second - 1] = torch.tensor([c, d, END])
    assert batch["targets"][0].tolist() == wanted.tolist()
    assert batch["document_ids"][0].tolist() == [0] * first + [1] * second + [2] * (256 - first - second)
    assert (data.real_tokens("train", [0, 1]), data.target_count("train", [0, 1])) == (first + second, 5)


@given(st.integers(0, 3), st.lists(st.booleans(), min_size=1, max_size=400))
def test_label_rows_are_those_of_all_labels_filled_up(rows: int, labels: list[bool]) -> None:
    targets_bs = np.where(np.array([labels] * (rows + 1)), 7, IGNORED)
    places = label_rows(targets_bs)
    wanted = np.flatnonzero(targets_bs.flatten() != IGNORED)
    assert set(wanted) <= set(places) and (np.diff(places) > 0).all()
    assert len(places) == min(-(-len(wanted) // 128) * 128, targets_bs.size)


@pytest.mark.parametrize("packed", [False, True])
def test_the_output_layer_reads_the_labels_alone(byte_tokenizer, packed):
    """The same loss and gradients as of all positions, for fewer products."""
    batch = made(byte_tokenizer, PAIRS * 4, packed=packed).collate("train", range(8))
    found, flops = [], []
    for leave_out in (False, True):
        model = attended("llama", vocab_size=len(byte_tokenizer))
        inputs = {name: tensor for name, tensor in batch.items() if leave_out or name != "label_rows"}
        with MatmulCounter() as counter:
            loss, _ = Objective(model, "instruction", "torch").train()(**inputs)
            loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        flops.append(counter.flops)
    torch.testing.assert_close(found[1], found[0])
    saved = batch["input_ids"].numel() - len(batch["label_rows"])
    assert saved > 0
    assert flops[0] - flops[1] == 3 * 2 * saved * WIDTH * len(byte_tokenizer)


def test_choices_are_documents_of_their_rows(byte_tokenizer):
    choices = [("no", "yes"), ("a", "b", "c")]
    data = made(byte_tokenizer, [("p", "yes"), ("q", "a")], choices=choices, labels=[1, 0])
    assert [data.choices("train", row).tolist() for row in (0, 1)] == [[0, 1], [2, 3, 4]]
    assert data.right("train", [1, 0]).tolist() == [2, 1]
    assert data.characters("train", data.choices("train", 0)).tolist() == [2, 3]
    batch = data.collate_documents("train", data.choices("train", 1))
    responses = [row[row != IGNORED].tolist() for row in batch["targets"]]
    assert responses == [[*ids(byte_tokenizer, text), END] for text in "abc"]
    assert data.target_count("train", [0, 1]) == len("yes") + len("a") + 2, "training reads the right ones alone"
    assert data.protocol("train")["majority_share"] == 0.5
    assert "accuracy" in data.protocol("train")


def test_the_prompt_to_answer_and_the_text_of_an_answer(byte_tokenizer):
    data = made(byte_tokenizer, PAIRS)
    assert data.prompt("train", 0) == ids(byte_tokenizer, BEFORE + "ab" + BETWEEN)
    assert data.end == END
    assert data.text([*ids(byte_tokenizer, "so é"), END]) == "so é"


def test_a_long_prompt_loses_its_beginning_and_nothing_else(byte_tokenizer):
    response = "xyz"
    longest = AROUND + 5 + len(response) + 1
    data = made(byte_tokenizer, [("0123456789", response), ("ab", response)], longest)
    assert data.prompt("train", 0) == ids(byte_tokenizer, BEFORE + "56789" + BETWEEN)
    targets = data.collate("train", [0])["targets"]
    assert targets[targets != IGNORED].tolist() == [*ids(byte_tokenizer, response), END]
    protocol = data.protocol("train")
    assert (protocol["truncated_prompts"], protocol["truncated_share"]) == (1, 0.5)
    assert protocol["truncated_responses"] == 0


def test_all_choices_of_a_row_share_one_prompt(byte_tokenizer):
    choices = [("a", "long one")]
    longest = AROUND + 4 + len("long one") + 1
    data = made(byte_tokenizer, [("0123456789", "a")], longest, choices=choices, labels=[0])
    ids_bs = data.collate_documents("train", data.choices("train", 0))["input_ids"]
    assert ids_bs[0, : AROUND + 4].tolist() == ids_bs[1, : AROUND + 4].tolist()
    assert ids_bs[0, : AROUND + 4].tolist() == ids(byte_tokenizer, BEFORE + "6789" + BETWEEN)


def test_a_response_that_does_not_fit_is_an_error_that_says_what_would(byte_tokenizer):
    response = "x" * 20
    needed = AROUND + len(response) + 1
    pairs = [("ab", "c"), ("ab", response)]
    assert made(byte_tokenizer, pairs, needed).protocol("train")["truncated_prompts"] == 1
    with pytest.raises(UserError, match=r"row 1 \('ab'\): its response does not fit") as caught:
        made(byte_tokenizer, pairs, needed - 1)
    assert caught.value.hint == f"set data.sequence_length to {needed} or more"


words = st.text(alphabet="abc é", min_size=1, max_size=12)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=6), st.integers(AROUND + 26, 80), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_response_token_is_a_target_once(byte_tokenizer, pairs, length, packed):
    data = made(byte_tokenizer, pairs, length, packed=packed)
    batch = data.collate("train", range(len(pairs)))
    predicted = batch["targets"] != IGNORED
    wanted = [token for _, response in pairs for token in (*ids(byte_tokenizer, response), END)]
    assert batch["targets"][predicted].tolist() == wanted
    assert data.target_count("train", range(len(pairs))) == len(wanted)
    real = batch.get("attention_mask", torch.ones_like(predicted))
    assert real.sum() == data.real_tokens("train", range(len(pairs)))
    assert not (predicted & ~real).any()
    # What follows a place that predicts is what it predicts, unless that is the end of the document.
    after = torch.roll(batch["input_ids"], -1, dims=1)
    inner = predicted & (batch["targets"] != END)
    assert (batch["targets"][inner] == after[inner]).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packing_gives_loss_and_gradients_of_one_document_a_row(byte_tokenizer, family):
    positions = {"n_positions": 256} if family == "gpt2" else {}
    pairs = [("ab", "cd"), ("a longer prompt", "e"), ("x", "a longer response")]
    results = []
    for packed, batches in ((False, [[0], [1], [2]]), (False, [[0, 1, 2]]), (True, [[2, 0, 1]])):
        objective = Objective(
            attended(family, vocab_size=258, initializer_range=0.2, **positions), "instruction", "torch"
        )  # type: ignore[arg-type]
        data = made(byte_tokenizer, pairs, packed=packed)
        loss = sum(objective(**data.collate("train", rows))[0] for rows in batches)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in objective.parameters())])
    alone, side_by_side, packed_ = results
    assert alone[0] > 10
    for other in (side_by_side, packed_):
        for mine, theirs in zip(alone, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not os.environ.get("LORAS_BENCH_DATA"), reason="needs the sets: set LORAS_BENCH_DATA")
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("arc-e", 2251, 2376),
        ("arc-c", 1119, 1172),
        ("openbookqa", 4957, 500),
        ("boolq-without-passages", 9427, 3270),
        ("gsm8k", 7473, 1319),
    ],
)
def test_the_sets_of_the_catalog_have_their_published_sizes(byte_tokenizer, name, train, test):
    data = load_data(DataConfig(name=name, sequence_length=4096), byte_tokenizer)
    assert (data.rows("train"), data.rows("test")) == (train, test)
    assert data.protocol("train")["truncated_prompts"] == 0
