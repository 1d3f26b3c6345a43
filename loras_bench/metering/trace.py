"""What the sources said over time: power samples and their integral, the counter's resets, the state each second."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence

from loras_bench.metering.clock import Clock
from loras_bench.metering.sources import DeviceState, EnergySource, Reading, SourceError

POLL_INTERVAL_S = 0.05
STATE_INTERVAL_S = 1.0
HOLE_S = 0.5
"""Power samples further apart than this leave a hole: nobody knows what the power did meanwhile."""
MIN_COVERED = 0.9
"""An integral is given only if holes leave at least this share of its window."""


def _moment(state: DeviceState) -> float:
    return state.t_s


class Trace:
    """The readings of one source, in time order; written by the poller's thread and by the phase edges."""

    def __init__(self, source: EnergySource) -> None:
        self.source = source
        self.times_s = array("d")
        self.power_w = array("d")
        self.states: list[DeviceState] = []
        self.resets_s: list[float] = []
        self.last: Reading | None = None
        self.error: str | None = None
        self._integral_j = array("d")
        self._holes_s: list[tuple[float, float]] = []
        self._last_energy_j: float | None = None
        # Reading and recording are one step: else a slower thread would record an older counter value as a reset.
        self._lock = threading.Lock()

    def read(self, with_power: bool = True) -> Reading | None:
        """Read the source and record what it said; None (and `error`) if it failed."""
        with self._lock:
            try:
                reading = self.source.read(with_power)
            except SourceError as error:
                self.error = str(error)
                return None
            self._record(reading)
            if with_power:
                self.last = reading
            return reading

    def read_state(self) -> None:
        """Record temperature, clocks and neighbours, if the source has them."""
        state = self.source.state()
        if state is not None:
            with self._lock:
                insort(self.states, state, key=_moment)

    def _record(self, reading: Reading) -> None:
        if reading.energy_j is not None:
            if self._last_energy_j is not None and reading.energy_j < self._last_energy_j:
                self.resets_s.append(reading.t_s)
            self._last_energy_j = reading.energy_j
        if reading.power_w is None:
            return
        integral_j = 0.0
        if self.times_s:
            gap_s = reading.t_s - self.times_s[-1]
            integral_j = self._integral_j[-1] + gap_s * (self.power_w[-1] + reading.power_w) / 2
            if gap_s > HOLE_S:
                self._holes_s.append((self.times_s[-1], reading.t_s))
        self.times_s.append(reading.t_s)
        self.power_w.append(reading.power_w)
        self._integral_j.append(integral_j)

    def reset_in(self, start_s: float, end_s: float) -> bool:
        """Whether the counter went backwards in the window."""
        return any(start_s < t_s <= end_s for t_s in self.resets_s)

    def states_in(self, start_s: float, end_s: float) -> list[DeviceState]:
        """States read in (start, end]."""
        with self._lock:
            first = bisect_right(self.states, start_s, key=_moment)
            return self.states[first : bisect_right(self.states, end_s, key=_moment)]

    def integral_j(self, start_s: float, end_s: float) -> float | None:
        """Joules by the trapezoid rule over the power samples, interpolated at both ends of the window.

        Returns:
            None if there is no power reading, or holes take more than a tenth of the window.
        """
        with self._lock:
            if not self.times_s:
                return None
            if end_s <= start_s:
                return 0.0
            holes = [(start_s, self.times_s[0]), *self._holes_s, (self.times_s[-1], end_s)]
            holes_s = sum(max(0.0, min(end_s, b) - max(start_s, a)) for a, b in holes if b - a > HOLE_S)
            if 1 - holes_s / (end_s - start_s) < MIN_COVERED:
                return None
            return self._integral_to(end_s) - self._integral_to(start_s)

    def _integral_to(self, t_s: float) -> float:
        after = bisect_left(self.times_s, t_s)
        if after == 0:
            return (t_s - self.times_s[0]) * self.power_w[0]
        before = after - 1
        elapsed_s = t_s - self.times_s[before]
        if after == len(self.times_s):
            return self._integral_j[before] + elapsed_s * self.power_w[before]
        slope = (self.power_w[after] - self.power_w[before]) / (self.times_s[after] - self.times_s[before])
        return self._integral_j[before] + elapsed_s * (self.power_w[before] + slope * elapsed_s / 2)


class Poller:
    """Reads every trace each 50 ms, GPU states and the CPU counter each second, in the background."""

    def __init__(self, traces: Sequence[Trace], clock: Clock, also: Callable[[], None] = lambda: None) -> None:
        self.polls_s = array("d")
        self._traces = traces
        self._clock = clock
        self._also = also
        self._last_state_s = float("-inf")
        self._stop: Callable[[], None] | None = None

    def start(self) -> None:
        self._stop = self._clock.every(POLL_INTERVAL_S, self.poll)

    def stop(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None

    def poll(self) -> None:
        """One round."""
        now_s = self._clock.now()
        self.polls_s.append(now_s)
        state_due = now_s - self._last_state_s >= STATE_INTERVAL_S
        if state_due:
            self._last_state_s = now_s
        for trace in self._traces:
            if trace.source.kind == "gpu" or state_due:
                trace.read()
            if state_due:
                trace.read_state()
        self._also()

    def polls_in(self, start_s: float, end_s: float) -> int:
        """Rounds begun in (start, end]."""
        return bisect_right(self.polls_s, end_s) - bisect_right(self.polls_s, start_s)
