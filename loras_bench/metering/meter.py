"""The meter: named phases with edges on the counter's ticks, polled power beside them, for all GPUs of a job.

Protocol and limits are in docs/energy.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from uuid import uuid4

from loras_bench.metering.clock import Clock, SystemClock
from loras_bench.metering.edges import Edge, stretch, take_edge
from loras_bench.metering.journal import Journal, Snapshot, lost_energy
from loras_bench.metering.phases import IdleReading, PhaseEnergy, add_up, judge, sum_if_known
from loras_bench.metering.sources import EnergySource
from loras_bench.metering.trace import Poller, Trace

SHARED_EDGE_S = 0.1
"""A phase entered this soon after an edge shares it: waiting for another tick would cost as much time again."""
HEARTBEAT_S = 5.0

OTHER = "other"
"""The phase that time outside all named phases goes to, so that phases add up to the run."""
IDLE = "idle"
"""The phase of `measure_idle`; not part of the run."""


class Live(NamedTuple):
    """What a progress bar shows."""

    power_w: float | None
    train_energy_j: float | None


class Meter:
    """Measures a run in one process over the GPUs that its sources name; use as a context manager.

    ```
    with Meter(open_sources([0], clock), synchronize=torch.cuda.synchronize) as meter:
        with meter.phase("setup"): ...
        with meter.phase("train"):
            ...
            with meter.phase("eval"): ...     # interrupts `train`, which goes on afterwards
    meter.phases()["train"].energy_j
    ```

    With several ranks on a node, one of them meters all GPUs of the job and the others get no sources.

    Args:
        sources: The GPUs of the job and at most one CPU source (`open_sources`).
        synchronize: Waits until the work given to all devices (by all ranks, if there are several) is done; called at
            each edge.
        clock: Only tests pass another one.
        journal: File for heartbeats and checkpoints; None keeps no journal.
        resumed: The snapshot that the run goes on from; its joules are added to those of the same phases.
    """

    def __init__(
        self,
        sources: Sequence[EnergySource],
        *,
        synchronize: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
        journal: Path | None = None,
        resumed: Snapshot | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._synchronize = synchronize
        self._traces = [Trace(source) for source in sources]
        self._gpus = [trace for trace in self._traces if trace.source.kind == "gpu"]
        self._poller = Poller(self._traces, self._clock, also=self._beat)
        self._stack: list[str] = []
        self._segments: list[PhaseEnergy] = []
        self._resumed = dict(resumed.phases) if resumed else {}
        self._polled = False
        self._edge: Edge
        self.lost_energy_j, self.lost_reason = lost_energy(journal, resumed) if journal else (None, "no journal")
        self._journal = Journal(journal) if journal else None
        self._last_beat_s = 0.0
        # Beats come from the poller's thread: a line must not overtake one with older readings.
        self._journal_lock = threading.Lock()

    def __enter__(self) -> Meter:
        readings = [trace.read() for trace in self._traces]
        # A reading that failed may come back; one without values never will, and is not worth a thread.
        self._polled = any(r is None or r.energy_j is not None or r.power_w is not None for r in readings)
        if self._polled:
            self._poller.start()
        self._edge = take_edge(self._traces, self._synchronize, self._clock)
        self._write("start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if not self._segments or not self._edge_is_fresh():
                self._cut()
        finally:
            self._poller.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything done inside belongs to phase `name`; an inner phase interrupts an outer one.

        A phase entered again goes on adding up. Consecutive phases share an edge.
        """
        if not self._edge_is_fresh():
            self._cut()
        self._stack.append(name)
        try:
            yield
        finally:
            try:
                self._cut()
            finally:
                self._stack.pop()

    def phases(self) -> dict[str, PhaseEnergy]:
        """All phases by name, up to the last edge; `other` is the time between them, `idle` that of `measure_idle`."""
        return {name: judge(phase, self._polled) for name, phase in self._totals().items()}

    def run(self) -> PhaseEnergy:
        """The whole run up to the last edge: the sum of all phases but `idle`."""
        phases = [phase for name, phase in self._totals().items() if name != IDLE]
        return judge(add_up("run", phases), self._polled)

    def live(self) -> Live:
        """Watts now and joules of `train` so far, from what the poller read last: no device is touched."""
        train = self._totals().get("train")
        closed_j = train.energy_j if train else 0.0 if self._polled else None
        open_j = self._open_energy_j() if self._label == "train" else 0.0
        return Live(
            power_w=sum_if_known(trace.last.power_w if trace.last else None for trace in self._gpus),
            train_energy_j=sum_if_known((closed_j, open_j)),
        )

    @property
    def measures_energy(self) -> bool:
        """Whether any GPU tells its energy or power."""
        return any(
            t.last is not None and (t.last.energy_j is not None or t.last.power_w is not None) for t in self._gpus
        )

    def temperature_c(self) -> float | None:
        """Temperature of the warmest GPU as the poller saw it last."""
        known = [t.states[-1].temperature_c for t in self._gpus if t.states]
        return max((c for c in known if c is not None), default=None)

    def snapshot(self) -> Snapshot:
        """What was spent until now, to be stored with a checkpoint; waits for a tick, like any edge."""
        self._cut()
        snapshot = Snapshot(
            id=uuid4().hex,
            phases=self._totals(),
            lost_energy_j=self.lost_energy_j,
            lost_reason=self.lost_reason,
        )
        self._write("checkpoint", snapshot.id)
        return snapshot

    def measure_idle(self, seconds: float = 10.0, quiet_s: float = 5.0) -> IdleReading:
        """Watch the GPUs do nothing for `seconds`, after `quiet_s` in which clocks and power settle.

        Returns at once where there is nothing to measure with.
        """
        if all("counter_missing" in trace.source.flags and not trace.source.power_kind for trace in self._gpus):
            flags = {name: reason for trace in self._gpus for name, reason in trace.source.flags.items()}
            return IdleReading(
                power_w=None, integral_power_w=None, source=None, seconds=0.0, temperature_c=None, flags=flags
            )
        with self.phase(IDLE):
            self._clock.sleep(quiet_s)
            self._cut()
            self._clock.sleep(seconds)
        idle = self._segments[-1]
        return IdleReading(
            power_w=idle.mean_power_w,
            integral_power_w=None if idle.integral_j is None else idle.integral_j / idle.seconds,
            source=idle.source,
            seconds=idle.seconds,
            temperature_c=idle.temperature_c,
            flags=idle.flags,
        )

    def write_trace(self, path: Path) -> None:
        """Write every GPU sample as a compressed `.npz`: `<uuid>/t_s`, `<uuid>/power_w`, `<uuid>/temperature_c`, ...

        Times are monotonic seconds of this process; `<uuid>/state_t_s` are those of temperature and clocks.
        """
        import numpy as np

        arrays: dict[str, Any] = {}
        for trace in self._gpus:
            name = trace.source.name
            arrays[f"{name}/t_s"] = np.asarray(trace.times_s)
            arrays[f"{name}/power_w"] = np.asarray(trace.power_w, dtype=np.float32)
            arrays[f"{name}/state_t_s"] = np.asarray([state.t_s for state in trace.states])
            for column in ("temperature_c", "sm_clock_mhz", "memory_clock_mhz", "utilization_percent"):
                values = [getattr(state, column) for state in trace.states]
                arrays[f"{name}/{column}"] = np.asarray(values, dtype=np.float32)
        np.savez_compressed(path, **arrays)

    @property
    def _label(self) -> str:
        return self._stack[-1] if self._stack else OTHER

    def _totals(self) -> dict[str, PhaseEnergy]:
        parts = {name: [phase] for name, phase in self._resumed.items()}
        for segment in self._segments:
            parts.setdefault(segment.name, []).append(segment)
        return {name: add_up(name, phases) for name, phases in parts.items()}

    def _open_energy_j(self) -> float | None:
        """Joules since the last edge, as far as the poller knows."""
        energies_j: list[float | None] = []
        for trace, mark in zip(self._traces, self._edge.marks, strict=True):
            if trace.source.kind != "gpu":
                continue
            energy_j = None
            if trace.last is not None and trace.last.energy_j is not None and mark.energy_j is not None:
                # If reads failed since, the last one is older than the edge.
                energy_j = max(0.0, trace.last.energy_j - mark.energy_j)
            elif trace.times_s:
                energy_j = trace.integral_j(mark.t_s, trace.times_s[-1])
            energies_j.append(energy_j)
        return sum_if_known(energies_j)

    def _edge_is_fresh(self) -> bool:
        return self._clock.now() - self._edge.t_s <= SHARED_EDGE_S

    def _cut(self) -> None:
        """End the current stretch with an edge and start the next one there."""
        start, end = self._edge, take_edge(self._traces, self._synchronize, self._clock)
        new_part = not self._segments or self._segments[-1].name != self._label
        polls = self._poller.polls_in(start.t_s, end.t_s)
        self._segments.append(stretch(self._label, start, end, self._traces, polls, new_part))
        self._edge = end

    def _beat(self) -> None:
        if self._clock.now() - self._last_beat_s >= HEARTBEAT_S:
            self._write("beat")

    def _write(self, event: str, snapshot_id: str | None = None) -> None:
        if self._journal is None:
            return
        with self._journal_lock:
            self._last_beat_s = self._clock.now()
            counters_j = {
                trace.source.name: trace.last.energy_j
                for trace in self._gpus
                if trace.last is not None and trace.last.energy_j is not None
            }
            self._journal.append(event, counters_j, snapshot_id)
