"""Documents in one row: places, positions and borders, by hand and as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loras_bench.data.packing import PADDING_MULTIPLE, WIDTH_MULTIPLE, lay_out, pack, pad


def test_three_documents_by_hand():
    """Of a store of 20 tokens: the last three, then one, then two."""
    row = pack(np.array([17, 4, 8]), np.array([3, 1, 2]))
    assert {array.shape for array in (row.source_1s, row.real_1s, row.document_1s, row.position_1s)} == {(1, 256)}
    assert row.source_1s[0, :6].tolist() == [17, 18, 19, 4, 8, 9]
    assert row.document_1s[0, :6].tolist() == [0, 0, 0, 1, 2, 2]
    assert row.position_1s[0, :6].tolist() == [0, 1, 2, 0, 0, 1]
    assert (row.first_b.tolist(), row.last_b.tolist()) == ([0, 3, 4], [2, 3, 5])
    assert row.real_1s[0].tolist() == [True] * 6 + [False] * 250
    assert row.document_1s[0, 6:].tolist() == [3] * 250, "the fill is a document of its own"
    assert row.position_1s[0, 6:].tolist() == row.source_1s[0, 6:].tolist() == [0] * 250


def test_side_by_side_by_hand():
    source_bs, real_bs = pad(np.array([17, 4]), np.array([3, 1]), longest=128)
    assert source_bs.shape == real_bs.shape == (2, PADDING_MULTIPLE)
    assert source_bs[:, :4].tolist() == [[17, 18, 19, 0], [4, 0, 0, 0]]
    assert real_bs.sum(axis=1).tolist() == [3, 1] and real_bs[:, 0].all()
    assert pad(np.array([0]), np.array([65]), longest=128)[0].shape == (1, 128)
    assert pad(np.array([0]), np.array([65]), longest=100)[0].shape == (1, 100), "no wider than a model can read"


@pytest.mark.parametrize(("tokens", "width"), [(1, 256), (255, 256), (256, 256), (257, 512)])
def test_the_width_is_the_next_multiple(tokens, width):
    row = pack(np.array([0]), np.array([tokens]))
    assert row.real_1s.shape == (1, width)
    assert row.real_1s.sum() == tokens


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_every_token_of_every_document_is_there_once_and_in_order(lengths, random):
    """Documents of one store, taken in any order."""
    store = list(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]))
    random.shuffle(store)
    row = pack(np.array([document[0] for document in store]), np.array([len(document) for document in store]))
    width, total = row.real_1s.shape[1], sum(lengths)
    assert width % WIDTH_MULTIPLE == 0 and 0 <= width - total < WIDTH_MULTIPLE
    for number, document in enumerate(store):
        places = np.flatnonzero(row.document_1s[0] == number)
        assert row.source_1s[0, places].tolist() == document.tolist()
        assert row.position_1s[0, places].tolist() == list(range(len(document)))
        assert (places[0], places[-1]) == (row.first_b[number], row.last_b[number])
    assert (np.diff(row.document_1s[0]) >= 0).all()
    assert row.real_1s[0].tolist() == [True] * total + [False] * (width - total)
    layout = lay_out(
        np.array([document[0] for document in store]), np.array([len(document) for document in store]), 0, packed=True
    )
    inputs = layout.facts | layout.borders
    assert all(array.dtype == np.int64 for name, array in inputs.items() if name != "attention_mask")
