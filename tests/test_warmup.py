"""Steps that are undone: the state after them is the state before them, bit for bit."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from cpu_graphs import Tape, cpu_graphs  # noqa: F401
from torch import Tensor
from training_fixtures import GPT2, LORA, MOODS, WINDOW, build_run, experiment

from loras_bench import warmup
from loras_bench.build import Build
from loras_bench.graphed import Graphs
from loras_bench.training import LossLog, plan_batches
from loras_bench.warmup import CPU_STEPS, steady_steps, warm_up

pytestmark = pytest.mark.usefixtures("places")

DROPOUT = GPT2 | {"architecture": GPT2["architecture"] | {"resid_pdrop": 0.1, "embd_pdrop": 0.1}}  # type: ignore[operator]


def built(**sections: Any) -> Build:
    return build_run(experiment(**sections))


def state(run: Build) -> dict[str, Tensor]:
    weights = {f"model.{name}": p for name, p in run.model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in (run.state.tensors() | weights).items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "dropout": {"model": DROPOUT},
    "bfloat16": {"model": GPT2 | {"dtype": "bfloat16"}, "methods": [LORA, WINDOW]},
    "classes": {"data": MOODS, "methods": [LORA]},
}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("trained", [0, 2])
def test_warm_up_leaves_no_trace(arm: str, trained: int) -> None:
    """Weights, masters, moments (their absence too) and random numbers: the run after it is the run without it."""
    warmed, cold = built(**ARMS[arm]), built(**ARMS[arm])
    random = torch.get_rng_state()
    for step in range(trained):
        cold.loop.step(step)
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    for step in range(trained):
        warmed.loop.step(step)
    before = state(warmed)
    assert warm_up(warmed, lambda phase: None) >= CPU_STEPS
    assert_same(before, state(warmed))

    losses = LossLog(2, torch.device("cpu")), LossLog(2, torch.device("cpu"))
    for run, log in zip((warmed, cold), losses, strict=True):
        torch.set_rng_state(after)
        for step in range(2):
            log.write(step, run.loop.step(trained + step))
    assert torch.equal(losses[0].values, losses[1].values)


def test_every_shape_of_a_batch_is_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are padded to multiples of 64; here to multiples of 8, so that there are several shapes."""
    monkeypatch.setattr("loras_bench.data.packing.PADDING_MULTIPLE", 8)
    run = built(data=MOODS, training={"batch_size": 4, "micro_batch_size": 1})
    shapes = {tuple(b["input_ids"].shape) for s in range(run.plan.steps) for b in plan_batches(run.data, run.plan, s)}
    assert len(shapes) > 2
    seen: set[tuple[int, ...]] = set()
    run.objective.register_forward_pre_hook(
        lambda module, args, inputs: seen.add(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    warm_up(run, lambda phase: None)
    assert seen == shapes


@pytest.mark.usefixtures("cpu_graphs")
@pytest.mark.parametrize("arm", [{}, {"data": MOODS, "training": {"batch_size": 4, "micro_batch_size": 1}}])
def test_nothing_is_captured_after_warm_up(arm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape as the first and as a later part of a step; and the replayed run is the eager one."""
    monkeypatch.setattr("loras_bench.data.packing.PADDING_MULTIPLE", 8)
    run, eager = built(**arm), built(**arm)
    run.loop.graphs = Graphs(run.loop.device)
    warm_up(run, lambda phase: None)
    recorded = Tape.recorded
    assert recorded > (1 if not arm else 4)
    losses = [[float(one.loop.step(step)) for step in range(one.plan.steps)] for one in (run, eager)]
    assert losses[0] == losses[1]
    assert Tape.recorded == recorded


def test_warm_up_ends_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_compilations", itertools.count().__next__)  # something compiles in every step
    monkeypatch.setattr(warmup, "MAX_SECONDS", 0.3)
    begun = time.monotonic()
    assert warm_up(built(), lambda phase: None) >= CPU_STEPS
    assert time.monotonic() - begun < 5
    monkeypatch.setattr(warmup, "MAX_SECONDS", 60.0)
    monkeypatch.setattr(warmup, "MAX_STEPS", 7)
    assert warm_up(built(), lambda phase: None) == 7


@pytest.mark.parametrize("arm", ["full", "classes"])
def test_steady_steps_are_the_runs_own_and_are_discarded(arm: str) -> None:
    run = built(**ARMS[arm])
    before, stepped = state(run), []
    step = run.loop.step
    run.loop.step = lambda number: stepped.append(number) or step(number)  # type: ignore
    begun = time.monotonic()
    tokens = steady_steps(run, 0.4, lambda phase: None)
    assert time.monotonic() - begun >= 0.4
    assert stepped == [number % run.plan.steps for number in range(len(stepped))]
    assert tokens == sum(run.data.real_tokens("train", run.plan.indices(number)) for number in stepped) > 0
    assert_same(before, state(run))
