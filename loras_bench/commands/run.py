"""`loras-bench run`: from the command line's words to planned blocks, and either a dry run or real ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from loras_bench.config import Experiment
from loras_bench.config_file import is_override, load_experiment
from loras_bench.errors import UserError
from loras_bench.plan import PlannedRun, plan_blocks, pretraining_of
from loras_bench.progress import Progress
from loras_bench.requests import Device
from loras_bench.runner import BlockRunner, Workers


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
    """Run or show what the command line asks for; returns the exit status."""
    experiments = read_experiments(words)
    numbers = parse_seeds(seeds)
    if results.exists() and not results.is_dir():
        raise UserError(f"--results {results} is a file", "give a folder")
    workers = Workers()
    target: Device = workers.ask("look_at_device", device)
    blocks = plan_blocks(experiments, numbers, results, target)
    if dry_run:
        _show(blocks, target, workers, results)
        return 0
    with Progress() as progress:
        done = sum(run.finished for block in blocks for run in block)
        if done and not force:
            progress.say(f"{done} of {sum(map(len, blocks))} runs are finished already; --force runs them again")
        outcomes = BlockRunner(results, target, workers, progress, force=force, stop_after_s=stop_after_s).run(blocks)
    failed = [outcome for outcome in outcomes if outcome.status in ("failed", "interrupted")]
    return 1 if failed else 0


def read_experiments(words: Sequence[str]) -> list[Experiment]:
    """Tell files from overrides and read the files."""
    overrides = [word for word in words if is_override(word)]
    files = [word for word in words if not is_override(word)]
    if not files:
        raise UserError("no experiment is given", "name at least one YAML file, such as configs/lora.yaml")
    return [load_experiment(file, overrides) for file in files]


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds `{text}` is not a list of numbers", "write --seeds 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds `{text}`: seeds are different numbers from 0 up", "write --seeds 0,1,2")
    return seeds


def _show(blocks: Sequence[Sequence[PlannedRun]], device: Device, workers: Workers, results: Path) -> None:
    """Print the dry run: YAML of each arm, then each run and where it stands, then parameters and FLOPs."""
    for run in sorted(blocks[0], key=lambda run: run.experiment.name):
        resolved = run.experiment.model_dump(mode="json", exclude_none=True)
        print("---")
        print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), end="")
    print("---")
    console = Console(highlight=False, width=None if os.isatty(1) else 160)
    plan = Table("run", "state", title=f"Runs in order, on {device.name}", box=None, title_justify="left")
    for block in blocks:
        for run in block:
            plan.add_row(run.run_id, "done" if run.finished else "to be resumed" if run.resumable else "to do")
    console.print(plan)
    facts = Table(
        "arm", "parameters", "trainable", "steps", "FLOPs, linear", "attention, executed", "allowed", "dense",
        title="Counted", box=None, title_justify="left",
    )  # fmt: skip
    for run in sorted(blocks[0], key=lambda run: run.experiment.name):
        facts.add_row(run.experiment.name, *_count(run, device, workers, results))
    console.print(facts)


def _count(run: PlannedRun, device: Device, workers: Workers, results: Path) -> list[str]:
    first = pretraining_of(run.experiment, results, device)
    if first is not None and not first.finished:
        return ["counted after pretraining"] + [""] * 6
    counted: dict[str, Any] = workers.ask("facts_of", run.experiment, run.seed, device, first.folder if first else None)
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
