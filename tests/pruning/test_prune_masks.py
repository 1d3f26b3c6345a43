"""Masks: exact counts, monotone, two of four; and their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loras_bench.pruning.masks import lowest, pack_bits, raised, unpack_bits

GROUPS = [[(1, 24), False], [(4, 12), False], [(1, 24), True], [(3, 8), True]]


def test_the_lowest_of_each_group_go_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([[3.0, 1, 2, 2], [0, 0, 0, 0]])
    assert lowest(scores, 2).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert not lowest(scores, 0).any()
    assert lowest(scores, 4).all()


def test_what_is_pruned_stays_pruned_whatever_its_score() -> None:
    pruned = torch.tensor([[True, False, False, False]])
    assert raised(pruned, torch.tensor([[9.0, 4, 1, 3]]), 0.5).int().tolist() == [[1, 0, 1, 0]]
    assert raised(pruned, torch.tensor([[9.0, 4, 1, 3]]), 0.0).int().tolist() == [[1, 0, 0, 0]], "a lower one"


def test_two_of_four_by_hand() -> None:
    """The lowest of what may go: 5 and 6 of the first four stay, however low they are beside the rest."""
    none, scores = torch.zeros(1, 8, dtype=torch.bool), torch.tensor([[5.0, 1, 2, 6, 10, 9, 20, 30]])
    assert raised(none, scores, 0.25, two_of_four=True).int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0]]
    assert raised(none, scores, 3 / 8, two_of_four=True).int().tolist() == [[0, 1, 1, 0, 0, 1, 0, 0]]
    assert raised(none, scores, 0.5, two_of_four=True).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]


@given(st.integers(0, 10_000), st.sampled_from(GROUPS), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_counts_are_exact_and_masks_only_grow(
    seed: int, groups: tuple[tuple[int, int], bool], shares: list[float]
) -> None:
    """Scores change between two changes of the masks, as weights do, and many are equal."""
    (shape, two_of_four), generator = groups, torch.Generator().manual_seed(seed)
    pruned = torch.zeros(shape, dtype=torch.bool)
    for share in sorted(shares):
        share = share / 2 if two_of_four else share
        scores = torch.randint(-3, 4, shape, generator=generator).float()
        more = raised(pruned, scores, share, two_of_four=two_of_four)
        assert not (pruned & ~more).any()
        assert more.sum(dim=1).tolist() == [round(share * shape[1])] * shape[0]
        kept_lowest = torch.where(more, torch.inf, scores).amin(dim=1)
        joined_highest = torch.where(more & ~pruned, scores, -torch.inf).amax(dim=1)
        assert two_of_four or (joined_highest <= kept_lowest).all()
        assert not two_of_four or more.view(-1, 4).sum(dim=1).max() <= 2
        pruned = more


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 4), (0,)])
def test_bits_come_back(shape: tuple[int, ...]) -> None:
    mask: Tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_the_order_of_bits() -> None:
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
    assert pack_bits(mask).tolist() == [1 + 128, 2]
    assert pack_bits(mask[:8].view(2, 4).t()).tolist() == [0b1000_0001], (
        "of the elements, not of their places in memory"
    )
