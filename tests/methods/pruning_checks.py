"""What the tests of pruning share: runs that prune, and what must hold of their weights."""

from __future__ import annotations

from typing import Any

import torch
from cpu_graphs import cpu_graphs  # noqa: F401
from torch import Tensor
from training_fixtures import BERT, GPT2, LLAMA, MOODS, NOTES, build_run, digests, experiment

from loras_bench.build import Build
from loras_bench.methods.pruning import Prune

STEPS = 8
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"data": NOTES, "model": GPT2},
    "llama": {"data": NOTES, "model": LLAMA},
    "bert": {"data": MOODS, "model": BERT},
}
ARMS: dict[str, dict[str, Any]] = {
    "fpp": {"scope": ["embeddings", "feed_forward", "attention"]},
    "magnitude": {"score": "magnitude"},
    "random": {"score": "random"},
    "wanda": {"score": "wanda"},
    "movement": {"score": "movement"},
    "2:4": {"pattern": "2:4", "scope": ["feed_forward", "attention"]},
    "units": {"pattern": "structured"},
    "moving units": {"pattern": "structured", "score": "movement"},
}


def prune(**options: Any) -> dict[str, Any]:
    return {"kind": "prune", "sparsity": 0.5, "every": 2, "end": 0.75} | options


def built(
    family: str = "llama", *others: Any, model: Any = None, training: Any = None, device: str = "cpu", **options: Any
) -> Build:
    sections = FAMILIES[family] | {"model": FAMILIES[family]["model"] | (model or {})}
    size = {"batch_size": 4, "epochs": STEPS / 6} if family == "bert" else {"tokens": STEPS * 128}
    settings = size | {"weight_decay": 0.1} | (training or {})
    return build_run(experiment(**sections, methods=[prune(**options), *others], training=settings), device=device)


def method_of(run: Build) -> Prune:
    return next(method for method in run.methods if isinstance(method, Prune))


def kept_units(run: Build) -> dict[str, Tensor]:
    """Numbers of the units that are left, int64 (units,), by the matrix that reads them."""
    units = {block.matrix.name: block.pruned for block in method_of(run).blocks if block.pruned.ndim == 1}
    return {name: (~pruned).nonzero()[:, 0] for name, pruned in units.items()}


def values_of(run: Build) -> dict[int, list[Tensor]]:
    """For each parameter what of it is stored anywhere: itself, its master, its moments."""
    found = {id(parameter): [parameter.detach()] for parameter in run.model.parameters()}
    for group in run.optimizer.groups:
        for buffer in (group.master, group.exp_avg, group.exp_avg_sq):
            for parameter, view in zip(group.params, group.views(buffer), strict=True):
                found[id(parameter)].append(view)
    return found


def assert_zero(run: Build) -> None:
    """Bit-zero wherever the mask says so: positive zero in every number format."""
    values, integers = values_of(run), {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    for block in method_of(run).blocks:
        for parameter, shape in block.places:
            mask = block.pruned.view(shape).expand(parameter.shape)
            for tensor in values[id(parameter)]:
                assert not tensor[mask].view(integers[tensor.dtype]).any()


def masks_of(run: Build) -> list[Tensor]:
    return [block.pruned.clone() for block in method_of(run).blocks]


def weights(run: Build) -> dict[str, str]:
    return digests(dict(run.model.named_parameters()))
