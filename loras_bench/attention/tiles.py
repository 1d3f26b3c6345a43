"""Sizes of the tiles of our Triton kernels: tuned on Hopper by benchmarks/tune_attention.py, kept in tiles.json.

The best size depends on the head dimension and on how many keys a query sees: few keys want small tiles, because a tile
at the edge of a window is computed whole. What was not tuned takes the nearest entry.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

Kernel = Literal["forward", "queries", "keys"]
PRODUCTS: dict[Kernel, int] = {"forward": 2, "queries": 3, "keys": 4}
"""Matrix products of each kernel over the pairs that it visits."""
LIST_TILE = 64
"""Edge of the tiles of irregular patterns: the keys of one 64-bit word of their mask."""
SHORT_KEYS = 1024
"""Mean keys of a query up to which the `short` entry serves."""


class TileChoice(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def choose_tiles(kernel: Kernel, head_dim: int, mean_keys: float, listed: bool) -> TileChoice:
    """The tiles of one kernel for a head dimension and the mean number of keys that a query sees.

    Irregular patterns (`listed`) have masks of 64 x 64 pairs, so their tiles have that size.
    """
    table = _table()
    sizes = sorted(int(size) for size in table)
    entries = table[str(next((size for size in sizes if size >= head_dim), sizes[-1]))]
    kind = "listed" if listed else "short" if mean_keys <= SHORT_KEYS else "long"
    choice = TileChoice(*(entries.get(kind) or entries["short"])[kernel])
    return choice._replace(queries=LIST_TILE, keys=LIST_TILE) if listed else choice


@cache
def _table() -> dict[str, dict[str, dict[Kernel, list[int]]]]:
    text = resources.files("loras_bench.attention").joinpath("tiles.json").read_text(encoding="utf-8")
    table = json.loads(text)
    del table["tuned on"]
    return dict(table)
