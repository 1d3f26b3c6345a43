"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) through PEFT: y = W0 x + (alpha / r) B A x with W0 frozen.

A is drawn, B is zero, so the adapted model starts as the base model. Adapters live in the model's number format; the
optimizer holds their float32 master copies, as it does for every trainable parameter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from loras_bench.errors import ConfigError
from loras_bench.methods.base import Method, MethodConfig, Stage

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

ATTENTION = r"(q_proj|k_proj|v_proj|o_proj|c_attn|attn\.c_proj|query|key|value|attention\.output\.dense)"
FEED_FORWARD = r"(gate_proj|up_proj|down_proj|c_fc|mlp\.c_proj|intermediate\.dense|(?<!attention\.)output\.dense)"
NORM = re.compile(r"(norm|ln_\w+)$", re.IGNORECASE)


class LoraConfig(MethodConfig):
    """Low-rank adapters on frozen linear layers."""

    kind: Literal["lora"]
    rank: int = Field(default=16, ge=1)
    """r: adds r * (inputs + outputs) parameters to each layer."""
    alpha: float = Field(default=32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: Literal["all-linear", "attention", "feed-forward"] | tuple[str, ...] = "all-linear"
    """Which linear layers get adapters: a group, or names as in PEFT's `target_modules`."""
    variant: Literal["lora", "dora"] = "lora"
    """`dora` learns the magnitude of each output row separately from its direction."""
    train_norms: bool = False
    """Train the norms too (LongLoRA found that it helps where the context changes)."""
    train_embeddings: bool = False
    """Train the input embeddings too; an output layer that is tied to them keeps the base's weights."""


class Lora(Method[LoraConfig]):
    """Wraps the model by `peft.get_peft_model`; saving, loading and merging stay PEFT's."""

    stage: ClassVar[Stage] = Stage.ADAPT

    def check(self, others: Sequence[Method[Any]], model_config: PretrainedConfig) -> None:
        """Refuse two LoRA methods in one experiment."""
        if any(isinstance(other, Lora) for other in others):
            raise ConfigError(
                "`lora` is listed twice in methods", "one adapter a run; raise its rank or its targets instead"
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze the base, attach the adapters; a classification head stays trainable.

        Raises:
            ConfigError: They cannot be attached, or DoRA would divide by a norm of 0.
        """
        adapted = self.resize(model)
        for name, parameter in adapted.named_parameters():
            if ".lora_magnitude_vector." in name and not parameter.all():
                layer = name.removeprefix("base_model.model.").partition(".lora_magnitude_vector.")[0]
                raise ConfigError(
                    f"lora: `variant: dora` divides by the norm of each output's weights, and {layer} has outputs "
                    "without any (pruned units)",
                    "use `variant: lora`",
                )
        return adapted

    def resize(self, model: nn.Module) -> nn.Module:
        """As `prepare`, whatever the weights of the base."""
        from peft import LoraConfig as PeftLoraConfig
        from peft import TaskType, get_peft_model

        config = self.config
        classifies = hasattr(model, "num_labels") and type(model).__name__.endswith("ForSequenceClassification")
        peft_config = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides: a float serves
            lora_dropout=config.dropout,
            target_modules=self._targets(model),
            use_dora=config.variant == "dora",
            bias="none",
            fan_in_fan_out=getattr(model.config, "model_type", "") == "gpt2",
            task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
            modules_to_save=self._trained_beside(model) or None,
        )
        try:
            return get_peft_model(model, peft_config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"lora cannot be attached: {error}", "name layers of this model in `targets`") from None

    def _trained_beside(self, model: nn.Module) -> list[str]:
        """Names of modules that train in full beside the adapters; PEFT saves them with the adapters."""
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        names = []
        for name, module in model.named_modules():
            if (self.config.train_norms and NORM.search(name)) or (
                self.config.train_embeddings and module is embeddings
            ):
                names.append(name)
        return names

    def _targets(self, model: nn.Module) -> str | list[str]:
        if isinstance(self.config.targets, tuple):
            return list(self.config.targets)
        if self.config.targets == "all-linear":
            return "all-linear"
        pattern = ATTENTION if self.config.targets == "attention" else FEED_FORWARD
        return rf".*\.{pattern}"
