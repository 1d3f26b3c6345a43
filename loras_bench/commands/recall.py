"""`loras-bench recall`: how well language models copy from their context, by distance."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.errors import UserError
from loras_bench.files import check_file
from loras_bench.results.formatting import markdown
from loras_bench.trained import for_inference, load_causal, open_causal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loras_bench.models.loading import LoadedModel
    from loras_bench.recall import Recall

HEAD = ("model", "distance", "accuracy", "loss", "copies")


def probe_recall(
    models: Sequence[str], distances: str, rows: int, seed: int, device: str, json_file: Path | None
) -> int:
    """Print one table of all models; returns the exit status. What a model is too short for is left out, with a note.

    Raises:
        UserError: A model is not there or predicts no tokens, a distance is no number, or none suits any model.
    """
    wanted = parse_distances(distances)
    if json_file is not None:
        check_file(json_file)
    import torch

    from loras_bench.benchmarking.report import write_json
    from loras_bench.worker import be_quiet, look_at_device

    be_quiet()
    target = torch.device(look_at_device(device).kind)
    opened = {name: open_causal(name) for name in (str(Path(model)) for model in models)}
    loaded = {name: load_causal(one) for name, one in opened.items()}
    tokens = shared_tokens(loaded)
    refused = {
        name: {distance: why_not(model, tokens[_size(model)], distance) for distance in wanted}
        for name, (model, _) in loaded.items()
    }
    if all(reason for reasons in refused.values() for reason in reasons.values()):
        name, reasons = next(iter(refused.items()))
        raise UserError(f"{name}: {reasons[wanted[0]]}", "give smaller --distances")
    read: dict[str, list[Recall]] = {}
    found: dict[str, Any] = {}
    for number, (name, (model, _)) in enumerate(loaded.items(), start=1):
        print(f"{number} of {len(loaded)}: {name}", file=sys.stderr)
        drawn, suited = tokens[_size(model)], [distance for distance in wanted if not refused[name][distance]]
        read[name] = _read(model, drawn, suited, rows, seed, target)
        left_out = {str(distance): reason for distance, reason in refused[name].items() if reason}
        points = [asdict(one) for one in read[name]]
        found[name] = {"model": model.label, "tokens": len(drawn), "recall": points, "left_out": left_out}
        if json_file is not None:
            write_json(json_file, {"rows": rows, "seed": seed, "models": found})
    print(_table(read, {_size(model): len(tokens[_size(model)]) for model, _ in loaded.values()}))
    for name, reasons in refused.items():
        for reason in filter(None, reasons.values()):
            print(f"Left out: {name}: {reason}.")
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


def why_not(model: LoadedModel, tokens: Tensor, distance: int) -> str | None:
    """Why a model cannot be probed at a distance; None if it can be."""
    from loras_bench.recall import positions_of

    config: Any = model.model.config
    if (needed := positions_of(distance, config.bos_token_id)) > config.max_position_embeddings:
        return f"distance {distance} needs {needed:,} positions, and there are {config.max_position_embeddings:,}"
    if distance > len(tokens):
        return f"distance {distance} needs as many tokens, and {len(tokens):,} are embedded by all models here"
    return None


def _size(model: LoadedModel) -> int:
    return int(model.model.config.vocab_size)


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


def _table(read: Mapping[str, Sequence[Recall]], drawn: Mapping[int, int]) -> str:
    """All models, and for each size of their vocabularies what one that knows nothing has."""
    lines = [
        [name, f"{one.distance:,}", f"{one.accuracy:.2%}", f"{one.loss:.3f}", f"{one.copies:,}"]
        for name, points in read.items()
        for one in points
    ]
    lines += [
        [f"by chance, of {size:,} tokens", "", f"{100 / size:.2g}%", f"{math.log(size):.3f}", ""] for size in drawn
    ]
    notes = [f"Drawn from {count:,} of {size:,} tokens, which all models here embed." for size, count in drawn.items()]
    return "\n".join([markdown(HEAD, lines), "", *notes])
