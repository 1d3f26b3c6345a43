"""Linear layers as products of two thin matrices, cut from the singular value decomposition of their weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loras_bench.pruning.blocks import Matrix, linears_of
from loras_bench.sparsity.estimator import low_rank


class LowRankLinear(nn.Module):
    """y = U (V x) + b, in a linear layer's place: r (inputs + outputs) weights."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    @classmethod
    def like(cls, matrix: Matrix, rank: int) -> LowRankLinear:
        """Of the sizes, type and device of a linear layer; its weights are 0."""
        outputs, inputs = matrix.by_outputs(matrix.weight).shape
        return cls(inputs, outputs, rank, getattr(matrix.module, "bias", None) is not None).to(matrix.weight)

    @torch.no_grad()
    def fit(self, matrix: Matrix) -> None:
        """The product of this rank that is nearest to the layer's weight (Eckart and Young 1936), and its bias."""
        factors = low_rank(matrix.by_outputs(matrix.weight), len(self.down))
        self.down.copy_(factors.down_rk)
        self.up.copy_(factors.up_nr)
        if self.bias is not None:
            self.bias.copy_(matrix.module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)


def replace_linears(model: nn.Module, pattern: str, rank: int, *, fitted: bool) -> None:
    """Put thin products in the place of the linear layers whose path ends as the regular expression says.

    Args:
        model: A transformers model before any adapter.
        pattern: As for `linears_of`.
        rank: Of each product.
        fitted: Whether they are fitted to the layers; else their values are to come.
    """
    for matrix in linears_of(model, pattern):
        module = LowRankLinear.like(matrix, rank)
        if fitted:
            module.fit(matrix)
        parent, _, name = matrix.name.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
