"""Two-of-four sparse weights on the sparse tensor cores, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loras_bench.pruning.blocks import Matrix, linears_of

EVERY_LINEAR = r"[^.]+"


def is_two_of_four(weight_oi: Tensor) -> bool:
    """Whether of each four neighbouring inputs of each output at least two weights are zero."""
    return weight_oi.shape[1] % 4 == 0 and bool(((weight_oi.reshape(-1, 4) != 0).sum(dim=1) <= 2).all())


def two_of_four_linears(model: nn.Module) -> list[Matrix]:
    """The linear layers of a transformers model's body whose weights are two-of-four sparse."""
    return [m for m in linears_of(model, EVERY_LINEAR) if is_two_of_four(m.by_outputs(m.weight.detach()))]


def use_sparse_tensor_cores(model: nn.Module, linears: list[Matrix]) -> None:
    """Compress linear layers for the sparse tensor cores, in place; they are for inference then.

    Args:
        model: On CUDA, in bfloat16 or float16.
        linears: Some of `two_of_four_linears`.

    Raises:
        RuntimeError: torch refuses a weight's device, number format or size.
    """
    for matrix in linears:
        module: Any = matrix.module
        weight_oi = matrix.by_outputs(module.weight.detach()).contiguous()
        compressed = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight_oi), requires_grad=False)
        if isinstance(module, Conv1D):  # multiplies from the other side
            outputs, inputs = weight_oi.shape
            linear = nn.Linear(inputs, outputs, bias=False, device="meta")
            linear.weight, linear.bias = compressed, module.bias
            model.set_submodule(matrix.name, linear)
        else:
            module.weight = compressed
