"""The cubic schedule of Zhu and Gupta (2017)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loras_bench.pruning.schedule import CubicSchedule


def test_it_is_the_papers_equation() -> None:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0: 0.8 (1 - (3/4)^3) and so on."""
    schedule = CubicSchedule(0.8, first=10, last=50, every=10)
    expected = {0: 0.0, 10: 0.0, 20: 0.8 * 37 / 64, 30: 0.8 * 7 / 8, 40: 0.8 * 63 / 64, 50: 0.8, 99: 0.8}
    assert {step: schedule.sparsity(step) for step in expected} == pytest.approx(expected)
    assert [step for step in range(100) if schedule.changes(step)] == [20, 30, 40, 50]


def test_the_last_change_comes_even_between_two_regular_ones() -> None:
    schedule = CubicSchedule(0.5, first=0, last=25, every=10)
    assert [step for step in range(60) if schedule.changes(step)] == [10, 20, 25]
    assert schedule.sparsity(25) == 0.5


@pytest.mark.parametrize(("start", "end", "changes"), [(0, 0, [0]), (0.5, 0.5, [5]), (1, 1, [10])])
def test_with_one_share_for_start_and_end_all_goes_at_once(start: float, end: float, changes: list[int]) -> None:
    schedule = CubicSchedule.over(10, 0.7, start, end, every=1)
    assert [step for step in range(11) if schedule.changes(step)] == changes
    assert [schedule.sparsity(step) for step in range(11) if step < changes[0]] == [0.0] * changes[0]
    assert schedule.sparsity(changes[0]) == 0.7


def test_shares_become_whole_steps_the_start_early_and_the_end_late() -> None:
    schedule = CubicSchedule.over(7, 0.5, 0.5, 0.6, every=3)
    assert (schedule.first, schedule.last) == (3, 5)
    assert CubicSchedule.over(10, 0.5, 0.3, 0.7, every=3) == CubicSchedule(0.5, 3, 7, 3)  # 0.7 * 10 is no 7 in binary


@given(st.integers(1, 300), st.floats(0.01, 0.99), st.floats(0, 1), st.floats(0, 1), st.integers(1, 50))
def test_it_never_falls_and_ends_at_the_target(steps: int, target: float, one: float, other: float, every: int) -> None:
    schedule = CubicSchedule.over(steps, target, min(one, other), max(one, other), every)
    values = [schedule.sparsity(taken) for taken in range(steps + 1)]
    assert values == sorted(values)
    assert values[-1] == target
    last = max(taken for taken in range(steps + 1) if schedule.changes(taken))
    assert schedule.sparsity(last) == target, "the masks get there too"
