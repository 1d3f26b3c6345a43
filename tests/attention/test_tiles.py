"""The table of tuned tiles: every entry can run, and what is not in it takes a neighbour's."""

from __future__ import annotations

from typing import get_args

import pytest

from loras_bench.attention.schedule import LIST_TILE
from loras_bench.attention.tiles import SHORT_KEYS, Kernel, choose_tiles

KERNELS: tuple[Kernel, ...] = get_args(Kernel)


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_choice_can_run(kernel: Kernel, head_dim: int) -> None:
    """Triton wants powers of two, and 16 at least for products."""
    for mean_keys, listed in ((64.0, False), (4096.0, False), (64.0, True)):
        choice = choose_tiles(kernel, head_dim, mean_keys, listed)
        assert {choice.queries, choice.keys} <= {16, 32, 64, 128, 256}
        assert choice.warps in (1, 2, 4, 8, 16) and 1 <= choice.stages <= 8
        assert not listed or (choice.queries, choice.keys) == (LIST_TILE, LIST_TILE)


def test_the_next_larger_head_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "64": {"short": {kernel: [64, 32, 4, 2] for kernel in KERNELS}},
        "128": {
            "short": {kernel: [32, 32, 4, 2] for kernel in KERNELS},
            "long": {kernel: [128, 64, 8, 3] for kernel in KERNELS},
        },
    }
    monkeypatch.setattr("loras_bench.attention.tiles._table", lambda: table)
    assert choose_tiles("forward", 40, 9, False) == (64, 32, 4, 2)
    assert choose_tiles("forward", 64, SHORT_KEYS + 1, False) == (64, 32, 4, 2)  # no `long` entry
    assert choose_tiles("keys", 96, SHORT_KEYS, False) == (32, 32, 4, 2)
    assert choose_tiles("keys", 96, SHORT_KEYS + 1, False) == (128, 64, 8, 3)
    assert choose_tiles("keys", 256, 9, False) == (32, 32, 4, 2)
    assert choose_tiles("queries", 64, 9, True) == (64, 64, 4, 2)
