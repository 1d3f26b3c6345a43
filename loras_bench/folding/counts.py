"""How many weights folding and pruning leave, from a model's configuration alone.

The paper's abstract claims that layers shrink by 99 %, linear layers by 70 % and the model by about 70 %. The first can
only be the matrices of queries, keys and values; the last needs 70 % of the embeddings to go too. Weights of matrices
are counted; biases, norms and heads stay and count towards the whole. `prune` takes the word embeddings alone,
those of positions and segments stay: `zeroed words` is what `fold` and `prune` leave together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loras_bench.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Count:
    """Weights of a part of a model before and after.

    `after` are those that are left and not zero; `claim` is the value of the abstract that it answers, if it does.
    """

    part: str
    before: int
    after: int
    claim: str = ""

    @property
    def gone_or_zero(self) -> float:
        """Share of the weights: folding takes them away, pruning makes them zero."""
        return 1 - self.after / self.before


@dataclass(frozen=True)
class Sizes:
    """Weights of a model by part: of one layer, and of all the rest.

    `words` are those of the `embeddings` that are tokens'.
    """

    layers: int
    hidden: int
    heads: int
    head_dim: int
    query_key_value: int
    output: int
    feed_forward: int
    embeddings: int
    words: int
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
        words=hidden * config.vocab_size,
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
        ConfigError: For architectures that are not known, and ranks that do not divide a head's rows.
    """
    found = sizes(config)
    parts = found.head_dim // 2 if config.model_type == "llama" else found.head_dim  # pairs of rotary channels
    if parts % rank:
        raise ConfigError(f"rank {rank} does not divide the {parts} rows of a head", "rank 1 is the paper's")
    qkv, block = found.query_key_value, found.query_key_value + found.output
    heads = {"shared rows": 1, "rows per head": found.heads}
    folded = {rows: folded_rows(found.hidden, keeping, rank) for rows, keeping in heads.items()}

    def zeroed(weights: int) -> int:
        return round(sparsity * weights)

    linears = found.layers * found.feed_forward
    counts = [Count(f"Q, K, V of a layer, {rows}", qkv, after, "99 %") for rows, after in folded.items()]
    counts += [Count(f"attention of a layer, {rows}", block, after + found.output) for rows, after in folded.items()]
    counts.append(
        Count("feed-forward of all layers", linears, linears - found.layers * zeroed(found.feed_forward), "70 %")
    )
    embeddings = {"dense embeddings": 0, "zeroed embeddings": found.embeddings, "zeroed words": found.words}
    for rows, after in folded.items():
        left = found.total - found.layers * (qkv - after + zeroed(found.feed_forward))
        counts += [
            Count(f"model, {rows}, {what}", found.total, left - zeroed(weights), "about 70 %" if weights else "")
            for what, weights in embeddings.items()
        ]
    return counts


def _on_meta(config: PretrainedConfig) -> Any:
    """The model without memory: with the output layer where it is the embeddings', and without one elsewhere."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)
