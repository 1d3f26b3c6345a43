"""Gathers what a run measures and counts, and turns it into its record: numbers with units, or None with a reason."""

from __future__ import annotations

import resource
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from loras_bench.build import Build
from loras_bench.catalog import task_of
from loras_bench.errors import UserError
from loras_bench.metering.environment import collect_environment
from loras_bench.metering.meter import Meter
from loras_bench.metering.phases import (
    HEADLINE_PHASES,
    MIN_HEADLINE_S,
    IdleReading,
    PhaseEnergy,
    aliased_sampling,
    idle_drift,
    sum_if_known,
)
from loras_bench.plan import KERNEL_VERSION
from loras_bench.requests import RunRequest
from loras_bench.results.record import CurvePoint, Flag, Flops, Phase, Quality, Record, Status
from loras_bench.training import LossLog, NonFiniteLossError

CURVE_POINTS = 200
MISSING_FLAGS = ("counter_missing", "energy_missing")


class Measurements:
    """Filled while a run goes on; `record` is asked for once, at its end."""

    def __init__(self, request: RunRequest) -> None:
        experiment = request.experiment
        self.request = request
        self.started_at = _now()
        self.status: Status = "failed"
        self.reason: str | None = None
        self.flags: list[Flag] = []
        self.quality: list[Quality] = []
        self.validation_curve: list[CurvePoint] = []
        self.loss_curve: list[CurvePoint] = []
        self.idle_before: IdleReading | None = None
        self.idle_after: IdleReading | None = None
        self.start_temperature_c: float | None = None
        self.estimates: dict[str, Any] = {}
        self.warmup_steps = 0
        self.steady_tokens: int | None = None
        self.trained_tokens = 0
        self.origin: dict[str, Any] = {}
        self.describe_attention: Callable[[], dict[str, Any]] = dict
        self.chain_before_j: float | None = None
        self.facts: dict[str, Any] = {
            "task": task_of(experiment.data) or "language_modeling",
            "model": experiment.model.name or experiment.model.run or "from scratch",
            "methods": [method.kind for method in experiment.methods],
        }

    def built(self, run: Build, flops: Flops, padded_tokens: int) -> None:
        """What is known before the first step."""
        total, trainable = run.parameter_counts()
        indices = [row for step in range(run.plan.steps) for row in run.plan.indices(step)]
        self.trained_tokens = run.data.real_tokens("train", indices)
        self.chain_before_j = run.chain_energy_j
        self.facts |= {
            "task": run.data.task,
            "model": run.loaded.label,
            "methods": [method.config.kind for method in run.methods],
            "total_parameters": total,
            "trainable_parameters": trainable,
            "trained_tokens": self.trained_tokens,
            "padded_tokens": padded_tokens,
            "steps": run.plan.steps,
            "flops": flops,
            "implementation": {
                **(run.fused.describe() if run.fused is not None else {"forward": "transformers"}),
                "cuda_graph": run.loop.graphs is not None,
            },
        }
        self.origin = {"model_origin": dict(run.loaded.origin), "dropout": dict(run.loaded.dropout)}
        if flops.incomplete:
            self.flag("flops_incomplete", f"no formula for {', '.join(flops.incomplete)}")

    def trained(self, run: Build, losses: LossLog) -> None:
        """What is known after the last step."""
        self.describe_attention = run.attention.describe
        stride = max(1, run.plan.steps // CURVE_POINTS)
        steps = sorted({*range(0, run.plan.steps, stride), run.plan.steps - 1})
        per_step = self.trained_tokens / run.plan.steps
        self.loss_curve = [
            CurvePoint(step=step + 1, tokens=round((step + 1) * per_step), loss=float(losses.values[step]))
            for step in steps
        ]
        if run.accelerator.device.type == "cuda":
            self.facts["peak_memory_bytes"] = run.loop.peak_memory_bytes()
        elif self.request.processes == 1:  # a rank has the peak of all its runs
            self.facts["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def flag(self, name: str, reason: str) -> None:
        """Tell readers something about the numbers, once a name."""
        if all(flag.name != name for flag in self.flags):
            self.flags.append(Flag(name=name, reason=reason))

    def complete(self) -> None:
        """The run reached its end."""
        self.status = "completed"

    def fail(self, error: BaseException) -> None:
        """The run was stopped by an error or by the user."""
        self.status, self.reason = "failed", describe_failure(error)
        if isinstance(error, KeyboardInterrupt):
            self.status = "interrupted"

    def record(self, meter: Meter) -> Record:
        """The record of the run, whole or not."""
        request, phases = self.request, meter.phases()
        run_energy_j = meter.run().energy_j
        for phase in phases.values():
            for name, reason in phase.flags.items():
                # Flags of other phases stay with them; what a CPU run does not use is not missing.
                if phase.name in HEADLINE_PHASES and not (request.device.kind == "cpu" and name in MISSING_FLAGS):
                    self.flag(name, reason if name == "counter_missing" else f"{phase.name}: {reason}")
        if self.idle_before and self.idle_after and (drift := idle_drift(self.idle_before, self.idle_after)):
            self.flag("idle_drift", drift)
        self._judge_train(phases)
        record = Record(
            run_id=request.run_id,
            name=request.experiment.name,
            seed=request.seed,
            status=self.status,
            reason=self.reason,
            started_at=self.started_at,
            finished_at=_now(),
            block=request.block,
            dataset=request.experiment.data.name,
            sequence_length=request.experiment.data.sequence_length,
            device=request.device.name,
            config=request.experiment.model_dump(mode="json"),
            kernel_version=KERNEL_VERSION,
            environment=collect_environment() | {"warmup_steps": self.warmup_steps} | self.origin,
            run_energy_j=run_energy_j,
            chain_energy_j=sum_if_known((run_energy_j, self.chain_before_j)),
            lost_energy_j=meter.lost_energy_j,
            idle_before_w=self.idle_before.power_w if self.idle_before else None,
            idle_after_w=self.idle_after.power_w if self.idle_after else None,
            quality=self.quality,
            loss_curve=self.loss_curve,
            validation_curve=self.validation_curve,
            phases=[_phase(phase) for phase in phases.values()],
            estimates=self.estimates,
            flags=self.flags,
            attention=self.describe_attention(),  # at the end: the evaluation may use other kernels
            **self.facts,
            **self._training_figures(phases),
        )
        record.device_uuids = _uuids(phases)
        record.missing = self._missing(record, phases)
        return record

    def _training_figures(self, phases: dict[str, PhaseEnergy]) -> dict[str, Any]:
        """The figures of the `train` phase; none of them if the run did not get through it."""
        train, steady = phases.get("train"), phases.get("steady")
        if train is None or not self.loss_curve:
            return {}
        figures: dict[str, Any] = {
            "train_energy_j": train.energy_j,
            "train_energy_source": train.source,
            "train_seconds": train.seconds,
            "tokens_per_second": self.trained_tokens / train.seconds,
            "mean_power_w": train.mean_power_w,
        }
        chosen, tokens = (
            (train, self.trained_tokens) if train.seconds >= MIN_HEADLINE_S else (steady, self.steady_tokens)
        )
        if chosen is not None and tokens and chosen.energy_j is not None:
            figures["energy_j_per_mtoken"] = chosen.energy_j / tokens * 1e6
            figures["energy_j_per_mtoken_phase"] = chosen.name
        return figures

    def _judge_train(self, phases: dict[str, PhaseEnergy]) -> None:
        """Flags of the `train` phase that depend on its steps; without a meter no window is too short for it."""
        train = phases.get("train")
        if train is None or train.energy_j is None:
            self.flags = [flag for flag in self.flags if flag.name != "short_window"]
        elif self.loss_curve and (reason := aliased_sampling(train.seconds / self.facts["steps"], train.seconds)):
            self.flag("aliased_sampling", reason)

    def _missing(self, record: Record, phases: dict[str, PhaseEnergy]) -> dict[str, str]:
        """Why the figures that a reader would look for are not there."""
        if record.status != "completed" and record.train_seconds is None:
            return {"train_energy_j": f"the run {record.status}: {record.reason}"}
        missing: dict[str, str] = {}
        reasons = [phase.flags[name] for phase in phases.values() for name in MISSING_FLAGS if name in phase.flags]
        counter = reasons[0] if reasons else "no reading"
        for name in ("train_energy_j", "run_energy_j", "mean_power_w"):
            if getattr(record, name) is None:
                missing[name] = counter
        if record.energy_j_per_mtoken is None:
            short = f"train lasted less than {MIN_HEADLINE_S:.0f} s and no steady phase was asked for"
            missing["energy_j_per_mtoken"] = counter if record.train_energy_j is None else short
        if record.lost_energy_j is None and record.resumed and self.request.device.kind == "cuda":
            missing["lost_energy_j"] = "the journal does not tell"
        if all(phase.cpu_energy_j is None for phase in phases.values()):
            missing["cpu_energy_j"] = next(
                (phase.cpu_reason for phase in phases.values() if phase.cpu_reason), "no reading"
            )
        return missing


def describe_failure(error: BaseException) -> str:
    """One line for a record: what happened, and what a user can do where that is known."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted by the user"
    if isinstance(error, UserError):
        return f"{error.message} ({error.hint})" if error.hint else error.message
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; lower training.micro_batch_size or set training.gradient_checkpointing"
    if isinstance(error, NonFiniteLossError):
        return f"{error}; lower training.learning_rate"
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no message'}"


def _phase(phase: PhaseEnergy) -> Phase:
    details = phase.model_dump(
        mode="json", include={"parts", "gpus", "temperature_c", "sm_clock_mhz", "memory_clock_mhz"}
    )
    details |= {
        "flags": phase.flags,
        "mean_power_w": phase.mean_power_w,
        "integral_to_counter": phase.integral_to_counter,
    }
    return Phase(
        name=phase.name,
        seconds=phase.seconds,
        energy_j=phase.energy_j,
        energy_source=phase.source,
        integral_j=phase.integral_j,
        cpu_energy_j=phase.cpu_energy_j,
        details=details,
    )


def _uuids(phases: dict[str, PhaseEnergy]) -> list[str]:
    return sorted({gpu.uuid for phase in phases.values() for gpu in phase.gpus if gpu.uuid.startswith("GPU-")})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
