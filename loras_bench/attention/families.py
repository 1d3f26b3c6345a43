"""The architectures whose attention can be replaced, by their configuration alone: no torch, so checks come early."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loras_bench.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DROPOUT_FIELD = {
    "gpt2": "attn_pdrop",
    "bert": "attention_probs_dropout_prob",
    "roberta": "attention_probs_dropout_prob",
    "llama": "attention_dropout",
}
"""Supported values of `model_type`, and where each keeps its dropout on attention weights."""
CAUSAL = {"gpt2", "llama"}
"""Decoders; BERT and RoBERTa are causal only with `is_decoder: true`."""


def check_architecture(config: PretrainedConfig) -> None:
    """Refuse architectures without support, cross-attention, and dropout on attention weights.

    Raises:
        ConfigError: With the key of the model's configuration at fault.
    """
    family = config.model_type
    if family not in DROPOUT_FIELD:
        raise ConfigError(
            f"attention of `{family}` models cannot be replaced", f"supported model types: {', '.join(DROPOUT_FIELD)}"
        )
    if getattr(config, "add_cross_attention", False):
        raise ConfigError("models with cross-attention are not supported", "set add_cross_attention: false")
    if getattr(config, DROPOUT_FIELD[family]):
        raise ConfigError(
            f"the model drops attention weights ({DROPOUT_FIELD[family]}: {getattr(config, DROPOUT_FIELD[family])}), "
            "which no sparse kernel does: arms could not be compared",
            f"set {DROPOUT_FIELD[family]}: 0 in the model's configuration",
        )


def is_causal(config: PretrainedConfig) -> bool:
    """Whether the model's tokens see only their past."""
    return config.model_type in CAUSAL or bool(getattr(config, "is_decoder", False))
