"""The recall probe: models that copy perfectly, guess, or know nothing, and scores by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_fixtures import tiny

from loras_bench import recall as probe
from loras_bench.errors import UserError
from loras_bench.recall import positions_of, recall, repeated, score

SIZE = 50


class Toy(nn.Module):
    """Logits by a function of the tokens: (rows, length) to (rows, length, SIZE)."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = rule
        self.shapes: list[torch.Size] = []

    def forward(self, input_ids: Tensor) -> Any:
        self.shapes.append(input_ids.shape)
        return SimpleNamespace(logits=self.rule(input_ids))


def copier(ids_rs: Tensor) -> Tensor:
    """What followed the latest earlier occurrence of the token gets 5, everything else 0."""
    logits_rsv = torch.zeros(*ids_rs.shape, SIZE)
    for row, ids_s in enumerate(ids_rs.tolist()):
        for place, token in enumerate(ids_s):
            earlier = [other for other in range(place) if ids_s[other] == token]
            if earlier:
                logits_rsv[row, place, ids_s[earlier[-1] + 1]] = 5
    return logits_rsv


def nothing(ids_rs: Tensor) -> Tensor:
    return torch.zeros(*ids_rs.shape, SIZE)


def guesser(ids_rs: Tensor) -> Tensor:
    return torch.randn(*ids_rs.shape, SIZE, generator=torch.Generator().manual_seed(1))


def rows_of(distance: int, rows: int = 4, first: int | None = None) -> Tensor:
    return repeated(torch.arange(1, SIZE), distance, rows, 0, first)


@pytest.mark.parametrize("distance", [2, 7, 49])
@pytest.mark.parametrize("first", [None, 0])
def test_a_model_that_copies_has_all(distance: int, first: int | None) -> None:
    toy = Toy(copier)
    found = recall(toy, rows_of(distance, first=first), distance, SIZE)
    assert {shape[1] for shape in toy.shapes} == {positions_of(distance, first)}, "the last token is predicted alone"
    assert (found.distance, found.accuracy, found.copies) == (distance, 1.0, 4 * (distance - 1))
    assert found.loss == pytest.approx(math.log(1 + 49 * math.exp(-5)))


def test_a_model_that_knows_nothing_has_one_in_the_vocabulary() -> None:
    found = recall(Toy(nothing), rows_of(9), 9, SIZE)
    assert found.accuracy == pytest.approx(1 / SIZE) and found.loss == pytest.approx(math.log(SIZE))


def test_a_model_that_guesses_has_it_on_average() -> None:
    found = recall(Toy(guesser), rows_of(40, rows=200), 40, SIZE)
    error = math.sqrt(1 / SIZE * (1 - 1 / SIZE) / found.copies)
    assert abs(found.accuracy - 1 / SIZE) < 4 * error


def test_only_the_second_half_counts_and_not_its_first_token() -> None:
    """A model that is right there and nowhere else."""

    def late(ids_rs: Tensor) -> Tensor:
        logits_rsv = nothing(ids_rs)
        logits_rsv[:, :6, 0] = 5
        logits_rsv[:, 6:11].scatter_(2, ids_rs[:, 1:6, None], 5.0)
        return logits_rsv

    assert recall(Toy(late), rows_of(6), 6, SIZE).accuracy == 1.0


def test_scores_by_hand() -> None:
    """A hit, a tie of two, a miss."""
    logits = torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 3, 0]])
    hits, loss = score(logits, torch.tensor([0, 1, 0]))
    assert hits == pytest.approx(1.5)
    terms = [math.log(1 + 2 * math.exp(-2)), math.log(2 + math.exp(-1)), math.log(2 + math.exp(3))]
    assert loss == pytest.approx(sum(terms))


def test_rows_repeat_different_tokens_of_those_given() -> None:
    tokens = torch.tensor([3, 5, 8, 13, 21])
    ids = repeated(tokens, 4, 100, 7, first=1)
    assert ids.shape == (100, 9) and (ids[:, 0] == 1).all()
    assert torch.equal(ids[:, 1:5], ids[:, 5:])
    assert all(len(set(row)) == 4 and set(row) <= set(tokens.tolist()) for row in ids[:, 1:5].tolist())
    assert ids[:, 1].unique().tolist() == tokens.tolist()
    assert torch.equal(ids, repeated(tokens, 4, 100, 7, first=1))
    assert not torch.equal(ids, repeated(tokens, 4, 100, 8, first=1))
    with pytest.raises(UserError, match="distance 6 needs as many tokens, and there are 5"):
        repeated(tokens, 6, 1, 0)


def test_rows_are_read_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Toy(copier), Toy(copier)
    expected = recall(whole, rows_of(5), 5, SIZE)
    monkeypatch.setattr(probe, "LOGITS_AT_ONCE", 3 * 10 * SIZE)
    found = recall(parts, rows_of(5), 5, SIZE)
    assert found.accuracy == expected.accuracy and found.loss == pytest.approx(expected.loss)
    assert [shape[0] for shape in whole.shapes] == [4] and [shape[0] for shape in parts.shapes] == [3, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_untrained_model_copies_nothing(family: str) -> None:
    model = tiny(family).eval()
    found = recall(model, repeated(torch.arange(2, 48), 20, 64, 0), 20, 48)
    assert found.accuracy < 0.1 and found.loss == pytest.approx(math.log(48), rel=0.1)
