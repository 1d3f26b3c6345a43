"""`loras-bench savings`: what the zeros of trained models save, on disk, in FLOPs, milliseconds and joules."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loras_bench.commands.kernels import _check_file
from loras_bench.trained import load_trained

if TYPE_CHECKING:
    from loras_bench.models.saved import PreviousRun
    from loras_bench.pruning.savings import SavingsRunner


def measure_savings(
    runs: Sequence[Path],
    batch: int,
    length: int,
    seconds: float,
    out: Path | None,
    device: str,
    json_file: Path | None,
) -> int:
    """Print a table for each run; returns the exit status.

    Raises:
        UserError: A run is not finished or kept no weights, or something else that was asked for cannot be done.
    """
    if json_file is not None:
        _check_file(json_file)
    from loras_bench.benchmarking.bench import CudaBench
    from loras_bench.models.saved import open_run
    from loras_bench.pruning.savings import HostBench, SavingsRunner
    from loras_bench.worker import be_quiet, look_at_device

    be_quiet()
    target, opened = look_at_device(device), [open_run(folder) for folder in runs]
    with CudaBench(seconds) if target.kind == "cuda" else nullcontext(HostBench()) as bench:
        _measure(opened, SavingsRunner(bench, batch, length), target.name, out, json_file)
    return 0


def _measure(
    runs: Sequence[PreviousRun], runner: SavingsRunner, device: str, out: Path | None, json_file: Path | None
) -> None:
    from loras_bench.benchmarking.report import write_json
    from loras_bench.metering.environment import collect_environment
    from loras_bench.results.savings import PROTOCOL, RunSavings, print_savings

    found: list[RunSavings] = []
    facts = {"protocol": PROTOCOL, "device": device, "batch": runner.batch, "length": runner.length}
    facts["environment"] = collect_environment()
    for run in runs:
        run_id, loaded = run.record.run_id, load_trained(run)
        forms = runner.run(loaded, out and out / run_id, partial(print, run_id, file=sys.stderr))
        found.append(RunSavings(run_id, loaded.label, forms))
        print_savings(found[-1], runner.batch, runner.length, device)
        if json_file is not None:  # after each run: what is finished survives a kill
            write_json(json_file, facts | {"runs": [one.to_json() for one in found]})
    print(PROTOCOL)
