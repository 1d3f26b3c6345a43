"""Where each architecture keeps the matrices of its attention, read over output units whatever the layout of a layer.

transformers' `Conv1D` (GPT-2) stores a weight as (inputs, outputs), `nn.Linear` as (outputs, inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LinearMap:
    """A linear map: `weight_oi` over output units, and `bias_o` where there is one."""

    weight_oi: Tensor
    bias_o: Tensor | None

    @classmethod
    def of(cls, module: nn.Module) -> LinearMap:
        """Of an nn.Linear or a Conv1D, sharing its memory."""
        weight, bias = module.weight.detach(), module.bias  # type: ignore[operator, union-attr]
        return cls(weight.t() if isinstance(module, Conv1D) else weight, None if bias is None else bias.detach())  # type: ignore[arg-type, operator]

    def split(self, parts: int) -> list[LinearMap]:
        """Its output units in equal runs."""
        biases = [None] * parts if self.bias_o is None else self.bias_o.chunk(parts)
        return [LinearMap(weight, bias) for weight, bias in zip(self.weight_oi.chunk(parts), biases, strict=True)]

    def heads(self, heads: int) -> LinearMap:
        """Output units by head: (heads, units, inputs) and (heads, units)."""
        bias = None if self.bias_o is None else self.bias_o.unflatten(0, (heads, -1))
        return LinearMap(self.weight_oi.unflatten(0, (heads, -1)), bias)

    def as_module(self, like: nn.Module) -> nn.Module:
        """A layer of the kind of another that is this map, with parameters of its own."""
        outputs, inputs = self.weight_oi.shape
        conv1d = isinstance(like, Conv1D)
        module = Conv1D(outputs, inputs) if conv1d else nn.Linear(inputs, outputs, bias=self.bias_o is not None)
        self.write(module)
        return module

    def write(self, module: Any) -> None:
        """Give a linear module this map, in its own layout and number format; a bias that it lacks is added."""
        like, transposed = module.weight, isinstance(module, Conv1D)
        weight = (self.weight_oi.t() if transposed else self.weight_oi).to(like)
        module.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        if not transposed:
            module.out_features, module.in_features = weight.shape
        if self.bias_o is not None:
            module.bias = nn.Parameter(self.bias_o.to(like).clone())


@dataclass(frozen=True)
class DenseAttention:
    """The attention of one layer as it was trained.

    `module` is the attribute `name` of `owner`; `output` is the projection of its output, and `inside` what of the
    module follows the core.
    """

    owner: nn.Module
    name: str
    query: LinearMap
    key: LinearMap
    value: LinearMap
    output: nn.Module
    inside: Mapping[str, nn.Module]
    scaling: float
    rotary: bool = False

    @property
    def module(self) -> nn.Module:
        return self.owner.get_submodule(self.name)


def read_attention(base: Any, layer: int) -> DenseAttention:
    """The attention of a layer of a GPT-2, BERT, RoBERTa or Llama base model, before any adapter."""
    family = base.config.model_type
    if family == "gpt2":
        block = base.h[layer]
        query, key, value = LinearMap.of(block.attn.c_attn).split(3)
        inside = {"c_proj": block.attn.c_proj, "resid_dropout": block.attn.resid_dropout}
        return DenseAttention(block, "attn", query, key, value, block.attn.c_proj, inside, block.attn.scaling)
    if family in ("bert", "roberta"):
        block = base.encoder.layer[layer].attention
        core = block.self
        query, key, value = map(LinearMap.of, (core.query, core.key, core.value))
        return DenseAttention(block, "self", query, key, value, block.output.dense, {}, core.scaling)
    if family == "llama":
        block = base.layers[layer]
        core = block.self_attn
        query, key, value = map(LinearMap.of, (core.q_proj, core.k_proj, core.v_proj))
        return DenseAttention(
            block, "self_attn", query, key, value, core.o_proj, {"o_proj": core.o_proj}, core.scaling, rotary=True
        )
    raise ValueError(f"no attention of {family} models is known")


def with_constant(matrix: LinearMap) -> Tensor:
    """[W, b] of a map by heads: (heads, units, inputs + 1)."""
    bias = matrix.weight_oi.new_zeros(matrix.weight_oi.shape[:-1]) if matrix.bias_o is None else matrix.bias_o
    return torch.cat([matrix.weight_oi, bias[..., None]], dim=-1)
