"""Blocks of runs in processes of their own: what is started, in which order, and what is skipped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_experiment import TINY_STEPS, only_record, records_of

from loras_bench.config_file import load_experiment
from loras_bench.metering.environment import cpu_name
from loras_bench.plan import plan_blocks
from loras_bench.progress import Progress
from loras_bench.requests import Device
from loras_bench.results.store import lock_run, run_folder
from loras_bench.runner import WARMER_C, BlockRunner, Outcome, Workers, durations_of

CPU = Device("cpu", "A CPU", triton=False)
LORA = {"kind": "lora", "rank": 4}


# --- the order of things, with workers that only note what they are asked


class NotedWorkers:
    """Ends each run as told, at once."""

    def __init__(self, endings=(), temperatures=()):
        self.requests, self.endings, self.temperatures = [], dict(endings), list(temperatures)

    def run(self, request, progress):
        self.requests.append(request)
        temperature_c = self.temperatures.pop(0) if self.temperatures else None
        status, reason = self.endings.get(request.experiment.name, ("completed", None))
        return Outcome(request.run_id, status, reason, temperature_c)


@pytest.fixture
def noted(write_config, tmp_path, capsys):
    """Run blocks of arms with noted workers; returns the requests, outcomes and what was said."""

    def run(arms, seeds=(0,), workers=None, stop_at=None, durations=None, force=False):
        workers = workers or NotedWorkers()
        results = tmp_path / "results"
        experiments = [load_experiment(write_config(name, **sections)) for name, sections in arms.items()]
        blocks = plan_blocks(experiments, seeds, results, CPU)
        with Progress() as progress:
            runner = BlockRunner(results, CPU, workers, progress, force=force, stop_at=stop_at)
            runner.durations |= durations or {}
            outcomes = runner.run(blocks)
        return workers.requests, outcomes, capsys.readouterr().err, blocks

    return run


THREE = {f"arm{rank}": {"methods": [{"kind": "lora", "rank": rank}]} for rank in (1, 2, 3)}
PRETRAIN = {
    "data": {"name": "python-topics", "sequence_length": 64},
    "training": {"tokens": 1024, "tokens_per_step": 256, "learning_rate": 1e-3},
}
PRETRAINED = {name: arm | {"pretrain": PRETRAIN} for name, arm in THREE.items()}


def test_runs_go_seed_by_seed_in_the_planned_order(noted):
    requests, outcomes, _, blocks = noted(THREE, seeds=(0, 1))
    planned = [run.run_id for block in blocks for run in block]
    assert [request.run_id for request in requests] == planned
    assert [outcome.run_id for outcome in outcomes] == planned
    assert [request.seed for request in requests] == [0, 0, 0, 1, 1, 1]


def test_idle_power_is_read_at_the_ends_of_a_block_only(noted):
    requests, *_ = noted(THREE, seeds=(0, 1))
    ends = [(request.idle_before, request.idle_after) for request in requests]
    assert ends == [(True, False), (False, False), (False, True)] * 2
    blocks = [(request.block.position, request.block.size) for request in requests]
    assert blocks == [(0, 3), (1, 3), (2, 3)] * 2
    assert len({request.block.id for request in requests}) == 2


def test_a_single_run_reads_idle_power_at_both_ends(noted):
    ((request,), *_) = noted({"one": {}})
    assert (request.idle_before, request.idle_after) == (True, True)


def test_later_runs_of_a_block_wait_for_the_temperature_of_the_first(noted):
    requests, *_ = noted(THREE, seeds=(0, 1), workers=NotedWorkers(temperatures=[40.0, 47.0, 45.0, 42.0, 40.0, 40.0]))
    assert [request.cool_to_c for request in requests] == [
        None, 40.0 + WARMER_C, 40.0 + WARMER_C, None, 42.0 + WARMER_C, 42.0 + WARMER_C,
    ]  # fmt: skip


def test_a_failed_run_does_not_stop_the_others(noted):
    requests, outcomes, said, _ = noted(THREE, workers=NotedWorkers({"arm2": ("failed", "the loss is nan")}))
    assert len(requests) == 3
    assert sorted(outcome.status for outcome in outcomes) == ["completed", "completed", "failed"]
    assert "failed: the loss is nan" in said


def test_a_failed_pretraining_fails_its_arms_with_the_reason_and_is_not_tried_for_each(noted):
    workers = NotedWorkers({"pretraining": ("failed", "the loss is nan")})
    requests, outcomes, said, _ = noted(PRETRAINED | {"alone": {}}, seeds=(0, 1), workers=workers)
    assert sorted(request.experiment.name for request in requests) == ["alone", "alone", "pretraining"]
    arms = [outcome for outcome in outcomes if outcome.run_id.startswith("arm")]
    assert len(arms) == 6
    assert {(arm.status, arm.reason) for arm in arms} == {("failed", "its pretraining failed: the loss is nan")}
    assert said.count("its pretraining failed: the loss is nan") == 6


def test_a_pretraining_that_another_process_is_at_skips_its_arms(noted):
    workers = NotedWorkers({"pretraining": ("skipped", "in use by process 7 on here")})
    _, outcomes, said, _ = noted(PRETRAINED, workers=workers)
    assert {outcome.status for outcome in outcomes} == {"skipped"}
    assert "in use by process 7" in said


# --- --stop-after


def test_nothing_is_started_that_would_not_fit(noted):
    requests, outcomes, said, blocks = noted(
        THREE, seeds=(0, 1), stop_at=time.monotonic() + 5, durations=dict.fromkeys(THREE, 60.0)
    )
    assert (requests, outcomes) == ([], [])
    assert said == f"stopping: 5 s are left, {blocks[0][0].run_id} needs about 60 s; call again to go on\n"


def test_runs_that_fit_are_started_and_the_first_that_does_not_ends_the_call(noted, write_config):
    """No later run is preferred because it is short: blocks stay whole."""
    order = [run.experiment.name for run in noted(THREE)[3][0]]
    durations = {order[0]: 1.0, order[1]: 60.0, order[2]: 1.0}
    requests, _, said, _ = noted(THREE, stop_at=time.monotonic() + 5, durations=durations)
    assert [request.experiment.name for request in requests] == order[:1]
    assert "call again to go on" in said


def test_an_arm_that_never_ran_is_expected_to_take_as_long_as_the_longest(noted):
    requests, *_ = noted({"new": {}}, stop_at=time.monotonic() + 5, durations={"old": 60.0})
    assert requests == []
    requests, *_ = noted({"new": {}}, stop_at=time.monotonic() + 100, durations={"old": 60.0})
    assert len(requests) == 1


def test_pretraining_has_to_fit_too(noted):
    requests, *_ = noted(PRETRAINED, stop_at=time.monotonic() - 1)
    assert requests == []


# --- real runs, each in a process forked from one server

real = pytest.mark.usefixtures("fork_server")


@pytest.fixture
def bench(invoke, tmp_path):
    """`loras-bench run ... --results tmp_path/results --device cpu`."""

    def run(*words):
        return invoke("run", *words, "--results", tmp_path / "results", "--device", "cpu")

    return run


@real
def test_a_run_leaves_a_whole_record_and_is_then_skipped(bench, write_config, tmp_path):
    config, results = write_config(), tmp_path / "results"
    first = bench(config)
    assert (first.status, first.out) == (0, "")
    assert "completed" in first.err
    record = only_record(results)
    assert (record.status, record.steps, record.resumed) == ("completed", TINY_STEPS, False)
    assert record.trained_tokens >= 2048
    assert len(record.loss_curve) == TINY_STEPS
    assert record.quality[0].metrics["perplexity"] < 300
    assert {phase.name for phase in record.phases} >= {"setup", "warmup", "train", "eval", "finish"}
    folder = run_folder(results, record.run_id)
    assert sorted(file.name for file in folder.iterdir()) == [".lock", "log.txt", "power.npz", "result.json"]

    again = bench(config)
    assert again.status == 0
    assert again.err == "1 of 1 runs are finished already; --force runs them again\n"
    assert only_record(results) == record

    forced = bench(config, "--force")
    assert forced.status == 0
    new = only_record(results)
    assert new.block != record.block
    assert new.loss_curve == record.loss_curve  # one thread on a CPU: the same bits


@real
def test_one_nan_loss_fails_its_run_and_the_others_go_on(bench, write_config, tmp_path):
    bad = write_config("bad", training={"learning_rate": 1e30})
    called = bench(bad, write_config("good"), "--seeds", "0,1")
    assert called.status == 1
    records = records_of(tmp_path / "results")
    assert sorted((record.name, record.seed, record.status) for record in records.values()) == [
        ("bad", 0, "failed"),
        ("bad", 1, "failed"),
        ("good", 0, "completed"),
        ("good", 1, "completed"),
    ]
    failed = next(record for record in records.values() if record.name == "bad")
    assert failed.reason.startswith("the loss is nan in step ")
    assert failed.reason.endswith("; lower training.learning_rate")
    assert (failed.train_energy_j, failed.train_seconds, failed.quality) == (None, None, [])
    assert called.err.count("failed: the loss is nan") == 2
    log = run_folder(tmp_path / "results", failed.run_id) / "log.txt"
    assert f"  see {log}\n" in called.err
    assert "NonFiniteLossError" in log.read_text()
    assert "Traceback" not in called.err


@real
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"architecture": {"model_type": "gpt2", "n_layr": 1}}},
            "unknown key `n_layr` in model.architecture for gpt2\nhint: did you mean `n_layer`?",
        ),
        ({"methods": [{"kind": "fold", "rank": 3}]}, "fold: rank 3 does not divide the 16 rows of a head"),
        ({"methods": [{"kind": "fold"}, {"kind": "svd"}]}, "`svd` and `fold` both replace queries, keys and values"),
    ],
)
def test_what_only_the_model_shows_is_refused_before_any_arm_runs(bench, write_config, tmp_path, sections, message):
    called = bench(write_config("fine"), write_config("wrong", **sections))
    assert (called.status, called.out) == (2, "")
    assert called.err.startswith("error: experiment `wrong`: ") and message in called.err
    assert not (tmp_path / "results").exists()


@real
def test_an_arm_that_is_finished_is_not_checked_again(bench, write_config, tmp_path, monkeypatch):
    asked = []
    config, ask = write_config(), Workers.ask
    monkeypatch.setattr(Workers, "ask", lambda *words: asked.append(words[1]) or ask(*words))
    assert bench(config).status == bench(config).status == 0
    assert asked == ["look_at_device", "check_experiments", "look_at_device"]


@real
def test_real_pretraining_is_made_once_and_hidden(bench, write_config, tmp_path):
    arms = [write_config("full", pretrain=PRETRAIN), write_config("lora", pretrain=PRETRAIN, methods=[LORA])]
    called = bench(*arms)
    assert called.status == 0, called.err
    results = tmp_path / "results"
    records = records_of(results)
    assert sorted(record.name for record in records.values()) == ["full", "lora", "pretraining"]
    assert len([name for name in records if name.startswith(".pretrained/")]) == 1
    assert called.err.count("pretraining/seed0") == 2  # its title and its end
    lora = next(record for record in records.values() if record.name == "lora")
    assert lora.trainable_parameters < lora.total_parameters


@real
def test_a_real_failed_pretraining_fails_its_arms(bench, write_config, tmp_path):
    pretrain = PRETRAIN | {"training": PRETRAIN["training"] | {"learning_rate": 1e30}}
    called = bench(write_config("full", pretrain=pretrain), write_config("alone"))
    assert called.status == 1
    assert "failed: its pretraining failed: the loss is nan" in called.err
    assert {record.name: record.status for record in records_of(tmp_path / "results").values()} == {
        "alone": "completed",
        "pretraining": "failed",
    }


@real
def test_a_damaged_record_is_made_again(bench, write_config, tmp_path):
    config = write_config()
    bench(config)
    (path,) = (tmp_path / "results").rglob("result.json")
    path.write_text(path.read_text()[:500])
    assert bench(config).status == 0
    assert only_record(tmp_path / "results").status == "completed"


@real
def test_stop_after_ends_without_work_and_the_next_call_goes_on(bench, write_config, tmp_path):
    config, results = write_config(), tmp_path / "results"
    stopped = bench(config, "--seeds", "0,1", "--stop-after", "0.5")
    assert stopped.status == 0
    assert "call again to go on" in stopped.err
    assert not results.exists()
    assert bench(config, "--seeds", "0,1", "--stop-after", "1000").status == 0
    assert len(records_of(results)) == 2
    assert durations_of(results).keys() == {"tiny"}


@real
def test_a_worker_that_dies_is_a_failed_run_and_the_others_go_on(fork_server, write_config, tmp_path, capsys):
    experiments = [load_experiment(write_config(name, training={"tokens": 1_000_000})) for name in ("victim",)]
    experiments.append(load_experiment(write_config("other")))
    results = tmp_path / "results"
    device = fork_server.ask("look_at_device", "cpu")

    class Killer(Progress):
        """Kills the worker of one arm at its first step."""

        def update(self, event):
            if "step" in event and self.title.startswith("victim"):
                (lock,) = (results / "victim").rglob(".lock")
                os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)

    with Killer() as progress:
        runner = BlockRunner(results, device, fork_server, progress, force=False, stop_at=None)
        outcomes = {o.run_id.partition("/")[0]: o for o in runner.run(plan_blocks(experiments, [0], results, device))}
    assert outcomes["victim"].status == "failed"
    assert outcomes["victim"].reason == "the worker was killed (SIGKILL); the next call takes it up"
    assert outcomes["other"].status == "completed"


@real
def test_a_run_that_another_process_holds_is_skipped(bench, write_config, tmp_path):
    config, results = write_config(), tmp_path / "results"
    device = Device("cpu", cpu_name(), triton=False)
    (run,) = plan_blocks([load_experiment(config)], [0], results, device)[0]
    with lock_run(run.folder):
        called = bench(config)
    assert called.status == 0
    assert f"in use by process {os.getpid()}" in called.err
    assert records_of(results) == {}
    assert bench(config).status == 0
    assert len(records_of(results)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@real
def test_a_run_forked_from_the_server_has_cuda_and_joules(invoke, write_config, tmp_path):
    called = invoke("run", write_config(), "--results", tmp_path / "results", "--device", "cuda")
    assert called.status == 0, called.err
    record = only_record(tmp_path / "results")
    assert record.train_energy_j > 0
    assert record.run_energy_j == pytest.approx(sum(phase.energy_j for phase in record.phases))
    assert record.device_uuids


def test_the_fork_server_imports_without_touching_cuda():
    """A CUDA context, or only a look for devices, would be broken in every process that is forked from it."""
    code = """
import torch
def touched(*_, **__):
    raise SystemExit("CUDA was touched")
for name in ("is_available", "device_count", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, touched)
import loras_bench.worker
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
