"""Joules survive a kill: snapshots go with checkpoints, heartbeats of the counter tell what was lost after the last."""

from __future__ import annotations

import contextlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

from loras_bench.metering.phases import PhaseEnergy


class Snapshot(BaseModel):
    """What a run had spent when a checkpoint was made; JSON-able with `model_dump(mode="json")`."""

    model_config = ConfigDict(frozen=True)

    id: str
    phases: dict[str, PhaseEnergy]
    """Totals so far, sessions before this one included; not judged."""
    lost_energy_j: float | None
    """Joules that kills had destroyed before; 0.0 if there was no kill, None if unknown."""
    lost_reason: str | None


class Journal:
    """An append-only file of JSON lines beside the run's checkpoints, one for all its sessions.

    A session is one process of the run; it writes `start`, then a `beat` every few seconds, then `checkpoint` at each
    snapshot, each with the counters' readings. Delete the file to start a run anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session = uuid4().hex

    def append(self, event: str, counters_j: dict[str, float], snapshot_id: str | None = None) -> None:
        """Append a line. A disk that is full must not end the run: the loss is then known less exactly."""
        line = {"session": self._session, "event": event, "snapshot": snapshot_id, "counters_j": counters_j}
        with contextlib.suppress(OSError), self._path.open("a") as file:
            # A session that was killed may have left half a line; the next one must not continue it.
            file.write(("\n" if event == "start" else "") + json.dumps(line) + "\n")


def lost_energy(path: Path, snapshot: Snapshot | None) -> tuple[float | None, str | None]:
    """Joules that were spent after the snapshot (or since the start, without one) and came to nothing.

    Each session killed since then lost what its last line shows above its base: the snapshot, or its start. What it
    spent between its last beat and the kill (up to 5 s) is not seen, nor is another process on the GPU told apart.

    Returns:
        Joules and None; or None and the reason why they are unknown. 0.0 if nothing was ever killed.
    """
    before_j = 0.0 if snapshot is None else snapshot.lost_energy_j
    if before_j is None:
        return None, None if snapshot is None else snapshot.lost_reason
    lines = _lines(path)
    if snapshot is not None:
        at = next((i for i, line in enumerate(lines) if line["snapshot"] == snapshot.id), None)
        if at is None:
            return None, "the journal does not know the checkpoint that the run was resumed from"
        lines = lines[at:]
    sessions: dict[str, list[dict[str, float]]] = {}
    for line in lines:
        sessions.setdefault(line["session"], []).append(line["counters_j"])
    lost_j = before_j
    for readings in sessions.values():
        if not readings[0] or any(reading.keys() != readings[0].keys() for reading in readings):
            return None, "a killed session had no energy counter"
        if any(later[name] < earlier[name] for earlier, later in pairwise(readings) for name in earlier):
            return None, "an energy counter was reset in a killed session"
        lost_j += sum(readings[-1][name] - base_j for name, base_j in readings[0].items())
    return lost_j, None


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        # Half a line, or the empty one that a start puts before itself.
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
