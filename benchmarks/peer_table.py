"""The comparison of `peers.py` in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peer_results import Entry, cost

from loras_bench.results.formatting import format_number
from loras_bench.results.render import DASH

HEADINGS = ("arm", "tokens/s", "J/Mtoken", "W", "peak GiB", "tokens/s, best peer = 1", "J, best peer = 1", "note")


def render(entries: Sequence[Entry]) -> str:
    """A table for each device and shape, the arms as they come first, then the peers' candidates, then ours."""
    places = dict.fromkeys((entry["device"], entry["shape"]["name"]) for entry in entries)
    tables = []
    for device, name in sorted(places, key=lambda place: _size(entries, place)):
        here = [entry for entry in entries if (entry["device"], entry["shape"]["name"]) == (device, name)]
        tables.append("\n".join([_title(device, here[0]["shape"]), "", *_lines(here)]))
    return "\n\n".join(tables)


def _size(entries: Sequence[Entry], place: tuple[str, str]) -> tuple[str, int, int]:
    shape = next(e["shape"] for e in entries if (e["device"], e["shape"]["name"]) == place)
    return place[0], shape["hidden"] * shape["layers"], shape["length"]


def _title(device: str, shape: dict[str, Any]) -> str:
    checkpointing = ", gradient checkpointing" if shape["checkpointing"] else ""
    tokens = shape["rows"] * shape["length"]
    learned = f", the last {shape['labels']:,} of a row learned" if shape.get("labels") else ""
    length = f"S = {shape['length']:,}{learned}"
    return f"### {shape['model']}, {length}, {tokens:,} tokens a step{checkpointing}, on {device}"


def _lines(entries: Sequence[Entry]) -> list[str]:
    best = {lora: _best_peer(entries, lora) for lora in (False, True)}
    ordered = sorted(entries, key=lambda e: (e["options"]["ours"], e["options"]["lora"], "/" in e["arm"]))
    rows = [_row(entry, best[entry["options"]["lora"]]) for entry in ordered]
    rule = "|---|" + "--:|" * (len(HEADINGS) - 2) + "---|"
    return [f"| {' | '.join(HEADINGS)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _best_peer(entries: Sequence[Entry], lora: bool) -> Entry | None:
    """The cheapest that is not ours, of those measured in full: a candidate's single window is no median."""
    peers = [entry for entry in entries if not entry["options"]["ours"] and entry["options"]["lora"] == lora]
    completed = [entry for entry in peers if entry["status"] == "completed"]
    full = [entry for entry in completed if entry["repeats"] > 1]
    return min(full or completed, key=cost, default=None)


def _row(entry: Entry, best: Entry | None) -> list[str]:
    name = f"**{entry['arm']}**" if entry is best else entry["arm"]
    if entry["status"] != "completed":
        return [name, *[DASH] * (len(HEADINGS) - 2), f"{entry['status']}: {entry['reason']}".replace("|", "/")]
    peak = None if entry["peak_bytes"] is None else entry["peak_bytes"] / 2**30
    numbers = [entry["tokens_per_s"], entry["energy_j_per_mtoken"], entry["power_w"], peak]
    ratios = [_ratio(entry, best, quantity) for quantity in ("tokens_per_s", "energy_j_per_mtoken")]
    elsewhere = (
        "; on another GPU than the best peer" if best is not None and entry.get("gpu") != best.get("gpu") else ""
    )
    return [name, *(DASH if n is None else format_number(n, 4) for n in numbers), *ratios, _note(entry) + elsewhere]


def _ratio(entry: Entry, best: Entry | None, quantity: str) -> str:
    if best is None or entry[quantity] is None or best[quantity] is None:
        return DASH
    return f"{entry[quantity] / best[quantity]:.3f}"


def _note(entry: Entry) -> str:
    windows = f"{entry['repeats']} x {entry['window_s']:g} s"
    return windows if entry["repeats"] > 1 else f"screened, {windows}"
