"""The kernel benchmark for people (a table for each case) and for programs (JSON)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loras_bench.benchmarking.bench import Quartiles
from loras_bench.benchmarking.measuring import Result, Row
from loras_bench.files import write_whole
from loras_bench.results.formatting import format_number
from loras_bench.results.render import DASH

PIPE_WIDTH = 220
"""Characters of a line where there is no terminal."""
COLUMNS = (
    "backend", "forward\nms (IQR)", "both\nms (IQR)", "cuDNN /\nboth", "forward, executed\nTFLOP/s",
    "both, executed\nTFLOP/s", "both, allowed\nTFLOP/s", "both\nJ", "\nW", "peak\nMiB",
    "largest relative error\nout / dq / dk / dv", "",
)  # fmt: skip
PROTOCOL = (
    "Both: forward and backward. bf16 random normal inputs. Medians of at least 30 calls, replayed as a CUDA graph "
    "unless noted, the L2 cache emptied before each. FLOPs: 4 * pairs * head_dim * heads forward and 2.5 times as many "
    "backward, for every backend. Joules of one call of many back to back, by the GPU's energy counter. Memory beyond "
    "the inputs. Errors against float32, over the largest exact value, on the first sample's first key head. Dense "
    "backends compute every (causal) pair and are held to dense attention."
)


def print_result(result: Result) -> None:
    """One table on stdout."""
    case = result.case
    share = result.allowed_pairs / case.baseline.allowed_pairs()
    grid = Table(title=f"{case.shape}  {case.pattern_text}  ({share:.1%} of the dense pairs)", title_justify="left")
    for number, name in enumerate(COLUMNS):
        grid.add_column(name, justify="left" if number in (0, len(COLUMNS) - 1) else "right")
    baseline = next((row.both for row in result.rows if row.backend == "cuDNN dense"), None)
    for row in result.rows:
        grid.add_row(*_cells(result, row, baseline))
    Console(highlight=False, width=None if os.isatty(1) else PIPE_WIDTH).print(grid)


def _cells(result: Result, row: Row, baseline: Quartiles | None) -> list[str | Text]:
    speed_up = baseline.median_ms / row.both.median_ms if baseline and row.both else None
    numbers = (
        speed_up,
        result.tflop_per_s(row, row.executed_pairs, both=False),
        result.tflop_per_s(row, row.executed_pairs, both=True),
        result.tflop_per_s(row, result.allowed_pairs, both=True),
        row.drawn and row.drawn.energy_j,
        row.drawn and row.drawn.power_w,
        None if row.peak_bytes is None else row.peak_bytes / 2**20,
    )
    errors = " / ".join(f"{error:.1e}" for error in row.errors.values()) or DASH
    note = Text(row.reason, style="red") if row.reason else Text(row.note, style="dim")
    return [row.backend, _time(row.forward), _time(row.both), *map(_number, numbers), errors, note]


def _time(times: Quartiles | None) -> str:
    return DASH if times is None else f"{times.median_ms:.4g} ({times.high_ms - times.low_ms:.1g})"


def _number(value: float | None) -> str:
    return DASH if value is None else format_number(value, 3)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def to_json(results: Sequence[Result], environment: dict[str, Any]) -> dict[str, Any]:
    """All cases so far, with where they were measured."""
    return {"protocol": PROTOCOL, "environment": environment, "cases": [result.to_json() for result in results]}
