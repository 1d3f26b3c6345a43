"""`loras-bench recall`: how well language models copy from their context, by distance."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.commands.kernels import _check_file
from loras_bench.errors import UserError
from loras_bench.trained import for_inference, load_causal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loras_bench.models.loading import LoadedModel
    from loras_bench.recall import Recall

HEAD = ("distance", "accuracy", "loss", "copies")


def probe_recall(
    models: Sequence[str], distances: str, rows: int, seed: int, device: str, json_file: Path | None
) -> int:
    """Print a table for each model; returns the exit status.

    Raises:
        UserError: A model is not there, predicts no tokens or has too few positions, or a distance is no number.
    """
    wanted = parse_distances(distances)
    if json_file is not None:
        _check_file(json_file)
    import torch

    from loras_bench.benchmarking.report import write_json
    from loras_bench.worker import be_quiet, look_at_device

    be_quiet()
    target = torch.device(look_at_device(device).kind)
    loaded = {name: load_causal(name) for name in models}
    for name, (model, _) in loaded.items():
        _check_positions(name, model, wanted)
    tokens = shared_tokens(loaded)
    found: dict[str, Any] = {}
    for name, (model, _) in loaded.items():
        print(name, file=sys.stderr)
        read = _read(model, tokens[model.model.config.vocab_size], wanted, rows, seed, target)
        drawn = len(tokens[model.model.config.vocab_size])
        found[name] = {"model": model.label, "tokens": drawn, "recall": [asdict(one) for one in read]}
        print(_table(model, read, drawn), end="\n\n")
        if json_file is not None:
            write_json(json_file, {"rows": rows, "seed": seed, "models": found})
    return 0


def parse_distances(text: str) -> list[int]:
    """`8,64` -> [8, 64]."""
    try:
        distances = sorted({int(part) for part in text.split(",")})
    except ValueError:
        distances = []
    if not distances or distances[0] < 2:
        raise UserError(f"--distances `{text}`: they are whole numbers, 2 or more", "write 8,32,128")
    return distances


def shared_tokens(loaded: Mapping[str, tuple[LoadedModel, Any]]) -> dict[int, Tensor]:
    """By size of the vocabulary the tokens that all models of it embed, int64: special and pruned ones are left out."""
    shared: dict[int, Tensor] = {}
    for model, tokenizer in loaded.values():
        whole: Any = model.model
        embedded = (whole.get_input_embeddings().weight.detach() != 0).any(dim=1)
        embedded[len(tokenizer) :] = False
        embedded[tokenizer.all_special_ids] = False
        shared[len(embedded)] = embedded & shared.get(len(embedded), embedded)
    return {size: embedded.nonzero()[:, 0] for size, embedded in shared.items()}


def _check_positions(name: str, model: LoadedModel, distances: Sequence[int]) -> None:
    """Refuse before anything is computed; the rows have a first token besides their halves."""
    positions, needed = model.model.config.max_position_embeddings, 2 * distances[-1] + 1
    if needed > positions:
        raise UserError(
            f"distance {distances[-1]} needs {needed} positions, and {name} has {positions}", "give smaller --distances"
        )


def _read(
    loaded: LoadedModel, tokens: Tensor, distances: Sequence[int], rows: int, seed: int, device: torch.device
) -> list[Recall]:
    import torch

    from loras_bench.recall import recall, repeated

    model: Any = loaded.model
    for_inference(model, device)
    model.to(device, torch.float32).eval()
    found = []
    for distance in distances:
        ids_rs = repeated(tokens, distance, rows, seed, model.config.bos_token_id)
        found.append(recall(model, ids_rs.to(device), distance, model.config.vocab_size))
    model.to("cpu")
    return found


def _table(model: LoadedModel, read: Sequence[Recall], drawn: int) -> str:
    size = model.model.config.vocab_size
    lines = [model.label, "", f"| {' | '.join(f'{name:>8}' for name in HEAD)} |", f"|{'|'.join(['---------:'] * 4)}|"]
    lines += [f"| {one.distance:8,} | {one.accuracy:8.2%} | {one.loss:8.3f} | {one.copies:8,} |" for one in read]
    chance = f"By chance: accuracy {1 / size:.2g}, loss ln {size} = {math.log(size):.3f}."
    return "\n".join([*lines, "", f"{chance} Drawn from {drawn:,} tokens that all such models here embed."])
