"""Runs blocks of experiments, each run in a fresh process forked from a server that imported torch but never touched
CUDA.

The parent stays light: it plans, shows progress, and names a worker that died without a record.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.errors import UserError
from loras_bench.interrupts import undisturbed
from loras_bench.plan import PlannedRun, is_done, occasion_of, pretraining_of
from loras_bench.progress import Progress
from loras_bench.requests import Device, RunRequest
from loras_bench.results.record import Block, Record
from loras_bench.results.store import load_records

if TYPE_CHECKING:
    from loras_bench.ranks import Ranks

WARMER_C = 5.0
"""A run starts at most this much warmer than the first of its block did, or after 30 s of cooling."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_id: str
    status: str
    reason: str | None
    temperature_c: float | None = None


def _worker(function: str, *arguments: Any) -> None:
    """Entry of every worker process; the parent must not import torch to name it."""
    from loras_bench import worker

    getattr(worker, function)(*arguments)


class Workers:
    """The fork server and the processes it forks."""

    def __init__(self) -> None:
        # Workers inherit these. Libraries' bars would tear our progress; OpenMP threads that spin while they wait
        # make a CPU run five times slower as soon as another program shares its cores.
        os.environ["TQDM_DISABLE"] = "1"
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["loras_bench.worker"])

    def ask(self, function: str, *arguments: Any) -> Any:
        """Call a function of `loras_bench.worker` in a process of its own, because touching CUDA must stay there.

        Raises:
            UserError: What the function raised as one.
            RuntimeError: Any other error, or a process that died.
        """
        receiver, process = self._start("answer", function, arguments)
        try:
            kind, *content = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f"the process that should answer `{function}` ended with code {process.exitcode}"
            ) from None
        process.join()
        if kind == "user error":
            raise UserError(*content)
        if kind == "error":
            raise RuntimeError("\n".join(content))
        return content[0]

    def run(self, request: RunRequest, progress: Progress) -> Outcome:
        """One run in one process; a worker that dies is reported as failed, with the signal."""
        receiver, process = self._start("work", request)
        try:
            ending = _follow(receiver, progress)
        except KeyboardInterrupt:
            # A terminal interrupts the worker too; an interrupt sent to this process alone is passed on.
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            _follow(receiver, progress)
            process.join()
            raise
        process.join()
        if ending is None:
            code = process.exitcode or 0
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Outcome(request.run_id, "failed", f"the worker was killed ({cause}); the next call takes it up")
        return Outcome(request.run_id, ending["status"], ending["reason"], ending.get("temperature_c"))

    def _start(self, function: str, *arguments: Any) -> tuple[Connection, Any]:
        with undisturbed():  # the server inherits this: Ctrl-C while it imports would be a traceback of its own
            forkserver.ensure_running()
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_worker, args=(function, *arguments, sender))
        process.start()
        sender.close()
        return receiver, process


def _follow(receiver: Connection, progress: Progress) -> dict[str, Any] | None:
    """Show events until the worker says how it ended; None if it dies without a word."""
    while True:
        try:
            event = receiver.recv()
        except EOFError:
            return None
        if "status" in event:
            return dict(event)
        progress.update(event)


