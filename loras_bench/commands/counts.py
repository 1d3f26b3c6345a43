"""`loras-bench counts`: what folding and pruning leave of a model's weights, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from loras_bench.models.catalog import locate_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from loras_bench.folding.counts import Count

ARCHITECTURES: Mapping[str, str] = {"bert-base": "bert", "gpt2": "gpt2"}
"""Models whose sizes are the defaults of transformers' configurations."""


def print_counts(models: Sequence[str], sparsity: float, rank: int, form: Literal["md", "json"]) -> None:
    """Print a table of each model.

    Raises:
        ConfigError: A name is unknown, or the architecture is.
        UserError: A model is not where it should be.
    """
    from loras_bench.folding.counts import count

    counted = {name: count(_config_of(name), sparsity, rank) for name in models}
    if form == "json":
        print(
            json.dumps({name: [asdict(row) | {"saved": row.saved} for row in rows] for name, rows in counted.items()})
        )
    else:
        print("\n\n".join(_table(name, rows) for name, rows in counted.items()))


def _config_of(name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    if name in ARCHITECTURES:
        return AutoConfig.for_model(ARCHITECTURES[name])
    from loras_bench.models.gguf import as_safetensors

    location = as_safetensors(locate_model(name))
    config: PretrainedConfig = AutoConfig.from_pretrained(location.path, trust_remote_code=False)
    return config


def _table(name: str, rows: Sequence[Count]) -> str:
    width = max(len(row.part) for row in rows)
    lines = [
        f"{name}",
        "",
        f"| {'weights':{width}} | {'before':>13} | {'after':>13} | {'saved':>8} |",
        f"|:{'-' * (width + 1)}|{'-' * 14}:|{'-' * 14}:|{'-' * 9}:|",
    ]
    lines += [f"| {row.part:{width}} | {row.before:13,} | {row.after:13,} | {row.saved:8.2%} |" for row in rows]
    return "\n".join(lines)
