"""Steps replayed as CUDA graphs are the eager steps: same losses, weights and random numbers, whatever comes between.

Each test runs on the CPU with a stand-in for CUDA's graphs alone (cpu_graphs.py), and on a GPU with the real ones.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Hashable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from cpu_graphs import Tape, cpu_graphs  # noqa: F401
from torch import Tensor
from training_fixtures import Rows, make_loop, task_of, tiny, token_ids

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from loras_bench.errors import ConfigError
from loras_bench.graphed import Eager, Graphs, shapes_of
from loras_bench.methods.base import Method, MethodConfig, Stage, Taps
from loras_bench.training import Loop, StepPlan

STEPS = 10
FAMILIES = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "bert": {"hidden_dropout_prob": 0.1},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("cpu_graphs")
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


class _ProbeConfig(MethodConfig):
    kind: Literal["probe"] = "probe"


class Probe(Method[_ProbeConfig]):
    """Pulls the model's first vector by a number of Python's that graphs bake in, and by a device tensor.

    Args:
        keys: `graph_key` of each step, and the baked number.
    """

    stage: ClassVar[Stage] = Stage.SPARSIFY

    def __init__(self, model: torch.nn.Module, device: str, keys: list[int | None]) -> None:
        super().__init__(_ProbeConfig())
        self.weight = next(p for p in model.parameters() if p.ndim == 1)
        self.keys, self.baked = keys, 0.0
        self.pull = torch.zeros((), device=device)
        self.seen = torch.zeros((), device=device)

    def before_step(self, step: int) -> None:
        self.baked = float(self.keys[step] or 0)
        self.pull.fill_(0.1 * step)

    def graph_key(self, step: int) -> Hashable | None:
        return self.keys[step]

    def loss_terms(self, taps: Taps) -> dict[str, Tensor]:
        self.seen += 1
        return {"pull": (self.baked + self.pull) * self.weight.sum()}

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen.copy_(state["seen"])


def loop_of(
    device: str,
    graphed: bool,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    keys: list[int | None] | None = None,
) -> Loop:
    """Ten steps of two micro-batches of unequal rows: so many targets, and in classifiers so many shapes."""
    model = tiny(family, **FAMILIES[family]).to(device)
    ModelAttention.install(model)
    labels = [0, 1, 2] * 4 if task_of(family) == "classification" else None
    data = Rows(token_ids(12, 16), lengths=[16, 7, 11] * 4, labels=labels)
    methods = [Probe(model, device, keys)] if keys else []
    plan = StepPlan(12, 4, 2, STEPS, 0)
    loop = make_loop(model, data, plan, methods, dtype, device, graphed, max_grad_norm=1.0)
    if keys:
        loop.taps = Taps()  # methods add to the loss
    torch.manual_seed(1)
    return loop


def state_of(loop: Loop) -> TrainingState:
    return TrainingState(loop.optimizer, loop.methods, loop.device)


def train(loop: Loop, start: int = 0, stop: int = STEPS) -> list[Tensor]:
    return [loop.step(step) for step in range(start, stop)]


def assert_same(loop: Loop, losses: list[Tensor], eager: Loop, expected: list[Tensor]) -> None:
    """Bit for bit on the CPU; on a GPU some backward passes add in an order that changes."""
    dtype = eager.optimizer.parameters[0].dtype
    exact = eager.device.type == "cpu"
    tolerance = (
        {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-5 if dtype is torch.float32 else 2e-2}
    )
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), **tolerance)
    ours, theirs = loop.optimizer, eager.optimizer
    for mine, other in zip((*ours.parameters, *ours.masters), (*theirs.parameters, *theirs.masters), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def captured(loop: Loop) -> int:
    assert loop.graphs is not None
    return len(loop.graphs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_replayed_steps_are_the_eager_steps(device: str, family: str, dtype: torch.dtype) -> None:
    """With accumulation, dropout, a rate that changes, and batches of several shapes."""
    eager = loop_of(device, False, family, dtype)
    expected = train(eager)
    graphed = loop_of(device, True, family, dtype)
    assert_same(graphed, train(graphed), eager, expected)
    shapes = 1 if family != "bert" else len({shapes_of(b) for step in range(STEPS) for b in parts(graphed, step)})
    assert (shapes > 1) == (family == "bert")
    assert 3 <= captured(graphed) <= 2 * shapes + 1, "first and later parts of each shape, and the update"


def parts(loop: Loop, step: int) -> list[dict[str, Tensor]]:
    rows = loop.plan.indices(step)
    return [loop.data.collate("train", rows[:2]), loop.data.collate("train", rows[2:])]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_layers_are_replayed_too(device: str, family: str) -> None:
    """With dropout on a GPU only: the stand-in cannot take random numbers back, torch's graphs can."""
    if family == "gpt2" and device == "cpu":
        pytest.skip("its random numbers cannot be replayed")
    losses, loops = [], []
    for graphed in (False, True):
        loop = loop_of(device, graphed, family)
        loop.objective.model.gradient_checkpointing_enable({"use_reentrant": False})
        losses.append(train(loop))
        loops.append(loop)
    assert_same(loops[1], losses[1], loops[0], losses[0])


