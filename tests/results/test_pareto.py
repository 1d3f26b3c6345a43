"""The front of hand-made sets, what of it is noise, and what is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loras_bench.errors import UserError
from loras_bench.results.pareto import describe, frontiers, non_dominated

# Few distinct coordinates, so that ties are common.
POINTS = st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("points", "larger_y", "expected"),
    [
        ([(1, 1)], False, [True]),
        ([(1, 3), (2, 2), (3, 1)], False, [True, True, True]),
        ([(1, 1), (2, 2), (3, 3)], False, [True, False, False]),  # a chain
        ([(1, 1), (1, 1), (2, 0)], False, [True, True, True]),  # identical points do not dominate each other
        ([(1, 1), (1, 2)], False, [True, False]),  # one x, worse y
        ([(1, 1), (2, 1)], False, [True, False]),  # one y, worse x
        ([(1, 0.9), (2, 0.95), (3, 0.92)], True, [True, True, False]),
        ([(1, 0.9), (1, 0.95), (2, 0.95)], True, [False, True, False]),
        ([(2, 2), (1, 3), (3, 1), (2, 3), (3, 2)], False, [True, True, True, False, False]),
    ],
)
def test_hand_made_sets(points, larger_y, expected):
    assert non_dominated(points, larger_y) == expected


@given(POINTS, st.booleans())
def test_every_dominated_point_has_a_dominator_on_the_front(points, larger_y):
    kept = non_dominated(points, larger_y)
    sign = -1 if larger_y else 1
    front = [(x, sign * y) for (x, y), keep in zip(points, kept, strict=True) if keep]
    assert front
    for (x, y), keep in zip(points, kept, strict=True):
        dominators = [p for p in front if p[0] <= x and p[1] <= sign * y and p != (x, sign * y)]
        assert bool(dominators) is not keep


@given(st.data(), POINTS, st.booleans())
def test_the_order_of_points_is_irrelevant(data, points, larger_y):
    order = data.draw(st.permutations(range(len(points))))
    kept = non_dominated(points, larger_y)
    assert non_dominated([points[i] for i in order], larger_y) == [kept[i] for i in order]


def status(records, **options):
    (frontier,) = frontiers(records, **options)
    return {arm.arm.label: arm.status for arm in frontier.arms}


def test_a_clear_comparison(comparison):
    assert status(comparison) == {"full": "on the front", "lora": "dominated by full", "lora_s": "on the front"}


def arm(make_record, name, joules, perplexities):
    pairs = enumerate(zip(joules, perplexities, strict=True))
    return [make_record(name, seed, joules=j, quality=q) for seed, (j, q) in pairs]


def test_domination_inside_the_noise_of_one_axis(make_record):
    full = arm(make_record, "full", [100.0, 101.0, 99.0], [10.0, 10.2, 9.8])
    lora = arm(make_record, "lora", [120.0, 121.0, 119.0], [10.3, 9.9, 10.1])  # dearer for certain, no better or worse
    assert status(full + lora) == {
        "full": "on the front",  # cheaper for certain: that is enough to stay
        "lora": "dominated by full (inside the noise: test perplexity against full)",
    }


def test_a_front_arm_whose_only_advantage_is_noise(make_record):
    full = arm(make_record, "full", [100.0, 101.0, 99.0], [10.0, 10.1, 9.9])
    lora = arm(make_record, "lora", [99.0, 102.0, 98.5], [11.0, 11.1, 10.9])
    assert status(full + lora) == {
        "full": "on the front",
        "lora": "on the front (inside the noise: train energy against full)",
    }


def test_one_clear_dominator_settles_it(make_record):
    first = arm(make_record, "a", [100.0, 101.0, 99.0], [10.0, 10.1, 9.9])
    second = arm(make_record, "b", [118.0, 123.0, 116.0], [9.0, 9.1, 8.9])
    third = arm(make_record, "c", [120.0, 121.0, 119.0], [11.0, 11.1, 10.9])
    assert status(first + second + third)["c"] == "dominated by a, b"


def test_equal_in_every_seed_is_known_to_be_equal(make_record):
    full = arm(make_record, "full", [100.0, 101.0, 99.0], [10.0, 10.0, 10.0])
    lora = arm(make_record, "lora", [120.0, 121.0, 119.0], [10.0, 10.0, 10.0])
    assert status(full + lora)["lora"] == "dominated by full"


def test_one_seed_tells_nothing_about_noise(make_record):
    records = [make_record("full", joules=100.0), make_record("lora", joules=120.0, quality=12.0)]
    assert status(records)["lora"] == "dominated by full (noise against full unknown)"


def test_accuracy_is_better_when_larger(make_record):
    def record(name, joules, accuracy):
        return make_record(name, joules=joules, quality=accuracy, task="classification")

    (frontier,) = frontiers([record("full", 100.0, 0.9), record("lora", 90.0, 0.8), record("b", 110.0, 0.85)])
    assert frontier.y.name == "accuracy"
    assert [arm.arm.label for arm in frontier.arms if not arm.dominated_by] == ["lora", "full"]


def test_throughput_on_the_x_axis_is_better_when_larger(make_record):
    fast, slow = make_record("fast", tokens_per_second=200.0), make_record("slow", tokens_per_second=100.0)
    (frontier,) = frontiers([slow, fast], x="tokens_per_second")
    assert [(arm.arm.label, bool(arm.dominated_by)) for arm in frontier.arms] == [("fast", False), ("slow", True)]


def test_panels_never_mix(make_record):
    records = [
        make_record(),
        make_record("lora"),
        make_record(device="NVIDIA H200"),
        make_record(tokens=5_000_000, config_hash="b"),
        make_record(sequence_length=512, config_hash="c"),
        make_record(dataset="imdb", config_hash="d"),
        make_record(model="another", config_hash="e"),
    ]
    found = frontiers(records)
    assert len({frontier.key for frontier in found}) == 6
    assert sorted(len(frontier.arms) for frontier in found) == [1, 1, 1, 1, 1, 2]


def test_without_joules_the_whole_panel_falls_back_to_flops(make_record):
    records = [
        make_record("full", joules=None, operations=4e12),
        make_record("lora", joules=None, operations=3e12, quality=12.0),
    ]
    (frontier,) = frontiers(records)
    assert frontier.x.name == "flops.total"
    assert frontier.title == "Test perplexity against FLOPs (no measured joules)"
    assert frontier.fallback == "no measured joules: no GPU energy counter on this machine"
    assert frontier.fallback in describe([frontier])
    assert frontier.arms[0].x.mean == 3e12


def test_an_arm_without_joules_is_left_out_of_a_panel_that_has_them(make_record):
    (frontier,) = frontiers([make_record("full"), make_record("lora", joules=None)])
    assert frontier.x.name == "train_energy_j"
    assert frontier.left_out == (("lora", "no train energy: no GPU energy counter on this machine"),)
    assert "left out: lora" in describe([frontier])


def test_flagged_runs_stay_out(make_record):
    records = [make_record(seed=0), make_record(seed=1, joules=99999.0, flags=("resumed",))]
    records += [make_record(seed=2, status="failed", reason="NaN loss", joules=99999.0)]
    (frontier,) = frontiers(records)
    assert (frontier.arms[0].x.n, frontier.arms[0].x.mean) == (1, 13000.0)


def test_other_axes(make_record):
    (frontier,) = frontiers([make_record(estimates={"carbon_g": 3.0})], x="estimates.carbon_g", y="loss")
    assert (frontier.arms[0].x.mean, frontier.arms[0].y.mean) == (3.0, 2.35)
    assert frontier.x.provenance == "estimated"
    for name in ("flops.total", "peak_memory_bytes", "train_seconds", "run_energy_j", "energy_j_per_mtoken"):
        assert frontiers([make_record()], x=name)[0].arms


@pytest.mark.parametrize("axes", [{"x": "train_enrgy_j"}, {"y": "perplexty"}])
def test_unknown_names_get_a_hint(make_record, axes):
    with pytest.raises(UserError, match="no number called") as error:
        frontiers([make_record()], **axes)
    assert error.value.hint in ("did you mean `train_energy_j`?", "did you mean `perplexity`?")


def test_both_axes_the_same(make_record):
    with pytest.raises(UserError, match="both axes"):
        frontiers([make_record()], x="perplexity", y="perplexity")


def test_the_listing_is_plain_and_complete(comparison):
    lines = describe(frontiers(comparison)).splitlines()
    assert lines[2].split("  ")[0] == "arm"
    assert [line.split()[0] for line in lines[3:]] == ["lora_s", "full", "lora"]
    assert "10.22 ± 0.19" in lines[3]
