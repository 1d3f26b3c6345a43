"""Structured sparse attention: with LoRA it is LoRA-S (Tiwari and Harish 2026), alone the arm that tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from loras_bench.attention.backend import SparseBackend
from loras_bench.attention.families import check_architecture, is_causal
from loras_bench.attention.patterns import Pattern, PatternBase
from loras_bench.errors import ConfigError
from loras_bench.methods.base import Method, MethodConfig, Stage
from loras_bench.methods.layers import by_layer, text_keys

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


class SparseAttentionConfig(MethodConfig):
    """Which pairs attend in which layer."""

    kind: Literal["sparse_attention"] = "sparse_attention"
    pattern: Pattern
    """The pattern of all layers that `layers` does not name."""
    layers: Annotated[Mapping[str, Pattern], BeforeValidator(text_keys)] = Field(default_factory=dict)
    """Patterns of single layers: a layer (`"3"`) or a range with both ends (`"0-1"`), counted from 0."""
    backend: SparseBackend = "auto"
    """Who computes it; `auto` is our Triton kernels on CUDA and the masked reference elsewhere."""

    def patterns(self, layer_count: int) -> list[PatternBase]:
        """One pattern for each layer of the model.

        Raises:
            ConfigError: If a key of `layers` is no range, lies outside the model, or overlaps another.
        """
        named = by_layer("sparse_attention", self.layers, layer_count)
        return [named.get(layer, self.pattern) for layer in range(layer_count)]


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
