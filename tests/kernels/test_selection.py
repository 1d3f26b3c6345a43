"""The selection kernel against a sort of (score, place) in Python, and against torch.topk where no scores are equal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import GPU, randn
from torch import Tensor

pytest.importorskip("triton")
from loras_bench.kernels.selection import select
from loras_bench.sparsity.criteria import LARGEST_SELECTION, top
from loras_bench.sparsity.criteria import select as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [(1, 1), (2, 1), (7, 3), (16, 16), (33, 32), (100, 1), (100, 25), (257, 128)]
REAL = [(14336, 143), (11008, 1100), (512, 128), (1024, 256), (20000, 19999), (LARGEST_SELECTION, 655)]
"""Scores and how many are taken: layers of Llama-3-8B and Llama-2-7B among them."""
over_sizes = pytest.mark.parametrize(
    ("size", "count"), [*SMALL, *(pytest.param(*one, marks=GPU) for one in [*SMALL, *REAL])]
)


def places(size: int) -> Tensor:
    return torch.arange(size, device=DEVICE)[None]


def chosen(scores: Tensor, count: int) -> list[int]:
    """Places alone, by the kernel."""
    found_k = select([scores.to(DEVICE)], [count], [places(len(scores))])
    assert found_k.dtype == torch.int64 and found_k.shape == (count,)
    return found_k.tolist()


def by_a_sort(scores: Tensor, count: int) -> list[int]:
    """Python compares equal numbers as equal, so that its stable sort leaves the first of them in front."""
    keys = [math.inf if math.isnan(score) else score for score in scores.tolist()]
    order = sorted(range(len(keys)), key=lambda place: (not math.isnan(scores[place]), -keys[place]))
    return sorted(order[:count])


@over_sizes
@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e30])
def test_it_is_topk_and_sort_where_no_scores_are_equal(size: int, count: int, scale: float) -> None:
    """Both signs, and numbers below the normal ones."""
    scores = torch.tensor(np.random.default_rng(size).permutation(size) - size // 3, dtype=torch.float32) * scale
    assert len(scores.unique()) == size
    assert chosen(scores, count) == top(scores, count).tolist() == by_a_sort(scores, count)


@over_sizes
def test_scores_as_they_are_in_training(size: int, count: int) -> None:
    """Norms: not negative, a few of them large."""
    scores = randn(size, size).square().exp().clamp(max=1e30)
    assert chosen(scores, count) == by_a_sort(scores, count)


@over_sizes
@pytest.mark.parametrize("values", [1, 2, 5])
def test_of_equal_scores_the_first_stay(size: int, count: int, values: int) -> None:
    scores = torch.randint(values, (size,), generator=torch.Generator().manual_seed(0)) - 1.0
    assert chosen(scores, count) == by_a_sort(scores, count)


NUMBERS = st.floats(width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1.0, -1.0, 1e-45])


@settings(deadline=None, max_examples=100)
@given(scores=st.lists(NUMBERS, min_size=1, max_size=40), data=st.data())
def test_every_float32_has_its_place(scores: list[float], data: st.DataObject) -> None:
    """Zeros are equal whatever their sign; NaN is the highest, as in torch.topk."""
    count = data.draw(st.integers(1, len(scores)))
    given_scores = torch.tensor(scores)
    found = chosen(given_scores, count)
    assert found == by_a_sort(given_scores, count)
    highest = given_scores.topk(count).values.sort().values
    torch.testing.assert_close(given_scores[found].sort().values, highest, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sizes", [((9, 4), (30, 11)), pytest.param(((512, 128), (1024, 256)), marks=GPU)])
def test_two_selections_in_one_launch_give_what_their_tables_say(sizes: tuple[tuple[int, int], ...]) -> None:
    """As attention's: six numbers for each of the one, three for each of the other."""
    scores = [randn(size, size) for size, _ in sizes]
    counts = [count for _, count in sizes]
    tables = [torch.randint(10**12, (rows, len(one))) for rows, one in zip((6, 3), scores, strict=True)]
    places = [by_a_sort(one, count) for one, count in zip(scores, counts, strict=True)]
    by_hand = [table[:, chosen].flatten() for table, chosen in zip(tables, places, strict=True)]
    found = select([one.to(DEVICE) for one in scores], counts, [one.to(DEVICE) for one in tables]).cpu()
    assert torch.equal(found, torch.cat(by_hand))
    assert torch.equal(found, reference(scores, counts, tables))


def test_nothing_is_written_beside_the_result() -> None:
    """The result is as long as it says, and the scores stay."""
    scores = randn(1, 50).to(DEVICE)
    before = scores.clone()
    chosen(scores, 7)
    assert torch.equal(scores, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_selection_chooses_anew_in_every_replay() -> None:
    scores = randn(0, 14336).to(DEVICE)
    selection = [scores], [143], [places(14336)]
    select(*selection)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = select(*selection)
    for seed in (1, 2):
        scores.copy_(randn(seed, 14336))
        graph.replay()
        assert found.tolist() == by_a_sort(scores.cpu(), 143)