class BlockRunner:
    """Runs what is not finished, block by block; a run that fails does not stop the others."""

    def __init__(
        self,
        results: Path,
        device: Device,
        workers: Workers | Ranks,
        progress: Progress,
        *,
        force: bool,
        stop_at: float | None,
    ) -> None:
        self.results, self.device, self.workers, self.progress = results, device, workers, progress
        self.force, self.stop_at = force, stop_at
        self.durations = durations_of(results)
        self.outcomes: list[Outcome] = []
        self.pretrainings: dict[str, Outcome] = {}

    def run(self, blocks: Sequence[Sequence[PlannedRun]]) -> list[Outcome]:
        """All blocks; ends early when the next run would not end before `stop_at` (monotonic seconds)."""
        for block in blocks:
            if not self._run_block(block):
                break
        return self.outcomes

    def _run_block(self, block: Sequence[PlannedRun]) -> bool:
        todo = [run for run in block if self.force or not run.finished]
        occasion, cool_to_c = occasion_of(block), None
        for position, run in enumerate(todo):
            first = pretraining_of(run.experiment, self.results, self.device)
            if first is not None and not first.finished:
                if not self._fits(first):
                    return False
                outcome = self._pretrain(first)
                if not is_done(first.folder, self.device):
                    status = "skipped" if outcome.status == "skipped" else "failed"
                    self._conclude(Outcome(run.run_id, status, f"its pretraining {outcome.status}: {outcome.reason}"))
                    continue
            if not self._fits(run):
                return False
            request = RunRequest(
                experiment=run.experiment,
                seed=run.seed,
                run_id=run.run_id,
                folder=run.folder,
                device=self.device,
                block=Block(id=occasion, position=position, size=len(todo)),
                pretrained=first.folder if first else None,
                idle_before=position == 0,
                idle_after=position == len(todo) - 1,
                cool_to_c=cool_to_c,
                fresh=self.force,
            )
            outcome = self._run(request)
            if cool_to_c is None and outcome.temperature_c is not None:
                cool_to_c = outcome.temperature_c + WARMER_C
        return True

    def _run(self, request: RunRequest) -> Outcome:
        begun = time.monotonic()
        self.progress.start(request.run_id)
        try:
            outcome = self.workers.run(request, self.progress)
        except KeyboardInterrupt:
            self.progress.say(f"{request.run_id}  interrupted; the next call takes it up")
            raise
        seconds = time.monotonic() - begun
        name = request.experiment.name
        if outcome.status == "completed":
            self.durations[name] = max(seconds, self.durations.get(name, 0.0))
        self._conclude(outcome, seconds)
        log = request.folder / "log.txt"
        if outcome.status == "failed" and log.exists():
            self.progress.say(f"  see {log}")
        return outcome

    def _conclude(self, outcome: Outcome, seconds: float | None = None) -> None:
        parts = [outcome.run_id, outcome.status if outcome.reason is None else f"{outcome.status}: {outcome.reason}"]
        self.progress.say("  ".join(parts if seconds is None else [*parts, f"({seconds:.0f} s)"]))
        self.outcomes.append(outcome)

    def _pretrain(self, first: PlannedRun) -> Outcome:
        """Make the weights that arms start from; what failed once in this command is not tried again for each arm."""
        if first.run_id not in self.pretrainings:
            request = RunRequest(first.experiment, first.seed, first.run_id, first.folder, self.device)
            self.pretrainings[first.run_id] = self._run(request)
        return self.pretrainings[first.run_id]

    def _fits(self, run: PlannedRun) -> bool:
        """Whether a run ends before the stop, judged by the longest run of its arm so far, or of any arm.

        The first run of an empty results folder has nothing to be judged by, and is started.
        """
        if self.stop_at is None:
            return True
        left_s = self.stop_at - time.monotonic()
        expected_s = self.durations.get(run.experiment.name, max(self.durations.values(), default=1.0))
        if left_s >= expected_s:
            return True
        self.progress.say(
            f"stopping: {max(0.0, left_s):.0f} s are left, {run.run_id} needs about {expected_s:.0f} s; "
            "call again to go on"
        )
        return False


def durations_of(results: Path) -> dict[str, float]:
    """Seconds that each arm's completed runs took, the longest of each: what the next run of it may need."""
    durations: dict[str, float] = {}
    if results.exists():
        for record in load_records([results])[0]:
            if record.status == "completed":
                durations[record.name] = max(durations.get(record.name, 0.0), wall_seconds(record))
    return durations


def wall_seconds(record: Record) -> float:
    """Wall time of a run."""
    return (datetime.fromisoformat(record.finished_at) - datetime.fromisoformat(record.started_at)).total_seconds()
