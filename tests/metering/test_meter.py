"""The meter against a GPU whose true power is known."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_source import FakeClock, ScriptedCpu, ScriptedGpu

from loras_bench.metering.clock import SystemClock
from loras_bench.metering.meter import Meter
from loras_bench.metering.phases import MIN_HEADLINE_S
from loras_bench.metering.sources import NullSource, open_sources


def measure(source, clock, seconds, name="train"):
    """One phase of `seconds` of work."""
    with Meter([source], clock=clock) as meter, meter.phase(name):
        clock.sleep(seconds)
    return meter.phases()[name]


def test_constant_power_is_power_times_time():
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock), clock, 12.0)
    assert phase.seconds == pytest.approx(12.0, abs=0.11)
    assert phase.energy_j == pytest.approx(600.0 * phase.seconds, rel=1e-3)
    assert phase.integral_j == pytest.approx(phase.energy_j, rel=1e-3)
    assert phase.mean_power_w == pytest.approx(600.0, rel=1e-3)
    assert phase.source == "counter"
    assert phase.parts == 1
    assert phase.flags == {}


@pytest.mark.parametrize("offset_s", [0.013, 0.05, 0.087])
@pytest.mark.parametrize("seconds", [1.03, 2.0, 9.98])
def test_tick_alignment_removes_the_edge_error(offset_s, seconds):
    clock = FakeClock()
    gpu = ScriptedGpu(clock, tick_offset_s=offset_s)
    clock.sleep(0.3)

    unaligned_from = gpu.read()
    clock.sleep(seconds)
    unaligned_j = gpu.read().energy_j - unaligned_from.energy_j
    assert abs(unaligned_j - 600.0 * seconds) <= 60.0 + 1e-6  # the bound of docs/energy.md: 0.1 s x 600 W

    phase = measure(gpu, clock, seconds)
    assert abs(phase.energy_j - 600.0 * phase.seconds) < 1.3  # two edges, each within 1 ms x 600 W


def test_unaligned_edges_do_reach_their_bound():
    """Without this, the test above could pass because nothing was ever wrong."""
    clock = FakeClock()
    gpu = ScriptedGpu(clock, tick_offset_s=0.001)
    start = gpu.read()
    clock.sleep(1.0985)
    unaligned_j = gpu.read().energy_j - start.energy_j
    assert abs(unaligned_j - 600.0 * 1.0985) > 55.0


def test_the_window_holds_the_work_and_only_little_idling():
    clock = FakeClock()
    began_s, ended_s = [], []
    origin_s = clock.now() - 0.04

    def power_w(t_s):
        return 700.0 if began_s and began_s[0] <= origin_s + t_s < (ended_s or [float("inf")])[0] else 100.0

    gpu = ScriptedGpu(clock, power_w, tick_offset_s=0.04)
    with Meter([gpu], clock=clock) as meter:
        clock.sleep(1.234)
        with meter.phase("train"):
            began_s.append(clock.now())
            clock.sleep(2.517)
            ended_s.append(clock.now())
    phase = meter.phases()["train"]
    assert 0.0 <= phase.seconds - 2.517 < 0.102
    assert phase.energy_j == pytest.approx(700.0 * 2.517 + 100.0 * (phase.seconds - 2.517), abs=5.0)


def square_wave(period_s):
    """700 W in the first half of each period, 100 W in the second: 400 W in truth."""
    return lambda t_s: 700.0 if (t_s / period_s) % 1.0 < 0.5 else 100.0


def test_part_time_sampling_of_a_commensurate_wave_is_wrong_and_the_cross_check_is_blind():
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, square_wave(0.1), slice_s=0.025), clock, 20.0)
    assert phase.mean_power_w == pytest.approx(700.0, rel=1e-3)  # the truth is 400 W
    assert "counter_integral_mismatch" not in phase.flags


@pytest.mark.parametrize("period_s", [0.13, 0.087, 0.3141])
def test_part_time_sampling_of_other_waves_is_within_two_percent(period_s):
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, square_wave(period_s), slice_s=0.025), clock, 60.0)
    assert phase.mean_power_w == pytest.approx(400.0, rel=0.02)


def test_nested_and_repeated_phases_split_and_add_up():
    clock = FakeClock()
    gpu = ScriptedGpu(clock, lambda t_s: 300.0 if 12.0 <= t_s < 20.0 else 600.0)
    with Meter([gpu], clock=clock) as meter:
        with meter.phase("setup"):
            clock.sleep(2.0)
        with meter.phase("train"):
            clock.sleep(10.0)
            with meter.phase("eval"):
                clock.sleep(4.0)
            clock.sleep(10.0)
        with meter.phase("eval"):
            clock.sleep(1.0)
        clock.sleep(3.0)  # outside all phases
    phases = meter.phases()
    assert list(phases) == ["setup", "train", "eval", "other"]
    assert phases["train"].parts == 2
    assert phases["eval"].parts == 2
    assert phases["train"].seconds == pytest.approx(20.0, abs=0.4)
    assert phases["eval"].seconds == pytest.approx(5.0, abs=0.4)
    assert phases["other"].seconds == pytest.approx(3.0, abs=0.2)
    run = meter.run()
    assert run.energy_j == pytest.approx(sum(phase.energy_j for phase in phases.values()), rel=1e-12)
    assert run.energy_j == pytest.approx(600.0 * run.seconds - 300.0 * 8.0, abs=2.0)


schedules = st.recursive(
    st.lists(st.tuples(st.sampled_from(["setup", "train", "eval"]), st.floats(0.0, 3.0)), max_size=4),
    lambda inner: st.lists(
        st.tuples(st.sampled_from(["train", "eval", "steady"]), st.floats(0.0, 3.0), inner), max_size=3
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(schedule=schedules, offset_s=st.floats(0.0, 0.099), resets_s=st.lists(st.floats(0.0, 20.0), max_size=2))
def test_phases_add_up_to_the_run(schedule, offset_s, resets_s):
    clock = FakeClock()
    gpu = ScriptedGpu(clock, lambda t_s: 200.0 + 40.0 * (t_s % 7.0), tick_offset_s=offset_s, resets_s=resets_s)

    def play(meter, steps):
        for name, seconds, *inner in steps:
            with meter.phase(name):
                clock.sleep(seconds)
                for more in inner:
                    play(meter, more)
            clock.sleep(seconds / 10)

    with Meter([gpu], clock=clock) as meter:
        start_s = clock.now()
        play(meter, schedule)
    run, phases = meter.run(), meter.phases()
    assert run.energy_j == pytest.approx(sum(phase.energy_j for phase in phases.values()), rel=1e-9)
    assert run.seconds == pytest.approx(sum(phase.seconds for phase in phases.values()), rel=1e-9)
    assert run.seconds == pytest.approx(clock.now() - start_s, abs=0.11)
    # 320 W is the mean of the ramp; whatever the schedule, the run draws between its ends.
    assert 200.0 * run.seconds - 60 <= run.energy_j <= 480.0 * run.seconds + 60


def test_a_counter_reset_is_integrated_over_and_flagged():
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, resets_s=[5.0]), clock, 20.0)
    assert phase.energy_j == pytest.approx(600.0 * phase.seconds, rel=0.01)
    assert phase.source == "instant_integral"
    assert set(phase.flags) == {"counter_reset"}


def test_a_reset_that_soon_overtakes_the_old_value_is_seen():
    """Edge to edge the counter grew; only the poller saw it fall."""
    clock = FakeClock()
    clock.sleep(0.05)
    gpu = ScriptedGpu(clock, lambda t_s: 600.0 if t_s < 8 else 6000.0, resets_s=[6.0])
    phase = measure(gpu, clock, 30.0)
    assert "counter_reset" in phase.flags
    assert phase.energy_j == pytest.approx(600.0 * 7.95 + 6000.0 * 22.1, rel=0.02)


@pytest.mark.parametrize(("power_kind", "source"), [("instant", "instant_integral"), ("average", "average_integral")])
def test_without_a_counter_power_is_integrated(power_kind, source):
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, has_counter=False, power_kind=power_kind), clock, 12.0)
    assert phase.energy_j == pytest.approx(600.0 * 12.0, rel=1e-3)
    assert phase.seconds == pytest.approx(12.0, abs=1e-6)  # nothing to align with, so nothing is waited for
    assert phase.source == source
    assert set(phase.flags) == {"counter_missing"}
    assert phase.integral_to_counter is None


def test_without_counter_and_power_joules_are_none_with_a_reason():
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, has_counter=False, power_kind=None), clock, 12.0)
    assert (phase.energy_j, phase.integral_j, phase.source, phase.mean_power_w) == (None, None, None, None)
    assert set(phase.flags) == {"counter_missing", "energy_missing"}
    assert phase.flags["counter_missing"] == "GPU-a has no energy counter"


def test_a_counter_without_power_is_used_without_cross_check():
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, power_kind=None), clock, 12.0)
    assert phase.source == "counter"
    assert phase.energy_j == pytest.approx(600.0 * phase.seconds, rel=1e-3)
    assert set(phase.flags) == {"cross_check_missing"}


def test_failures_within_a_phase_do_not_touch_the_counter():
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, fails=lambda t_s: 4.0 < t_s < 4.4), clock, 12.0)
    assert phase.energy_j == pytest.approx(600.0 * phase.seconds, rel=1e-3)
    assert phase.flags == {}


def test_a_long_failure_leaves_the_cross_check_out():
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, fails=lambda t_s: 4.0 < t_s < 9.0), clock, 12.0)
    assert phase.source == "counter"
    assert phase.integral_j is None
    assert set(phase.flags) == {"cross_check_missing"}


def test_a_failure_at_an_edge_falls_back_to_the_integral():
    clock = FakeClock()
    # The last edge is taken from 12.1 s on.
    phase = measure(ScriptedGpu(clock, fails=lambda t_s: t_s > 12.05), clock, 12.0)
    assert phase.energy_j == pytest.approx(600.0 * phase.seconds, rel=0.01)
    assert phase.source == "instant_integral"
    assert "fell off the bus" in phase.flags["counter_missing"]


def test_a_gpu_that_fails_for_good_gives_none():
    clock = FakeClock()
    phase = measure(ScriptedGpu(clock, fails=lambda t_s: t_s > 3.0), clock, 12.0)
    assert phase.energy_j is None
    assert "energy_missing" in phase.flags


def test_cross_check_flags_a_disagreement_above_five_percent():
    for gain, flagged in [(1.04, False), (0.96, False), (1.06, True), (0.5, True)]:
        clock = FakeClock()
        phase = measure(ScriptedGpu(clock, gain=gain), clock, 12.0)
        assert phase.integral_to_counter == pytest.approx(gain, rel=2e-3)
        assert ("counter_integral_mismatch" in phase.flags) is flagged


@pytest.mark.parametrize(("slowdown", "late"), [(1.0, False), (1.05, False), (1.2, True)])
def test_a_late_poller_is_flagged(slowdown, late):
    clock = FakeClock(slowdown)
    assert ("poller_late" in measure(ScriptedGpu(clock), clock, 12.0).flags) is late


def test_short_headlines_are_flagged_and_parts_count_together():
    clock = FakeClock()
    with Meter([ScriptedGpu(clock)], clock=clock) as meter:
        with meter.phase("train"):
            clock.sleep(6.0)
        with meter.phase("eval"):
            clock.sleep(1.0)
        assert "short_window" in meter.phases()["train"].flags
        with meter.phase("train"):
            clock.sleep(6.0)
    phases = meter.phases()
    assert phases["train"].seconds > MIN_HEADLINE_S
    assert "short_window" not in phases["train"].flags
    assert "short_window" not in phases["eval"].flags  # not a headline
    assert "short_window" not in meter.run().flags


@pytest.mark.parametrize(
    ("state", "flag"),
    [
        ({"clock_event_reasons": frozenset({"hw_thermal_slowdown", "hw_slowdown"})}, "thermal_throttle"),
        ({"clock_event_reasons": frozenset({"sw_thermal_slowdown"})}, "thermal_throttle"),
        ({"clock_event_reasons": frozenset({"hw_slowdown"})}, "thermal_throttle"),
        ({"clock_event_reasons": frozenset({"hw_slowdown", "hw_power_brake_slowdown"})}, "power_capped"),
        ({"clock_event_reasons": frozenset({"sw_power_cap"})}, "power_capped"),
        ({"clock_event_reasons": frozenset({"gpu_idle"})}, None),
        ({"foreign_pids": (4711,)}, "foreign_process"),
        ({"temperature_c": 55.0}, None),
    ],
)
def test_states_raise_their_flag_in_their_phase_only(state, flag):
    clock = FakeClock()
    gpu = ScriptedGpu(clock, state=lambda t_s: state if 14.0 < t_s < 16.0 else {})
    with Meter([gpu], clock=clock) as meter:
        with meter.phase("warmup"):
            clock.sleep(11.0)
        with meter.phase("train"):
            clock.sleep(11.0)
    assert meter.phases()["warmup"].flags == {}
    assert set(meter.phases()["train"].flags) == ({flag} if flag else set())


def test_what_holds_of_a_source_is_flagged_in_every_phase():
    clock = FakeClock()
    gpu = ScriptedGpu(clock)
    gpu.flags["mig"] = "a slice"
    assert measure(gpu, clock, 12.0).flags == {"mig": "a slice"}


def test_temperatures_and_clocks_are_summarised():
    clock = FakeClock()
    gpu = ScriptedGpu(clock, state=lambda t_s: {"temperature_c": 40.0 + t_s, "sm_clock_mhz": 1980.0})
    phase = measure(gpu, clock, 20.0)
    assert phase.temperature_c.min == pytest.approx(41.0, abs=1.1)
    assert phase.temperature_c.max == pytest.approx(60.0, abs=1.1)
    assert phase.temperature_c.mean == pytest.approx(50.5, abs=1.1)
    assert phase.sm_clock_mhz.min == phase.sm_clock_mhz.max == 1980.0
    assert phase.memory_clock_mhz is None


def test_several_gpus_add_up_and_stay_apart():
    clock = FakeClock()
    gpus = [
        ScriptedGpu(clock, lambda t_s: 600.0, name="GPU-a", tick_offset_s=0.02),
        ScriptedGpu(clock, lambda t_s: 400.0, name="GPU-b", tick_offset_s=0.07),
        ScriptedGpu(clock, lambda t_s: 100.0, name="GPU-c", has_counter=False),
    ]
    with Meter(gpus, clock=clock) as meter, meter.phase("train"):
        clock.sleep(20.0)
    phase = meter.phases()["train"]
    for gpu, power_w in zip(phase.gpus, [600.0, 400.0, 100.0], strict=True):
        assert gpu.energy_j == pytest.approx(power_w * gpu.seconds, abs=1.3)
    assert phase.energy_j == sum(gpu.energy_j for gpu in phase.gpus)
    assert phase.mean_power_w == pytest.approx(1100.0, rel=1e-3)
    assert [gpu.source for gpu in phase.gpus] == ["counter", "counter", "instant_integral"]
    assert phase.source == "instant_integral"  # a sum is called after its worst term


def test_a_gpu_whose_counter_stands_still_does_not_hold_up_the_others():
    clock = FakeClock()
    gpus = [ScriptedGpu(clock, name="GPU-a"), ScriptedGpu(clock, name="GPU-b", tick_s=0.7)]
    with Meter(gpus, clock=clock) as meter, meter.phase("train"):
        clock.sleep(20.0)
    phase = meter.phases()["train"]
    assert phase.gpus[0].energy_j == pytest.approx(600.0 * phase.gpus[0].seconds, abs=1.3)
    assert phase.flags["edge_unaligned"].startswith("GPU-b")


def test_one_unknown_gpu_makes_the_sum_unknown():
    clock = FakeClock()
    gpus = [ScriptedGpu(clock, name="GPU-a"), NullSource("gpu", "no driver", name="GPU-b")]
    with Meter(gpus, clock=clock) as meter, meter.phase("train"):
        clock.sleep(12.0)
    phase = meter.phases()["train"]
    assert phase.energy_j is None
    assert phase.gpus[0].energy_j == pytest.approx(7200.0, rel=0.02)
    assert meter.live().power_w is None


def test_cpu_joules_are_apart_from_the_gpus():
    clock = FakeClock()
    with Meter([ScriptedGpu(clock), ScriptedCpu(clock, 150.0)], clock=clock) as meter, meter.phase("train"):
        clock.sleep(12.0)
    phase = meter.phases()["train"]
    assert phase.cpu_energy_j == pytest.approx(150.0 * phase.seconds, rel=1e-3)
    assert phase.cpu_reason is None
    assert phase.energy_j == pytest.approx(600.0 * phase.seconds, rel=1e-3)


def test_a_machine_with_no_instrument_runs_and_says_so():
    with Meter([open_sources([], SystemClock())[0], NullSource("cpu", "no RAPL here")]) as meter:
        started_s = time.perf_counter()
        for _ in range(20):
            with meter.phase("train"):
                pass
        assert time.perf_counter() - started_s < 0.1
        idle = meter.measure_idle()  # at once
        assert idle.power_w is None
        assert idle.flags == {"counter_missing": "the run uses no GPU"}
        assert meter.live() == (None, None)
    train = meter.phases()["train"]
    assert train.energy_j is None
    assert train.cpu_energy_j is None
    assert train.cpu_reason == "no RAPL here"
    assert train.flags["counter_missing"] == "the run uses no GPU"
    assert "poller_late" not in meter.run().flags


def test_no_source_at_all_is_none_not_zero():
    """Ranks that leave the metering to another have no sources."""
    with Meter([]) as meter, meter.phase("train"):
        pass
    assert meter.phases()["train"].energy_j is None
    assert meter.run().energy_j is None


def test_idle_is_measured_apart_from_the_run():
    clock = FakeClock()
    gpu = ScriptedGpu(clock, lambda t_s: 300.0 if t_s < 4.0 else 80.0)  # settles within the quiet seconds
    with Meter([gpu], clock=clock) as meter:
        idle = meter.measure_idle()
        with meter.phase("train"):
            clock.sleep(12.0)
    assert idle.power_w == pytest.approx(80.0, rel=1e-3)
    assert idle.integral_power_w == pytest.approx(80.0, rel=1e-3)
    assert idle.source == "counter"
    assert idle.seconds == pytest.approx(10.0, abs=0.11)
    assert meter.run().energy_j == pytest.approx(80.0 * meter.run().seconds, rel=1e-3)
    assert meter.run().seconds == pytest.approx(12.0, abs=0.3)


def test_live_follows_train_without_synchronizing():
    clock = FakeClock()
    calls = []
    with Meter([ScriptedGpu(clock)], clock=clock, synchronize=lambda: calls.append(1)) as meter:
        assert meter.live().train_energy_j == 0.0
        with meter.phase("train"):
            clock.sleep(5.0)
            before = len(calls)
            power_w, energy_j = meter.live()
            assert len(calls) == before
            assert power_w == 600.0
            assert energy_j == pytest.approx(3000.0, abs=70.0)
            with meter.phase("eval"):
                clock.sleep(5.0)
                assert meter.live().train_energy_j == pytest.approx(3000.0, abs=140.0)
            clock.sleep(5.0)
        assert meter.live().train_energy_j == pytest.approx(meter.phases()["train"].energy_j)


def test_live_integrates_where_there_is_no_counter():
    clock = FakeClock()
    with Meter([ScriptedGpu(clock, has_counter=False)], clock=clock) as meter, meter.phase("train"):
        clock.sleep(5.0)
        assert meter.live().train_energy_j == pytest.approx(3000.0, rel=0.02)


def test_a_phase_that_raises_is_measured_and_the_error_goes_on():
    clock = FakeClock()
    meter = Meter([ScriptedGpu(clock)], clock=clock)
    with pytest.raises(RuntimeError, match="out of memory"), meter, meter.phase("train"):
        clock.sleep(12.0)
        raise RuntimeError("out of memory")
    assert meter.phases()["train"].energy_j == pytest.approx(7200.0, rel=0.02)


def test_the_trace_is_written(tmp_path):
    clock = FakeClock()
    with Meter([ScriptedGpu(clock, state=lambda t_s: {"temperature_c": 50.0})], clock=clock) as meter:
        clock.sleep(10.0)
    meter.write_trace(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz") as trace:
        assert len(trace["GPU-a/t_s"]) >= 200
        assert (np.diff(trace["GPU-a/t_s"]) >= 0).all()
        assert set(trace["GPU-a/power_w"]) == {600.0}
        assert len(trace["GPU-a/state_t_s"]) == len(trace["GPU-a/temperature_c"]) >= 10
        assert np.isnan(trace["GPU-a/sm_clock_mhz"]).all()


def test_with_the_machines_clock_and_a_real_thread():
    clock = SystemClock()
    gpu = ScriptedGpu(clock, tick_s=0.02)
    with Meter([gpu]) as meter, meter.phase("train"):
        time.sleep(0.6)
    phase = meter.phases()["train"]
    assert 0.6 <= phase.seconds < 2.0  # a busy machine may be late
    assert phase.energy_j == pytest.approx(600.0 * phase.seconds, rel=0.1)
    assert phase.integral_j == pytest.approx(phase.energy_j, rel=0.1)
    assert 3 <= phase.polls <= 40


@pytest.mark.gpu
def test_a_real_gpu_agrees_with_itself():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    with Meter(open_sources([0], SystemClock()), synchronize=torch.cuda.synchronize) as meter:
        idle = meter.measure_idle(seconds=3.0, quiet_s=2.0)
        with meter.phase("train"):
            end_s = time.monotonic() + 4.0
            while time.monotonic() < end_s:
                for _ in range(50):
                    a @ a
                torch.cuda.synchronize()
    phase = meter.phases()["train"]
    assert phase.source == "counter"
    assert phase.integral_to_counter == pytest.approx(1.0, abs=0.05)
    assert phase.mean_power_w > 2 * idle.power_w > 0
    assert set(phase.flags) <= {"short_window", "power_capped"}
