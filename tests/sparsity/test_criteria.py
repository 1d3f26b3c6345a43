"""Scores and index maps against explicit loops, transformers' own grouped queries and rotary embedding, and toys."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from loras_bench.sparsity.criteria import (
    Heads,
    feed_forward_scores,
    kept,
    query_key_scores,
    top,
    value_scores,
)

GROUPS = [Heads(query=4, key=4, size=8), Heads(query=6, key=2, size=8), Heads(query=8, key=2, size=6)]
LLAMA3 = Heads(query=32, key=8, size=128)
over_groups = pytest.mark.parametrize("heads", GROUPS, ids=lambda heads: f"G={heads.group}")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Kept channels


@pytest.mark.parametrize(
    ("width", "sparsity", "count"),
    [
        (14336, 0.99, 143),
        (14336, 0.97, 430),
        (11008, 0.9, 1100),
        (13824, 0.97, 414),
        (1024, 0.75, 256),
        (1000, 0.9, 100),  # 99 in floating point
        (10, 0.9, 1),
        (10, 0.999, 1),
        (10, 1e-9, 9),
        (10, 0.0, 10),
    ],
)
def test_kept_widths(width: int, sparsity: float, count: int) -> None:
    assert kept(width, sparsity) == count


@given(width=st.integers(1, 20000), percent=st.integers(0, 99))
def test_kept_widths_are_those_of_whole_numbers(width: int, percent: int) -> None:
    assert kept(width, percent / 100) == max(1, width * (100 - percent) // 100)


def test_pairs_are_half_the_channels_and_at_least_one() -> None:
    assert LLAMA3.kept_pairs(0.75) == 128
    assert Heads(2, 1, 10).kept_pairs(0.5) == 2  # 5 channels, rounded down to 4
    assert Heads(2, 1, 10).kept_pairs(0.95) == 1


@given(st.permutations(range(20)), st.integers(1, 20))
def test_top_is_the_set_of_the_highest_in_order(scores: list[int], count: int) -> None:
    chosen = top(torch.tensor(scores, dtype=torch.float32), count)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(scores.index(score) for score in range(20 - count, 20))


# Index maps


def true_partners(heads: Heads) -> Tensor:
    """The key channel that each query channel is multiplied with, as transformers repeats the key heads."""
    channels_1gse = torch.arange(heads.key * heads.size).view(1, heads.key, 1, heads.size)
    return repeat_kv(channels_1gse, heads.group).flatten()


@over_groups
def test_query_channels_are_those_of_explicit_loops(heads: Heads) -> None:
    channels = [1, 2, heads.size, 2 * heads.size - 1]
    expected = []
    for member in range(heads.group):
        for channel in channels:
            head, element = divmod(channel, heads.size)
            expected.append((head * heads.group + member) * heads.size + element)
    assert heads.query_channels(torch.tensor(channels)).tolist() == expected


@pytest.mark.parametrize("heads", [*GROUPS, LLAMA3], ids=lambda heads: f"{heads.query} on {heads.key}")
def test_query_channels_of_all_key_channels_are_all_and_each_is_a_true_partner(heads: Heads) -> None:
    """Bijective, and G to one; the official code's maps agree with the truth on 12.5 % and 0.8 % of Llama-3's."""
    key_channels = torch.arange(heads.key * heads.size)
    query_channels = heads.query_channels(key_channels)
    assert torch.equal(query_channels.sort().values, torch.arange(heads.query * heads.size))
    assert torch.equal(true_partners(heads)[query_channels], key_channels.repeat(heads.group))


@given(st.sampled_from(GROUPS), st.data())
def test_kept_query_channels_meet_kept_key_channels_and_no_others(heads: Heads, data: st.DataObject) -> None:
    every = range(heads.key * heads.size)
    channels = torch.tensor(sorted(data.draw(st.sets(st.sampled_from(every), min_size=1))))
    chosen = heads.query_channels(channels)
    assert len(set(chosen.tolist())) == len(channels) * heads.group
    is_kept = torch.isin(true_partners(heads), channels)
    assert torch.equal(is_kept.nonzero().flatten(), chosen.sort().values)


def test_without_groups_query_channels_are_the_key_channels() -> None:
    channels = torch.tensor([3, 0, 17])
    assert torch.equal(Heads(query=4, key=4, size=8).query_channels(channels), channels)


def test_inputs_of_the_output_projection_reach_into_every_head() -> None:
    """The official code keeps attention channels of Llama-3's heads 0 to 7 only."""
    channels = top(value_scores(drawn(50, 1024)), kept(1024, 0.75))
    inputs = LLAMA3.query_channels(channels)
    assert len(inputs) == 4 * 256 and set((inputs // 128).tolist()) == set(range(32))


@over_groups
def test_rotary_pairs_are_kept_together(heads: Heads) -> None:
    half = heads.size // 2
    pairs = top(drawn(heads.key * half), heads.kept_pairs(0.5))
    channels = heads.pair_channels(pairs)
    first, second = channels.chunk(2)
    assert torch.equal(second, first + half)
    assert torch.equal(first // heads.size * half + first % heads.size, pairs) and (first % heads.size < half).all()
    every = heads.pair_channels(torch.arange(heads.key * half))
    assert torch.equal(every.sort().values, torch.arange(heads.key * heads.size))


def rotated(q_tn: Tensor, k_tc: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Through transformers' rotary embedding at positions 0, 1, ..."""
    half = heads.size // 2
    angles_te = torch.arange(len(q_tn))[:, None] * 10 ** -(torch.arange(half) / half)
    angles_1te = torch.cat([angles_te, angles_te], dim=1)[None]
    split = (x.view(1, len(x), -1, heads.size).transpose(1, 2) for x in (q_tn, k_tc))
    turned = apply_rotary_pos_emb(*split, angles_1te.cos(), angles_1te.sin())
    q, k = (x.transpose(1, 2).reshape(len(q_tn), -1) for x in turned)
    return q, k


def only(x_tc: Tensor, channels: Tensor) -> Tensor:
    return torch.zeros_like(x_tc).index_copy(1, channels, x_tc[:, channels])


@over_groups
def test_choosing_channels_commutes_with_the_rotary_embedding(heads: Heads) -> None:
    q, k = drawn(9, heads.query * heads.size), drawn(9, heads.key * heads.size, seed=1)
    k_channels = heads.pair_channels(top(query_key_scores(q, k, heads), heads.kept_pairs(0.5)))
    q_channels = heads.query_channels(k_channels)
    before = rotated(only(q, q_channels), only(k, k_channels), heads)
    q_rotated, k_rotated = rotated(q, k, heads)
    torch.testing.assert_close(before[0], only(q_rotated, q_channels))
    torch.testing.assert_close(before[1], only(k_rotated, k_channels))


# Scores


def test_scores_by_hand() -> None:
    gate = torch.tensor([[1.0, 0.0], [-2.0, 3.0]])
    up = torch.tensor([[2.0, 5.0], [1.0, 1.0]])
    silu = {x: x / (1 + math.exp(-x)) for x in (1.0, -2.0, 3.0)}
    expected = torch.tensor([math.hypot(silu[1.0] * 2, silu[-2.0]), silu[3.0]])
    torch.testing.assert_close(feed_forward_scores(gate, up), expected)
    torch.testing.assert_close(value_scores(torch.tensor([[3.0, 1.0], [4.0, 1.0]])), torch.tensor([5.0, math.sqrt(2)]))


@over_groups
def test_query_key_scores_are_those_of_explicit_loops(heads: Heads) -> None:
    q, k = drawn(7, heads.query * heads.size), drawn(7, heads.key * heads.size, seed=1)
    half, expected = heads.size // 2, []
    for head in range(heads.key):
        for element in range(half):
            pair = (element, element + half)
            k_norm = math.sqrt(sum(float(k[:, head * heads.size + e].square().sum()) for e in pair))
            members = range(head * heads.group, (head + 1) * heads.group)
            q_squares = [float(q[:, m * heads.size + e].square().sum()) for m in members for e in pair]
            expected.append(k_norm * math.sqrt(sum(q_squares) / heads.group))
    torch.testing.assert_close(query_key_scores(q, k, heads), torch.tensor(expected))


@over_groups
def test_query_key_scores_are_the_same_before_and_after_the_rotary_embedding(heads: Heads) -> None:
    q, k = drawn(9, heads.query * heads.size), drawn(9, heads.key * heads.size, seed=1)
    torch.testing.assert_close(query_key_scores(*rotated(q, k, heads), heads), query_key_scores(q, k, heads))


HEADS = Heads(query=6, key=2, size=8)
SCORES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "feed-forward": (feed_forward_scores, (20, 20)),
    "values": (value_scores, (16,)),
    "queries and keys": (lambda q, k, real=None: query_key_scores(q, k, HEADS, real), (48, 16)),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("fill", [1e4, math.nan])
def test_padding_does_not_count_whatever_stands_there(kind: str, fill: float) -> None:
    score, widths = SCORES[kind]
    real = torch.tensor([False, True, True, False, True])
    inputs = [drawn(5, width, seed=width) for width in widths]
    expected = score(*(x[real] for x in inputs))
    for x in inputs:
        x[~real] = fill
    torch.testing.assert_close(score(*inputs, real), expected)
    assert torch.equal(score(*inputs, torch.zeros(5, dtype=torch.bool)), torch.zeros_like(expected))


@pytest.mark.parametrize("kind", SCORES)
def test_scores_are_summed_in_float32_at_least(kind: str) -> None:
    """4,096 equal squares summed in bfloat16 would stop growing at 256."""
    score, widths = SCORES[kind]
    scores = score(*(torch.ones(4096, width, dtype=torch.bfloat16) for width in widths))
    assert scores.dtype == torch.float32
    assert score(*(torch.ones(4, width, dtype=torch.float64) for width in widths)).dtype == torch.float64
    single = score(*(torch.ones(1, width, dtype=torch.bfloat16) for width in widths))
    torch.testing.assert_close(scores, single * (64**2 if kind == "queries and keys" else 64), rtol=1e-4, atol=0)


# Toys: what the criteria choose loses less than what chance chooses


def outliers(width: int, seed: int) -> Tensor:
    """Scales of channels: one in eight is ten times larger."""
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: width // 8]
    return torch.ones(width).index_fill(0, chosen, 10.0)


def by_chance(width: int, count: int, seed: int) -> Tensor:
    return top(drawn(width, seed=seed), count)


@pytest.mark.parametrize("seed", range(5))
def test_l2_of_the_feed_forward_layer_loses_less_than_chance(seed: int) -> None:
    x, width, count = drawn(64, 16, seed=seed), 64, 16
    gate, up = (x @ drawn(16, width, seed=seed + k) for k in (10, 20))
    hidden = F.silu(gate) * up * outliers(width, seed)
    down = drawn(width, 16, seed=seed + 30)
    losses = [
        ((hidden - only(hidden, channels)) @ down).norm()
        for channels in (
            top(feed_forward_scores(gate, up * outliers(width, seed)), count),
            by_chance(width, count, seed),
        )
    ]
    assert losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("seed", range(5))
def test_qk_norm_and_l2_of_values_lose_less_than_chance(seed: int) -> None:
    heads = Heads(query=6, key=2, size=16)
    q = drawn(32, 96, seed=seed) * outliers(96, seed)
    k, v = (drawn(32, 32, seed=seed + number) * outliers(32, seed + number) for number in (1, 2))
    half = heads.key * heads.size // 2

    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_hte, k_hte, v_hte = (x.view(32, -1, heads.size).transpose(0, 1) for x in (q, k, v))
        k_hte, v_hte = (x_hte.repeat_interleave(heads.group, 0) for x_hte in (k_hte, v_hte))
        return (q_hte @ k_hte.transpose(1, 2) / 100).softmax(2) @ v_hte

    def lost(pairs: Tensor, v_channels: Tensor) -> float:
        k_channels = heads.pair_channels(pairs)
        q_channels = heads.query_channels(k_channels)
        return float((output(q, k, v) - output(only(q, q_channels), only(k, k_channels), only(v, v_channels))).norm())

    every_pair, every_value = torch.arange(half), torch.arange(2 * half)
    by_qk_norm = lost(top(query_key_scores(q, k, heads), half // 4), every_value)
    assert by_qk_norm < 0.9 * lost(by_chance(half, half // 4, seed), every_value)
    by_l2 = lost(every_pair, top(value_scores(v), half // 2))
    assert by_l2 < 0.7 * lost(every_pair, by_chance(2 * half, half // 2, seed))
