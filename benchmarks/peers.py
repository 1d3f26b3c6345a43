"""LoRA, LoRA-S and full fine-tuning end to end: as they come, at a user's best, and ours; see README.md beside it.

    python benchmarks/peers.py --shapes 135m-8k,1b-4k --arms full,lora,peer_lora,ours_lora --budget 300
    python benchmarks/peers.py --table

Each arm runs in a fresh process, forked from a server that has imported torch but never touched CUDA. What is finished
is kept in the results file at once, and skipped by the next call.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from peer_arms import ARMS, SHAPES, Arm, Shape, choose_arms, choose_shapes
from peer_results import Results
from peer_table import render

from loras_bench.errors import UserError
from loras_bench.interrupts import undisturbed
from loras_bench.requests import Device
from loras_bench.runner import Workers

OUT = Path(__file__).parent / "results" / "peers.json"
SCREEN_S = 3.0
"""Length of the one window in which candidates compete."""
LIMIT_S = 300.0
"""An arm that takes longer is stopped: tuning compilers can take many minutes."""
START_S, COMPILE_S, COMPILE_LAYERS_S = 15.0, 60.0, 15.0
"""Guesses for what was never run."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Comparison:
    """Runs arms one after the other, into the results file.

    Args:
        device: What they run on.
        seconds: Of each window.
        repeats: Windows of each arm.
        stop_at: Monotonic seconds by which the last arm must have ended, or None.
        force: Run again what is finished.
    """

    def __init__(
        self,
        workers: Workers,
        device: Device,
        results: Results,
        *,
        seconds: float,
        repeats: int,
        stop_at: float | None,
        force: bool,
    ) -> None:
        self.workers, self.device, self.results = workers, device, results
        self.seconds, self.repeats, self.stop_at, self.force = seconds, repeats, stop_at, force

    def run(self, shape: Shape, arms: Sequence[Arm]) -> bool:
        """All these arms at one shape; False if there was no time for one of them."""
        arms = [arm for arm in arms if arm.fits(shape)]
        for group in dict.fromkeys(arm.group for arm in arms):
            members = [arm for arm in arms if arm.group == group]
            if len(members) > 1:
                if not all(self._run(arm, shape, SCREEN_S, 1) for arm in members):
                    return False
                best = self.results.best(self.device.name, shape.name, [arm.name for arm in members])
                if best is None:
                    continue
                say(f"{shape.name}  best of {group}: {best}")
                members = [ARMS[best]]
            if not self._run(members[0], shape, self.seconds, self.repeats):
                return False
        return True

    def _run(self, arm: Arm, shape: Shape, seconds: float, repeats: int) -> bool:
        """One arm, unless it is finished; False if there is no time for it."""
        entry = self.results.get(self.device.name, shape.name, arm.name)
        if entry and not (self.force and self._is_old(entry)) and _serves(entry, seconds, repeats):
            return True
        expected_s = self._expected_s(arm, shape, seconds * repeats)
        if self.stop_at is not None and time.monotonic() + expected_s > self.stop_at:
            say(f"stopping: {shape.name} {arm.name} needs about {expected_s:.0f} s; call again to go on")
            return False
        say(f"{shape.name}  {arm.name} ...")
        found = self._measure(arm, shape, seconds, repeats)
        found |= {"device": self.device.name, "shape": asdict(shape), "arm": arm.name, "options": asdict(arm)}
        found |= {"window_s": seconds, "repeats": repeats, "at": time.time()}
        self.results.put(found)
        say(f"{shape.name}  {arm.name}  {_line(found)}")
        return True

    def _is_old(self, entry: dict[str, Any]) -> bool:
        """Whether an entry is from an earlier call: what this one measured is not measured again."""
        return bool(entry["at"] < self.results.opened_at)

    def _expected_s(self, arm: Arm, shape: Shape, measured_s: float) -> float:
        """What the arm needs besides its windows as it needed last time, or a guess."""
        known = self.results.get(self.device.name, shape.name, arm.name)
        if known and known["status"] == "completed":
            return float(known["wall_s"] - known["window_s"] * known["repeats"] + measured_s)
        compile_s = COMPILE_LAYERS_S if arm.compile_layers else COMPILE_S if arm.compile_mode else 0
        return START_S + compile_s + measured_s

    def _measure(self, arm: Arm, shape: Shape, seconds: float, repeats: int) -> dict[str, Any]:
        """In a fresh process; one that dies or takes too long is a failed arm."""
        from peer_worker import Task, work

        task = Task(arm, shape, self.device.kind, seconds, repeats)
        begun = time.monotonic()
        with undisturbed():
            forkserver.ensure_running()
        receiver, sender = self.workers.context.Pipe(duplex=False)
        process = self.workers.context.Process(target=work, args=(task, sender))
        process.start()
        sender.close()
        failed = {"status": "failed", "environment": {}}
        try:
            if receiver.poll(LIMIT_S):
                found: dict[str, Any] = receiver.recv()
                process.join()
                return found
            reason = f"it took more than {LIMIT_S:.0f} s"
        except EOFError:
            process.join()
            reason = f"its process ended with code {process.exitcode}"
        finally:
            process.kill()
            process.join()
        return failed | {"reason": reason, "wall_s": time.monotonic() - begun}


def _serves(entry: dict[str, Any], seconds: float, repeats: int) -> bool:
    """Whether an entry is what a run would find: a failure is tried again, a lack of memory is a finding."""
    if entry["status"] == "completed":
        return bool(entry["window_s"] >= seconds and entry["repeats"] >= repeats)
    return bool(entry["status"] == "out of memory")


def _line(found: dict[str, Any]) -> str:
    if found["status"] != "completed":
        return f"{found['status']}: {found['reason']}"
    energy = found["energy_j_per_mtoken"]
    joules = "no counter" if energy is None else f"{energy:,.0f} J/Mtoken"
    return f"{found['tokens_per_s']:,.0f} tokens/s, {joules} ({found['wall_s']:.0f} s in all)"


def main(words: Sequence[str] | None = None) -> int:
    """Run or print what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: %(default)s")
    groups = dict.fromkeys(arm.group for arm in ARMS.values())
    parser.add_argument(
        "--arms", default=",".join(groups), help=f"also {list(ARMS)[-1]} and such; default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="windows of each arm; default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="results file; default: benchmarks/results/peers.json")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no arm that would not end in time")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="run again what is finished")
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown, run nothing")
    options = parser.parse_args(words)
    try:
        return _main(options)
    except UserError as error:
        say(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return 2


def _main(options: argparse.Namespace) -> int:
    begun = time.monotonic()
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: an arm needs at least one window", "give 1 or more")
    if not 0 < options.seconds < math.inf:
        raise UserError(f"--seconds {options.seconds:g} is no length of a window", "give seconds above 0")
    if options.budget is not None and not options.budget > 0:
        raise UserError(f"--budget {options.budget:g} leaves no time", "give seconds above 0, or leave it out")
    shapes, arms = choose_shapes(options.shapes.split(",")), choose_arms(options.arms.split(","))
    results = Results(options.out)
    if options.table and not results.entries:
        raise UserError(f"--out {options.out} holds no results", "run it without --table first")
    if not options.table:
        workers = Workers()
        comparison = Comparison(
            workers,
            workers.ask("look_at_device", options.device),
            results,
            seconds=options.seconds,
            repeats=options.repeats,
            stop_at=None if options.budget is None else begun + options.budget,
            force=options.force,
        )
        all(comparison.run(shape, arms) for shape in shapes)
    print(render(results.entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
