"""Records survive kills, neighbours, copies and corruption."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loras_bench.errors import UserError
from loras_bench.results.record import CurvePoint
from loras_bench.results.store import RunLockedError, is_finished, load_records, lock_run, run_folder, write_record

HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from loras_bench.results.store import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
WRITE_AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from loras_bench.results.record import Record
from loras_bench.results.store import write_record
record = Record.model_validate_json(sys.stdin.read())
for i in range(60):
    write_record(record.model_copy(update={"reason": sys.argv[2] * 5000}), Path(sys.argv[1]))
"""


def test_a_written_record_is_read_back(tmp_path, make_record):
    record = make_record()
    path = write_record(record, run_folder(tmp_path, record.run_id))
    assert path == tmp_path / "full" / "seed0-aaaaaaaaaa" / "result.json"
    assert load_records([tmp_path]) == ([record], [])
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_diverged_run_keeps_its_nan(tmp_path, make_record):
    curve = [CurvePoint(step=1, tokens=10, loss=math.nan)]
    write_record(make_record(status="failed", reason="NaN loss", loss_curve=curve), tmp_path)
    write_record(make_record(status="failed", reason="NaN loss", loss_curve=curve), tmp_path / "copy")
    records, problems = load_records([tmp_path])
    assert math.isnan(records[0].loss_curve[0].loss)
    assert problems == []


def test_a_failing_write_leaves_the_old_record_and_no_rubbish(tmp_path, make_record, monkeypatch):
    write_record(make_record(), tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(make_record(joules=1.0), tmp_path)
    assert load_records([tmp_path])[0][0].train_energy_j == 13000
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("place", ["", "full", "full/seed0-aaaaaaaaaa", "full/seed0-aaaaaaaaaa/result.json"])
def test_every_kind_of_place_is_accepted(tmp_path, make_record, place):
    write_record(make_record(), run_folder(tmp_path, make_record().run_id))
    assert load_records([tmp_path / place]) == ([make_record()], [])


def test_bad_files_are_named_and_hide_nothing(tmp_path, make_record):
    good = make_record("lora")
    write_record(good, run_folder(tmp_path, good.run_id))
    wrong_field = json.loads(make_record().model_dump_json()) | {"seed": "many"}
    contents = {
        "cut": ('{"schema_version": 1, "run', "not valid JSON"),
        "future": ('{"schema_version": 99}', "schema version 99"),
        "list": ("[]", "no JSON object"),
        "field": (json.dumps(wrong_field), "seed: "),
        "bytes": (b"\xff\xfe\x00", "not UTF-8"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).mkdir()
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name / "result.json").write_bytes(raw)
    records, problems = load_records([tmp_path])
    assert records == [good]
    assert {problem.path.parent.name for problem in problems} == set(contents)
    for problem in problems:
        assert contents[problem.path.parent.name][1] in str(problem)
        assert "\n" not in str(problem)


def test_places_without_records(tmp_path):
    assert "no result.json" in load_records([tmp_path])[1][0].reason
    with pytest.raises(UserError, match="no such file or folder"):
        load_records([tmp_path / "nowhere"])


def test_a_run_counts_once(tmp_path, make_record):
    old = make_record(joules=1.0)
    new = make_record(joules=2.0, finished_at="2026-02-01T00:00:00Z")
    elsewhere = make_record(joules=3.0, device="NVIDIA H200")
    for folder, record in {"a": old, "b": new, "c": new, "d": elsewhere}.items():
        write_record(record, tmp_path / folder)
    records, problems = load_records([tmp_path, tmp_path / "a", tmp_path / "b" / "result.json"])
    assert [record.train_energy_j for record in records] == [2.0, 3.0]
    assert [problem.path.parent.name for problem in problems] == ["a"]
    assert "b/result.json counts" in problems[0].reason


def test_finished_means_completed_on_this_device_with_these_kernels(make_record):
    assert is_finished(make_record(), "NVIDIA H100 80GB HBM3", "1")
    assert not is_finished(make_record(), "NVIDIA H200", "1")
    assert not is_finished(make_record(), "NVIDIA H100 80GB HBM3", "2")
    assert not is_finished(make_record(status="failed"), "NVIDIA H100 80GB HBM3", "1")


def test_a_locked_run_names_its_holder_and_a_kill_frees_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=f"process {holder.pid} on "), lock_run(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with lock_run(tmp_path), pytest.raises(RunLockedError, match=f"process {os.getpid()}"), lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        pass


def test_a_child_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    with lock_run(tmp_path):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with lock_run(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_reader_between_two_writers_sees_whole_records(tmp_path: Path, make_record):
    write_record(make_record(reason="c" * 5000), tmp_path)
    text = make_record().model_dump_json()
    command = [sys.executable, "-c", WRITE_AGAIN_AND_AGAIN, str(tmp_path)]
    writers = [subprocess.Popen([*command, letter], stdin=subprocess.PIPE, text=True) for letter in "ab"]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(text)
        writer.stdin.close()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        records, problems = load_records([tmp_path])
        assert problems == []
        assert len(set(records[0].reason)) == 1 and len(records[0].reason) == 5000
        seen.add(records[0].reason[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen & {"a", "b"}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
