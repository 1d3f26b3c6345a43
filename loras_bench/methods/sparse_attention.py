"""Structured sparse attention: with LoRA it is LoRA-S (Tiwari and Harish 2026), alone the arm that tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from loras_bench.attention.backend import SparseBackend
from loras_bench.attention.families import check_architecture, is_causal
from loras_bench.attention.patterns import Pattern, PatternBase
from loras_bench.errors import ConfigError
from loras_bench.methods.base import Method, MethodConfig, Stage

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


class SparseAttentionConfig(MethodConfig):
    """Which pairs attend in which layer."""

    kind: Literal["sparse_attention"] = "sparse_attention"
    pattern: Pattern
    """The pattern of all layers that `layers` does not name."""
    layers: Mapping[str, Pattern] = Field(default_factory=dict)
    """Patterns of single layers: a layer (`"3"`) or a range with both ends (`"0-1"`), counted from 0."""
    backend: SparseBackend = "auto"
    """Who computes it; `auto` is our Triton kernels on CUDA and the masked reference elsewhere."""

    @field_validator("layers", mode="before")
    @classmethod
    def _text_keys(cls, layers: object) -> object:
        """YAML reads `3:` as a number."""
        return {str(key): value for key, value in layers.items()} if isinstance(layers, Mapping) else layers

    def patterns(self, layer_count: int) -> list[PatternBase]:
        """One pattern for each layer of the model.

        Raises:
            ConfigError: If a key of `layers` is no range, lies outside the model, or overlaps another.
        """
        patterns: list[PatternBase] = [self.pattern] * layer_count
        named_by: dict[int, str] = {}
        for key, pattern in self.layers.items():
            for layer in _layer_range(key, layer_count):
                if layer in named_by:
                    raise ConfigError(
                        f"sparse_attention: layer {layer} is named by `{named_by[layer]}` and by `{key}`",
                        "give each layer one pattern",
                    )
                named_by[layer] = key
                patterns[layer] = pattern
        return patterns


def _layer_range(key: str, layer_count: int) -> range:
    first, _, last = key.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()) or int(first) > int(last or first):
        raise ConfigError(
            f"sparse_attention: `{key}` in `layers` names no layers", 'write a layer ("3") or a range ("0-1")'
        )
    if int(last or first) >= layer_count:
        raise ConfigError(
            f"sparse_attention: `{key}` in `layers` lies outside the model, which has {layer_count} layers",
            f"layers are counted from 0 to {layer_count - 1}",
        )
    return range(int(first), int(last or first) + 1)


class SparseAttention(Method[SparseAttentionConfig]):
    """Sets the patterns of the model's attention; nothing else of the model changes."""

    stage: ClassVar[Stage] = Stage.ATTEND

    def check(self, others: Sequence[Method[Any]], model_config: PretrainedConfig) -> None:
        """Refuse other architectures, patterns of the wrong direction, missing layers, and a second such method."""
        if any(isinstance(other, SparseAttention) for other in others):
            raise ConfigError(
                "`sparse_attention` is listed twice in methods", "name the layers of the second pattern in `layers`"
            )
        check_architecture(model_config)
        for pattern in self.config.patterns(model_config.num_hidden_layers):
            pattern.check(is_causal(model_config))

    def prepare(self, model: nn.Module) -> nn.Module:
        """Install the patterns in the attention that the experiment has put into every model."""
        from loras_bench.attention.dispatch import ModelAttention

        attention = ModelAttention.of(model)
        attention.set_patterns(self.config.patterns(len(attention.patterns)), self.config.backend)
        return model
