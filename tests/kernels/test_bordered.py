"""Spare columns: strides, what counts as a border and what does not."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loras_bench.kernels.bordered import ALIGNMENT, bordered, with_border


@given(rows=st.integers(1, 9), width=st.integers(1, 40), border=st.integers(0, 40))
def test_the_border_is_the_columns_at_the_right(rows: int, width: int, border: int) -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    x_nd = bordered(rows, width, border, like)
    assert x_nd.shape == (rows, width) and x_nd.dtype is torch.bfloat16
    assert x_nd.stride(0) % ALIGNMENT == 0 and x_nd.stride(1) == 1
    x_nd.fill_(1)
    whole = with_border(x_nd, border)
    assert whole is not None and whole.shape == (rows, width + border)
    whole[:, width:] = 2
    assert torch.equal(x_nd, torch.ones(rows, width).bfloat16())
    assert torch.equal(whole[:, :width], x_nd) and whole.data_ptr() == x_nd.data_ptr()


def test_it_is_found_again_through_the_batch_shape() -> None:
    x_nd = bordered(6, 24, 16, torch.zeros(1))
    assert with_border(x_nd.view(2, 3, 24).flatten(0, 1), 16) is not None


def test_what_is_not_a_border() -> None:
    buffer = torch.zeros(6, 40)
    assert with_border(torch.zeros(6, 24), 16) is None  # a plain matrix
    assert with_border(buffer[:, 16:], 16) is None  # the right part of a wider one
    assert with_border(buffer[:, :12], 16) is None  # a left part with more neighbours than the border
    assert with_border(buffer[:4, :24], 16) is None  # some rows of one
    assert with_border(bordered(6, 24, 16, buffer), 32) is None  # a border of another width
    assert with_border(bordered(6, 24, 16, buffer)[1:], 16) is None
    assert with_border(torch.zeros(24, 6).t(), 16) is None


def test_neighbours_as_wide_as_the_border_are_no_border() -> None:
    """Two tensors side by side, 24 and 16 columns: writing u beside the first would destroy the second."""
    assert with_border(torch.cat([torch.zeros(6, 24), torch.ones(6, 16)], dim=1)[:, :24], 16) is None
