"""The choice of a schedule: exact against every schedule there is, budgets, ranges, and the FLOPs it counts by."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_schedules import LLAMA3_8B, SETTINGS

from loras_bench.errors import UserError
from loras_bench.methods.lora import LoraConfig
from loras_bench.methods.sparse_lora import SparseLoraConfig
from loras_bench.sparsity.criteria import DENSE, Heads, LayerSparsity
from loras_bench.sparsity.flops import ATTENTION, Shape, step_flops
from loras_bench.sparsity.sensitivity import (
    PARTS,
    Option,
    StepCost,
    adapted,
    by_range,
    check_budget,
    choose,
    least_divergence,
    predicted,
    uniform,
)

TINY = Shape(32, 80, Heads(4, 2, 8))
COST = StepCost(TINY, layer_count=2, context=50, output=14, lora_rank=4, adapted=ATTENTION)
GRID = {"feed_forward": [0.5, 0.9], "attention": [0.25, 0.75]}


def all_schedules() -> list[list[LayerSparsity]]:
    layer = [LayerSparsity(*pair) for pair in itertools.product(*([0.0, *GRID[part]] for part in PARTS))]
    return [list(schedule) for schedule in itertools.product(layer, repeat=2)]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_knapsack_is_that_of_all_combinations(data: st.DataObject) -> None:
    saved = st.integers(0, 12).map(lambda number: number * data.draw(st.sampled_from([1, 6]), label="unit"))
    option = st.builds(Option, saved, st.integers(-8, 40).map(lambda number: number / 8))
    groups = data.draw(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=4))
    needed = data.draw(st.integers(0, 150))
    combinations = [picked for picked in itertools.product(*groups) if sum(one.saved for one in picked) >= needed]
    if not combinations:
        with pytest.raises(ValueError, match="save less"):
            least_divergence(groups, needed)
        return
    picked = [group[index] for group, index in zip(groups, least_divergence(groups, needed), strict=True)]
    assert sum(one.saved for one in picked) >= needed
    assert sum(one.divergence for one in picked) == min(
        sum(one.divergence for one in picked) for picked in combinations
    )


def test_of_equals_the_first_is_taken() -> None:
    assert least_divergence([[Option(0, 0.0), Option(4, 0.0)]] * 2, 4) == [1, 0]
    assert least_divergence([[Option(0, 0.0), Option(4, 0.0)]] * 2, 0) == [0, 0]


@given(
    divergences=st.lists(st.floats(0.0, 1.0), min_size=8, max_size=8),
    budget=st.sampled_from([COST.ratio(schedule) for schedule in all_schedules()]),
)
@settings(max_examples=100, deadline=None)
def test_no_schedule_within_the_budget_is_better(divergences: list[float], budget: float) -> None:
    """At the very ratio of a schedule it is within the budget itself."""
    places = itertools.product(range(2), PARTS)
    numbers = iter(divergences)
    measured = {(layer, part): {share: next(numbers) for share in GRID[part]} for layer, part in places}
    check_budget(COST, GRID, budget)
    chosen = choose(COST, measured, budget)
    assert COST.ratio(chosen) <= budget * (1 + 1e-9)
    within = [schedule for schedule in all_schedules() if COST.ratio(schedule) <= budget * (1 + 1e-9)]
    best = min(predicted(schedule, measured) for schedule in within)
    assert predicted(chosen, measured) == pytest.approx(best, abs=1e-12)


def test_weights_saved_by_hand() -> None:
    """Of 80 hidden channels 8 stay; of 16 key channels 4, of 4 query heads' 32 the 8 that belong to them."""
    assert COST.saved_weights("feed_forward", 0.9) == 3 * 32 * (80 - 8)
    assert COST.saved_weights("attention", 0.75) == 32 * (2 * (32 - 8) + 2 * (16 - 4))
    both = [LayerSparsity(0.9, 0.75), DENSE]
    saved = 4 * COST.context * sum(COST.saved_weights(part, share) for part, share in both[0]._asdict().items())
    dense = step_flops(TINY, [DENSE] * 2, 50, 14, 4)
    assert COST.ratio(both) == pytest.approx((dense - saved) / dense, rel=1e-12)


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    least = COST.ratio([LayerSparsity(0.9, 0.75)] * 2)
    with pytest.raises(UserError) as refused:
        check_budget(COST, GRID, least - 0.001)
    shown = f"{math.ceil(least * 1e4) / 1e4:.4f}"
    assert f"--flops {least - 0.001:g} cannot be reached" in refused.value.message and shown in refused.value.message
    assert "50 tokens are context" in str(refused.value.hint)
    check_budget(COST, GRID, float(shown))
    measured = {(layer, part): dict.fromkeys(GRID[part], 1.0) for layer in range(2) for part in PARTS}
    assert choose(COST, measured, least) == [LayerSparsity(0.9, 0.75)] * 2


