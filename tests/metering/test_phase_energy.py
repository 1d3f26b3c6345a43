"""Sums of phases, idle, and the part-time sensor's view of a step."""

from __future__ import annotations

import json

import pytest

from loras_bench.metering.phases import (
    GpuEnergy,
    IdleReading,
    PhaseEnergy,
    Spread,
    add_up,
    aliased_sampling,
    idle_drift,
    judge,
    sampled_share,
)


def phase(energy_j=1000.0, integral_j=1000.0, seconds=20.0, source="counter", uuid="GPU-a", polls=400, **more):
    gpu = GpuEnergy(uuid=uuid, seconds=seconds, energy_j=energy_j, source=source, integral_j=integral_j)
    values = {
        "name": "train",
        "seconds": seconds,
        "parts": 1,
        "polls": polls,
        "gpus": (gpu,),
        "cpu_energy_j": None,
        "cpu_reason": "no RAPL",
        "temperature_c": None,
        "sm_clock_mhz": None,
        "memory_clock_mhz": None,
        "flags": {},
    }
    return PhaseEnergy(**(values | more))


def test_parts_add_up():
    both = add_up("run", [phase(cpu_energy_j=5.0, cpu_reason=None), phase(500.0, 520.0, 10.0, cpu_energy_j=7.0)])
    assert (both.name, both.energy_j, both.integral_j, both.seconds, both.parts) == ("run", 1500.0, 1520.0, 30.0, 2)
    assert both.cpu_energy_j == 12.0
    assert both.mean_power_w == 50.0
    assert both.integral_to_counter == pytest.approx(1520 / 1500)


@pytest.mark.parametrize(
    ("sources", "worst"),
    [
        (("counter", "counter"), "counter"),
        (("counter", "average_integral"), "average_integral"),
        (("average_integral", "instant_integral"), "average_integral"),
        (("counter", None), None),
    ],
)
def test_a_sum_is_called_after_its_worst_term(sources, worst):
    parts = [phase(source=source, energy_j=None if source is None else 1.0) for source in sources]
    both = add_up("train", parts)
    assert both.source == worst
    assert (both.energy_j is None) is (worst is None)


def test_json_round_trip_carries_the_derived_values():
    original = phase(temperature_c=Spread.of([50.0, 60.0]))
    dumped = json.loads(json.dumps(original.model_dump(mode="json")))
    assert dumped["energy_j"] == 1000.0
    assert dumped["mean_power_w"] == 50.0
    assert PhaseEnergy.model_validate(dumped) == original


def test_spreads_merge_by_their_samples():
    assert Spread.of([]) is None
    assert Spread.of([1.0, 2.0, 3.0]) + Spread.of([10.0]) == Spread(min=1.0, mean=4.0, max=10.0, samples=4)


@pytest.mark.parametrize(("seconds", "flagged"), [(1.9, False), (2.1, True)])
def test_windows_too_short_for_the_cross_check_are_not_judged(seconds, flagged):
    judged = judge(phase(1000.0, 900.0, seconds, name="eval"))
    assert ("counter_integral_mismatch" in judged.flags) is flagged


def test_missed_polls_mean_nothing_where_nobody_polled():
    assert "poller_late" in judge(phase(polls=0)).flags
    assert "poller_late" not in judge(phase(polls=0), polled=False).flags


def idle(power_w):
    return IdleReading(power_w=power_w, integral_power_w=None, source=None, seconds=10.0, temperature_c=None, flags={})


def test_idle_drift():
    assert idle_drift(idle(80.0), idle(87.9)) is None
    assert idle_drift(idle(80.0), idle(72.1)) is None
    assert idle_drift(idle(80.0), idle(89.0)) == "idle power went from 80.0 W to 89.0 W"
    assert idle_drift(idle(80.0), idle(71.0)) is not None
    assert idle_drift(idle(None), idle(80.0)) is None


@pytest.mark.parametrize(
    ("step_s", "window_s", "expected"),
    [
        (0.1, 60.0, 0.25),  # always the same quarter of the step
        (0.05, 60.0, 0.5),
        (0.2, 60.0, 0.25),  # two slices a step
        (0.025, 60.0, 1.0),  # a step fits into a slice
        (0.13, 60.0, 1.0),
        (0.1001, 10.0, 0.3488),  # drifts by 0.1 ms a period: 99 of them cover another 9.9 ms
    ],
)
def test_sampled_share_of_a_step(step_s, window_s, expected):
    assert sampled_share(step_s, window_s) == pytest.approx(expected, abs=0.01)


def test_only_commensurate_steps_are_flagged():
    assert aliased_sampling(0.13, 60.0) is None
    assert "25%" in aliased_sampling(0.1, 60.0)
