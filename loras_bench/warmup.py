"""Steps that are undone: warm-up before the `train` phase, and the steady phase after evaluation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from itertools import cycle

import torch

from loras_bench.build import Build
from loras_bench.distributed import agreed
from loras_bench.graphed import shapes_of
from loras_bench.training import plan_batches, regime_of, steps_that_differ

SETTLED_STEPS = 10
SETTLED_VARIATION = 0.05
MAX_STEPS = 100
MAX_SECONDS = 60.0
CPU_STEPS = 3
"""On a CPU nothing is compiled or tuned unless `compile` is asked for: these pay the first allocations."""


def warm_up(build: Build, say: Callable[[str], None]) -> int:
    """Real steps on a snapshot that is restored, until nothing compiles and the last ten step times agree to 5 %.

    Each distinct batch shape of the plan runs at least once as the first and as a later part of a step, where it comes
    as such, and in each regime, so that none is compiled or captured inside `train`.

    Returns:
        Number of steps taken.
    """
    snapshot = build.state.snapshot()
    steps, settling = list(_shapes(build).values()), _alike(build, 0)
    cuda = build.accelerator.device.type == "cuda"
    least = len(steps) + (SETTLED_STEPS if cuda else CPU_STEPS)
    times: list[float] = []
    started, taken, compiled = time.monotonic(), 0, -1
    while True:
        begun = time.monotonic()
        build.loop.step(steps[taken] if taken < len(steps) else settling[taken % len(settling)])
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
    """Repeat the run's own steps for some seconds and discard their updates; returns the number of tokens.

    Only those of the last step's regime: what the steps of a long run are.
    """
    snapshot = build.state.snapshot()
    started, tokens = time.monotonic(), 0
    steps = cycle(_alike(build, build.plan.steps - 1))
    while agreed(time.monotonic() - started < seconds):
        build.loop.step(step := next(steps))
        tokens += build.data.real_tokens("train", build.plan.indices(step))
        say(f"steady, {time.monotonic() - started:.0f} of {seconds:.0f} s")
    _synchronize(build)
    build.state.restore(snapshot)
    return tokens


def _shapes(build: Build) -> dict[Hashable, int]:
    """For each batch shape of the plan, and place in a step that counts, and regime, a step that has it."""
    found: dict[Hashable, int] = {}
    processes, methods = build.accelerator.num_processes, build.methods
    for step in steps_that_differ(build.data, build.plan, methods):
        for rank in range(processes):  # of all, so that all take the same steps
            for number, batch in enumerate(plan_batches(build.data, build.plan, step, rank, processes, methods)):
                found.setdefault((regime_of(methods, step), shapes_of(batch), number == 0), step)
    return found


def _alike(build: Build, step: int) -> list[int]:
    """The steps of the plan in the regime of this one."""
    regime = regime_of(build.methods, step)
    return [other for other in range(build.plan.steps) if regime_of(build.methods, other) == regime]


def _synchronize(build: Build) -> None:
    if build.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _compilations() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
