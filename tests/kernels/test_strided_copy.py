"""One launch for many copies into strided rows: what torch's copies give, and nothing beside the targets written."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from loras_bench.kernels.strided_copy import StridedCopy

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16
"""Triton's interpreter cuts digits off where it should round to bfloat16."""


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_it_is_torchs_copy_of_each(dtype: torch.dtype) -> None:
    """Views of one matrix, as adapters are: more than one block, part of a block, one element, one column."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(70, 100, generator=generator).to(DEVICE, dtype)
    sizes = [(0, 40, 0, 64), (40, 41, 3, 4), (41, 70, 64, 65), (45, 61, 0, 60)]
    cuts = [(slice(top, bottom), slice(left, right)) for top, bottom, left, right in sizes]
    sources = [torch.randn(matrix[cut].shape, generator=generator).to(DEVICE) for cut in cuts]
    expected = matrix.clone()
    for cut, source in zip(cuts, sources, strict=True):
        expected[cut].copy_(source)
    copy = StridedCopy([matrix[cut] for cut in cuts], sources)
    copy()
    assert torch.equal(matrix, expected)
    sources[0].mul_(2)
    copy()
    assert torch.equal(matrix[cuts[0]], sources[0].to(dtype)), "it reads the sources anew"
