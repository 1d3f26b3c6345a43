"""Patterns against brute force: the rule as a set of pairs, the counts, and the numbers of the literature."""

from __future__ import annotations

import time

import pytest
import torch
from attention_checks import interval_patterns, irregular_patterns
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from loras_bench.attention.binding import AttentionBatch
from loras_bench.attention.patterns import (
    BigBird,
    BlockLocal,
    Dense,
    Dilated,
    Fixed,
    Longformer,
    Pattern,
    PatternBase,
    Strided,
    Window,
)
from loras_bench.errors import ConfigError


def mask_of(pattern: PatternBase, length: int, causal: bool) -> torch.Tensor:
    return AttentionBatch(length, causal, torch.device("cpu")).bound(pattern).mask_bqk[0]


def by_definition(pattern: PatternBase, length: int, causal: bool) -> set[tuple[int, int]]:
    """The pairs of every pattern but BigBird, written from the formulas of the papers, one pair at a time."""

    def allowed(i: int, j: int) -> bool:
        match pattern:
            case Dense():
                return True
            case Window() | Longformer():
                near = 0 <= i - j < pattern.window if pattern.window else abs(i - j) <= (pattern.half_width or 0)
                globals_ = set(range(pattern.global_tokens)) | set(getattr(pattern, "global_positions", ()))
                return near or i in globals_ or j in globals_
            case Dilated():
                reach = pattern.dilation * (pattern.window - 1 if pattern.window else pattern.half_width or 0)
                return abs(i - j) <= reach and (i - j) % pattern.dilation == 0
            case Strided():
                return abs(i - j) < pattern.stride or (i - j) % pattern.stride == 0
            case Fixed():
                own = i // pattern.stride == j // pattern.stride
                return own or j % pattern.stride >= pattern.stride - pattern.summary
            case BlockLocal():
                return abs(i // pattern.block - j // pattern.block) <= pattern.overlap
        raise AssertionError(pattern)

    return {(i, j) for i in range(length) for j in range(length) if (j <= i or not causal) and allowed(i, j)}


@given(st.data(), st.integers(1, 37), st.booleans())
@settings(max_examples=150, deadline=None)
def test_rule_and_count_follow_the_definition(data: st.DataObject, length: int, causal: bool) -> None:
    pattern = data.draw(st.one_of(interval_patterns(causal), irregular_patterns(causal)))
    expected = by_definition(pattern, length, causal)
    assert {(i, j) for i, j in mask_of(pattern, length, causal).nonzero().tolist()} == expected
    assert pattern.count_pairs(length, causal) == len(expected)


@given(
    st.builds(
        BigBird,
        block=st.integers(1, 8),
        window_blocks=st.sampled_from([1, 3, 5]),
        global_blocks=st.integers(0, 3),
        random_blocks=st.integers(0, 4),
        seed=st.integers(0, 99),
    ),
    st.integers(1, 60),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_bigbird_rows_hold_window_globals_and_distinct_random_blocks(big: BigBird, length: int, causal: bool) -> None:
    mask = mask_of(big, length, causal)
    assert big.count_pairs(length, causal) == int(mask.sum())
    table = big.block_table(length, causal)
    assert (table == big.block_table(length, causal)).all()
    blocks = len(table)
    for row in range(blocks):
        past = set(range(row + 1)) if causal else set(range(blocks))
        seen = set(table[row].nonzero()[0].tolist())
        assert seen <= past
        if row < big.global_blocks:
            assert seen == past
            continue
        first = row - big.window_blocks + 1 if causal else row - big.window_blocks // 2
        last = row if causal else row + big.window_blocks // 2
        planned = {c for c in past if first <= c <= last or c < big.global_blocks}
        assert planned <= seen
        assert len(seen - planned) == min(big.random_blocks, len(past - planned))


def test_bigbird_seed_changes_the_random_blocks() -> None:
    one, other = (BigBird(seed=seed).block_table(4096, True) for seed in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize(
    ("pattern", "length", "causal", "pairs"),
    [
        (Dense(), 4096, True, 8_390_656),
        (Dense(), 1024, True, 524_800),
        (Dense(), 4096, False, 16_777_216),
        (Window(window=256), 4096, True, 1_015_936),
        (Window(half_width=128), 4096, False, 1_036_160),
        (Window(half_width=256), 4096, False, 2_035_456),
        (BlockLocal(block=256, overlap=False), 4096, False, 1_048_576),
        (BlockLocal(block=256), 4096, True, 1_509_376),
        (Strided(stride=64), 4096, True, 389_152),
        (Fixed(stride=32, summary=4), 512, True, 23_808),
        (Dilated(half_width=256, dilation=2), 4096, False, 1_969_664),
        (Longformer(half_width=256, global_tokens=1), 4096, False, 2_043_134),
        (Longformer(half_width=256, global_positions=(0,)), 4096, False, 2_043_134),
        (BigBird(block=64, window_blocks=3, global_blocks=2, random_blocks=3), 4096, False, 2_547_712),
        (Window(window=32, global_tokens=4), 1024, True, 36_234),
        (Window(window=32, global_tokens=4), 512, True, 17_802),
    ],
)
def test_counts_of_the_literature(pattern: PatternBase, length: int, causal: bool, pairs: int) -> None:
    assert pattern.count_pairs(length, causal) == pairs


@pytest.mark.parametrize(
    ("pattern", "length", "of_causal", "of_all"),
    [
        (Window(window=32, global_tokens=4), 1024, 6.90, 3.46),
        (Window(window=64, global_tokens=8), 1024, 13.6, 6.79),
        (Window(window=16, global_tokens=2), 512, 6.90, 3.46),
        (Window(window=32, global_tokens=4), 512, 13.6, 6.79),
        (Window(window=9), 256, 6.89, 3.46),
        (Window(window=16, global_tokens=2), 256, 13.5, 6.80),
        (Window(window=256, global_tokens=32), 8192, 6.91, None),
    ],
)
def test_densities_of_lora_s(pattern: Window, length: int, of_causal: float, of_all: float | None) -> None:
    pairs = pattern.count_pairs(length, True)
    assert 100 * pairs / Dense().count_pairs(length, True) == pytest.approx(
        of_causal, abs=0.06 if of_causal > 10 else 0.006
    )
    if of_all is not None:
        assert 100 * pairs / length**2 == pytest.approx(of_all, abs=0.006)


def test_density_of_the_bidirectional_band() -> None:
    assert 100 * Window(half_width=4).count_pairs(128, False) / 128**2 == pytest.approx(6.91, abs=0.006)


def test_counting_is_fast_at_32k() -> None:
    start = time.perf_counter()
    for pattern in (
        Window(window=512, global_tokens=64),
        Strided(stride=181),
        BigBird(),
        Longformer(window=9, global_positions=(9999,)),
    ):
        pattern.count_pairs(32_768, True)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("pattern", "causal", "hint"),
    [
        (Window(window=9), False, "half_width: 4"),
        (Longformer(half_width=4), True, "window: 5"),
        (Dilated(window=9, dilation=2), False, "half_width: 4"),
        (BigBird(window_blocks=4), False, "5"),
    ],
)
def test_impossible_directions_name_the_fix(pattern: PatternBase, causal: bool, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        pattern.check(causal)
    assert hint in (error.value.hint or "")
    pattern.check(not causal)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ({"kind": "window"}, "either `window`"),
        ({"kind": "window", "window": 4, "half_width": 4}, "either `window`"),
        ({"kind": "window", "window": 0}, "greater than or equal to 1"),
        ({"kind": "fixed", "stride": 4, "summary": 5}, "cannot exceed"),
        ({"kind": "strided", "stride": 4, "window": 4}, "Extra inputs"),
        ({"kind": "spiral"}, "spiral"),
    ],
)
def test_yaml_mistakes_are_refused(text: dict[str, object], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        TypeAdapter(Pattern).validate_python(text)


def test_the_union_reads_every_kind_and_documents_its_fields() -> None:
    adapter: TypeAdapter[PatternBase] = TypeAdapter(Pattern)
    pattern = adapter.validate_python({"kind": "longformer", "window": 8, "global_positions": [3, 5]})
    assert pattern == Longformer(window=8, global_positions=(3, 5))
    assert hash(pattern) == hash(Longformer(window=8, global_positions=(3, 5)))
    kinds = adapter.json_schema()["discriminator"]["mapping"]
    assert set(kinds) == {"dense", "window", "longformer", "dilated", "strided", "fixed", "block_local", "bigbird"}
    window = adapter.json_schema()["$defs"]["Window"]["properties"]["window"]
    assert "the query itself included" in window["description"]
