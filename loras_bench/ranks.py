"""Runs under `accelerate launch -m loras_bench run ...`: one process a GPU, all on this machine, data parallel.

Nothing is forked. Rank 0 plans and tells the others each run, which all then execute together; only rank 0 prints,
measures, locks and writes. What depends on its clock or its readings it decides for all (`distributed.agreed`).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from loras_bench import worker
from loras_bench.distributed import agreed, join, meet
from loras_bench.errors import UserError
from loras_bench.experiment import Run
from loras_bench.interrupts import raise_once
from loras_bench.plan import claim_run
from loras_bench.progress import Progress
from loras_bench.requests import Device, RunRequest
from loras_bench.results.store import RunLockedError
from loras_bench.runner import Outcome

PATIENCE = timedelta(hours=1)
PATIENCE_AFTER_FAILURE = timedelta(seconds=60)
"""Errors in the data or a loss that is no number stop all ranks at once; after another one the rest wait in vain."""


class Ranks:
    """Takes the place of `Workers` on rank 0; the other ranks `follow`. Use as a context manager.

    Args:
        device: `auto`, `cuda` or `cpu`.

    Raises:
        UserError: The job spans machines or uses more than data parallelism, or has more processes than GPUs.
    """

    def __init__(self, device: str) -> None:
        self.kind = worker.look_at_device("cpu" if _launched_with("CPU") else device).kind
        self.process, self.processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        _check_launch(self.kind, self.processes)
        worker.be_quiet()
        raise_once()  # the launcher ends a job by SIGTERM
        self.group = join(self.kind)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Rank 0 dismisses the others; after any other error than the user's the launcher ends them."""
        if self.process == 0 and (error is None or isinstance(error, UserError)):
            agreed(None)
        if error is None or isinstance(error, UserError):
            torch.distributed.destroy_process_group()

    def ask(self, question: str, *arguments: Any) -> Any:
        """Answer a question of `loras_bench.worker` here; the device is named with the number of processes."""
        if question != "look_at_device":
            return worker.QUESTIONS[question](*arguments)
        device: Device = worker.look_at_device(self.kind)
        name = f"{self.processes} x {device.name}"  # never in one panel with a single GPU
        return replace(device, name=name, processes=self.processes)

    def run(self, request: RunRequest, progress: Progress) -> Outcome:
        """One run on all ranks.

        Raises:
            KeyboardInterrupt: The run was interrupted.
        """
        try:
            with claim_run(request):
                return self._execute(agreed(request), progress.update)
        except RunLockedError as error:
            return Outcome(request.run_id, "skipped", error.message)

    def follow(self) -> None:
        """What the other ranks do: every run that rank 0 names, until it names none."""
        nothing: RunRequest | None = None
        while (request := agreed(nothing)) is not None:
            self._execute(replace(request, process=self.process), lambda event: None)

    def _execute(self, request: RunRequest, report: Callable[[dict[str, Any]], None]) -> Outcome:
        run = Run(request, report)
        record = run.execute()
        outcome = Outcome(request.run_id, record.status, record.reason, run.done.start_temperature_c)
        if record.status == "interrupted":
            raise KeyboardInterrupt
        del run
        gc.collect()
        torch.cuda.empty_cache()  # the next run starts with free memory, as in a process of its own
        try:
            meet(self.group, PATIENCE if record.status == "completed" else PATIENCE_AFTER_FAILURE)
        except RuntimeError:
            raise RuntimeError(f"rank {self.process} {record.status} without the others: {record.reason}") from None
        return outcome


def _check_launch(kind: str, processes: int) -> None:
    if int(os.environ.get("LOCAL_WORLD_SIZE", processes)) != processes:
        raise UserError("jobs on several machines are not supported", "rank 0 has to measure all GPUs: use one machine")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _launched_with(name):
            raise UserError(f"accelerate's {name} is not supported", "launch with --multi_gpu: data parallelism (DDP)")
    if kind == "cuda" and processes > (gpus := torch.cuda.device_count()):
        raise UserError(f"{processes} processes would share {gpus} GPUs", f"launch with --num_processes {gpus}")


def _launched_with(name: str) -> bool:
    """Whether `accelerate launch` was told to use something."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
