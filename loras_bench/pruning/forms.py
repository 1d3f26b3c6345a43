"""The forms in which a trained model can be kept and run, and what their forward passes execute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.metering.flops import MatmulCounter
from loras_bench.pruning.blocks import Matrix
from loras_bench.pruning.export import Vocabulary, export
from loras_bench.pruning.semi_structured import two_of_four_linears

NOTHING_TO_CUT = "no hidden unit and too few tokens are zero throughout: nothing to cut"
NOT_TWO_OF_FOUR = "no linear layer has two zeros in each four inputs"
SMALLER = ("folding", "low_rank")
"""Where configurations note that modules were replaced by smaller ones."""
SMALL = 0.02
"""Standard deviation of values where there are none to go by: that of new weights in transformers."""


@dataclass(frozen=True)
class Form:
    """A model on the CPU, as it is stored, with what its forward pass needs beside it.

    `linears` are the layers that run on the sparse tensor cores. A form that there cannot be has no model, and a
    `reason`.
    """

    name: str
    model: Any = None
    vocabulary: Vocabulary | None = None
    linears: list[Matrix] = field(default_factory=list)
    reason: str | None = None

    def inputs(self, ids_bs: Tensor) -> Tensor:
        """What it reads for these tokens."""
        return ids_bs if self.vocabulary is None else self.vocabulary.rows(ids_bs)


def forms_of(model: Any, out: Path | None = None) -> Iterator[Form]:
    """Dense, trained, exported and 2:4, each a copy that is made when its turn comes.

    Args:
        model: A transformers model; it is not changed.
        out: Folder that keeps the exported model, if there is one.
    """
    yield Form("dense", dense_of(model))
    yield Form("trained", copy.deepcopy(model))
    if (exported := export(copy.deepcopy(model))) is None:
        yield Form("exported", reason=NOTHING_TO_CUT)
    else:
        if out is not None:
            exported.save(out)
        yield Form("exported", exported.model, exported.vocabulary)
    sparse = copy.deepcopy(model)
    linears = two_of_four_linears(sparse)
    yield Form("2:4", sparse, linears=linears) if linears else Form("2:4", reason=NOT_TWO_OF_FOUR)


def forward_flops(form: Form, ids_bs: Tensor) -> tuple[float, list[str]]:
    """What a forward pass executes, and the names of operations that have no formula.

    A two-of-four sparse product executes half of the dense one. Nothing is computed.

    Args:
        form: With our attention in its model.
        ids_bs: Its batch.
    """
    model = copy.deepcopy(form.model).to("meta")
    saved: list[int] = []

    def halve(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        saved.append(inputs[0].numel() * output.shape[-1])  # of 2 for each multiply-add

    for matrix in form.linears:
        model.get_submodule(matrix.name).register_forward_hook(halve)
    with torch.no_grad(), ModelAttention.of(model).counting() as calls, MatmulCounter() as counter:
        model(input_ids=form.inputs(ids_bs).to("meta"))
    executed = counter.flops + sum(call.flops(call.pairs.executed) for call in calls)
    return executed - sum(saved), sorted(counter.unknown)


def dense_of(model: Any) -> Any:
    """A copy that costs what the model would without pruning and folding; what it computes is not asked for.

    Where modules were replaced by smaller ones it is the whole architecture with random weights. All zeros get random
    values, as large as those beside them, since a GPU draws less power for zeros; a tensor of zeros alone, such as the
    biases of a new model, gets small ones.
    """
    config = copy.deepcopy(model.config)
    if notes := [note for note in SMALLER if hasattr(config, note)]:
        for note in notes:
            delattr(config, note)
        model = type(model)(config).to(model.dtype).eval()
    else:
        model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        zero = weight.detach() == 0
        if zero.any():
            scale = SMALL if zero.all() else weight.detach()[~zero].float().square().mean().sqrt()
            values = scale * torch.randn(weight.shape, generator=generator)
            weight.data[zero] = values.to(weight.dtype)[zero]
    return model
