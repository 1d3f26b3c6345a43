"""How many weights folding and pruning leave, from a model's configuration alone.

The paper's abstract claims that layers shrink by 99 %, linear layers by 70 % and the model by about 70 %. The first can
only be the matrices of queries, keys and values; the last needs 70 % of the embeddings to go too. Weights of matrices
are counted; biases, norms and heads stay and count towards the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loras_bench.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Count:
    """Weights of a part of a model before and after."""

    part: str
    before: int
    after: int

    @property
    def saved(self) -> float:
        """Share of the weights that is gone."""
        return 1 - self.after / self.before


@dataclass(frozen=True)
class Sizes:
    """Weights of a model by part: of one layer, and of all the rest."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    query_key_value: int
    output: int
    feed_forward: int
    embeddings: int
    total: int


def sizes(config: PretrainedConfig) -> Sizes:
    """Read the parts of a GPT-2, BERT, RoBERTa or Llama base model (with a language-modelling head if it is tied).

    Raises:
        ConfigError: For other architectures.
    """
    family, hidden = config.model_type, config.hidden_size
    heads = config.num_attention_heads
    if family not in ("gpt2", "bert", "roberta", "llama"):
        raise ConfigError(f"the parts of `{family}` models are not known", "give a gpt2, bert, roberta or llama model")
    llama = family == "llama"
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_heads = config.num_key_value_heads if llama else heads
    inner = (config.n_inner or 4 * hidden) if family == "gpt2" else config.intermediate_size
    rows = config.vocab_size + (0 if llama else config.max_position_embeddings)
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        query_key_value=hidden * (heads + 2 * key_heads) * head_dim,
        output=heads * head_dim * hidden,
        feed_forward=(3 if llama else 2) * hidden * inner,
        embeddings=hidden * (rows + (config.type_vocab_size if family in ("bert", "roberta") else 0)),
        total=sum(parameter.numel() for parameter in _on_meta(config).parameters()),
    )


def folded_rows(hidden: int, heads: int, rank: int) -> int:
    """Weights of `rank` rows of queries and of keys for each head (1 if they share), and of a diagonal of values."""
    return 2 * rank * hidden * heads + hidden


def count(config: PretrainedConfig, sparsity: float, rank: int = 1) -> list[Count]:
    """The claims of the abstract as they come out for a model.

    Args:
        config: Of the model.
        sparsity: Share of feed-forward and embedding weights that is set to zero.
        rank: Rows that are left of a query or key matrix.

    Raises:
        ConfigError: For architectures that are not known, and ranks that a head does not have.
    """
    found = sizes(config)
    if rank > found.head_dim:
        raise ConfigError(f"rank {rank} is more than the {found.head_dim} rows of a head", "rank 1 is the paper's")
    qkv, shared = found.query_key_value, folded_rows(found.hidden, 1, rank)
    own = folded_rows(found.hidden, found.heads, rank)
    block = qkv + found.output

    def kept(weights: int) -> int:
        return weights - round(sparsity * weights)

    folded_away = found.layers * (qkv - shared)
    zeroed = found.layers * (found.feed_forward - kept(found.feed_forward))
    embedded = found.embeddings - kept(found.embeddings)
    return [
        Count("Q, K, V of a layer, rows shared by all heads", qkv, shared),
        Count("Q, K, V of a layer, rows of each head", qkv, own),
        Count("attention of a layer, shared rows, dense output", block, shared + found.output),
        Count(
            "linear layers (feed-forward), zeroed",
            found.layers * found.feed_forward,
            found.layers * kept(found.feed_forward),
        ),
        Count("whole model, shared rows, embeddings untouched", found.total, found.total - folded_away - zeroed),
        Count(
            "whole model, shared rows, embeddings zeroed too",
            found.total,
            found.total - folded_away - zeroed - embedded,
        ),
    ]


def _on_meta(config: PretrainedConfig) -> Any:
    """The model without memory: with the output layer where it is the embeddings', and without one elsewhere."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)
