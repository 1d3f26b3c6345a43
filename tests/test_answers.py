"""Likelihoods of answers and greedy answers of models whose every probability is known, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from training_fixtures import VOCABULARY, attended, tiny, token_ids

from loras_bench.answers import count_exact, greedy, log_likelihoods, score_choices
from loras_bench.catalog import DatasetSpec
from loras_bench.config import GenerationConfig
from loras_bench.data.instruction import Instructions
from loras_bench.data.sources import Source, Split
from loras_bench.evaluation import evaluate
from loras_bench.models.objective import Objective
from loras_bench.models.tokenizer import train_tokenizer

CPU = torch.device("cpu")
END = 0
TOKENIZER = train_tokenizer([], 258, mark_ends=False)


class Bigram(nn.Module):
    """A decoder whose next-token logits are a row of a table, chosen by the token before."""

    def __init__(self, table_vv: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(len(table_vv), len(table_vv), bias=False)
        self.head.weight = nn.Parameter(table_vv.T.contiguous())
        self.widths: list[int] = []

    def base_model(self, input_ids: Tensor, use_cache: bool, **facts: Tensor) -> tuple[Tensor]:
        assert not use_cache and not torch.is_grad_enabled()
        self.widths.append(input_ids.shape[1])
        return (nn.functional.one_hot(input_ids, self.head.in_features).float(),)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class Recital(Bigram):
    """After a line end it says what it was given, whatever the prompt."""

    def __init__(self, says: list[int]) -> None:
        super().__init__(torch.eye(258))
        self.says = torch.tensor(says)

    def base_model(self, input_ids: Tensor, use_cache: bool, **facts: Tensor) -> tuple[Tensor]:
        places_s = torch.arange(input_ids.shape[1])
        line_bs = torch.where(input_ids == token("\n"), places_s, 0).cummax(dim=1).values
        return super().base_model(self.says[(places_s - line_bs).clamp(max=len(self.says) - 1)], use_cache)


def token(character: str) -> int:
    return int(TOKENIZER(character)["input_ids"][0])


def bigram(**weights: float) -> Bigram:
    """Logit `w` of b after a for each `ab=w`; `_` is a line end, `E` the end; all others are 0."""
    names = {"_": "\n", "E": "<|endoftext|>"}
    table_vv = torch.zeros(258, 258)
    for (before, after), weight in weights.items():
        table_vv[token(names.get(before, before)), token(names.get(after, after))] = weight
    return Bigram(table_vv)


def made(pairs: list[tuple[str, str]], packed: bool = False, **split: Any) -> Instructions:
    prompts, responses = ([pair[number] for pair in pairs] for number in (0, 1))
    spec = DatasetSpec("mine", "instruction", final_answer=r"#### (-?[0-9.,]+)")
    source = Source(spec, "here", {"test": Split((prompts, responses), **split)}, (), "none")
    return Instructions(source, TOKENIZER, 96, ["test"], packed=packed)


def nats(weight: float) -> float:
    """-log of the probability of the one token with that logit among 258."""
    return math.log(math.exp(weight) + 257) - weight


@pytest.mark.parametrize("packed", [False, True])
def test_likelihoods_by_hand(packed: bool) -> None:
    """The response `ab` ends with its turn: log p(a | line end) + log p(b | a) + log p(end | b)."""
    model = bigram(_a=2.0, ab=3.0, bE=1.0)
    data = made([("p", "ab"), ("a longer prompt", "b"), ("q", "bb")], packed)
    scores = log_likelihoods(model, data.collate("test", [0, 1, 2]), CPU)
    empty = math.log(math.exp(2.0) + 257)  # b after a line end, where only a has a logit
    end = nats(1.0)
    after_b = math.log(math.exp(1.0) + 257)
    wanted = [-(nats(2.0) + nats(3.0) + end), -(empty + end), -(empty + after_b + end)]
    assert scores.tolist() == pytest.approx(wanted, rel=1e-5)


def test_accuracies_by_hand() -> None:
    """`a` is likelier than `bbbb` as a whole, and less likely per character; ties go to the first choice.

    Row 0 is right by the sum, row 1 by the sum per character, row 2 (three choices, the first right) by both.
    """
    model = bigram(_a=6.0, aE=4.0, _b=5.0, bb=9.0, bE=9.0)
    data = made(
        [("p", "a"), ("q", "bbbb"), ("r", "a")], labels=[0, 1, 0], choices=[("a", "bbbb")] * 2 + [("a", "c", "d")]
    )
    loss, tokens, right, normalized = score_choices(model, data, "test", [0, 1, 2], CPU)
    assert (tokens, right, normalized) == (2 + 5 + 2, 2, 2)
    line = math.log(math.exp(6) + math.exp(5) + 256)
    after_b = math.log(2 * math.exp(9) + 256)
    short, long = (line - 6) + nats(4.0), (line - 5) + 4 * (after_b - 9)
    assert short < long and short > long / 4
    assert loss == pytest.approx(2 * short + long, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_of_choices(batch_size: int, packed: bool) -> None:
    pairs = [("p", "a"), ("question", "b"), ("r", "a"), ("s", "b"), ("t", "a")]
    data = made(pairs, packed, choices=[("a", "b")] * 5, labels=[0, 1, 0, 1, 0])
    objective = Objective(bigram(_a=2.0), "instruction", "torch").train()
    metrics = evaluate(objective, data, "test", batch_size, Accelerator(cpu=True))
    loss = (3 * nats(2.0) + 2 * math.log(math.exp(2.0) + 257) + 5 * math.log(258)) / 10
    assert metrics == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.6, "accuracy_normalized": 0.6}, rel=1e-5
    )
    assert objective.training
    assert data.protocol("test")["majority_share"] == 0.6


def test_a_greedy_answer_ends_with_its_turn_or_is_cut_off() -> None:
    """From a: b c d e, over and over; from x: y, then the end."""
    model = bigram(ab=1.0, bc=1.0, cd=1.0, de=1.0, eb=1.0, xy=1.0, yE=1.0)
    prompts = [[token(letter) for letter in text] for text in ("za", "x", "zzzzza")]
    answers = greedy(model, prompts, END, 38, 41, CPU)
    text = [TOKENIZER.decode(answer) for answer in answers]
    assert text == ["bcde" * 9 + "bc", "y", ("bcde" * 9)[:35]], "38 new tokens; the end; 41 tokens with the prompt"
    assert max(model.widths) <= 41


def test_a_prompt_without_room_gets_no_answer() -> None:
    answers = greedy(bigram(ab=1.0, ba=1.0), [[token("a")] * 5, [token("a")] * 3], END, 9, 5, CPU)
    assert answers == [[], [token("b"), token("a")]]


def test_greedy_answers_are_those_of_transformers() -> None:
    """Prompts of several lengths side by side give what each gives alone."""
    model = tiny("llama", initializer_range=0.5).eval()
    prompts = [row[:length].tolist() for row, length in zip(token_ids(4, 12), (3, 12, 7, 1), strict=True)]
    answers = greedy(model, prompts, VOCABULARY, 20, 64, CPU)
    ours = attended("llama", initializer_range=0.5).eval()
    assert greedy(ours, prompts, VOCABULARY, 20, 64, CPU) == answers
    for prompt, answer in zip(prompts, answers, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            min_new_tokens=20,
            max_new_tokens=20,
            eos_token_id=VOCABULARY + 1,
        )
        assert answer == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_exact_match_of_the_first_rows(batch_size: int) -> None:
    """The model answers every prompt by `#### 7`; two of the first three rows want it, and the fourth is not asked."""
    answering = Recital([*TOKENIZER("#### 7")["input_ids"], END])
    data = made([("p", "so\n#### 7"), ("q", "#### 8"), ("r", "#### 7.\n"), ("s", "#### 7")])
    objective = Objective(answering, "instruction", "torch")
    metrics = evaluate(objective, data, "test", batch_size, Accelerator(cpu=True), GenerationConfig(rows=3))
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    assert count_exact(answering, data, "test", [3], 2, CPU) == 0, "cut off before the number"
