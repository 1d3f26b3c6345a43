"""`loras-bench savings`: what the zeros of trained models save, on disk, in FLOPs, milliseconds and joules."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loras_bench.errors import UserError
from loras_bench.files import check_file, check_folder
from loras_bench.trained import load_trained, open_trained

if TYPE_CHECKING:
    from loras_bench.models.saved import PreviousRun
    from loras_bench.pruning.savings import SavingsRunner
    from loras_bench.results.savings import RunSavings

Format = Literal["md", "csv"]


def measure_savings(
    runs: Sequence[Path],
    batch: int,
    length: int,
    seconds: float,
    out: Path | None,
    form: Format,
    device: str,
    json_file: Path | None,
    *,
    force: bool,
) -> int:
    """Print a table for each run and one over all; returns the exit status, 1 where a run could not be measured.

    Raises:
        UserError: A run is not finished or kept no weights, or what was asked for cannot be done with any of them.
    """
    if json_file is not None:
        check_file(json_file)
    if out is not None:
        check_folder(out, "--out")
    from loras_bench.benchmarking.bench import CudaBench
    from loras_bench.pruning.savings import HostBench, SavingsRunner
    from loras_bench.worker import be_quiet, look_at_device

    be_quiet()
    target = look_at_device(device)
    opened = list({run.folder.resolve(): run for run in map(open_trained, runs)}.values())
    if out is not None:
        _make_room(out, opened, force=force)
    with CudaBench(seconds) if target.kind == "cuda" else nullcontext(HostBench()) as bench:
        found = _measure(opened, SavingsRunner(bench, batch, length), target.name, out, form, json_file)
    return 1 if any(run.refused for run in found) else 0


def _make_room(out: Path, runs: Sequence[PreviousRun], *, force: bool) -> None:
    """Refuse to mix or replace models of other runs; with `force` take away what an earlier call wrote."""
    folders = [out / run.record.run_id for run in runs]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise UserError(f"two runs would be kept in {twice}", "call once for each, with another --out")
    if (earlier := [folder for folder in folders if folder.exists()]) and not force:
        raise UserError(f"{earlier[0]} exists", "give another --out, or --force: it is replaced")
    for folder in earlier:
        shutil.rmtree(folder / "exported", ignore_errors=True)
        (folder / "packed.safetensors").unlink(missing_ok=True)


def _measure(
    runs: Sequence[PreviousRun],
    runner: SavingsRunner,
    device: str,
    out: Path | None,
    form: Format,
    json_file: Path | None,
) -> list[RunSavings]:
    from loras_bench.benchmarking.report import write_json
    from loras_bench.metering.environment import collect_environment
    from loras_bench.results.savings import PROTOCOL, as_csv, comparison, forms_table

    found: list[RunSavings] = []
    facts = {"protocol": PROTOCOL, "device": device, "batch": runner.batch, "length": runner.length}
    facts["environment"] = collect_environment()
    for number, run in enumerate(runs, start=1):
        found.append(_forms_of(run, runner, out, f"{number} of {len(runs)}: {run.record.run_id}"))
        if len(runs) == 1 and found[0].refused:  # one of several does not hold up the others
            raise found[0].refused
        if form == "md":
            print(forms_table(found[-1], runner.batch, runner.length, device), end="\n\n")
        if json_file is not None:  # after each run: what is finished survives a kill
            write_json(json_file, facts | {"runs": [one.to_json() for one in found]})
    if form == "csv":
        print(as_csv(found, runner.batch, runner.length, device), end="")
        return found
    if len(found) > 1:
        print(comparison(found), end="\n\n")
    print(PROTOCOL)
    return found


def _forms_of(run: PreviousRun, runner: SavingsRunner, out: Path | None, progress: str) -> RunSavings:
    """What was measured of a run, or why it could not be."""
    from loras_bench.results.savings import RunSavings

    record = run.record
    try:
        loaded = load_trained(run)
        kept = out and out / record.run_id
        forms = runner.run(loaded, kept, lambda name: print(f"{progress}, {name}", file=sys.stderr))
    except UserError as error:
        return RunSavings(record, record.model, refused=error)
    return RunSavings(record, loaded.label, forms)
