"""Pruning in the ways of a run: resumed, captured, fused, beside other methods, and finished."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_graphs import cpu_graphs  # noqa: F401
from pruning_checks import ARMS, STEPS, assert_zero, built, masks_of, method_of, weights
from training_fixtures import LORA, WINDOW

from loras_bench.checkpoint import load_checkpoint, save_checkpoint
from loras_bench.graphed import Graphs
from loras_bench.warmup import warm_up

pytestmark = pytest.mark.usefixtures("places")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("arm", "others"),
    [("fpp", ()), ("movement", ()), ("units", ()), ("2:4", ()), ("fpp", (LORA,)), ("units", (LORA,))],
    ids=str,
)
def test_a_resumed_run_is_the_same_run(arm: str, dtype: str, others: Any, tmp_path: Path) -> None:
    """Also after warm-up steps, whose zeros are undone: those in frozen weights too, which no optimizer state holds."""
    whole, first, second = (built("llama", *others, model={"dtype": dtype}, **ARMS[arm]) for _ in range(3))
    for step in range(STEPS):
        whole.loop.step(step)
    start = weights(first)
    warm_up(first, lambda text: None)
    first.loop.step(STEPS - 2)
    first.loop.step(STEPS - 3)  # it raises the masks to the target
    assert weights(first) != start
    first.state.restore(second.state.snapshot())
    assert weights(first) == start
    for step in range(5):
        first.loop.step(step)
    save_checkpoint(tmp_path, first.state.tensors(), {"step": 5})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert {t.dtype for name, t in loaded[1].items() if name.endswith("pruned")} == {torch.uint8}
    for block in method_of(second).blocks:
        if block.norm_i is not None:
            block.norm_i.fill_(1)  # as if another machine had measured
    second.state.restore(loaded[1])
    for step in range(5, STEPS):
        second.loop.step(step)
    assert_zero(second)
    assert weights(second) == weights(whole)
    assert all(torch.equal(one, other) for one, other in zip(masks_of(second), masks_of(whole), strict=True))


@pytest.mark.usefixtures("cpu_graphs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", ["fpp", "movement", "moving units", "2:4"])
def test_captured_steps_are_the_eager_steps(arm: str, dtype: str) -> None:
    eager, graphed = (
        built("llama", model={"dtype": dtype}, training={"micro_batch_size": 2}, **ARMS[arm]) for _ in range(2)
    )
    graphed.loop.graphs = Graphs(graphed.loop.device)
    for step in range(STEPS):
        assert float(graphed.loop.step(step)) == float(eager.loop.step(step))
    assert len(graphed.loop.graphs) == 3, "two parts of a step and the update, once each"
    assert_zero(graphed)
    assert weights(graphed) == weights(eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["fused", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("arm", "others"), [("fpp", ()), ("movement", ()), ("units", ()), ("2:4", ()), ("fpp", (LORA,))], ids=str
)
def test_steps_captured_on_a_gpu_are_the_eager_steps(arm: str, others: Any, dtype: str, implementation: str) -> None:
    """Also while the masks change between replays."""
    model = {"dtype": dtype, "implementation": implementation}
    eager, graphed = (
        built("llama", *others, device="cuda", model=model, training={"cuda_graph": captured}, **ARMS[arm])
        for captured in (False, True)
    )
    assert eager.loop.graphs is None and graphed.loop.graphs is not None
    for step in range(STEPS):
        expected = float(eager.loop.step(step))
        assert float(graphed.loop.step(step)) == pytest.approx(expected, rel=1e-4 if dtype == "float32" else 2e-2)
        assert_zero(graphed)
    assert all(int(mask.sum()) == round(0.5 * mask.numel()) for mask in masks_of(graphed))


@pytest.mark.parametrize(
    ("family", "others", "options"),
    [("llama", (), {}), ("gpt2", (LORA,), {"pattern": "structured"}), ("bert", (), {"pattern": "structured"})],
    ids=["llama", "gpt2-lora-units", "bert-units"],
)
def test_parameters_that_are_views_of_a_packed_matrix_are_pruned_too(family: str, others: Any, options: Any) -> None:
    """Frozen ones are pruned where the fused products read them; the optimizer writes there those that train."""
    options = options | {"score": "magnitude", "end": 0.25, "every": 1}
    fused, plain = (
        built(family, *others, model={"implementation": implementation}, **options)
        for implementation in ("fused", "transformers")
    )
    assert fused.fused is not None
    for step in range(3):
        torch.testing.assert_close(fused.loop.step(step), plain.loop.step(step), rtol=1e-3, atol=1e-4)
        assert_zero(fused)
    assert all(
        torch.equal(one, other) and one.any() for one, other in zip(masks_of(fused), masks_of(plain), strict=True)
    )
    fused.fused.remove()
    method_of(fused).finish(fused.model)
    assert_zero(fused)


def test_lora_trains_beside_a_base_that_loses_weights() -> None:
    run = built("llama", LORA, end=0)
    base = {name: digest for name, digest in weights(run).items() if ".lora_" not in name}
    first = run.loop.step(0)
    for step in range(1, STEPS):
        last = run.loop.step(step)
    assert last < first
    assert {name: digest for name, digest in weights(run).items() if ".lora_" not in name} == base
    assert_zero(run)
    zeros = sum(int(block.pruned.sum()) for block in method_of(run).blocks)
    assert zeros == sum(block.pruned.numel() // 2 for block in method_of(run).blocks) > 0


def test_it_goes_with_sparse_attention() -> None:
    run = built("llama", WINDOW)
    for step in range(STEPS):
        assert math.isfinite(run.loop.step(step))
    assert_zero(run)
    assert {pattern.kind for pattern in run.attention.patterns} == {"window"}


def test_finished_weights_keep_their_zeros_and_are_free_again() -> None:
    run = built("llama", end=0)
    method = method_of(run)
    model = method.finish(run.model)
    assert_zero(run)
    run.loop.step(0)
    run.loop.step(1)
    assert model is run.model and method.blocks[-1].matrix.weight[method.blocks[-1].pruned].any()
