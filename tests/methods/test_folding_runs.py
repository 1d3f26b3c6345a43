"""Folding in the ways of a run: captured, in another number format, on a GPU, and in its sizes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_graphs import cpu_graphs  # noqa: F401
from test_composition import MODELS
from torch import Tensor
from training_fixtures import LORA, Rows, attended, build_run, digests, experiment, token_ids

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.build import Build, assemble, read
from loras_bench.counting import count_training
from loras_bench.folding.attention import FoldedAttention
from loras_bench.graphed import Graphs
from loras_bench.methods.folding import Fold, FoldConfig
from loras_bench.models.objective import Objective

pytestmark = pytest.mark.usefixtures("places")

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FOLD = {"kind": "fold", "calibration_tokens": 64}
SHARED = {"kind": "fold", "heads": "shared", "rank": 2, "values": "dense", "initialisation": "svd"}


def built(family: str, *methods: Any, device: str = "cpu", dtype: str = "float32", **training: Any) -> Build:
    sections = MODELS[family]
    model = experiment(**sections).model.model_dump() | {"dtype": dtype}
    return build_run(experiment(**(sections | {"model": model}), methods=methods, training=training), device=device)


@pytest.mark.usefixtures("cpu_graphs")
@pytest.mark.parametrize("methods", [(FOLD,), (FOLD, LORA), (SHARED,)], ids=["fold", "fold-lora", "shared"])
@pytest.mark.parametrize("family", MODELS)
def test_captured_steps_are_the_eager_steps(family: str, methods: Any) -> None:
    """Nothing is read to the host, and a replay needs nothing but the recorded addresses."""
    eager, graphed = (built(family, *methods, micro_batch_size=2) for _ in range(2))
    graphed.loop.graphs = Graphs(graphed.loop.device)
    for step in range(4):
        assert float(graphed.loop.step(step)) == float(eager.loop.step(step))
    assert digests(dict(graphed.model.named_parameters())) == digests(dict(eager.model.named_parameters()))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("switch", [{"gradient_checkpointing": True}, {"micro_batch_size": 2}], ids=str)
def test_folding_bears_the_switches_of_training(family: str, switch: dict[str, Any]) -> None:
    plain, switched = built(family, FOLD), built(family, FOLD, **switch)
    if "micro_batch_size" in switch:  # each calibrates on a batch of its own size: the same weights for both
        switched.model.load_state_dict(plain.model.state_dict())
    for step in range(3):
        torch.testing.assert_close(switched.loop.step(step), plain.loop.step(step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_without_batches_a_fold_has_its_sizes_and_costs(family: str) -> None:
    """What a dry run shows is what the run will be: parameters and FLOPs."""
    made = experiment(**MODELS[family], methods=[FOLD])
    dry = assemble(made, 0, torch.device("cpu"), read(made, 0), fitted=False)
    whole = build_run(made)
    assert dry.parameter_counts() == whole.parameter_counts()
    assert count_training(dry, torch.device("cpu")) == count_training(whole, torch.device("cpu"))
    blocks = [module for module in dry.model.modules() if isinstance(module, FoldedAttention)]
    assert len(blocks) == 2 and not any(block.query.any() for block in blocks)


@pytest.mark.parametrize("method", [FOLD, SHARED, {"kind": "svd"}], ids=["fold", "shared", "svd"])
def test_where_only_sizes_matter_nothing_is_fitted(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the fit would read data: a dry run decomposes no matrix."""
    made = experiment(**MODELS["llama"], methods=[method])
    whole = build_run(made)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("fitted")

    for function in ("svd", "svd_lowrank", "linalg.svd", "linalg.eigh", "linalg.solve", "linalg.qr"):
        monkeypatch.setattr(f"torch.{function}", never)
    dry = assemble(made, 0, torch.device("cpu"), read(made, 0), fitted=False)
    assert dry.parameter_counts() == whole.parameter_counts()
    notes = [getattr(run.model.config, "folding", None) for run in (dry, whole)]
    assert notes[0] == notes[1] and (notes[0] is None) == (method["kind"] == "svd")
    with pytest.raises(AssertionError, match="fitted"):
        build_run(made)