def test_without_context_nothing_can_be_saved() -> None:
    with pytest.raises(UserError, match="nothing can be saved"):
        check_budget(StepCost(TINY, 2, 0, 64, 4, ATTENTION), GRID, 0.99)


def test_the_best_uniform_schedule_by_hand() -> None:
    """Attention hurts: leave it dense where the feed-forward part alone saves enough, or else as much as is needed."""
    divergences = {
        (layer, part): {share: (10.0 if part == "attention" else 0.1) * share for share in GRID[part]}
        for layer in range(2)
        for part in PARTS
    }
    only = LayerSparsity(max(GRID["feed_forward"]), 0.0)
    assert uniform(COST, divergences, COST.ratio([only] * 2)) == [only] * 2
    everything = [LayerSparsity(max(GRID["feed_forward"]), max(GRID["attention"]))] * 2
    assert uniform(COST, divergences, COST.ratio(everything)) == everything
    assert uniform(COST, divergences, 1.0) == [LayerSparsity()] * 2


def test_what_is_free_is_taken_beyond_the_budget() -> None:
    divergences = {(layer, part): {share: float(layer) for share in GRID[part]} for layer in range(2) for part in PARTS}
    chosen = choose(COST, divergences, 0.99)
    assert chosen[0] == LayerSparsity(max(GRID["feed_forward"]), max(GRID["attention"]))
    assert chosen[1] == LayerSparsity()


def test_a_large_model_is_chosen_exactly_too() -> None:
    """Llama-3-8B in the paper's setting: parts that hurt more the earlier they are."""
    cost = StepCost(LLAMA3_8B, 32, 384, 128, 32, ATTENTION)
    grid = {"feed_forward": [0.5, 0.75, 0.9, 0.99], "attention": [0.25, 0.5, 0.75]}
    measured = {
        (layer, part): {share: share**3 / (1 + layer) for share in grid[part]} for layer in range(32) for part in PARTS
    }
    chosen = choose(cost, measured, 0.6)
    assert 0.599 < cost.ratio(chosen) <= 0.6
    assert predicted(chosen, measured) < predicted([LayerSparsity(0.75, 0.75)] * 32, measured)
    assert chosen[31].feed_forward > chosen[0].feed_forward


@pytest.mark.parametrize("name", SETTINGS)
def test_ranges_name_the_schedule(name: str) -> None:
    config = SparseLoraConfig.model_validate({"kind": "sparse_lora", "layers": SETTINGS[name].layers})
    schedule = config.schedule(SETTINGS[name].layer_count)
    again = SparseLoraConfig.model_validate({"kind": "sparse_lora", "layers": by_range(schedule)})
    assert again.schedule(len(schedule)) == schedule


def test_ranges_by_hand() -> None:
    schedule = [LayerSparsity(0.5, 0.25), LayerSparsity(0.5, 0.25), LayerSparsity(0.5), DENSE, LayerSparsity(0.9, 0.5)]
    assert by_range(schedule) == {
        "0-2": {"feed_forward": 0.5},
        "4": {"feed_forward": 0.9, "attention": 0.5},
        "0-1": {"attention": 0.25},
    }


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("attention", ["q", "k", "v", "o"]),
        ("feed-forward", ["gate", "up", "down"]),
        ("all-linear", ["q", "k", "v", "o", "gate", "up", "down"]),
        (("q_proj", "self_attn.v_proj", "up_proj"), ["q", "v", "up"]),
    ],
)
def test_adapted_projections(targets: Any, names: list[str]) -> None:
    assert adapted(LoraConfig(kind="lora", targets=targets), TINY) == names
