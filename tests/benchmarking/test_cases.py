"""Shapes and patterns in short words."""

from __future__ import annotations

import pytest

from loras_bench.attention.patterns import BigBird, BlockLocal, Dense, Dilated, Longformer, Strided, Window
from loras_bench.benchmarking.cases import Case, Shape, read_cases, read_pattern, read_shape
from loras_bench.errors import UserError


def test_a_shape_is_batch_heads_length_and_head_dim() -> None:
    assert read_shape("2x16x8192x64") == Shape(2, 16, 16, 8192, 64)
    assert read_shape("4x9/3x8192x64") == Shape(4, 9, 3, 8192, 64)


@pytest.mark.parametrize("text", ["2x16x8192x64", "4x9/3x8192x64"])
def test_a_shape_reads_back(text: str) -> None:
    assert str(read_shape(text)) == text


@pytest.mark.parametrize("text", ["", "2x16x8192", "2x16x8192x64x1", "axbxcxd", "2x9/2x8x64", "0x1x1x1", "2x4/0x8x64"])
def test_other_words_are_no_shapes(text: str) -> None:
    with pytest.raises(UserError, match="--shapes"):
        read_shape(text)


@pytest.mark.parametrize(
    ("text", "pattern", "causal"),
    [
        ("dense", Dense(), True),
        ("dense,bidirectional", Dense(), False),
        ("dense:bidirectional", Dense(), False),
        ("window:512", Window(window=512), True),
        ("window:512+64", Window(window=512, global_tokens=64), True),
        ("window:256+8,bidirectional", Window(half_width=256, global_tokens=8), False),
        ("window:half_width=3", Window(half_width=3), False),
        ("dense,causal=false", Dense(), False),
        ("longformer:16+2", Longformer(window=16, global_tokens=2), True),
        ("dilated:64,dilation=4", Dilated(window=64, dilation=4), True),
        ("strided:128", Strided(stride=128), True),
        ("block_local:64,overlap=false", BlockLocal(block=64, overlap=False), True),
        ("bigbird", BigBird(), True),
        ("bigbird:128,random_blocks=1,bidirectional", BigBird(block=128, random_blocks=1), False),
        (
            "{kind: longformer, window: 8, global_positions: [1, 5]}",
            Longformer(window=8, global_positions=(1, 5)),
            True,
        ),
        ('{"kind": "strided", "stride": 8, "causal": false}', Strided(stride=8), False),
        ("{kind: window, half_width: 4}", Window(half_width=4), False),
    ],
)
def test_patterns_in_short_words(text: str, pattern: object, causal: bool) -> None:
    assert read_pattern(text) == (pattern, causal)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not match"),
        ("sparse", "does not match"),
        ("window", "half_width"),
        ("window:many", "neither a number"),
        ("window:8,depth=2", "depth"),
        ("strided:0", "greater than or equal to 1"),
        ("{kind: window", "not valid YAML"),
        ("window:64,window=128", "`window` is given twice"),
        ("window:64+8,global_tokens=8", "`global_tokens` is given twice"),
        ("window:64,128", "`window` is given twice"),
        ("window:64,kind=dense", "`kind` is given twice"),
        ("dense,bidirectional,causal=true", "`causal` is given twice"),
        ("{kind: window, window: 64, window: 128}", "`window` was already given"),
        ("window:64,causal=maybe", "`causal` is true or false, not 'maybe'"),
        ("{kind: dense, causal: 0}", "`causal` is true or false, not 0"),
        ("dense,causal=", "`causal` is true or false, not None"),
        ("window:half_width=3,causal=true", "bidirectional"),
        ("{kind: window, window: 8, causal: false}", "bidirectional"),
        ("bigbird:64,window_blocks=2,bidirectional", "no middle block"),
    ],
)
def test_other_words_are_no_patterns(text: str, reason: str) -> None:
    with pytest.raises(UserError, match="--patterns") as refused:
        read_pattern(text)
    assert reason in refused.value.message


def test_every_pattern_is_measured_at_every_shape() -> None:
    cases = read_cases(["1x1x8x16 1x2x8x16", "2x1x8x16"], ["dense window:4", "{kind: strided, stride: 2}"])
    assert [(str(case.shape), case.pattern.kind) for case in cases] == [
        (shape, kind) for shape in ("1x1x8x16", "1x2x8x16", "2x1x8x16") for kind in ("dense", "window", "strided")
    ]
    with pytest.raises(UserError, match="nothing to measure"):
        read_cases([" "], ["dense"])


def test_a_case_counts_its_pairs_over_the_samples() -> None:
    case = Case(Shape(2, 4, 4, 6, 16), Window(window=2), True)
    assert case.allowed_pairs() == 2 * (1 + 5 * 2)
    assert case.baseline.allowed_pairs() == 2 * 21
    assert case.pattern_text == "window: window 2, causal"
