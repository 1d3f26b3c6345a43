"""The step loop, the same for every arm: order of the data, one optimizer step, the loss log, budgets.

The order of the rows depends on the seed alone, the learning rate on the step alone, so that arms of one seed see the
same batches and a resumed run goes on where it stopped with nothing but the number of the step.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loras_bench.config import TrainingConfig
from loras_bench.errors import ConfigError
from loras_bench.graphed import Eager, Graphs, Runner, shapes_of
from loras_bench.methods.base import Method, Taps
from loras_bench.models.objective import Objective
from loras_bench.optimizer import MasterAdamW, cosine_with_warmup

if TYPE_CHECKING:
    from accelerate import Accelerator

    from loras_bench.data import TaskData

STEPS_AHEAD = 2
"""Steps that may be under way on the GPU when the host prepares another."""


class Lead:
    """Keeps the host at most `STEPS_AHEAD` steps ahead of the GPU.

    Replays return at once: without a bound, progress and clocks would run minutes ahead.
    """

    def __init__(self) -> None:
        self._ends: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """Call it when a step has been queued: it waits until an earlier one has ended."""
        self._ends.append(torch.cuda.Event(blocking=True))
        self._ends[-1].record()
        if len(self._ends) > STEPS_AHEAD:
            self._ends.popleft().synchronize()


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class StepPlan:
    """Which rows each step takes: one shuffled pass after the other, in whole steps of equal size."""

    rows: int
    rows_per_step: int
    micro_rows: int
    steps: int
    seed: int

    def indices(self, step: int) -> list[int]:
        """The rows of one optimizer step; steps beyond the plan go on in the same way."""
        start = step * self.rows_per_step
        taken = range(start, start + self.rows_per_step)
        return [_shuffled(self.rows, self.seed, k // self.rows)[k % self.rows] for k in taken]


@lru_cache(maxsize=4)
def _shuffled(rows: int, seed: int, number: int) -> tuple[int, ...]:
    """The order of the rows in one pass over them."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return tuple(torch.randperm(rows, generator=generator).tolist())


def plan_steps(config: TrainingConfig, data: TaskData, sequence_length: int, seed: int) -> StepPlan:
    """Turn a budget in tokens or epochs into whole steps (rounded up).

    Raises:
        ConfigError: The batch does not divide into blocks or micro-batches, or is larger than the data set.
    """
    if data.task == "language_modeling":
        if config.tokens_per_step is None:
            raise ConfigError(
                "training.batch_size is for classification and instructions",
                "give `tokens_per_step` for language modelling",
            )
        rows_per_step, rest = divmod(config.tokens_per_step, sequence_length)
        if rest:
            hint = (
                f"the nearest are {max(1, rows_per_step) * sequence_length} and {(rows_per_step + 1) * sequence_length}"
            )
            raise ConfigError(
                f"training.tokens_per_step must be a multiple of the sequence length {sequence_length}", hint
            )
    else:
        if config.batch_size is None:
            raise ConfigError(
                "training.tokens_per_step is for language modelling",
                "give `batch_size` for classification and instructions",
            )
        rows_per_step = config.batch_size
    micro_rows = config.micro_batch_size or rows_per_step
    if rows_per_step % micro_rows:
        raise ConfigError(f"training.micro_batch_size {micro_rows} does not divide the {rows_per_step} rows of a step")
    rows = data.rows("train")
    if rows == 0:
        raise ConfigError("the training set is empty")
    if rows_per_step > rows:
        key = "tokens_per_step" if data.task == "language_modeling" else "batch_size"
        raise ConfigError(
            f"training.{key}: a step takes {rows_per_step} rows, the training set has {rows}", "take a smaller step"
        )
    if config.epochs is not None:
        steps = math.ceil(config.epochs * rows / rows_per_step)
    else:
        assert config.tokens is not None
        # Blocks are full but for the last of each pass, which must not add a step to a budget of whole steps.
        tokens_per_row = sequence_length if data.task == "language_modeling" else _mean_tokens(data)
        steps = math.ceil(round(config.tokens / (tokens_per_row * rows_per_step), 6))
    return StepPlan(rows, rows_per_step, micro_rows, max(1, steps), seed)


def _mean_tokens(data: TaskData) -> float:
    rows = data.rows("train")
    return data.real_tokens("train", range(rows)) / rows


def plan_batches(
    data: TaskData, plan: StepPlan, step: int, rank: int = 0, processes: int = 1, methods: Sequence[Method[Any]] = ()
) -> list[dict[str, Tensor]]:
    """The micro-batches of a step, on the CPU: of the rows of each, those of one process; with what methods add."""
    indices, taken = plan.indices(step), plan.micro_rows
    starts = range(0, len(indices), taken)
    batches = [data.collate("train", indices[at : at + taken][rank::processes]) for at in starts]
    for batch in batches:
        for method in methods:
            batch |= method.batch_tensors(batch)
    return batches


def regime_of(methods: Sequence[Method[Any]], step: int) -> tuple[Hashable | None, ...]:
    """Steps of one regime run the same operations on batches of the same shapes."""
    return tuple(method.graph_key(step) for method in methods)


