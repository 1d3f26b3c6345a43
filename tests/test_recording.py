"""From phases to a record: a GPU whose power is known, and a run whose steps are told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metering.scripted_source import FakeClock, ScriptedCpu, ScriptedGpu
from tiny_experiment import TINY, TINY_STEPS
from training_fixtures import build_run

from loras_bench import recording
from loras_bench.config import Experiment
from loras_bench.errors import ConfigError
from loras_bench.metering.meter import Meter
from loras_bench.recording import Measurements, describe_failure
from loras_bench.requests import Device, RunRequest
from loras_bench.results.record import Block, Flops, Record
from loras_bench.training import LossLog, NonFiniteLossError

GPU, CPU = Device("cuda", "A GPU", triton=False), Device("cpu", "A CPU", triton=False)
WATTS = 600.0
FLOPS = Flops(linear=1e12, attention_executed=3e11, attention_allowed=2e11, attention_dense=4e11)
USUAL = (("setup", 3.0), ("warmup", 2.0), ("train", 12.0), ("eval", 1.5), ("finish", 0.5))
SHORT = (("setup", 3.0), ("train", 4.0), ("eval", 1.0))
ENERGY_FIELDS = ("train_energy_j", "run_energy_j", "chain_energy_j", "energy_j_per_mtoken", "mean_power_w")
EXPERIMENT = Experiment.model_validate({"name": "tiny", **TINY})
TOKENS = TINY_STEPS * 256


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real build of the tiny experiment; its steps are not taken here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return build_run(EXPERIMENT)


@pytest.fixture
def script(run, tmp_path, monkeypatch):
    """Play phases of known length and power, and return the record."""
    monkeypatch.setattr(recording, "collect_environment", dict)

    def play(
        phases=USUAL, *, device=GPU, error=None, steady_tokens=None, chain_j=0.0, idle_w=(), watts=WATTS, **options
    ):
        clock = FakeClock()
        make_sources = options.pop("sources", lambda clock: [ScriptedGpu(clock, lambda t_s: watts)])
        done = Measurements(
            RunRequest(EXPERIMENT, 0, "tiny/seed0-x", tmp_path, device, Block(id="b", position=0, size=2))
        )
        with Meter(make_sources(clock), clock=clock, **options) as meter:
            run.chain_energy_j = chain_j
            done.built(run, FLOPS, TOKENS)
            for name, seconds in phases:
                with meter.phase(name):
                    clock.sleep(seconds)
            if error is None:
                losses = LossLog(run.plan.steps, torch.device("cpu"))
                losses.values[:] = torch.arange(run.plan.steps, 0.0, -1.0)
                done.trained(run, losses)
                done.steady_tokens = steady_tokens
                done.complete()
            else:
                done.fail(error)
        return done.record(meter)

    return play


def phase_of(record, name):
    return next(phase for phase in record.phases if phase.name == name)


def flag_names(record):
    return {flag.name for flag in record.flags}


# --- joules


def test_energy_fields_are_those_of_their_phases(script):
    record = script()
    assert record.status == "completed"
    assert record.train_energy_j == phase_of(record, "train").energy_j
    assert record.train_energy_j == pytest.approx(WATTS * 12.0, rel=0.02)
    assert record.train_energy_source == "counter"
    assert record.train_seconds == phase_of(record, "train").seconds
    assert record.tokens_per_second == pytest.approx(TOKENS / record.train_seconds)
    assert record.mean_power_w == pytest.approx(WATTS, rel=1e-3)
    assert record.energy_j_per_mtoken == pytest.approx(record.train_energy_j / TOKENS * 1e6)
    assert record.energy_j_per_mtoken_phase == "train"
    assert phase_of(record, "train").integral_j == pytest.approx(record.train_energy_j, rel=1e-2)
    assert record.missing.keys() == {"cpu_energy_j"}
    assert not record.resumed


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["setup", "warmup", "train", "eval", "finish", "steady"]), st.floats(0.01, 4.0)),
        max_size=12,
    )
)
def test_the_joules_of_phases_add_up_to_the_run(script, phases):
    record = script((*phases, ("train", 1.0)))
    assert sum(phase.energy_j for phase in record.phases) == pytest.approx(record.run_energy_j, rel=1e-9)
    assert len({phase.name for phase in record.phases}) == len(record.phases)


def test_train_interrupted_by_evaluations_counts_once(script):
    record = script((("train", 6.0), ("eval", 3.0), ("train", 6.0), ("eval", 3.0)))
    assert record.train_energy_j == pytest.approx(WATTS * 12.0, rel=0.04)
    assert phase_of(record, "train").details["parts"] == 2
    assert record.energy_j_per_mtoken_phase == "train"
    assert "short_window" not in flag_names(record)


def test_a_short_train_phase_leaves_joules_per_token_to_the_steady_phase(script):
    record = script((*SHORT, ("steady", 11.0)), steady_tokens=5000)
    assert record.train_energy_j == pytest.approx(WATTS * 4.0, rel=0.06)
    assert record.energy_j_per_mtoken == phase_of(record, "steady").energy_j / 5000 * 1e6
    assert record.energy_j_per_mtoken_phase == "steady"
    assert "short_window" in flag_names(record)


def test_ten_seconds_of_train_are_enough_even_beside_a_steady_phase(script):
    record = script((("train", 10.1), ("steady", 11.0)), steady_tokens=5000)
    assert record.energy_j_per_mtoken_phase == "train"


def test_a_short_train_phase_alone_gives_no_joules_per_token_and_says_why(script):
    record = script(SHORT)
    assert record.train_energy_j is not None
    assert record.energy_j_per_mtoken is None
    assert record.energy_j_per_mtoken_phase is None
    assert record.missing["energy_j_per_mtoken"] == ("train lasted less than 10 s and no steady phase was asked for")


def test_a_chain_adds_the_joules_of_the_runs_before(script):
    record = script(chain_j=5000.0)
    assert record.chain_energy_j == pytest.approx(record.run_energy_j + 5000.0)
    assert script(chain_j=0.0).chain_energy_j > 0
    assert script(chain_j=None).chain_energy_j is None


def test_idle_power_is_told_and_not_part_of_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "collect_environment", dict)
    clock = FakeClock()
    gpu = ScriptedGpu(clock, lambda t_s: 80.0 if t_s < 20 else 100.0 if t_s > 35 else WATTS)
    done = Measurements(RunRequest(EXPERIMENT, 0, "tiny/seed0-x", tmp_path, GPU))
    with Meter([gpu], clock=clock) as meter:
        done.built(run, FLOPS, TOKENS)
        done.idle_before = meter.measure_idle(10.0)
        clock.sleep(20.0 - (clock.now() - 1000.0))
        with meter.phase("train"):
            clock.sleep(15.0)
        clock.sleep(1.0)
        done.idle_after = meter.measure_idle(10.0)
        done.complete()
    record = done.record(meter)
    assert record.idle_before_w == pytest.approx(80.0, rel=1e-3)
    assert record.idle_after_w == pytest.approx(100.0, rel=1e-3)
    assert "idle_drift" in flag_names(record)
    counted = sum(phase.energy_j for phase in record.phases if phase.name != "idle")
    assert record.run_energy_j == pytest.approx(counted)


# --- what is missing is None with a reason, never 0


def assert_nothing_is_zero(record):
    assert [name for name in ENERGY_FIELDS if getattr(record, name) == 0] == []
    assert all(phase.energy_j is None or phase.energy_j > 0 for phase in record.phases)


def test_without_instruments_every_figure_is_none_with_a_reason(script):
    record = script(device=CPU, sources=lambda clock: [])
    assert [getattr(record, name) for name in ENERGY_FIELDS] == [None] * 5
    assert {"train_energy_j", "run_energy_j", "energy_j_per_mtoken", "mean_power_w", "cpu_energy_j"} <= set(
        record.missing
    )
    assert all(record.missing.values())
    assert record.train_seconds == pytest.approx(12.0, abs=0.2)
    assert record.flags == []  # a CPU run misses nothing that it could have had
    assert record.device_uuids == []


def test_a_gpu_without_counter_and_power_is_flagged(script):
    record = script(sources=lambda clock: [ScriptedGpu(clock, has_counter=False, power_kind=None)])
    assert_nothing_is_zero(record)
    assert record.train_energy_j is None
    assert record.missing["train_energy_j"] == "GPU-a has no energy counter"
    assert "counter_missing" in flag_names(record)


def test_integrated_power_is_named_as_such(script):
    record = script(sources=lambda clock: [ScriptedGpu(clock, lambda t_s: WATTS, has_counter=False)])
    assert record.train_energy_source == "instant_integral"
    assert record.train_energy_j == pytest.approx(WATTS * 12.0, rel=0.03)
    assert "train_energy_j" not in record.missing


def test_a_gpu_that_falls_off_in_training_gives_none_and_the_reason(script):
    record = script(sources=lambda clock: [ScriptedGpu(clock, fails=lambda t_s: t_s > 8)])
    assert_nothing_is_zero(record)
    assert record.train_energy_j is None
    assert record.run_energy_j is None
    assert phase_of(record, "setup").energy_j is not None
    assert "fell off the bus" in record.missing["train_energy_j"]


def test_cpu_joules_are_a_column_of_their_own(script):
    record = script(sources=lambda clock: [ScriptedGpu(clock, lambda t_s: WATTS), ScriptedCpu(clock, 50.0)])
    train = phase_of(record, "train")
    assert train.cpu_energy_j == pytest.approx(50.0 * train.seconds, rel=1e-3)
    assert record.run_energy_j == pytest.approx(sum(phase.energy_j for phase in record.phases))
    assert "cpu_energy_j" not in record.missing


# --- runs that did not end well


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (
            NonFiniteLossError("the loss is nan in step 3"),
            "failed",
            "the loss is nan in step 3; lower training.learning_rate",
        ),
        (KeyboardInterrupt("interrupted by the user"), "interrupted", "interrupted by the user"),
        (KeyboardInterrupt(), "interrupted", "interrupted by the user"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
            "failed",
            "out of GPU memory; lower training.micro_batch_size or set training.gradient_checkpointing",
        ),
        (ConfigError("no data", "put it there"), "failed", "no data (put it there)"),
        (ConfigError("no data"), "failed", "no data"),
        (ValueError("first line\nsecond line"), "failed", "ValueError: first line"),
        (RuntimeError(), "failed", "RuntimeError: no message"),
    ],
)
def test_what_ended_a_run_is_one_line_in_its_record(script, error, status, reason):
    assert describe_failure(error) == reason
    record = script((("setup", 3.0), ("train", 5.0)), error=error)
    assert (record.status, record.reason) == (status, reason)
    assert record.missing["train_energy_j"] == f"the run {status}: {reason}"
    assert (record.train_energy_j, record.train_seconds, record.energy_j_per_mtoken) == (None, None, None)
    assert record.run_energy_j == pytest.approx(sum(phase.energy_j for phase in record.phases))
    assert phase_of(record, "train").energy_j > 0


def test_a_run_that_ends_before_its_model_is_built_leaves_a_record(tmp_path):
    done = Measurements(RunRequest(EXPERIMENT, 0, "tiny/seed0-x", tmp_path, CPU))
    with Meter([], clock=FakeClock()) as meter:
        done.fail(ConfigError("no data"))
    record = done.record(meter)
    assert (record.status, record.task, record.total_parameters) == ("failed", "language_modeling", None)
    assert record.environment["python"]


# --- a kill in between


def test_a_resumed_run_adds_its_sessions_up_and_tells_what_was_lost(script, run, tmp_path):
    journal = tmp_path / "journal.jsonl"
    clock = FakeClock()
    with Meter([ScriptedGpu(clock, lambda t_s: WATTS)], clock=clock, journal=journal) as meter:
        with meter.phase("train"):
            clock.sleep(7.0)
        with meter.phase("finish"):
            snapshot = meter.snapshot()
        with meter.phase("train"):
            clock.sleep(20.0)  # killed here: beats of the counter are all that is left
    record = script((("train", 5.0),), resumed=snapshot, journal=journal)
    assert record.train_energy_j == pytest.approx(WATTS * 12.0, rel=0.04)
    assert record.lost_energy_j == pytest.approx(WATTS * 20.0, rel=0.3)
    assert record.run_energy_j == pytest.approx(sum(phase.energy_j for phase in record.phases))
    assert record.run_energy_j < WATTS * 15.0


# --- the rest of it


def test_counts_curves_and_config_are_in_the_record(script, run):
    record = script()
    total, trainable = run.parameter_counts()
    assert (record.total_parameters, record.trainable_parameters) == (total, trainable)
    assert (record.steps, record.trained_tokens, record.padded_tokens) == (TINY_STEPS, TOKENS, TOKENS)
    assert [(point.step, point.loss) for point in record.loss_curve] == [
        (k, TINY_STEPS + 1.0 - k) for k in range(1, TINY_STEPS + 1)
    ]
    assert record.loss_curve[-1].tokens == TOKENS
    assert record.flops.total == 1.3e12
    assert Experiment.model_validate(record.config) == EXPERIMENT
    assert record.block.id == "b"
    assert record.peak_memory_bytes > 1e7
    assert record.attention["layers"][0]["pattern"]["kind"] == "dense"


def test_an_operation_without_a_formula_is_flagged(run, tmp_path):
    done = Measurements(RunRequest(EXPERIMENT, 0, "tiny/seed0-x", tmp_path, CPU))
    done.built(run, FLOPS.model_copy(update={"incomplete": ["aten.odd_mm"]}), TOKENS)
    assert [(flag.name, flag.reason) for flag in done.flags] == [("flops_incomplete", "no formula for aten.odd_mm")]


def test_a_record_survives_its_json(script):
    for record in (script(), script(device=CPU, sources=lambda clock: []), script(error=KeyboardInterrupt())):
        assert Record.model_validate_json(record.model_dump_json()) == record
