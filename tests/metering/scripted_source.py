"""A clock and a GPU that follow a script, so that tests measure hours of known power in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loras_bench.metering.sources import DeviceState, PowerKind, Reading, SourceError, SourceKind


class FakeClock:
    """Time passes only in `sleep`; what was asked for `every` interval is called on the way, `slowdown` times late."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self.t_s = 1000.0
        self._slowdown = slowdown
        self._jobs: list[list] = []

    def now(self) -> float:
        return self.t_s

    def sleep(self, seconds: float) -> None:
        end_s = self.t_s + seconds
        while self._jobs and (job := min(self._jobs, key=lambda job: job[0]))[0] <= end_s:
            self.t_s = job[0]
            job[0] += job[1]
            job[2]()
        self.t_s = end_s

    def every(self, interval_s: float, callback: Callable[[], None]) -> Callable[[], None]:
        interval_s *= self._slowdown
        job = [self.t_s + interval_s, interval_s, callback]
        self._jobs.append(job)
        return lambda: self._jobs.remove(job)


class ScriptedGpu:
    """A GPU whose true power is `power_w(t)` with t in seconds since its making.

    Each `tick_s` its sensor averages the first `slice_s` of the period that ended, adds that x `tick_s` to the counter
    and shows it as instant power: with `slice_s < tick_s` it is the part-time sensor of an A100 or H100.
    """

    kind: SourceKind = "gpu"

    def __init__(
        self,
        clock: FakeClock,
        power_w: Callable[[float], float] = lambda t_s: 600.0,
        *,
        name: str = "GPU-a",
        tick_s: float = 0.1,
        slice_s: float = 0.1,
        tick_offset_s: float = 0.0,
        has_counter: bool = True,
        power_kind: PowerKind | None = "instant",
        gain: float = 1.0,
        resets_s: Sequence[float] = (),
        fails: Callable[[float], bool] = lambda t_s: False,
        state: Callable[[float], dict] = lambda t_s: {},
    ) -> None:
        self.name, self.power_kind = name, power_kind
        self.flags = {} if has_counter else {"counter_missing": f"{name} has no energy counter"}
        self._clock, self._power_w, self._state, self._fails = clock, power_w, state, fails
        self._tick_s, self._slice_s, self._has_counter, self._gain = tick_s, slice_s, has_counter, gain
        self._resets_s = sorted(resets_s)
        self._start_s = clock.now() - tick_offset_s
        self._slices_w: list[float] = []
        self._sums_j = [0.0]

    def _ticks(self, t_s: float) -> int:
        ticks = int(t_s / self._tick_s + 1e-6)
        while len(self._slices_w) < ticks:
            begin_s = len(self._slices_w) * self._tick_s
            moments = [begin_s + self._slice_s * (i + 0.5) / 20 for i in range(20)]
            self._slices_w.append(sum(map(self._power_w, moments)) / 20)
            self._sums_j.append(self._sums_j[-1] + self._slices_w[-1] * self._tick_s)
        return ticks

    def read(self, with_power: bool = True) -> Reading:
        t_s = self._clock.now() - self._start_s
        if self._fails(t_s):
            raise SourceError(f"{self.name} fell off the bus")
        ticks = self._ticks(t_s)
        past = [reset_s for reset_s in self._resets_s if reset_s <= t_s]
        energy_j = 5000.0 + self._sums_j[ticks]
        if past:
            energy_j = self._sums_j[ticks] - self._sums_j[self._ticks(past[-1])]
        power_w = self._slices_w[ticks - 1] if ticks else self._power_w(0.0)
        return Reading(
            self._clock.now(),
            energy_j if self._has_counter else None,
            power_w * self._gain if with_power and self.power_kind else None,
        )

    def state(self) -> DeviceState:
        return DeviceState(self._clock.now(), **self._state(self._clock.now() - self._start_s))


class ScriptedCpu:
    """A RAPL that draws a constant power, refreshed every millisecond."""

    kind: SourceKind = "cpu"
    name = "rapl"
    power_kind: PowerKind | None = None

    def __init__(self, clock: FakeClock, power_w: float) -> None:
        self.flags: dict[str, str] = {}
        self._clock, self._power_w = clock, power_w

    def read(self, with_power: bool = True) -> Reading:
        now_s = self._clock.now()
        return Reading(now_s, round(now_s, 3) * self._power_w, None)

    def state(self) -> None:
        return None
