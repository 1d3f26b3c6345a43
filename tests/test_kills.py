"""Signals in the midst of training, to commands in processes of their own: what is left, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress

import pytest
from tiny_experiment import only_record, records_of

from loras_bench.results.store import lock_run

LONG = {"tokens": 1_000_000, "checkpoint_minutes": 1e-3}
"""Thousands of steps take seconds: time for a signal in the midst of them."""
DEADLINE_S = 60.0


def wait_for(what, condition, process=None):
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        if process is not None and process.poll() is not None:
            pytest.fail(f"the command ended before there was {what}: {process.communicate()[1]}")
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} in {DEADLINE_S} s")
        time.sleep(0.005)
    return found


def is_alive(pid):
    """Whether a process runs; one that ended and was not waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def group_of(process):
    """The processes of a command's group."""
    members = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(ProcessLookupError):
            members += [name] if os.getpgid(int(name)) == process.pid else []
    return members


def checkpoint_in(results):
    return lambda: next(results.rglob("checkpoint.json"), None)


def assert_same_run(record, other):
    """The same record fields, steps and losses; one was interrupted in between."""
    assert set(json.loads(record.model_dump_json())) == set(json.loads(other.model_dump_json()))
    assert (record.status, record.steps, record.trained_tokens) == ("completed", other.steps, other.trained_tokens)
    assert record.missing.keys() == other.missing.keys()
    assert {phase.name for phase in record.phases} == {phase.name for phase in other.phases}
    assert record.loss_curve == other.loss_curve
    assert record.quality == other.quality
    assert record.flops == other.flops


def test_ctrl_c_while_torch_is_imported_is_quiet(launch, write_config, tmp_path):
    process = launch("run", write_config(), "--results", tmp_path / "results", "--device", "cpu")
    wait_for("the fork server", lambda: len(group_of(process)) >= 3, process)  # and the resource tracker
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.usefixtures("fork_server")
def test_a_killed_run_is_taken_up_and_ends_like_an_undisturbed_one(launch, invoke, write_config, tmp_path):
    """SIGKILL to the whole process group, in the midst of training, after a checkpoint."""
    config, killed, whole = write_config(training=LONG | {"tokens": 60_000}), tmp_path / "killed", tmp_path / "whole"
    process = launch("run", config, "--results", killed, "--device", "cpu")
    wait_for("a checkpoint", checkpoint_in(killed), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert records_of(killed) == {}

    planned = invoke("run", config, "--results", killed, "--device", "cpu", "--dry-run")
    assert "to be resumed" in planned.out
    assert invoke("run", config, "--results", killed, "--device", "cpu").status == 0
    assert invoke("run", config, "--results", whole, "--device", "cpu").status == 0
    resumed, undisturbed = only_record(killed), only_record(whole)
    assert (resumed.resumed, undisturbed.resumed) == (True, False)
    (reason,) = [flag.reason for flag in resumed.flags if flag.name == "resumed"]
    assert reason.startswith("taken up after step ")
    assert reason.endswith(f" of {resumed.steps}")
    assert_same_run(resumed, undisturbed)
    assert checkpoint_in(killed)() is None


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(lambda process: os.killpg(process.pid, signal.SIGINT), id="ctrl-c"),
        pytest.param(lambda process: process.send_signal(signal.SIGTERM), id="scheduler"),
    ],
)
def test_an_interrupt_leaves_a_record_and_status_130(launch, write_config, tmp_path, interrupt):
    """Ctrl-C in a terminal signals every process of the group; a scheduler may signal the parent alone."""
    results = tmp_path / "results"
    process = launch("run", write_config(training=LONG), write_config("next"), "--results", results, "--device", "cpu")
    wait_for("a checkpoint", checkpoint_in(results), process)
    interrupt(process)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted; the next call takes it up" in err
    record = next(record for record in records_of(results).values() if record.name == "tiny")
    assert (record.status, record.reason) == ("interrupted", "interrupted by the user")
    assert record.missing["train_energy_j"] == "the run interrupted: interrupted by the user"
    assert checkpoint_in(results)() is not None


def test_a_worker_whose_parent_was_killed_ends_by_itself(launch, write_config, tmp_path):
    config, results = write_config(training=LONG), tmp_path / "results"
    process = launch("run", config, "--results", results, "--device", "cpu")
    checkpoint = wait_for("a checkpoint", checkpoint_in(results), process)
    worker = int((checkpoint.parent / ".lock").read_text().split()[1])
    os.kill(process.pid, signal.SIGKILL)
    wait_for("a record", lambda: list(results.rglob("result.json")))
    wait_for("the worker's end", lambda: not is_alive(worker))
    record = only_record(results)
    assert (record.status, record.reason) == ("interrupted", "the command that started the run is gone")
    with lock_run(checkpoint.parent):
        pass


def test_two_processes_on_one_results_folder_do_the_work_once(launch, write_config, tmp_path):
    results = tmp_path / "results"
    configs = [write_config(name, training={"tokens": 20_000}) for name in ("a", "b", "c")]
    processes = [launch("run", *configs, "--results", results, "--device", "cpu") for _ in range(2)]
    told = [process.communicate(timeout=DEADLINE_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    records = records_of(results)
    assert sorted((record.name, record.status) for record in records.values()) == [
        ("a", "completed"),
        ("b", "completed"),
        ("c", "completed"),
    ]
    assert len("".join(told).split("  completed  ")) - 1 == 3
    assert not list(results.rglob("*.tmp"))