def test_each_key_has_graphs_of_its_own_and_none_runs_eagerly(device: str) -> None:
    keys: list[int | None] = [1, 1, 1, 2, 2, None, 2, 1, None, 1]
    eager = loop_of(device, False, keys=keys)
    expected = train(eager)
    graphed = loop_of(device, True, keys=keys)
    losses = train(graphed)
    assert_same(graphed, losses, eager, expected)
    assert captured(graphed) == 6, "three pieces for each of two keys, whenever they come"


def test_a_method_that_is_never_graphed_makes_every_step_eager(device: str) -> None:
    loop = loop_of(device, True, keys=[None] * STEPS)
    train(loop, stop=3)
    assert captured(loop) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_graphs_outlive_the_restoring_of_a_snapshot(device: str, dtype: torch.dtype) -> None:
    """Warm-up records; its steps are undone; the run replays what warm-up recorded, and random numbers go on."""
    keys: list[int | None] = [1] * STEPS
    eager = loop_of(device, False, "gpt2", dtype, keys)
    expected = train(eager)
    graphed = loop_of(device, True, "gpt2", dtype, keys)
    state = state_of(graphed)
    snapshot = state.snapshot()
    train(graphed, stop=4)
    state.restore(snapshot)
    recorded = captured(graphed), Tape.recorded
    losses = train(graphed)
    assert (captured(graphed), Tape.recorded) == recorded
    assert_same(graphed, losses, eager, expected)
    method = graphed.methods[0]
    assert float(method.state_dict()["seen"]) == 2 * STEPS, "a graph counts in the tensor that was restored"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_resumed_run_replays_the_same_steps(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A fresh process warms up, which records, and then takes up the checkpoint of another."""
    first = loop_of(device, True, "gpt2", dtype)
    begun = train(first, stop=5)
    save_checkpoint(tmp_path, state_of(first).tensors(), {"step": 5})
    expected = [*begun, *train(first, 5)]
    second = loop_of(device, True, "gpt2", dtype)
    state = state_of(second)
    snapshot = state.snapshot()
    train(second, stop=3)
    state.restore(snapshot)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    state.restore(loaded[1])
    assert_same(second, [*begun, *train(second, 5)], first, expected)


class Reader(Probe):
    """Reads a value in the midst of a step, which makes the host wait."""

    def loss_terms(self, taps: Taps) -> dict[str, Tensor]:
        return {"pull": self.weight.sum() * float(self.pull)}


def refusal(device: str) -> tuple[str, str | None]:
    """Message and hint of the error of a step that reads a value."""
    loop = loop_of(device, True, keys=[1] * STEPS)
    loop.methods = [Reader(loop.objective, device, [1])]
    with pytest.raises(ConfigError) as raised:
        loop.step(0)
    return raised.value.message, raised.value.hint


def test_what_cannot_be_recorded_is_said_with_the_way_out(device: str) -> None:
    if device == "cpu":
        message, hint = refusal(device)
    else:  # in a process of its own: a capture that failed may leave CUDA unusable
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            message, hint = pool.submit(refusal, device).result()
    assert re.match(r"training.cuda_graph: the step cannot be captured: .*captur", message)
    assert hint == "set training.cuda_graph: false"


def test_a_lack_of_memory_is_raised_as_it_is(device: str) -> None:
    """A smaller batch helps, eager steps do not; what failed is not held, so that the piece may be tried again."""
    graphs, total = Graphs(torch.device(device)), torch.zeros((), device=device)
    lack = torch.OutOfMemoryError("CUDA out of memory")
    passes = [lack, None, lack, None]

    def piece() -> None:
        total.add_(1)
        if error := passes.pop(0):
            raise error

    for _ in ("rehearsal", "recording"):
        with pytest.raises(torch.OutOfMemoryError) as raised:
            graphs.run("kernels", 1, piece)
        assert raised.value is lack and len(graphs) == 0
    graphs.run("kernels", 1, piece)
    assert len(graphs) == 1 and float(total) == 3.0, "two rehearsals and a replay"


def test_batches_of_one_shape_share_their_buffers(device: str) -> None:
    graphs = Graphs(torch.device(device))
    batches = [{"input_ids": token_ids(2, 8, seed), "targets": token_ids(2, 8, seed + 9)} for seed in range(3)]
    places = []
    for batch in batches:
        inputs = graphs.load(batch)
        assert all(torch.equal(inputs[name].cpu(), tensor) for name, tensor in batch.items())
        places.append([tensor.data_ptr() for tensor in inputs.values()])
    assert places[0] == places[1] == places[2]
    wider = graphs.load({"input_ids": token_ids(2, 9), "targets": token_ids(2, 9)})
    assert wider["input_ids"].shape == (2, 9)
    assert torch.equal(graphs.load(batches[0])["targets"].cpu(), batches[0]["targets"])


def test_shapes_tell_apart_what_runs_different_operations() -> None:
    batch = {"input_ids": token_ids(2, 8), "targets": token_ids(2, 8)}
    assert shapes_of(batch) == shapes_of({name: batch[name] + 1 for name in reversed(batch)})
    others = [
        {**batch, "targets": token_ids(1, 8)},
        {**batch, "attention_mask": torch.ones(2, 8, dtype=torch.bool)},
        {**batch, "input_ids": batch["input_ids"].int()},
    ]
    assert len({shapes_of(other) for other in (batch, *others)}) == 4


def test_a_piece_runs_once_a_call_and_kernels_are_rehearsed_once(device: str) -> None:
    """A rehearsal takes memory beside the graphs', so the second piece of the same kernels goes without one."""
    graphs, total = Graphs(torch.device(device)), torch.zeros((), device=device)
    passes: list[str] = []

    def piece(name: str, amount: float) -> None:
        passes.append(name)
        total.add_(amount)

    for _ in range(3):
        graphs.run("a", 1, partial(piece, "a1", 1.0))
        graphs.run("a", 2, partial(piece, "a2", 10.0))
        graphs.run("b", 1, partial(piece, "b1", 100.0))
    assert float(total) == 333.0
    assert passes == ["a1", "a1", "a2", "b1", "b1"]
    assert len(graphs) == 3


def test_eager_runs_a_piece_each_time() -> None:
    calls: list[int] = []
    for _ in range(3):
        Eager(torch.device("cpu")).run("kernels", None, lambda: calls.append(1))
    assert len(calls) == 3


@pytest.mark.gpu
def test_the_peak_of_memory_counts_what_graphs_hold() -> None:
    """A replay allocates nothing; what its activations take must show all the same."""
    peaks = []
    for graphed in (False, True):
        loop = loop_of("cuda", graphed, "gpt2")
        train(loop, stop=3)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(loop, 3, 6)
        torch.cuda.synchronize()
        peaks.append(loop.peak_memory_bytes() - before)
        del loop
    assert peaks[1] == pytest.approx(peaks[0], rel=0.2)