def steps_that_differ(data: TaskData, plan: StepPlan, methods: Sequence[Method[Any]]) -> dict[int, int]:
    """Steps that stand for all of the plan, and how many steps each stands for.

    Blocks of language modelling all have one shape: there, the first step of each regime stands for it. But for those
    in whose batches methods tell tokens apart.
    """
    one_shape = data.task == "language_modeling" and not any(
        method.batch_tensors(batch) for batch in plan_batches(data, plan, 0) for method in methods
    )
    if not one_shape:
        return dict.fromkeys(range(plan.steps), 1)
    regimes = [regime_of(methods, step) for step in range(plan.steps)]
    return {regimes.index(regime): times for regime, times in Counter(regimes).items()}


class LossLog:
    """The loss of every step, read without making the device wait: copies land in pinned memory some steps later."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.values = torch.full((steps,), math.inf, dtype=torch.float32, pin_memory=device.type == "cuda")
        self.last = -1

    def write(self, step: int, loss: Tensor) -> None:
        self.values[step].copy_(loss, non_blocking=True)
        self.last = step

    def latest(self) -> float | None:
        """The newest loss that has arrived."""
        for step in range(self.last, max(-1, self.last - 64), -1):
            if self.values[step] != math.inf:
                return float(self.values[step])
        return None

    def check(self, *, settled: bool = False) -> None:
        """Stop at a loss that is not a number; call with `settled` only after the device was synchronised.

        Raises:
            NonFiniteLossError: With the step.
        """
        seen = self.values[: self.last + 1]
        bad = ~torch.isfinite(seen) if settled else torch.isnan(seen)
        if bad.any():
            step = int(bad.nonzero()[0])
            raise NonFiniteLossError(f"the loss is {float(seen[step])} in step {step + 1}")


class Loop:
    """Everything one optimizer step needs, in one place.

    Args:
        objective: The model with its loss (as `accelerator.prepare` returned it).
        methods: In stage order; their hooks are called around each step.
        taps: What layers show to methods that ask for it, or None.
        graphed: Replay steps as CUDA graphs, but for those that a method wants eager.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: MasterAdamW,
        methods: Sequence[Method[Any]],
        data: TaskData,
        plan: StepPlan,
        config: TrainingConfig,
        accelerator: Accelerator,
        taps: Taps | None,
        graphed: bool,
    ) -> None:
        self.objective, self.optimizer, self.methods, self.data = objective, optimizer, methods, data
        self.plan, self.config, self.accelerator, self.taps = plan, config, accelerator, taps
        self.device = accelerator.device
        self.graphs = Graphs(self.device) if graphed else None
        self._eager = Eager(self.device)
        self._loss, self._share = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self._lead = Lead()

    def step(self, step: int) -> Tensor:
        """One optimizer step; returns the mean loss of its targets as a device scalar, without synchronising."""
        for method in self.methods:
            method.before_step(step)
        runner, processes = self._runner(step), self.accelerator.num_processes
        # Data-parallel gradients are averaged over processes, so each process scales its sum up by their number.
        self._share.fill_(processes / self.data.target_count("train", self.plan.indices(step)))
        batches = plan_batches(self.data, self.plan, step, self.accelerator.process_index, processes, self.methods)
        for number, batch in enumerate(batches):
            inputs, first = runner.load(batch), number == 0
            runner.run(shapes_of(batch), first, partial(self._micro_step, inputs, first, len(batches)))
        self.optimizer.set_rate(cosine_with_warmup(step, self.plan.steps, self.config.warmup_fraction))
        runner.run("update", None, partial(self.optimizer.step, self.config.max_grad_norm))
        for method in self.methods:
            method.after_step(step)
        if self.device.type == "cuda":
            self._lead.step()
        if processes == 1:
            return self._loss.clone()
        mean: Tensor = self.accelerator.reduce(self._loss, reduction="mean")  # type: ignore[assignment]
        return mean

    def _runner(self, step: int) -> Runner:
        regime = regime_of(self.methods, step)
        if self.graphs is None or any(key is None for key in regime):
            return self._eager
        self.graphs.enter(regime)
        return self.graphs

    def _micro_step(self, inputs: dict[str, Tensor], first: bool, parts: int) -> None:
        """Forward and backward of one micro-batch; adds its share to the step's mean loss and gradients."""
        loss_sum, _ = self.objective(**inputs)
        loss = loss_sum * self._share
        share = loss.detach()
        if first:
            self._loss.copy_(share)
        else:
            self._loss.add_(share)
        if self.taps is not None:
            for method in self.methods:
                for term in method.loss_terms(self.taps).values():
                    loss = loss + term / parts
            self.taps.clear()
        self.accelerator.backward(loss)
        self.optimizer.collect_gradients(first=first)

    def peak_memory_bytes(self) -> int:
        """The most memory that tensors took since torch's last reset of its peak; CUDA only."""
        temporary = self.graphs.recorder.temporary_bytes if self.graphs is not None else 0
        return max(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + temporary)

    def run(self, start: int, stop: int, log: LossLog, on_step: Callable[[int], bool]) -> int:
        """Steps from `start` until `stop` or until `on_step` returns True; returns the next step."""
        for step in range(start, stop):
            log.write(step, self.step(step))
            if step % 10 == 9:
                if self.accelerator.num_processes > 1 and self.device.type == "cuda":
                    torch.cuda.synchronize()  # all processes must have seen the same losses, to stop at the same step
                log.check()
            if on_step(step):
                return step + 1
        return stop
