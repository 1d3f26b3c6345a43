"""What the tests of linear groups share: layers of every kind, random inputs, borders, outputs with gradients."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loras_bench.kernels.bordered import bordered
from loras_bench.kernels.linear import LinearGroup

INPUTS, WIDTHS, RANK = 24, (16, 8, 40), 3
KINDS = ["lora", "conv1d", "two adapted", "scalings", "rank 16", "trained base", "full", "full conv1d", "frozen"]


class Layers(nn.Module):
    """Three linear layers that read the same input; the middle one has no bias."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        for name, width in zip("qkv", WIDTHS, strict=True):
            layer = Conv1D(width, INPUTS) if transposed else nn.Linear(INPUTS, width, bias=name != "k")
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


def adapt(layers: nn.Module, **fields: Any) -> PeftModel:
    settings = {"r": RANK, "lora_alpha": 4, "target_modules": ["q", "k", "v"]} | fields
    return get_peft_model(layers, LoraConfig(**settings))  # type: ignore[arg-type]


def make(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Layers of one kind, every parameter random: adapters as after a training."""
    torch.manual_seed(0)
    layers = Layers(transposed="conv1d" in kind)
    if kind == "lora" or kind == "conv1d":
        model: nn.Module = adapt(layers, fan_in_fan_out=kind == "conv1d")
    elif kind == "two adapted":
        model = adapt(layers, target_modules=["q", "v"])
    elif kind == "scalings":
        model = adapt(layers, alpha_pattern={"k": 7}, rank_pattern={"v": 5})
    elif kind == "rank 16":
        model = adapt(layers, r=16, target_modules=["v"])
    elif kind == "trained base":
        model = adapt(layers).requires_grad_()
    else:
        model = layers.requires_grad_(kind.startswith("full"))
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def modules_of(model: nn.Module) -> list[nn.Module]:
    layers = model.base_model.model if isinstance(model, PeftModel) else model
    return [layers.q, layers.k, layers.v]


class GiveBorder(torch.autograd.Function):
    """Copies a tensor into a bordered buffer, or the gradient on its way back: what norms and rotations do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, border: int, backward: bool) -> Tensor:
        ctx.border = border if backward else None
        return x.clone() if backward else copy_bordered(x, border)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return dx if ctx.border is None else copy_bordered(dx, ctx.border), None, None


def copy_bordered(x: Tensor, border: int) -> Tensor:
    """The same numbers with NaN at their right: what nobody wrote must not be read."""
    out = bordered(x.shape[:-1].numel(), x.shape[-1], border, x)
    out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,)).fill_(torch.nan)
    return out.copy_(x.flatten(0, -2)).view_as(x)


def with_borders(group: LinearGroup, x: Tensor) -> Tensor:
    return GiveBorder.apply(group(GiveBorder.apply(x, group.border, False)), group.border, True)


def inputs(dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(2, 5, sum(WIDTHS), generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), dy


def run(call: Any, model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and all gradients by name."""
    model.zero_grad()
    x.grad = None
    y = call(x)
    y.backward(dy)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad.clone()} | gradients