def test_costs_are_those_of_the_device_that_the_run_is_for() -> None:
    """On CUDA queries and keys of rank 1 have 8 columns, values of 4 heads too: 16 / 9 of the CPU's core.

    Also where a dry run counts without the device, in float32.
    """
    made = experiment(**MODELS["gpt2"], methods=[FOLD])
    flops = {}
    for device in ("cpu", "cuda"):
        dry = assemble(made, 0, torch.device(device), read(made, 0), fitted=False)
        dry.objective.to("meta")
        flops[device], _ = count_training(dry, torch.device("meta"))
    assert flops["cuda"].attention_executed == pytest.approx(16 / 9 * flops["cpu"].attention_executed)
    assert flops["cuda"].linear == flops["cpu"].linear


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("family", MODELS)
def test_a_dry_run_counts_what_a_gpu_does(family: str, device: str) -> None:
    run = built(family, FOLD, device=device, dtype="bfloat16")
    made = experiment(**MODELS[family], methods=[FOLD])
    dry = assemble(made, 0, torch.device(device), read(made, 0), fitted=False)
    dry.objective.to("meta")
    assert count_training(dry, torch.device("meta")) == count_training(run, run.accelerator.device)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_a_kernel_for_bfloat16_does_not_stop_the_fits(kernel: str, device: str) -> None:
    sections = MODELS["bert"]
    model = experiment(**sections).model.model_dump() | {"dtype": "bfloat16", "dense_attention": kernel}
    run = build_run(experiment(**(sections | {"model": model}), methods=[FOLD]), device=device)
    assert run.attention.describe()["dense_kernels_used"] == [], "nothing of the fits"
    assert torch.isfinite(run.loop.step(0))
    assert run.attention.describe()["dense_kernels_used"] == [kernel]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("fields", [{}, {"rank": 2}, {"heads": "shared"}, {"values": "dense"}], ids=str)
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("family", ["gpt2-classifier", "bert", "llama-classifier"])
def test_a_folded_forward_pass_on_a_gpu_is_that_of_the_cpu(family: str, kind: str, fields: Any, device: str) -> None:
    """Loss and gradients in float32, folded there from the same weights."""
    lengths = None if kind == "whole" else [16, 9, 12, 5]
    data = Rows(token_ids(4, 16), lengths, [0, 1, 2, 0], packed=kind == "packed")
    found: list[dict[str, Tensor]] = []
    for place in (torch.device("cpu"), torch.device(device)):
        model = attended(family, device=place)
        method = Fold(FoldConfig.model_validate({"kind": "fold", "initialisation": "row_mean"} | fields))
        method.observe([data.collate("train", [0, 1])])
        method.prepare(model).to(place)
        batch = {name: tensor.to(place) for name, tensor in data.collate("train", range(4)).items()}
        loss, _ = Objective(model, "classification", "torch").train()(**batch)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach().cpu()} | gradients)
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = float(ours[name].abs().max())
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4 * max(scale, 1e-2))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("methods", [(FOLD,), (FOLD, LORA), (SHARED, LORA)], ids=["fold", "fold-lora", "shared-lora"])
@pytest.mark.parametrize("family", MODELS)
def test_steps_captured_on_a_gpu_are_the_eager_steps(family: str, methods: Any, dtype: str, device: str) -> None:
    runs = [built(family, *methods, device=device, dtype=dtype, cuda_graph=graphed) for graphed in (False, True)]
    assert [run.loop.graphs is not None for run in runs] == [False, True]
    eager, graphed = ([float(run.loop.step(step)) for step in range(6)] for run in runs)
    torch.testing.assert_close(graphed, eager, rtol=1e-4 if dtype == "float32" else 2e-2, atol=1e-4)
    assert graphed[-1] < graphed[0]
    used = ModelAttention.of(runs[1].model).describe()["dense_kernels_used"]
    assert used and "math" not in used, f"a fused kernel takes the folded widths: {used}"
