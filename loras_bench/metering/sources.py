"""Where joules come from: the protocol of an energy source, the source of a machine that has none, and opening them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal, Protocol

from loras_bench.metering.clock import Clock

SourceKind = Literal["gpu", "cpu"]
PowerKind = Literal["instant", "average"]


class SourceError(Exception):
    """A source cannot be opened or read; the message says why, in words for a table's footnote."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a source. A value that the source does not have is None, never 0."""

    t_s: float
    """Monotonic seconds."""
    energy_j: float | None
    """Joules since some fixed moment in the past."""
    power_w: float | None


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What a GPU says about itself; what it does not say is None."""

    t_s: float
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_limit_w: float | None = None
    utilization_percent: float | None = None
    clock_event_reasons: frozenset[str] = frozenset()
    """Why clocks are below the maximum: `sw_power_cap`, `hw_thermal_slowdown`, ... (NVML's names in snake case)."""
    foreign_pids: tuple[int, ...] = ()
    """Processes on the GPU that are not of this run."""


class EnergySource(Protocol):
    """One GPU, or the CPU packages of the machine."""

    @property
    def name(self) -> str:
        """The GPU's UUID; `rapl` for CPU packages."""

    @property
    def kind(self) -> SourceKind:
        """Whether its joules are GPU joules (the headline) or CPU joules (a column of their own)."""

    @property
    def power_kind(self) -> PowerKind | None:
        """What `power_w` means: instant draw, a moving average, or None where there is no power reading."""

    @property
    def flags(self) -> dict[str, str]:
        """What holds of the source for the whole run (`counter_missing`, `mig`, `vgpu`), with the reason."""

    def read(self, with_power: bool = True) -> Reading:
        """Read counter and power; `with_power=False` reads the counter alone, for the wait for its tick.

        Raises:
            SourceError: The driver or the file system refused.
        """

    def state(self) -> DeviceState | None:
        """Temperature, clocks and neighbours; None for a source that has no such thing."""


@dataclass(frozen=True)
class NullSource:
    """Stands in for an instrument that is not there; every reading is None and `reason` says why."""

    kind: SourceKind
    reason: str
    name: str = "none"
    power_kind: None = None
    flags: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flags", {"counter_missing": self.reason})

    def read(self, with_power: bool = True) -> Reading:
        return Reading(time.monotonic(), None, None)

    def state(self) -> None:
        return None


def open_sources(devices: Sequence[int | str], clock: Clock, powercap: Path | None = None) -> list[EnergySource]:
    """Open the meters of a job: one source for each GPU and one for the CPU packages; never fails a run.

    Args:
        devices: CUDA ordinals (after `CUDA_VISIBLE_DEVICES`) or GPU UUIDs of all GPUs of the job; empty on a CPU.
        clock: Time stamps of the readings.
        powercap: Root of the kernel's powercap tree; default `/sys/class/powercap`.

    Returns:
        GPU sources in the order of `devices` (one `NullSource` where there is none), then the CPU source.
    """
    from loras_bench.metering.nvml import NvmlSource
    from loras_bench.metering.rapl import POWERCAP, RaplSource

    sources: list[EnergySource] = []
    for device in devices:
        try:
            sources.append(NvmlSource(device, clock))
        except SourceError as error:
            sources.append(NullSource("gpu", str(error), name=f"cuda:{device}"))
    if not devices:
        sources.append(NullSource("gpu", "the run uses no GPU"))
    try:
        sources.append(RaplSource(clock, powercap or POWERCAP))
    except SourceError as error:
        sources.append(NullSource("cpu", str(error)))
    return sources


def counter_period_s(source: EnergySource, clock: Clock, watch_s: float = 1.0) -> float | None:
    """Measure how often the source's energy counter changes (about 0.1 s on A100 and H100).

    Returns:
        Median seconds between changes; None if the counter is missing or changed less than twice in `watch_s`.

    Raises:
        SourceError: A read failed.
    """
    ticks_s: list[float] = []
    last = source.read(with_power=False)
    end_s = clock.now() + watch_s
    while clock.now() < end_s and last.energy_j is not None:
        clock.sleep(0.0005)
        reading = source.read(with_power=False)
        if reading.energy_j != last.energy_j:
            ticks_s.append(reading.t_s)
        last = reading
    gaps_s = [later - earlier for earlier, later in pairwise(ticks_s)]
    return median(gaps_s) if gaps_s else None
