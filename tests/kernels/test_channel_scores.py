"""Scores of channels against those of whole estimates in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import GPU, randn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from loras_bench.kernels.channel_scores import attention_scores, feed_forward_scores
from loras_bench.sparsity.criteria import Heads, query_key_scores, value_scores
from loras_bench.sparsity.criteria import feed_forward_scores as expected_feed_forward

GPU_THERE = torch.cuda.is_available()
DEVICE = "cuda" if GPU_THERE else "cpu"
FORMATS = [torch.float32, torch.bfloat16 if GPU_THERE else torch.float16]
"""Triton's interpreter cuts digits off where it should round to bfloat16."""
ERROR = 1e-4 if GPU_THERE else 1e-5
"""Tensor cores round each of the many additions down."""
over_formats = pytest.mark.parametrize("dtype", FORMATS, ids=str)


@over_formats
@pytest.mark.parametrize(
    ("tokens", "samples", "width", "rank"),
    [(9, 2, 40, 4), (300, 70, 130, 8), pytest.param(4096, 8, 14336, 8, marks=GPU)],
    ids=["one tile", "several tiles", "llama"],
)
def test_feed_forward_scores(tokens: int, samples: int, width: int, rank: int, dtype: torch.dtype) -> None:
    """Samples of different lengths, and a fill that belongs to none."""
    like = (DEVICE, dtype)
    z, up = randn(0, tokens, 2 * rank, like=like), randn(1, 2 * width, rank, like=like)
    sample_t = torch.arange(tokens) * (samples + 1) // tokens
    member_mt = (sample_t == torch.arange(samples)[:, None]).double()
    mean = (member_mt / member_mt.sum(1, keepdim=True)).to(*like)
    means = mean.double() @ z.double()
    gate, value = (part @ factor.double().t() for part, factor in zip(means.chunk(2, 1), up.chunk(2), strict=True))
    scores = feed_forward_scores(z, mean, up)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected_feed_forward(gate, value), rtol=1e-4, atol=1e-5)


def estimates(z: Tensor, up: Tensor, heads: Heads) -> list[Tensor]:
    """Of q, k and v: (t, n), in float64."""
    widths = [heads.query * heads.size, heads.key * heads.size, heads.key * heads.size]
    parts = zip(z.double().chunk(3, 1), up.double().split(widths), strict=True)
    return [one @ factor.t() for one, factor in parts]


@over_formats
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "rank"),
    [
        (9, Heads(4, 4, 8), 4),
        (300, Heads(6, 2, 10), 8),
        (20, Heads(2, 1, 64), 20),
        pytest.param(4096, Heads(32, 8, 128), 8, marks=GPU),
    ],
    ids=lambda value: str(value),
)
def test_attention_scores(tokens: int, heads: Heads, rank: int, padding: bool, dtype: torch.dtype) -> None:
    """Whatever stands at padding, it does not count."""
    like, channels = (DEVICE, dtype), heads.key * heads.size
    z = randn(0, tokens, 3 * rank, like=like)
    up = randn(1, heads.query * heads.size + 2 * channels, rank, like=like)
    real_t = (torch.arange(tokens, device=DEVICE) % 3 > 0) if padding else None
    q, k, v = estimates(z, up, heads)
    expected = query_key_scores(q, k, heads, real_t), value_scores(v, real_t)
    if real_t is not None:
        z[~real_t] = torch.nan
    scores = attention_scores(z, real_t, up, heads.query, heads.key)
    assert [len(one) for one in scores] == [channels // 2, channels]
    torch.testing.assert_close([one.double() for one in scores], list(expected), rtol=ERROR, atol=ERROR)


def test_products_are_counted() -> None:
    """5 tokens, 2 samples, f = 3 of rank 4: one program. Attention: 2 + 2 x 1 heads of 4 channels."""
    z, mean, up = randn(0, 5, 8).to(DEVICE), randn(1, 2, 5).to(DEVICE), randn(2, 6, 4).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        feed_forward_scores(z, mean, up)
    assert counter.get_total_flops() == 2 * 2 * 5 * 8 + 2 * 2 * 6 * 4
    z, up = randn(0, 5, 12).to(DEVICE), randn(1, 16, 4).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        attention_scores(z, None, up, 2, 1)
    assert counter.get_total_flops() == 3 * 2 * 5 * 4 * 4 + 2 * 16 * 4 * 4


@pytest.mark.parametrize("heads", [Heads(6, 2, 10), Heads(32, 8, 128)], ids=str)
def test_shapes_are_known_without_running(heads: Heads) -> None:
    channels = heads.key * heads.size
    with torch.device("meta"):
        z, mean, up = torch.empty(30, 12), torch.empty(3, 30), torch.empty(heads.query * heads.size + 2 * channels, 4)
    assert [len(one) for one in attention_scores(z, None, up, heads.query, heads.key)] == [channels // 2, channels]
    assert len(feed_forward_scores(z, mean, up)) == len(up) // 2
