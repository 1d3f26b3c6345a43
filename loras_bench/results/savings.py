"""What zeros save, for people (Markdown: a table for each run, one over all runs) and for programs (CSV, JSON)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loras_bench.errors import UserError
from loras_bench.results.formatting import format_number, markdown, scaled_unit
from loras_bench.results.quantities import QUALITY_OF_TASK, Quantity, evaluated_split
from loras_bench.results.record import Record
from loras_bench.results.render import DASH

if TYPE_CHECKING:
    from loras_bench.pruning.savings import Saving

PROTOCOL = (
    "In parentheses: as a share of the dense form, which is what the model would be without zeros and folds. Bytes of "
    "the tensors in a safetensors file, bfloat16: every weight (stored), or a bit for each weight and the values that "
    "are not zero (packed). FLOPs, milliseconds and joules of one forward pass of random tokens, all logits computed. "
    "Milliseconds: the median, and the spread between the quartiles, of the fastest of three rounds in which all forms "
    "take turns. On a GPU in bfloat16, replayed as a CUDA graph unless noted, joules by its energy counter over calls "
    "back to back; on a CPU in float32."
)


@dataclass(frozen=True)
class RunSavings:
    """The forms of one run's model, beside how good it is; without rows where it could not be measured."""

    record: Record
    label: str
    rows: Sequence[Saving] = ()
    refused: UserError | None = None

    @property
    def reason(self) -> str | None:
        """Why there are no rows."""
        return None if self.refused is None else self.refused.message

    def to_json(self) -> dict[str, Any]:
        forms = [row.to_json() for row in self.rows]
        facts = {"run": self.record.run_id, "model": self.label, "quality": self.quality(), "forms": forms}
        return facts | {"reason": self.reason}

    def quality(self) -> dict[str, float]:
        """What the run recorded of its task's first metric, by its name; evaluated as trained."""
        split = evaluated_split([self.record])
        wanted = [Quantity(name, split) for name in QUALITY_OF_TASK[self.record.task]]
        read = {quantity.label: value for quantity in wanted if (value := quantity.read(self.record)) is not None}
        return dict(list(read.items())[:1])

    def smallest(self) -> Saving | None:
        """Of the forms that run and compute what was trained, that with the fewest FLOPs; None if none runs."""
        ran = [row for row in self.rows if row.form != "dense" and row.flops is not None and row.reason is None]
        return min(ran, key=lambda row: row.flops or 0.0, default=None)


def forms_table(found: RunSavings, batch: int, length: int, device: str) -> str:
    """A column for each form of one run's model, a row for each number."""
    title = f"{found.record.run_id}: {found.label}, a forward pass of {batch} x {length} tokens on {device}"
    if found.reason is not None:
        return f"{title}\n\nNot measured: {found.reason}."
    shown = [row for row in found.rows if row.parameters is not None]
    dense = shown[0]
    bytes_per, unit = scaled_unit("B", dense.dense_bytes or 0)
    flops_per, flop_unit = scaled_unit("FLOP", dense.flops or 0)
    numbers: list[tuple[str, float, list[float | None]]] = [
        ("10^6 parameters", 1e6, [row.parameters for row in shown]),
        ("10^6 not zero", 1e6, [row.nonzero for row in shown]),
        (f"{unit} stored", bytes_per, [row.dense_bytes for row in shown]),
        (f"{unit} packed", bytes_per, [row.packed_bytes for row in shown]),
        (flop_unit, flops_per, [row.flops for row in shown]),
        ("ms", 1.0, [row.times and row.times.median_ms for row in shown]),
        ("J", 1.0, [row.drawn and row.drawn.energy_j for row in shown]),
    ]
    lines = [[name, *_shares(values, per)] for name, per, values in numbers]
    spreads = [DASH if row.times is None else f"{row.times.high_ms - row.times.low_ms:.1g}" for row in shown]
    lines.insert(-1, ["ms between quartiles", *spreads])
    notes = [f"{row.form}: {text}." for row in found.rows for text in (row.note, row.reason) if text]
    notes += [f"No joules: {reason}." for reason in sorted({row.energy_reason for row in shown if row.energy_reason})]
    return "\n\n".join([title, markdown(["", *(row.form for row in shown)], lines), *notes])


def _shares(values: Sequence[float | None], per: float) -> list[str]:
    """Numbers, and behind all but the first, which is the dense form's, what share of that they are."""
    first, *others = values
    plain = [DASH if value is None else format_number(value / per) for value in values]
    shares = [f" ({value / first:.1%})" if first and value is not None else "" for value in others]
    return [number + share for number, share in zip(plain, ["", *shares], strict=True)]


def comparison(runs: Sequence[RunSavings]) -> str:
    """One table over runs: how good each is, and what its smallest form takes."""
    chosen = [(run, form) for run in runs if (form := run.smallest()) is not None]
    names = list(dict.fromkeys(name for run, _ in chosen for name in run.quality()))
    bytes_per, unit = scaled_unit("B", max((form.packed_bytes or 0 for _, form in chosen), default=0))
    flops_per, flop_unit = scaled_unit("FLOP", max((form.flops or 0 for _, form in chosen), default=0))
    lines = []
    for run, form in chosen:
        numbers = [*map(run.quality().get, names), _per(form.nonzero, 1e6), _per(form.packed_bytes, bytes_per)]
        numbers += [_per(form.flops, flops_per), form.times and form.times.median_ms]
        texts = [DASH if number is None else format_number(number) for number in numbers]
        lines.append([run.record.run_id, form.form, *texts])
    return markdown(["run", "form", *names, "10^6 not zero", f"{unit} packed", flop_unit, "ms"], lines, left=2)


def _per(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def as_csv(runs: Sequence[RunSavings], batch: int, length: int, device: str) -> str:
    """A line for each form, in plain units; what was not measured is empty."""
    facts = {"device": device, "batch": batch, "length": length}
    lines = []
    for run in runs:
        common = {"run": run.record.run_id, "model": run.label} | facts | run.quality()
        for form in (row.to_json() for row in run.rows):
            times = form.pop("forward_ms") or {}
            lines.append(common | form | {f"forward_{name}": value for name, value in times.items()})
        if not run.rows:
            lines.append(common | {"reason": run.reason})
    text = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
