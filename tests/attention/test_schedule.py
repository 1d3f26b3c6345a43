"""Schedules against the mask: no allowed pair is left out, no tile without one is visited, and full tiles are full."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_checks import (
    CASES,
    CPU,
    LENGTH,
    batches,
    case_name,
    documents,
    interval_patterns,
    irregular_patterns,
    padding,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from loras_bench.attention.binding import AttentionBatch
from loras_bench.attention.patterns import BigBird, Dense, Dilated, PatternBase, Window
from loras_bench.attention.schedule import ITEM_VISITS, LIST_TILE, Part, Tiles, Visits

LISTS = Tiles(LIST_TILE, LIST_TILE)
sizes = st.sampled_from([1, 4, 16, 64])


def interval_mask(bounds_b4s: Tensor) -> Tensor:
    """Which column each row's two intervals hold: bool (b, rows, columns)."""
    column = torch.arange(bounds_b4s.shape[2])
    first_a, end_a, first_b, end_b = bounds_b4s[..., None].unbind(dim=1)
    return ((column >= first_a) & (column < end_a)) | ((column >= first_b) & (column < end_b))


def tiled(mask_bqk: Tensor, tiles: Tiles, fill: bool) -> Tensor:
    """The mask cut into tiles, filled up at the ends: bool (b, row tiles, column tiles, pairs)."""
    samples, rows, columns = mask_bqk.shape
    padded = F.pad(mask_bqk, (0, 0, 0, -rows % tiles.rows), value=fill)  # rows beyond the end may be anything
    padded = F.pad(padded, (0, -columns % tiles.columns))
    cut = padded.view(samples, -(-rows // tiles.rows), tiles.rows, -(-columns // tiles.columns), tiles.columns)
    return cut.transpose(2, 3).flatten(3)


def visited(visits: Visits, sample: int, tile: int, listed: bool) -> tuple[list[int], list[int]]:
    """The tiles that need a mask and the full ones, as the kernels enumerate them."""
    masked, full = visits.counts[sample, tile].tolist()
    row = visits.tiles[sample, tile].tolist()
    if listed:
        return row[:masked], row[masked : masked + full]
    low, run, other_low, full_low, full_end = row
    others = [other_low + t for t in range(masked - run)]
    others = [other if other < full_low else other + full_end - full_low for other in others]
    return [*range(low, low + run), *others], [*range(full_low, full_low + full)]


def check_visits(part: Part, side: str, tiles: Tiles, mask_bqk: Tensor, exact: bool) -> None:
    """Tiles of rows visit what holds an allowed pair (or the tiles between two such); full tiles are full."""
    visits = part.visits(side, tiles)
    some = tiled(mask_bqk, tiles, fill=False).any(dim=3)
    full = tiled(mask_bqk, tiles, fill=not part.listed).all(dim=3)
    for sample, tile in torch.cartesian_prod(torch.arange(some.shape[0]), torch.arange(some.shape[1])).tolist():
        needed = set(some[sample, tile].nonzero()[:, 0].tolist())
        filled = set(full[sample, tile].nonzero()[:, 0].tolist())
        masked_tiles, full_tiles = visited(visits, sample, tile, part.listed)
        found = {*masked_tiles, *full_tiles}
        assert len(found) == len(masked_tiles) + len(full_tiles)
        assert needed <= found <= set(range(min(needed, default=0), max(needed, default=-1) + 1))
        assert set(full_tiles) <= filled
        if exact:
            assert found == needed and set(full_tiles) == filled & needed


@given(st.data(), st.booleans(), sizes, sizes)
@settings(max_examples=300, deadline=None)
def test_runs_of_tiles_cover_the_mask(data: st.DataObject, causal: bool, rows: int, columns: int) -> None:
    """From both sides; exactly, where all rows of a tile are of one sequence and see one interval."""
    batch = data.draw(batches(causal, 150))
    pattern = data.draw(interval_patterns(causal))
    for part in batch.bound(pattern).parts:
        simple = part.order is None and not part.has_prefix and batch.document_bs is None
        for side in ("queries", "keys"):
            mask = interval_mask(part._bounds[side])  # type: ignore[arg-type]
            check_visits(part, side, Tiles(rows, columns), mask, exact=simple)


@given(st.data(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_intervals_are_the_mask_from_both_sides(data: st.DataObject, causal: bool) -> None:
    batch = data.draw(batches(causal, 60))
    bound = batch.bound(data.draw(interval_patterns(causal)))
    total = torch.zeros(bound.samples, batch.length, batch.length, dtype=torch.int32)
    for part in bound.parts:
        mask = interval_mask(part._bounds["queries"])  # type: ignore[arg-type]
        assert torch.equal(interval_mask(part._bounds["keys"]), mask.transpose(1, 2))  # type: ignore[arg-type]
        if part.order is not None:  # back from residue classes to tokens
            order = part.order.long().expand(len(mask), -1)
            assert torch.equal(order.sort(dim=1).values, torch.arange(batch.length).expand_as(order))
            place = order.argsort(dim=1)
            mask = torch.stack([one[at][:, at] for one, at in zip(mask, place, strict=True)])
        total += mask
    assert torch.equal(total, bound.mask_bqk.int())  # no pair is in two parts
    assert bound.allowed_pairs(bound.samples) == int(total.sum())


def test_residue_classes_of_documents_and_of_padded_rows() -> None:
    """Step 3, written out by hand: document by document, class by class, each in ascending order; padding last."""
    pattern = Dilated(window=2, dilation=3)
    packed = AttentionBatch(9, True, CPU, document_bs=documents(5, 4)).bound(pattern).parts[0]
    assert packed.order is not None and packed.order.tolist() == [[0, 3, 1, 4, 2, 5, 8, 6, 7]]
    padded = AttentionBatch(9, True, CPU, padding_bs=padding(5, 9, length=9)).bound(pattern).parts[0]
    assert padded.order is not None
    assert padded.order.tolist() == [[0, 3, 1, 4, 2, 5, 8, 6, 7], [0, 3, 6, 1, 4, 7, 2, 5, 8]]


@given(st.data(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_lists_of_irregular_patterns_are_the_mask(data: st.DataObject, causal: bool) -> None:
    batch = data.draw(batches(causal, 200))
    big = st.builds(BigBird, block=st.sampled_from([8, 64]), random_blocks=st.integers(0, 3), seed=st.integers(0, 9))
    bound = batch.bound(data.draw(st.one_of(irregular_patterns(causal), big)))
    (part,) = bound.parts
    assert part.bits is not None
    words = part.bits.transpose(2, 3).flatten(1, 2)  # (b, queries, key tiles)
    bits = ((words[..., None] >> torch.arange(LIST_TILE)) & 1).bool().flatten(2)
    assert torch.equal(bits[:, : batch.length, : batch.length], bound.mask_bqk)
    assert int(bits.sum()) == int(bound.mask_bqk.sum()) == bound.allowed_pairs(bound.samples)
    for side, mask in (("queries", bound.mask_bqk), ("keys", bound.mask_bqk.transpose(1, 2))):
        check_visits(part, side, LISTS, mask, exact=True)


def test_runs_of_a_window_by_hand() -> None:
    """Window 3 and one global token, n = 10, tiles of 4: (first, number), first of the second run, full from, to."""
    (part,) = AttentionBatch(10, True, CPU).bound(Window(window=3, global_tokens=1)).parts
    visits = part.visits("queries", Tiles(4, 4))
    assert visits.tiles[0, :, :3].tolist() == [[0, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert visits.counts.tolist() == [[[1, 0], [2, 0], [3, 0]]]
    (dense,) = AttentionBatch(10, True, CPU).bound(Dense()).parts
    assert dense.visits("queries", Tiles(4, 4)).counts.tolist() == [[[1, 0], [1, 1], [1, 2]]]
    assert dense.visits("queries", Tiles(4, 2)).counts.tolist() == [[[2, 0], [2, 2], [1, 4]]]
    assert dense.visits("keys", Tiles(4, 4)).counts.tolist() == [[[2, 1], [2, 0], [1, 0]]]


def test_a_tile_of_two_documents_whose_runs_would_cross_has_one_run() -> None:
    """The first document has no keys before its band, the second's global key lies beyond the first one's band."""
    (part,) = AttentionBatch(8, True, CPU, document_bs=documents(2, 6)).bound(Window(window=2, global_tokens=1)).parts
    visits = part.visits("queries", Tiles(8, 2))
    assert sorted(visited(visits, 0, 0, listed=False)[0]) == [0, 1, 2, 3]


@given(
    length=st.integers(1, 900),
    prefix=st.integers(0, 9),
    width=st.integers(1, 100),
    group=st.integers(1, 4),
    causal=st.booleans(),
    side=st.sampled_from(["queries", "keys"]),
)
@settings(max_examples=100, deadline=None)
def test_items_are_all_visits_once(length: int, prefix: int, width: int, group: int, causal: bool, side: str) -> None:
    window = Window(window=width, global_tokens=prefix) if causal else Window(half_width=width, global_tokens=prefix)
    (part,) = AttentionBatch(length, causal, CPU).bound(window).parts
    visits = part.visits(side, Tiles(4, 4), group)
    totals = visits.counts[0].sum(dim=1) * (group if side == "keys" else 1)
    pieces: dict[int, list[list[int]]] = {}
    for tile, *item in visits.items.tolist():
        pieces.setdefault(tile, []).append(item)
    assert sorted(pieces) == list(range(len(totals)))
    taken: list[int] = []
    for tile, items in pieces.items():
        if len(items) == 1:
            assert items == [[0, -1, 1, 0, 0]]
            continue
        items.sort()
        assert side == "keys"
        assert [first for first, *_ in items] == [0, *(end for _, end, *_ in items[:-1])]
        assert items[-1][1] == totals[tile] and all(first < end for first, end, *_ in items)
        assert [item[2:] for item in items] == [[len(items), items[0][3], index] for index in range(len(items))]
        taken += range(items[0][3], items[0][3] + len(items))
    assert sorted(taken) == list(range(visits.parts))
    held = [int(totals[tile]) if end < 0 else end - first for tile, first, end, *_ in visits.items.tolist()]
    assert held == sorted(held, reverse=True)


def test_tiles_of_global_keys_are_split() -> None:
    """1600 queries in tiles of 4 see the global key: 400 visits, where the others have 3 at most."""
    (part,) = AttentionBatch(1600, True, CPU).bound(Window(window=8, global_tokens=1)).parts
    visits = part.visits("keys", Tiles(4, 4))
    assert visits.parts == -(-400 // ITEM_VISITS) == 7
    assert part.visits("keys", Tiles(4, 4), group=3).parts == -(-1200 // ITEM_VISITS)
    assert part.visits("queries", Tiles(4, 4)).parts == 0
    assert AttentionBatch(1600, True, CPU).bound(Dense()).parts[0].visits("keys", Tiles(4, 4)).parts == 0


@pytest.mark.parametrize(("pattern", "causal"), CASES, ids=case_name)
def test_schedules_of_documents_never_wait_for_the_device(pattern: PatternBase, causal: bool) -> None:
    """Fake tensors have no values to wait for: whoever asks for one is refused."""
    with FakeTensorMode():
        numbers = torch.zeros(2, LENGTH, dtype=torch.int64)
        batch = AttentionBatch(LENGTH, causal, CPU, numbers == 0, numbers)
        with pytest.raises(DataDependentOutputException):
            batch.documents_bs[0].sum().item()
        for part in batch.bound(pattern).parts:
            for side in ("queries", "keys"):
                visits = part.visits(side, LISTS, group=2)
                assert visits.items.shape == (3, 6) and visits.counts.shape == (2, 3, 2) and not visits.parts


def test_items_of_documents_are_whole_tiles() -> None:
    batch = AttentionBatch(700, True, CPU, document_bs=documents(600, 100))
    visits = batch.bound(Window(window=8, global_tokens=1)).parts[0].visits("keys", Tiles(4, 4))
    assert visits.items.tolist() == [[tile, 0, -1, 1, 0, 0] for tile in range(175)]
    assert int(visits.counts.sum(dim=2).max()) > ITEM_VISITS
