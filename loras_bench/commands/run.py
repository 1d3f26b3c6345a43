"""`loras-bench run`: from the command line's words to planned blocks, and either a dry run or real ones."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from loras_bench.catalog import locate_data
from loras_bench.config import Experiment
from loras_bench.config_file import is_override, load_experiment
from loras_bench.errors import UserError
from loras_bench.files import check_folder
from loras_bench.models.catalog import locate_model
from loras_bench.plan import PlannedRun, plan_blocks, pretraining_of
from loras_bench.progress import Progress
from loras_bench.requests import Device
from loras_bench.results.store import RECORD_FILE
from loras_bench.runner import BlockRunner, Workers

if TYPE_CHECKING:
    from loras_bench.ranks import Ranks


def run_experiments(
    words: Sequence[str],
    seeds: str,
    results: Path,
    device: str,
    *,
    dry_run: bool,
    force: bool,
    stop_after_s: float | None,
) -> int:
    """Run or show what the command line asks for; returns the exit status.

    Under `accelerate launch` every rank comes here, and all but rank 0 follow it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _run(words, seeds, results, device, Workers(), dry_run=dry_run, force=force, stop_after_s=stop_after_s)
    from loras_bench.ranks import Ranks

    with Ranks(device) as ranks:
        if ranks.process == 0:
            return _run(words, seeds, results, device, ranks, dry_run=dry_run, force=force, stop_after_s=stop_after_s)
        ranks.follow()
        return 0


def _run(
    words: Sequence[str],
    seeds: str,
    results: Path,
    device: str,
    workers: Workers | Ranks,
    *,
    dry_run: bool,
    force: bool,
    stop_after_s: float | None,
) -> int:
    stop_at = None if stop_after_s is None else time.monotonic() + stop_after_s
    experiments = read_experiments(words)
    numbers = parse_seeds(seeds)
    check_folder(results)
    target: Device = workers.ask("look_at_device", device)
    blocks = plan_blocks(experiments, numbers, results, target)
    if dry_run:
        _show(blocks, target, workers, results)
        return 0
    if todo := [run.experiment for block in blocks for run in block if force or not run.finished]:
        workers.ask("check_experiments", todo, target)
    with Progress() as progress:
        done = sum(run.finished for block in blocks for run in block)
        if done and not force:
            progress.say(f"{done} of {sum(map(len, blocks))} runs are finished already; --force runs them again")
        outcomes = BlockRunner(results, target, workers, progress, force=force, stop_at=stop_at).run(blocks)
    failed = [outcome for outcome in outcomes if outcome.status in ("failed", "interrupted")]
    return 1 if failed else 0


def read_experiments(words: Sequence[str]) -> list[Experiment]:
    """Tell files from overrides and read the files."""
    overrides = [word for word in words if is_override(word)]
    files = [word for word in words if not is_override(word)]
    if not files:
        raise UserError("no experiment is given", "name at least one YAML file, such as configs/lora.yaml")
    experiments = [load_experiment(file, overrides) for file in files]
    for experiment in experiments:
        check_sources(experiment)
    return experiments


def check_sources(experiment: Experiment) -> None:
    """Find data and model before anything runs, so that a wrong name does not stop a comparison half-way.

    Raises:
        UserError: One of them is nowhere.
    """
    locate_data(experiment.data)
    if experiment.pretrain is not None:
        locate_data(experiment.pretrain.data)
    model = experiment.model
    if model.name is not None:
        locate_model(model.name, model.revision)
    if model.run is not None and not (Path(model.run) / RECORD_FILE).exists():
        raise UserError(f"{experiment.name}: model.run `{model.run}` holds no {RECORD_FILE}", "name a finished run")


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds `{text}` is not a list of numbers", "write --seeds 0,1,2") from None
    if len(set(seeds)) < len(seeds) or not 0 <= min(seeds) <= max(seeds) < 2**32:
        raise UserError(f"--seeds `{text}`: seeds are different numbers from 0 to 2^32 - 1", "write --seeds 0,1,2")
    return seeds


def _show(blocks: Sequence[Sequence[PlannedRun]], device: Device, workers: Workers | Ranks, results: Path) -> None:
    """Print the dry run: YAML of each arm, then each run and where it stands, then parameters and FLOPs."""
    for run in sorted(blocks[0], key=lambda run: run.experiment.name):
        resolved = run.experiment.model_dump(mode="json", exclude_none=True)
        print("---")
        print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), end="")
    print("---")
    console = Console(highlight=False, width=None if os.isatty(1) else 160)
    plan = Table("run", "state", title=f"Runs in order, on {device.name}", box=None, title_justify="left")
    for run in _with_pretraining(blocks, results, device):
        plan.add_row(run.run_id, "done" if run.finished else "to be resumed" if run.resumable else "to do")
    console.print(plan)
    facts = Table(
        "arm", "parameters", "trainable", "steps", "FLOPs, linear", "attention, executed", "allowed", "dense",
        title="Counted", box=None, title_justify="left",
    )  # fmt: skip
    for run in sorted(blocks[0], key=lambda run: run.experiment.name):
        facts.add_row(run.experiment.name, *_count(run, device, workers, results))
    console.print(facts)
    if device.kind == "cpu":
        console.print(
            " executed: by this CPU's reference, which skips nothing; GPU kernels execute little more than is allowed"
        )


def _with_pretraining(blocks: Sequence[Sequence[PlannedRun]], results: Path, device: Device) -> list[PlannedRun]:
    """All runs in order, and before the first that needs it each pretraining."""
    runs: dict[str, PlannedRun] = {}
    for run in (run for block in blocks for run in block):
        first = pretraining_of(run.experiment, results, device)
        for each in (first, run) if first else (run,):
            runs.setdefault(each.run_id, each)
    return list(runs.values())


def _count(run: PlannedRun, device: Device, workers: Workers | Ranks, results: Path) -> list[str]:
    first = pretraining_of(run.experiment, results, device)
    pretrained = first.folder if first and first.finished else None
    counted: dict[str, Any] = workers.ask("facts_of", run.experiment, run.seed, device, pretrained)
    flops, total, trainable = counted["flops"], counted["total_parameters"], counted["trainable_parameters"]
    return [
        f"{total:,}",
        f"{trainable:,} ({trainable / total:.2%})",
        f"{counted['steps']:,}",
        f"{flops.linear:.3e}",
        f"{flops.attention_executed:.3e}",
        f"{flops.attention_allowed:.3e}",
        f"{flops.attention_dense:.3e}",
    ]
