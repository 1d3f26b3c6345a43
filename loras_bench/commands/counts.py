"""`loras-bench counts`: what folding and pruning leave of a model's weights, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from loras_bench.errors import UserError
from loras_bench.models.catalog import MODELS
from loras_bench.results.formatting import markdown
from loras_bench.trained import locate_by_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from loras_bench.folding.counts import Count

ARCHITECTURES: Mapping[str, str] = {"bert-base": "bert", "gpt2": "gpt2"}
"""Models whose sizes are the defaults of transformers' configurations."""
NOTES = (
    "Not zero: what folding leaves of Q, K and V, and pruning of feed-forward layers and embeddings; biases, norms and "
    "all else stay. Zeros are stored and multiplied unless something is done about them (`loras-bench savings`). "
    "Claimed: by the abstract (Belhaouari and Kraidia 2025), of `transformer layers`, `linear layers` and the `overall "
    "model`; the layers can only mean Q, K and V, and the model needs its embeddings pruned. Zeroed embeddings are "
    "those of words, positions and segments; zeroed words are what `fold` and `prune` do."
)


def print_counts(models: Sequence[str], sparsity: float, rank: int, form: Literal["md", "json"]) -> None:
    """Print a table of each model.

    Raises:
        ConfigError: The architecture is unknown, or a head has no such rank.
        UserError: A model is not where it should be, or no weights would be left.
    """
    from loras_bench.folding.counts import count

    if not sparsity < 1:
        raise UserError("--sparsity 1 leaves no weights", "give less, such as 0.7")
    counted = {name: count(_config_of(name), sparsity, rank) for name in models}
    if form == "json":
        tables = {
            name: [asdict(row) | {"gone_or_zero": row.gone_or_zero} for row in rows] for name, rows in counted.items()
        }
        print(json.dumps(tables))
        return
    chosen = f"rank {rank}, sparsity {sparsity:.4g}"
    print("\n\n".join([*(f"{name}, {chosen}\n\n{_table(rows)}" for name, rows in counted.items()), NOTES]))


def _config_of(name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    if name in ARCHITECTURES:
        return AutoConfig.for_model(ARCHITECTURES[name])
    from loras_bench.models.gguf import as_safetensors

    location = as_safetensors(locate_by_name(name, [*ARCHITECTURES, *MODELS]))
    config: PretrainedConfig = AutoConfig.from_pretrained(location.path, trust_remote_code=False)
    return config


def _table(rows: Sequence[Count]) -> str:
    return markdown(
        ["weights", "before", "not zero", "gone or zero", "claimed"],
        [[row.part, f"{row.before:,}", f"{row.after:,}", f"{row.gone_or_zero:.2%}", row.claim] for row in rows],
    )
