"""Every number of a record that tables and plots can show: its unit, its origin and which direction is better."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from loras_bench.errors import UserError
from loras_bench.results.record import Flops, Quality, Record

Provenance = Literal["measured", "counted", "estimated"]

COUNTED = {
    "total_parameters": "all parameters",
    "trainable_parameters": "trained parameters",
    "trainable_percent": "trained parameters",
    "trained_tokens": "trained tokens",
    "padded_tokens": "computed tokens",
    "steps": "steps",
    "flops.total": "FLOPs",
    "flops.linear": "linear FLOPs",
    "flops.attention_executed": "attention, executed",
    "flops.attention_allowed": "attention, allowed pairs",
    "flops.attention_dense": "attention, if dense",
}
LABELS = {
    "train_energy_j": "train energy",
    "energy_j_per_mtoken": "energy per Mtoken",
    "run_energy_j": "run energy",
    "chain_energy_j": "chain energy",
    "train_seconds": "train time",
    "tokens_per_second": "throughput",
    "mean_power_w": "mean power",
    "peak_memory_bytes": "peak memory",
    **COUNTED,
}
UNITS = {  # by the ending of the name, the longest first
    "_j_per_mtoken": "J/Mtoken",
    "_tokens_per_second": "tokens/s",
    "tokens_per_second": "tokens/s",
    "_percent": "%",
    "_seconds": "s",
    "_bytes": "B",
    "_j": "J",
    "_w": "W",
}
LARGER_IS_BETTER = frozenset({"accuracy", "accuracy_normalized", "f1", "exact_match", "tokens_per_second"})
QUALITY_OF_TASK = {
    "language_modeling": ("perplexity",),
    "classification": ("accuracy",),
    "instruction": ("accuracy", "perplexity"),
}
"""What tells how good a run is: the first that was read."""
SAME_IN_A_PANEL = frozenset({"schema_version", "seed", "sequence_length"})


@dataclass(frozen=True)
class Quantity:
    """One number of a record.

    Attributes:
        name: The record's field (`train_energy_j`, `flops.total`) or the metric's name (`perplexity`).
        split: For metrics of quality, the split they were read on; None for fields.
        attention: For metrics of quality, `same` as in training or `dense`.
    """

    name: str
    split: str | None = None
    attention: Literal["same", "dense"] = "same"

    @property
    def label(self) -> str:
        """What tables and axes call it, without the unit."""
        if self.split is not None:
            dense = ", dense attention" if self.attention == "dense" else ""
            return f"{self.split} {self.name.replace('_', ' ')}{dense}"
        return LABELS.get(self.name, self.name.replace(".", " ").replace("_", " "))

    @property
    def unit(self) -> str:
        """The unit that the number is recorded in; empty for pure numbers."""
        if self.name.startswith("flops."):
            return "FLOP"
        return next((unit for ending, unit in UNITS.items() if self.name.endswith(ending)), "")

    @property
    def provenance(self) -> Provenance:
        """How the number came to be."""
        if self.name.startswith("estimates."):
            return "estimated"
        return "counted" if self.name in COUNTED else "measured"

    @property
    def larger_is_better(self) -> bool:
        """Direction; costs and losses are better when small."""
        return self.name in LARGER_IS_BETTER

    @property
    def is_energy(self) -> bool:
        """Whether it is measured in joules."""
        return self.unit.startswith("J")

    @property
    def needs_block(self) -> bool:
        """Whether runs are comparable only within a block: what the card and its temperature decide."""
        return self.split is None and self.provenance == "measured"

    def read(self, record: Record) -> float | None:
        """The number, or None where there is no finite one."""
        value = self._raw(record)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)

    def why_missing(self, record: Record) -> str:
        """The reason for `read` giving None, in words."""
        stem = "quality" if self.split is not None else self.name.split(".")[0]
        reason = record.missing.get(self.name) or record.missing.get(stem)
        if reason is None and (self.is_energy or self.unit == "W"):
            reason = record.missing.get("train_energy_j")  # the one sensor gives all of them
        if reason:
            return reason
        if isinstance(self._raw(record), float):
            return f"{self.name} is not a finite number"
        if self.split is not None:
            return f"not evaluated on {self.split} with {self.attention} attention"
        return f"{self.name} was not recorded"

    def _raw(self, record: Record) -> Any:
        if self.split is not None:
            # An arm whose every layer is dense was evaluated densely as trained.
            attention = "same" if record.attends_densely else self.attention
            reading = (q for q in record.quality if q.split == self.split and q.attention == attention)
            return next((q.metrics[self.name] for q in reading if self.name in q.metrics), None)
        value: Any = record
        for part in self.name.split("."):
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        return value


def fields(records: Iterable[Record]) -> list[str]:
    """Names of all numeric fields, dotted where nested; of the free-form estimates those that the records have."""
    names = [name for name, field in Record.model_fields.items() if _is_number(field.annotation)]
    names += [
        "trainable_percent",
        "flops.total",
        *(f"flops.{name}" for name in Flops.model_fields if name != "incomplete"),
    ]
    for record in records:
        names += [f"estimates.{key}" for key, value in record.estimates.items() if isinstance(value, int | float)]
    return [name for name in dict.fromkeys(names) if name not in SAME_IN_A_PANEL]


def find_quantity(name: str, records: list[Record]) -> Quantity:
    """The field or metric of that name; metrics are read on the test split where any record has one.

    Raises:
        UserError: There is none; the hint names the nearest.
    """
    if name in fields(records):
        return Quantity(name)
    metrics = {metric for record in records for quality in record.quality for metric in quality.metrics}
    if name in metrics:
        return Quantity(name, evaluated_split(records))
    choices = sorted({*fields(records), *metrics})
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"one of {', '.join(choices)}"
    raise UserError(f"no number called `{name}` in these records", hint)


def evaluated_split(records: Iterable[Record]) -> str:
    """`test` where any record was read on it, else what they were read on: one table never mixes splits."""
    readings: list[Quality] = [quality for record in records for quality in record.quality]
    splits = {quality.split for quality in readings}
    return "test" if "test" in splits or not splits else min(splits)


def _is_number(annotation: Any) -> bool:
    kinds = set(get_args(annotation) or (annotation,)) - {type(None)}
    return bool(kinds) and kinds <= {int, float}
