"""One run told top to bottom: build, warm up, train, evaluate, finish, record.

Every span of it is a phase of the meter, so the joules of the phases add up to the run. Whatever ends the run, a record
says so.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from loras_bench.attention.patterns import Dense
from loras_bench.build import Build, build, read
from loras_bench.checkpoint import load_checkpoint, remove_checkpoint, save_checkpoint
from loras_bench.counting import count_training
from loras_bench.distributed import agreed
from loras_bench.errors import UserError
from loras_bench.evaluation import evaluate
from loras_bench.interrupts import undisturbed
from loras_bench.metering.carbon import CarbonEstimator
from loras_bench.metering.clock import SystemClock
from loras_bench.metering.journal import Snapshot
from loras_bench.metering.meter import Meter
from loras_bench.metering.phases import MIN_HEADLINE_S, IdleReading
from loras_bench.metering.sources import open_sources
from loras_bench.methods.base import Stage
from loras_bench.models.saved import save_weights
from loras_bench.recording import Measurements
from loras_bench.requests import RunRequest
from loras_bench.results.record import CurvePoint, Quality, Record
from loras_bench.results.store import write_record
from loras_bench.training import LossLog
from loras_bench.warmup import steady_steps, warm_up

JOURNAL = "journal.jsonl"
REPORT_INTERVAL_S = 0.25
COOLING_S = 30.0
HOST_THREADS = 4
"""CPU threads of a GPU run: it launches kernels, and a pool on all cores slows the runs on the other GPUs by half."""


class Run:
    """One execution of one run; `execute` is its story."""

    def __init__(self, request: RunRequest, report: Callable[[dict[str, Any]], None]) -> None:
        self.request, self.report = request, report
        self.experiment = request.experiment
        self.done = Measurements(request)
        self.reported_at = 0.0

    def execute(self) -> Record:
        """Run to the end, or to what stops it; the record is written in either case."""
        folder, device = self.request.folder, self.request.device.kind
        folder.mkdir(parents=True, exist_ok=True)
        journal = folder / JOURNAL if self.request.main_process else None
        if self.request.fresh and journal:
            remove_checkpoint(folder)
            journal.unlink(missing_ok=True)
        agreed(None)  # no rank looks for a checkpoint that rank 0 is removing
        checkpoint = load_checkpoint(folder)
        resumed = Snapshot.model_validate(checkpoint[0]["energy"]) if checkpoint else None
        if device == "cuda":
            torch.set_num_threads(HOST_THREADS)
        clock = SystemClock()
        sources = open_sources(self.request.gpus, clock)
        synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
        with Meter(sources, synchronize=synchronize, clock=clock, journal=journal, resumed=resumed) as meter:
            self.meter = meter
            try:
                with self._estimator() as estimator:
                    self._run(checkpoint)
                if estimator is not None:
                    self.done.estimates = asdict(estimator.estimate)
                self.done.complete()
            except (KeyboardInterrupt, Exception) as error:
                self.done.fail(error)
                if not isinstance(error, KeyboardInterrupt | UserError):
                    traceback.print_exc()  # into the run's log
        with undisturbed():
            record = self.done.record(self.meter)
            if journal:
                self.meter.write_trace(folder / "power.npz")
                write_record(record, folder)
                if record.status == "completed":
                    remove_checkpoint(folder)
                    journal.unlink(missing_ok=True)
        return record

    def _run(self, checkpoint: tuple[dict[str, Any], dict[str, torch.Tensor]] | None) -> None:
        with self.meter.phase("setup"):
            request = self.request
            self._say("loading data and model")
            ingredients = read(self.experiment, request.seed, request.pretrained)
            run = build(self.experiment, request.seed, request.device.kind, ingredients)
            self._say("counting FLOPs")
            self.done.built(run, *count_training(run, run.accelerator.device, request.processes))
        self._idle_and_cool()
        with self.meter.phase("warmup"):
            self.done.warmup_steps = warm_up(run, self._say)
        start, losses = 0, LossLog(run.plan.steps, run.accelerator.device)
        if checkpoint:
            start = self._resume(run, checkpoint, losses)
        self._train(run, start, losses)
        self._evaluate(run)
        self._steady(run)
        with self.meter.phase("finish"):
            self._finish(run)
        if self.request.idle_after:
            self.done.idle_after = self._idle()

    def _estimator(self) -> AbstractContextManager[CarbonEstimator | None]:
        """CodeCarbon around the run, where the experiment names a country; it watches the whole machine, so once."""
        country = self.experiment.energy.codecarbon_country
        if country is None or not self.request.main_process:
            return nullcontext()
        return CarbonEstimator(country)

    def _idle(self) -> IdleReading | None:
        """Idle power now; None where it was not asked for or there is no meter."""
        if not self.experiment.energy.idle_seconds or not self.meter.measures_energy:
            return None
        self._say("measuring idle power")
        return self.meter.measure_idle(self.experiment.energy.idle_seconds)

    def _idle_and_cool(self) -> None:
        """Idle power at the start of a block; between runs, wait for the GPU to cool to where the block began."""
        if self.request.idle_before:
            self.done.idle_before = self._idle()
        deadline = time.monotonic() + COOLING_S
        while self.request.cool_to_c is not None and time.monotonic() < deadline:
            temperature_c = self.meter.temperature_c()
            if temperature_c is None or temperature_c <= self.request.cool_to_c:
                break
            self._say(f"cooling, {temperature_c:.0f} C")
            time.sleep(1.0)
        # The other ranks wait here: until now their GPUs had to be idle.
        self.done.start_temperature_c = agreed(self.meter.temperature_c())

    def _train(self, run: Build, start: int, losses: LossLog) -> None:
        """The `train` phase, interrupted by evaluations and checkpoints, which are phases of their own."""
        if run.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        interval = self._evaluation_interval(run)
        saved_at, begun, step = time.monotonic(), time.monotonic(), start
        checkpoint_s = 60 * self.experiment.training.checkpoint_minutes

        def on_step(step: int) -> bool:
            self._report_step(run, step, start, begun, losses)
            return agreed(time.monotonic() - saved_at > checkpoint_s)

        while step < run.plan.steps:
            stop = min(run.plan.steps, (step // interval + 1) * interval) if interval else run.plan.steps
            with self.meter.phase("train"):
                agreed(None)  # the other ranks start with rank 0's reading of the counters
                step = run.loop.run(step, stop, losses, on_step)
            losses.check(settled=True)
            if interval and step % interval == 0:
                self._read_validation(run, step)
            if step < run.plan.steps and agreed(time.monotonic() - saved_at > checkpoint_s):
                self._checkpoint(run, step, losses)
                saved_at = time.monotonic()
        self.done.trained(run, losses)

    def _evaluation_interval(self, run: Build) -> int:
        every = self.experiment.evaluation.every_tokens
        if every is None:
            return 0
        return max(1, round(every / (self.done.trained_tokens / run.plan.steps)))

    def _read_validation(self, run: Build, step: int) -> None:
        with self.meter.phase("eval"):
            self._say("evaluating")
            batch = self.experiment.evaluation.batch_size
            metrics = evaluate(run.objective, run.data, "validation", batch, run.accelerator)
            tokens = round(self.done.trained_tokens * step / run.plan.steps)
            self.done.validation_curve.append(CurvePoint(step=step, tokens=tokens, loss=metrics["loss"]))

    def _checkpoint(self, run: Build, step: int, losses: LossLog) -> None:
        with self.meter.phase("finish"):
            energy = self.meter.snapshot().model_dump(mode="json")
            facts = {
                "step": step,
                "energy": energy,
                "losses": losses.values[:step].tolist(),
                "validation": [point.model_dump() for point in self.done.validation_curve],
            }
            tensors = run.state.tensors()  # in all processes: of some, each has a part
            if self.request.main_process:
                save_checkpoint(self.request.folder, tensors, facts)

    def _resume(self, run: Build, checkpoint: tuple[dict[str, Any], dict[str, torch.Tensor]], losses: LossLog) -> int:
        facts, tensors = checkpoint
        run.state.restore(tensors)
        losses.values[: facts["step"]] = torch.tensor(facts["losses"])
        losses.last = facts["step"] - 1
        self.done.validation_curve = [CurvePoint(**point) for point in facts["validation"]]
        self.done.flag("resumed", f"taken up after step {facts['step']} of {run.plan.steps}")
        return int(facts["step"])

    def _evaluate(self, run: Build) -> None:
        """Each split as trained and, where asked, with dense attention; a dense model is read once."""
        settings = self.experiment.evaluation
        all_dense = all(isinstance(pattern, Dense) for pattern in run.attention.patterns)
        for split in settings.splits:
            read: dict[bool, dict[str, float]] = {}
            for attention in settings.attention:
                self._say(f"evaluating on {split}, attention {attention}")
                overridden = attention == "dense" and not all_dense
                with self.meter.phase("eval"), run.attention.override(Dense()) if overridden else nullcontext():
                    if overridden not in read:
                        read[overridden] = evaluate(
                            run.objective, run.data, split, settings.batch_size, run.accelerator, settings.generation
                        )
                protocol = run.data.protocol(split)
                if settings.generation is not None:
                    protocol["generation"] = settings.generation.model_dump()
                quality = Quality(split=split, attention=attention, metrics=read[overridden], protocol=protocol)
                self.done.quality.append(quality)

    def _steady(self, run: Build) -> None:
        """At least 10 s of real steps for joules per token, if the `train` phase was too short for them."""
        wanted_s = self.experiment.energy.steady_seconds
        too_short = self.meter.measures_energy and self.meter.phases()["train"].seconds < MIN_HEADLINE_S
        if wanted_s and agreed(too_short):
            with self.meter.phase("steady"):
                self.done.steady_tokens = steady_steps(run, wanted_s, self._say)

    def _finish(self, run: Build) -> None:
        model = run.model
        if run.fused is not None:
            run.fused.remove()
        for method in run.methods:
            model = method.finish(model)
        if self.experiment.save and self.request.main_process:
            self._say("saving")
            changed = any(method.stage <= Stage.COMPRESS for method in run.methods)
            save_weights(self.request.folder, model, run.tokenizer, changed_base=changed)

    def _say(self, phase: str) -> None:
        self.report({"phase": phase})

    def _report_step(self, run: Build, step: int, start: int, begun: float, losses: LossLog) -> None:
        now = time.monotonic()
        if now - self.reported_at < REPORT_INTERVAL_S:
            return
        self.reported_at = now
        share = (step + 1 - start) / max(1e-9, now - begun)
        live = self.meter.live()
        self.report(
            {
                "phase": "train",
                "step": step + 1,
                "steps": run.plan.steps,
                "loss": losses.latest(),
                "tokens_per_s": share * self.done.trained_tokens / run.plan.steps,
                "power_w": live.power_w,
                "energy_j": live.train_energy_j,
                "left_s": (run.plan.steps - step - 1) / share,
            }
        )
