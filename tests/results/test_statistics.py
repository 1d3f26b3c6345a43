"""Intervals against numbers worked out by hand, with Student's t from a printed table."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loras_bench.results.statistics import Interval, paired_difference, paired_ratio, seed_pairs, t_interval

T1, T2 = 12.7062047, 4.30265273  # two-sided 95 %, 1 and 2 degrees of freedom


def test_three_values():
    interval = t_interval([1.0, 2.0, 3.0])  # s = 1
    assert (interval.n, interval.mean) == (3, 2.0)
    assert interval.half_width == pytest.approx(T2 / math.sqrt(3))
    assert interval.low == pytest.approx(2 - 2.48413, abs=1e-5)


def test_two_values():
    interval = t_interval([10.0, 12.0])  # s / sqrt(2) = 1
    assert (interval.low, interval.high) == pytest.approx((11 - T1, 11 + T1))


def test_another_level():
    assert t_interval([1.0, 2.0, 3.0], level=0.9).half_width == pytest.approx(2.91998558 / math.sqrt(3))


def test_one_value_has_no_interval():
    interval = t_interval([5.0])
    assert interval == Interval(1, 5.0, None, None)
    assert interval.half_width is None
    assert interval.excludes(0.0) is None


def test_no_value_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_equal_values_have_an_interval_of_no_width():
    assert t_interval([4.0, 4.0, 4.0]) == Interval(3, 4.0, 4.0, 4.0)


def test_pairing_removes_what_seeds_share():
    pairs = [(11.0, 10.0), (21.0, 20.0), (31.5, 30.0)]  # differences 1, 1, 1.5
    interval = paired_difference(pairs)
    assert interval.mean == pytest.approx(3.5 / 3)
    assert interval.half_width == pytest.approx(T2 * math.sqrt(1 / 12) / math.sqrt(3))
    assert interval.excludes(0.0)
    assert not t_interval([11.0, 21.0, 31.5]).excludes(t_interval([10.0, 20.0, 30.0]).mean)


def test_a_ratio_is_a_geometric_mean_with_its_interval_on_the_log():
    interval = paired_ratio([(2.0, 1.0), (16.0, 2.0)])  # ratios 2 and 8; logs ln 4 -+ ln 2
    assert interval.mean == pytest.approx(4.0)
    assert interval.low == pytest.approx(4.0 * math.exp(-T1 * math.log(2)))
    assert interval.high == pytest.approx(4.0 * math.exp(T1 * math.log(2)))
    assert paired_ratio([(3.0, 2.0)]) == Interval(1, pytest.approx(1.5))


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)), min_size=2, max_size=6))
def test_the_ratio_the_other_way_round_is_the_inverse(pairs):
    there, back = paired_ratio(pairs), paired_ratio([(b, a) for a, b in pairs])
    assert there.mean * back.mean == pytest.approx(1.0)
    assert math.log(there.low) == pytest.approx(-math.log(back.high), abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8), st.floats(-1e6, 1e6))
def test_an_interval_moves_with_its_values(values, shift):
    here, there = t_interval(values), t_interval([value + shift for value in values])
    assert here.low <= here.mean <= here.high
    assert there.mean == pytest.approx(here.mean + shift, abs=1e-6)
    assert there.half_width == pytest.approx(here.half_width, rel=1e-6, abs=1e-6)


def test_joules_are_paired_only_within_a_block(make_record):
    full = [make_record(seed=seed, joules=100.0 + seed) for seed in (0, 1, 2)]
    lora = [
        make_record("lora", 0, joules=90.0),
        make_record("lora", 1, joules=91.0, block="another day "),
        make_record("lora", 2, joules=92.0, block=None),
        make_record("lora", 7, joules=97.0),
    ]

    def read(record):
        return record.train_energy_j

    assert seed_pairs(lora, full, read, within_blocks=True) == [(90.0, 100.0)]
    assert seed_pairs(lora, full, read, within_blocks=False) == [(90.0, 100.0), (91.0, 101.0), (92.0, 102.0)]


def test_a_missing_value_drops_its_pair(make_record):
    full = [make_record(seed=seed) for seed in (0, 1)]
    lora = [make_record("lora", 0, joules=None), make_record("lora", 1, joules=6500.0)]
    pairs = seed_pairs(lora, full, lambda record: record.train_energy_j, within_blocks=True)
    assert pairs == [(6500.0, 13000.0)]
