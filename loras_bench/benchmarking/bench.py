"""Times, memory and joules of one call on a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Protocol

import torch

from loras_bench.errors import ConfigError
from loras_bench.graphed import Recorder
from loras_bench.metering.clock import SystemClock
from loras_bench.metering.meter import Meter
from loras_bench.metering.sources import open_sources

Call = Callable[[], object]
SAMPLES = 30
"""At least so many timed calls stand behind a median."""
LEAST_MS = 100.0
CHUNK_MS = 50.0
"""Calls that are queued at once while joules are measured: long enough that waiting between chunks does not count."""


class Quartiles(NamedTuple):
    """Milliseconds of a call."""

    low_ms: float
    median_ms: float
    high_ms: float


class Drawn(NamedTuple):
    """What a call costs when it is repeated without a pause; None where there is no counter."""

    energy_j: float | None
    power_w: float | None


class Bench(Protocol):
    """Where calls are measured."""

    @property
    def device(self) -> torch.device:
        """Of the inputs."""
        ...

    def captured(self, call: Call) -> Call | None:
        """Something that does the same without the host's time; None if there is no such thing."""
        ...

    def times(self, call: Call, thorough: bool = True) -> Quartiles:
        """How long it takes; a first look is enough where variants are compared."""
        ...

    def peak_bytes(self, call: Call) -> int:
        """Memory that it needs beyond its inputs."""
        ...

    def energy(self, call: Call, call_ms: float) -> Drawn | None:
        """Joules of one call; None if they were not asked for."""
        ...

    def release(self) -> None:
        """Give freed memory back, so that the next call starts as this one did."""
        ...


class CudaBench:
    """The current GPU; use as a context manager.

    Args:
        seconds: Length of the loop for joules; 0 leaves them out.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._meter: Meter | None = None
        self._loops = 0
        self._open = ExitStack()

    def __enter__(self) -> CudaBench:
        if self.seconds:
            clock = SystemClock()
            sources = open_sources([self.device.index], clock)
            self._meter = self._open.enter_context(Meter(sources, synchronize=torch.cuda.synchronize, clock=clock))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def captured(self, call: Call) -> Call | None:
        """The call as a CUDA graph, as a captured training step runs it; None where it cannot be captured."""
        recorder = Recorder(self.device)

        def piece() -> None:
            call()

        recorder.rehearse(piece)
        try:
            return recorder.record(piece)
        except ConfigError:
            return None

    def times(self, call: Call, thorough: bool = True) -> Quartiles:
        """Quartiles of at least 30 calls, the L2 cache emptied before each."""
        from triton.testing import do_bench

        def quartiles(warmup_ms: float, total_ms: float) -> Quartiles:
            return Quartiles(*do_bench(call, warmup=warmup_ms, rep=total_ms, quantiles=[0.25, 0.5, 0.75]))

        first = quartiles(10, 20)
        return quartiles(25, max(LEAST_MS, 1.1 * SAMPLES * first.median_ms)) if thorough else first

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def energy(self, call: Call, call_ms: float) -> Drawn | None:
        """Calls back to back for some seconds, between two ticks of the GPU's energy counter."""
        if self._meter is None:
            return None
        self._loops += 1
        name = f"loop {self._loops}"
        chunk, calls = max(1, round(CHUNK_MS / call_ms)), 0
        with self._meter.phase(name):
            started = time.monotonic()
            while time.monotonic() - started < self.seconds:
                for _ in range(chunk):
                    call()
                calls += chunk
                torch.cuda.synchronize()
        phase = self._meter.phases()[name]
        return Drawn(None if phase.energy_j is None else phase.energy_j / calls, phase.mean_power_w)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
