"""What can be pruned of a model: its matrices, and the blocks of weights that share a mask."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loras_bench.distributed import mean_over_processes
from loras_bench.pruning.masks import pack_bits, unpack_bits

WRITERS = {
    "mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.c_fc",),
    "output.dense": ("intermediate.dense",),
}
"""Feed-forward layers: whose inputs are the hidden units, and whose outputs (Llama; GPT-2; BERT and RoBERTa)."""


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer or of an embedding, which is a linear layer of one-hot inputs."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (inputs, outputs)."""
        return isinstance(self.module, Conv1D | nn.Embedding)

    def by_outputs(self, tensor: Tensor) -> Tensor:
        """A tensor laid out as the weight, seen as (outputs, inputs)."""
        return tensor.t() if self.transposed else tensor

    def along(self, units: int, *, inputs: bool) -> tuple[int, int]:
        """The shape in which a mask of the inputs, or outputs, spreads over the weight as it is stored."""
        return (1, units) if inputs != self.transposed else (units, 1)


@dataclass(frozen=True)
class Part:
    """What shares masks: the weights of a matrix; or with `writers` the units that it reads and those write.

    The units of an embedding are tokens, which nothing writes: `()`.
    """

    matrix: Matrix
    writers: tuple[Matrix, ...] | None = None


@dataclass
class Block:
    """Weights that share a mask: those of one matrix, or of whole units, which are the inputs of that matrix.

    A hidden unit takes the rows and biases that write it along with the column that reads it; a token its embedding.

    Attributes:
        places: Parameters, and the shape in which the mask spreads over each.
        pruned: bool, True where weights are zero: in the layout of the weight, or (units,).
        norm_i: Of each input over the calibration batches, float32 (inputs,); None where scores do without.
        movement: The sum of -gradient * weight over the steps, float32, shaped as `pruned`; None for other scores. Of
            this process's share of the rows, with gradients whose mean over the processes is the step's.
    """

    matrix: Matrix
    places: list[tuple[nn.Parameter, tuple[int, ...]]]
    pruned: Tensor
    norm_i: Tensor | None = None
    movement: Tensor | None = None

    @classmethod
    def of(cls, part: Part) -> Block:
        """The block of a part, nothing pruned."""
        matrix, weight = part.matrix, part.matrix.weight
        if part.writers is None:
            pruned = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
            return cls(matrix, [(weight, tuple(weight.shape))], pruned)
        units = matrix.by_outputs(weight).shape[1]
        places: list[tuple[nn.Parameter, tuple[int, ...]]] = [(weight, matrix.along(units, inputs=True))]
        for writer in part.writers:
            places.append((writer.weight, writer.along(units, inputs=False)))
            if isinstance(bias := getattr(writer.module, "bias", None), nn.Parameter):
                places.append((bias, (units,)))
        return cls(matrix, places, torch.zeros(units, dtype=torch.bool, device=weight.device))

    def state_dict(self) -> dict[str, Tensor]:
        """The mask as bits, and what its scores are made of: the mean over all processes, which call it together."""
        state = {f"{self.matrix.name}.pruned": pack_bits(self.pruned)}
        return state | {
            f"{self.matrix.name}.{name}": mean_over_processes(tensor) if tensor is self.movement else tensor
            for name, tensor in self._sums().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, in place."""
        packed = state[f"{self.matrix.name}.pruned"].to(self.pruned.device)
        self.pruned.copy_(unpack_bits(packed, self.pruned.shape))
        for name, tensor in self._sums().items():
            tensor.copy_(state[f"{self.matrix.name}.{name}"])

    def _sums(self) -> dict[str, Tensor]:
        named = {"norm_i": self.norm_i, "movement": self.movement}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def embedding_of(model: Any) -> Matrix:
    """The input embedding of a transformers model, to which its output layer may be tied."""
    embedding = model.get_input_embeddings()
    return Matrix(next(name for name, module in model.named_modules() if module is embedding), embedding)


def linears_of(model: nn.Module, pattern: str) -> list[Matrix]:
    """The linear layers of a transformers model whose path ends as the regular expression says."""
    return [matrix for name, matrix in _linears(model).items() if re.fullmatch(rf".*\.{pattern}", name)]


def hidden_units_of(model: nn.Module) -> list[tuple[Matrix, tuple[Matrix, ...]]]:
    """The matrix that reads the hidden units of each feed-forward layer, and those that write them."""
    linears, found = _linears(model), []
    for name, matrix in linears.items():
        for reader, writers in WRITERS.items():
            names = [name.removesuffix(reader) + writer for writer in writers]
            if name.endswith(f".{reader}") and all(other in linears for other in names):
                found.append((matrix, tuple(linears[other] for other in names)))
    return found


def _linears(model: nn.Module) -> dict[str, Matrix]:
    return {
        name: Matrix(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
