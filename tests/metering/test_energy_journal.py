"""Joules across kills: what a checkpoint keeps, what a kill destroys."""

from __future__ import annotations

import json

import pytest
from scripted_source import FakeClock, ScriptedGpu

from loras_bench.metering.journal import Journal, Snapshot, lost_energy
from loras_bench.metering.meter import Meter


def checkpoint(id="s", lost_energy_j=0.0, lost_reason=None):
    return Snapshot(id=id, phases={}, lost_energy_j=lost_energy_j, lost_reason=lost_reason)


def write(path, *events):
    """Events of one session: (event, joules of GPU-a[, id of the snapshot])."""
    journal = Journal(path)
    for event, energy_j, *snapshot_id in events:
        journal.append(event, {} if energy_j is None else {"GPU-a": energy_j}, *snapshot_id)


def test_nothing_killed_is_nothing_lost(tmp_path):
    assert lost_energy(tmp_path / "none.jsonl", None) == (0.0, None)


def test_lost_since_the_checkpoint(tmp_path):
    path = tmp_path / "j"
    write(path, ("start", 100.0), ("beat", 400.0), ("checkpoint", 500.0, "s"), ("beat", 800.0), ("beat", 930.0))
    assert lost_energy(path, checkpoint()) == (430.0, None)
    assert lost_energy(path, None) == (830.0, None)  # killed, and begun anew from the start


def test_two_kills_after_one_checkpoint_add_up(tmp_path):
    path = tmp_path / "j"
    write(path, ("start", 100.0), ("checkpoint", 500.0, "s"), ("beat", 800.0))
    write(path, ("start", 2000.0), ("beat", 2600.0))
    assert lost_energy(path, checkpoint()) == (300.0 + 600.0, None)


def test_a_later_checkpoint_carries_what_was_lost_before_it(tmp_path):
    path = tmp_path / "j"
    write(path, ("start", 100.0), ("checkpoint", 500.0, "s"), ("beat", 800.0))
    write(path, ("start", 2000.0), ("checkpoint", 2600.0, "t"), ("beat", 2650.0))
    assert lost_energy(path, checkpoint("t", lost_energy_j=300.0)) == (350.0, None)
    # Going back to the older checkpoint loses the later one's work too.
    assert lost_energy(path, checkpoint("s")) == (300.0 + 650.0, None)


def test_half_a_line_is_skipped(tmp_path):
    path = tmp_path / "j"
    write(path, ("start", 100.0), ("beat", 400.0))
    path.write_text(path.read_text() + '{"session": "x", "eve')
    write(path, ("start", 1000.0), ("beat", 1010.0))
    assert lost_energy(path, None) == (310.0, None)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([("start", None), ("checkpoint", None, "s"), ("beat", None)], "no energy counter"),
        ([("checkpoint", 500.0, "s"), ("beat", 3.0), ("beat", 900.0)], "reset"),
        ([("start", 100.0)], "does not know"),
    ],
)
def test_unknown_losses_are_none_with_a_reason(tmp_path, events, reason):
    write(tmp_path / "j", *events)
    lost_j, why = lost_energy(tmp_path / "j", checkpoint())
    assert lost_j is None
    assert reason in why
    assert lost_energy(tmp_path / "j", checkpoint(lost_energy_j=None, lost_reason="before")) == (None, "before")


def test_a_journal_that_cannot_be_written_does_not_end_the_run(tmp_path):
    Journal(tmp_path / "no" / "folder").append("beat", {})


def test_a_killed_run_resumed_accounts_for_every_joule(tmp_path):
    clock = FakeClock()
    gpu = ScriptedGpu(clock)  # 600 W all the time
    journal = tmp_path / "energy.jsonl"

    first = Meter([gpu], clock=clock, journal=journal)
    first.__enter__()
    with first.phase("setup"):
        clock.sleep(3.0)
    train = first.phase("train")
    train.__enter__()
    clock.sleep(20.0)
    kept = first.snapshot()
    saved = json.dumps(kept.model_dump(mode="json"))
    clock.sleep(22.0)  # lost
    first._poller.stop()  # the kill: nothing else is told

    clock.sleep(100.0)
    resumed = Snapshot.model_validate(json.loads(saved))
    assert resumed == kept
    with Meter([gpu], clock=clock, journal=journal, resumed=resumed) as second:
        assert second.lost_reason is None
        # The last heartbeat came up to 5 s before the kill.
        assert 600.0 * 17.0 - 60 <= second.lost_energy_j <= 600.0 * 22.0
        with second.phase("train"):
            assert second.live().train_energy_j == pytest.approx(12_000, abs=130)
            clock.sleep(15.0)
    phases = second.phases()
    assert phases["train"].seconds == pytest.approx(35.0, abs=0.4)
    assert phases["train"].energy_j == pytest.approx(600.0 * phases["train"].seconds, rel=1e-3)
    assert phases["train"].parts == 2
    assert phases["setup"].energy_j == pytest.approx(1800.0, abs=70.0)
    assert second.run().energy_j == pytest.approx(sum(phase.energy_j for phase in phases.values()))
    assert second.snapshot().lost_energy_j == second.lost_energy_j


def test_a_run_resumed_on_another_gpu_keeps_both(tmp_path):
    clock = FakeClock()
    with Meter([ScriptedGpu(clock, name="GPU-a")], clock=clock) as meter, meter.phase("train"):
        clock.sleep(11.0)
        snapshot = meter.snapshot()
    gpu = ScriptedGpu(clock, lambda t_s: 300.0, name="GPU-b")
    with Meter([gpu], clock=clock, resumed=snapshot) as meter, meter.phase("train"):
        clock.sleep(11.0)
    train = meter.phases()["train"]
    assert [gpu.uuid for gpu in train.gpus] == ["GPU-a", "GPU-b"]
    assert train.energy_j == pytest.approx(6600.0 + 3300.0, abs=130.0)
    assert meter.lost_reason == "no journal"


def test_flags_of_a_short_first_session_do_not_outlive_it(tmp_path):
    clock = FakeClock()
    gpu = ScriptedGpu(clock)
    with Meter([gpu], clock=clock) as meter, meter.phase("train"):
        clock.sleep(4.0)
        snapshot = meter.snapshot()
    assert "short_window" in meter.phases()["train"].flags
    with Meter([gpu], clock=clock, resumed=snapshot) as meter, meter.phase("train"):
        clock.sleep(8.0)
    assert meter.phases()["train"].flags == {}
