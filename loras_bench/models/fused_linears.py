"""LoRA layers as fused products, in models whose forward pass is not fused."""

from __future__ import annotations

from typing import Any

from torch import nn

from loras_bench.kernels.linear import LinearGroup, why_not
from loras_bench.models.fused import described


class FusedLinears:
    """Gives every LoRA layer of a model the product of its one-module `LinearGroup` as forward, until `remove`.

    Create it once the model has its type and device; remove it before adapters are merged or weights saved.

    Attributes:
        refusals: Names of the LoRA layers that keep PEFT's forward, and why.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        self._fused: list[tuple[nn.Module, LinearGroup]] = []
        self.refusals: dict[str, str] = {}
        for name, module in model.named_modules():
            if not issubclass(type(module), LoraLayer):
                continue
            if reason := why_not([module]):
                self.refusals[name] = reason
                continue
            group = LinearGroup.of([module])
            group.pack()
            module.forward = group
            self._fused.append((module, group))

    def __len__(self) -> int:
        """How many layers were fused."""
        return len(self._fused)

    def describe(self) -> dict[str, Any]:
        """How many linear layers are fused, and which adapted ones are not and why; for the record."""
        return described("transformers", len(self), self.refusals)

    def remove(self) -> None:
        """PEFT's forward again, and storage of its own for every parameter."""
        for module, group in self._fused:
            del module.forward
            group.unpack()
        self._fused.clear()
