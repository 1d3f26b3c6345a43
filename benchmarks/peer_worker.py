"""Measures one arm in a process of its own: steps until they are even, then windows of steady steps."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from peer_arms import Arm, Shape
from peer_steps import Trainer, attention_kernels, make_trainer

from loras_bench.experiment import HOST_THREADS
from loras_bench.interrupts import raise_once
from loras_bench.metering.clock import SystemClock
from loras_bench.metering.environment import collect_environment
from loras_bench.metering.meter import Meter
from loras_bench.metering.sources import open_sources
from loras_bench.training import Lead
from loras_bench.worker import be_quiet

EVEN_STEPS, EVEN_VARIATION = 3, 0.05
LEAST_STEPS, LEAST_WARMUP_S, MOST_WARMUP_S = 5, 5.0, 60.0
"""Clocks, and the host of peers that wait for it, take seconds to settle."""


@dataclass(frozen=True)
class Task:
    """One arm at one shape."""

    arm: Arm
    shape: Shape
    device: str
    """`cuda` or `cpu`."""
    seconds: float
    """Of each window."""
    repeats: int
    """Windows."""


def work(task: Task, sender: Connection) -> None:
    """Entry of the process: measure, and tell the parent how it went."""
    raise_once()
    be_quiet()
    begun = time.monotonic()
    try:
        found = {"status": "completed", "reason": None, **_measure(task, begun)}
    except Exception as error:  # whatever stops an arm is a finding about it
        text = f"{type(error).__name__}: {error}"
        memory = isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text.lower()
        found = {"status": "out of memory" if memory else "failed", "reason": text.strip().partition("\n")[0]}
        if not memory:
            traceback.print_exc()
    with suppress(OSError):  # the parent may be gone
        sender.send({**found, "wall_s": time.monotonic() - begun, "environment": collect_environment()})


def _measure(task: Task, begun: float) -> dict[str, Any]:
    cuda = task.device == "cuda"
    device = torch.device(task.device, 0) if cuda else torch.device(task.device)
    if cuda:
        torch.set_num_threads(HOST_THREADS)
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else (lambda: None)
    clock = SystemClock()
    with attention_kernels(task.arm):
        trainer = make_trainer(task.arm, task.shape, device)
        first_loss = _finite(trainer.step(0))
        built_s = time.monotonic() - begun
        steps = _warm_up(trainer, synchronize, LEAST_WARMUP_S if cuda else 0.0)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        windows = []
        with Meter(open_sources([0] if cuda else [], clock), synchronize=synchronize, clock=clock) as meter:
            for number in range(task.repeats):
                name = f"window {number}"
                with meter.phase(name):
                    taken, seconds = _window(trainer, task.seconds, steps, synchronize)
                steps += taken
                windows.append(_summary(meter, name, taken * task.shape.tokens_per_step, seconds))
        last_loss = _finite(trainer.step(steps))
    return {
        "windows": windows,
        **_medians(windows),
        "peak_bytes": trainer.peak_bytes() if cuda else None,
        "gpu": str(torch.cuda.get_device_properties(0).uuid) if cuda else None,
        "first_loss": first_loss,
        "last_loss": last_loss,
        "until_first_step_s": built_s,
        "steps": steps,
        "facts": trainer.facts,
    }


def _finite(loss: torch.Tensor) -> float:
    """The loss; steps on NaN are not worth measuring."""
    value = float(loss)
    if not math.isfinite(value):
        raise RuntimeError(f"the loss is {value}")
    return value


def _warm_up(trainer: Trainer, synchronize: Callable[[], None], least_s: float) -> int:
    """Steps for some seconds, and until the last three took equally long; returns the number of the next step."""
    times_s: list[float] = []
    started_s = time.monotonic()
    while (spent_s := time.monotonic() - started_s) < MOST_WARMUP_S:
        recent, enough = times_s[-EVEN_STEPS:], len(times_s) >= LEAST_STEPS and spent_s >= least_s
        if enough and statistics.pstdev(recent) < EVEN_VARIATION * statistics.fmean(recent):
            break
        begun = time.monotonic()
        trainer.step(1 + len(times_s))
        synchronize()
        times_s.append(time.monotonic() - begun)
    return 1 + len(times_s)


def _window(trainer: Trainer, seconds: float, first: int, synchronize: Callable[[], None]) -> tuple[int, float]:
    """Steps for some seconds; returns their number and how long they took."""
    begun, taken = time.monotonic(), 0
    lead = Lead()
    while time.monotonic() - begun < seconds:
        loss = trainer.step(first + taken)
        taken += 1
        if loss.is_cuda:  # the host must not run ahead of the clock
            lead.step()
    synchronize()
    return taken, time.monotonic() - begun


def _summary(meter: Meter, name: str, tokens: int, seconds: float) -> dict[str, Any]:
    """One window; joules are between two ticks of the counter, the last of which follows the work."""
    phase = meter.phases()[name]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "energy_j": phase.energy_j,
        "energy_j_per_mtoken": None if phase.energy_j is None else phase.energy_j / tokens * 1e6,
        "energy_source": phase.source,
        "power_w": phase.mean_power_w,
        "sm_clock_mhz": None if phase.sm_clock_mhz is None else phase.sm_clock_mhz.mean,
        "temperature_c": None if phase.temperature_c is None else phase.temperature_c.max,
        "flags": phase.flags,
    }


def _medians(windows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Over the windows; None where one of them has no value."""
    medians: dict[str, float | None] = {}
    for name in ("tokens_per_s", "energy_j_per_mtoken", "power_w"):
        values = [window[name] for window in windows]
        medians[name] = None if None in values else statistics.median(values)
    return medians
