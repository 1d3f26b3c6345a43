"""Steps that are undone: warm-up before the `train` phase, and the steady phase after evaluation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable

import torch

from loras_bench.build import Build
from loras_bench.distributed import agreed
from loras_bench.graphed import shapes_of
from loras_bench.training import plan_batches

SETTLED_STEPS = 10
SETTLED_VARIATION = 0.05
MAX_STEPS = 100
MAX_SECONDS = 60.0
CPU_STEPS = 3
"""On a CPU nothing is compiled or tuned unless `compile` is asked for: these pay the first allocations."""


def warm_up(build: Build, say: Callable[[str], None]) -> int:
    """Real steps on a snapshot that is restored, until nothing compiles and the last ten step times agree to 5 %.

    Each distinct batch shape of the plan runs at least once as the first and as a later part of a step, where it comes
    as such, so that none is compiled or captured inside `train`.

    Returns:
        Number of steps taken.
    """
    snapshot = build.state.snapshot()
    steps = list(_shapes(build).values())
    cuda = build.accelerator.device.type == "cuda"
    least = len(steps) + (SETTLED_STEPS if cuda else CPU_STEPS)
    times: list[float] = []
    started, taken, compiled = time.monotonic(), 0, -1
    while True:
        begun = time.monotonic()
        build.loop.step(steps[taken] if taken < len(steps) else taken % build.plan.steps)
        _synchronize(build)
        times.append(time.monotonic() - begun)
        taken += 1
        say(f"warming up, step {taken}")
        fresh, compiled = compiled != _compilations(), _compilations()
        recent = times[-SETTLED_STEPS:]
        settled = not cuda or statistics.pstdev(recent) < SETTLED_VARIATION * statistics.fmean(recent)
        late = taken >= MAX_STEPS or time.monotonic() - started > MAX_SECONDS
        if taken >= least and agreed(late or (not fresh and settled)):
            break
    build.state.restore(snapshot)
    return taken


def steady_steps(build: Build, seconds: float, say: Callable[[str], None]) -> int:
    """Repeat the run's own steps for some seconds and discard their updates; returns the number of tokens."""
    snapshot = build.state.snapshot()
    started, step, tokens = time.monotonic(), 0, 0
    while agreed(time.monotonic() - started < seconds):
        build.loop.step(step % build.plan.steps)
        tokens += build.data.real_tokens("train", build.plan.indices(step % build.plan.steps))
        step += 1
        say(f"steady, {time.monotonic() - started:.0f} of {seconds:.0f} s")
    _synchronize(build)
    build.state.restore(snapshot)
    return tokens


def _shapes(build: Build) -> dict[Hashable, int]:
    """For each batch shape of the plan, and place in a step that counts, a step that has it.

    Blocks of language modelling all have one shape.
    """
    if build.data.task == "language_modeling":
        return {(): 0}
    found: dict[Hashable, int] = {}
    processes = build.accelerator.num_processes
    for step in range(build.plan.steps):
        for rank in range(processes):  # of all, so that all take the same steps
            for number, batch in enumerate(plan_batches(build.data, build.plan, step, rank, processes)):
                found.setdefault((shapes_of(batch), number == 0), step)
    return found


def _synchronize(build: Build) -> None:
    if build.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _compilations() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
