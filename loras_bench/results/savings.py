"""What zeros save, for people (a table for each run) and for programs (JSON)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loras_bench.results.formatting import format_number, scaled_unit
from loras_bench.results.render import DASH

if TYPE_CHECKING:
    from loras_bench.pruning.savings import Saving

PIPE_WIDTH = 200
"""Characters of a line where there is no terminal."""
PROTOCOL = (
    "In parentheses: as a share of the dense form, which is what the model would be without zeros and folds. Bytes of "
    "the tensors in a safetensors file, bfloat16: every weight, or packed, which is a bit for each weight and the "
    "values that are not zero. FLOPs, milliseconds and joules of one forward pass of random tokens, all logits "
    "computed. Milliseconds: the median, and the spread between the quartiles, of the fastest of three rounds in which "
    "all forms take turns. On a GPU in bfloat16, replayed as a CUDA graph unless noted, joules by its energy counter "
    "over calls back to back; on a CPU in float32."
)


@dataclass(frozen=True)
class RunSavings:
    """The forms of one run's model."""

    run: str
    label: str
    rows: Sequence[Saving]

    def to_json(self) -> dict[str, Any]:
        return {"run": self.run, "model": self.label, "forms": [row.to_json() for row in self.rows]}


def print_savings(found: RunSavings, batch: int, length: int, device: str) -> None:
    """One table on stdout."""
    dense = next(row for row in found.rows if row.form == "dense")
    bytes_per, unit = scaled_unit("B", dense.dense_bytes or 0)
    flops_per, flop_unit = scaled_unit("FLOP", dense.flops or 0)
    title = f"{found.label}: a forward pass of {batch} x {length} tokens on {device}"
    grid = Table(title=title, title_justify="left")
    heads = ("parameters", "not zero", f"{unit}\nstored", f"{unit}\npacked", flop_unit, "ms", "spread\nms", "J")
    grid.add_column("form")
    for head in heads:
        grid.add_column(head, justify="right")
    grid.add_column("")
    for row in found.rows:
        cells = [
            _share(row.parameters, dense.parameters),
            _share(row.nonzero, dense.parameters),
            _share(row.dense_bytes, dense.dense_bytes, bytes_per),
            _share(row.packed_bytes, dense.dense_bytes, bytes_per),
            _share(row.flops, dense.flops, flops_per),
            _share(row.times and row.times.median_ms, dense.times and dense.times.median_ms),
            DASH if row.times is None else f"{row.times.high_ms - row.times.low_ms:.1g}",
            _share(row.drawn and row.drawn.energy_j, dense.drawn and dense.drawn.energy_j),
        ]
        remark = Text(row.note, style="dim")
        if row.reason:
            remark = Text(", ".join(filter(None, [row.note, row.reason])), style="red")
        grid.add_row(row.form, *cells, remark)
    Console(highlight=False, width=None if os.isatty(1) else PIPE_WIDTH).print(grid)
    if reasons := sorted({row.energy_reason for row in found.rows if row.energy_reason}):
        print(f"No joules: {', '.join(reasons)}.")


def _share(value: float | None, of: float | None, per: float = 1.0) -> str:
    """A number, and what share of the dense form's it is."""
    if value is None:
        return DASH
    number = f"{value:,}" if isinstance(value, int) and per == 1.0 else format_number(value / per)
    return f"{number} ({value / of:.1%})" if of else number
