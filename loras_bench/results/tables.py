"""Tables: one per panel, a row per arm; each number has its interval and origin, a missing one its reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from loras_bench.results.panels import FLAGS_THAT_EXCLUDE, Arm, Panel, PanelKey, build_panels, config_differences
from loras_bench.results.quantities import Quantity
from loras_bench.results.record import Record
from loras_bench.results.report import carbon_notes, energy_statement, estimate_notes, majority_notes
from loras_bench.results.statistics import Interval

Kind = Literal["value", "ratio", "difference"]


@dataclass(frozen=True)
class Column:
    """What a column shows of each arm.

    Attributes:
        quantity: The number.
        kind: The number itself, its ratio to the baseline's or its difference from the baseline's, both paired by seed.
        group: The stacked table that the column goes to where a page is too narrow for all.
        detail: What is true of the whole column and goes beside its unit (`counter`, `steady phase`).
    """

    quantity: Quantity
    kind: Kind = "value"
    group: str = "Quality"
    detail: str = ""

    @property
    def key(self) -> str:
        """The column's name in CSV and JSON."""
        split = "" if self.quantity.split is None else f"{self.quantity.split}_"
        dense = "_dense_attention" if self.quantity.attention == "dense" else ""
        suffix = {"value": "", "ratio": "_ratio", "difference": "_difference"}[self.kind]
        return f"{split}{self.quantity.name.replace('.', '_')}{dense}{suffix}"


@dataclass(frozen=True)
class Cell:
    """A number with its interval, or the reason why there is none."""

    interval: Interval | None
    missing: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One arm; `flags` are (name, text) pairs that go to the footnotes."""

    arm: Arm
    cells: dict[str, Cell]
    flags: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """One panel, ready to be rendered; `notes` are whole sentences that belong under it."""

    key: PanelKey
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...] = field(default=())
    energy_statement: str = ""


def build_tables(records: Iterable[Record]) -> list[Table]:
    """One table per panel of comparable records."""
    return [_build(panel) for panel in build_panels(records)]


def _build(panel: Panel) -> Table:
    columns = _columns(panel)
    rows = tuple(
        Row(arm, {column.key: _cell(column, arm, panel.baseline) for column in columns}, _flags(arm))
        for arm in panel.arms
    )
    return Table(
        panel.key, columns, rows, panel.baseline.label, _notes(panel), energy_statement(panel.key.device, panel.arms)
    )


def _columns(panel: Panel) -> tuple[Column, ...]:
    quality = panel.quality
    dense = Quantity(quality.name, quality.split, "dense")
    energy = Quantity("train_energy_j")
    columns = [
        Column(Quantity("trainable_percent")),
        Column(quality),
        Column(quality, "difference"),
        Column(dense),
        Column(Quantity("exact_match", quality.split)),
        Column(energy, "value", "Energy", _shared(panel, "train_energy_source")),
        Column(energy, "ratio", "Energy"),
        Column(Quantity("energy_j_per_mtoken"), "value", "Energy", _shared(panel, "energy_j_per_mtoken_phase")),
        Column(Quantity("run_energy_j"), "value", "Energy", "all phases"),
        Column(Quantity("chain_energy_j"), "value", "Energy", "with the runs gone on from"),
    ]
    time = ("tokens_per_second", "mean_power_w", "peak_memory_bytes")
    flops = ("total", "linear", "attention_executed", "attention_allowed", "attention_dense")
    columns += [
        Column(Quantity("train_seconds"), "value", "Time and memory"),
        Column(Quantity("train_seconds"), "ratio", "Time and memory"),
    ]
    columns += [Column(Quantity(name), group="Time and memory") for name in time]
    columns += [Column(Quantity(f"flops.{name}"), group="FLOPs of the train phase") for name in flops]
    return tuple(column for column in columns if _is_wanted(column, panel))


def _is_wanted(column: Column, panel: Panel) -> bool:
    """Comparisons need two arms; dense evaluation, exact match and chains get a column only where some run has them."""
    if column.kind != "value":
        return len(panel.arms) > 1
    if column.quantity.name == "chain_energy_j":
        return any(record.chain_energy_j not in (None, record.run_energy_j) for record in panel.records)
    if column.quantity.attention == "dense" or column.quantity.name == "exact_match":
        return any(column.quantity.read(record) is not None for record in panel.records)
    return True


def _shared(panel: Panel, attribute: str) -> str:
    """The attribute's value where all runs agree on it; where they do not, cells say it."""
    values = {value for record in panel.records if (value := getattr(record, attribute)) is not None}
    return values.pop().replace("_", " ") if len(values) == 1 else "mixed" if values else ""


def _cell(column: Column, arm: Arm, baseline: Arm) -> Cell:
    quantity = column.quantity
    if column.kind == "value":
        return _value_cell(column, arm)
    if arm is baseline:
        return Cell(Interval(len(arm.runs), 1.0 if column.kind == "ratio" else 0.0))
    interval = arm.ratio(baseline, quantity) if column.kind == "ratio" else arm.difference(baseline, quantity)
    if interval is not None:
        return Cell(interval)
    for side in (arm, baseline):
        if side.interval(quantity) is None:
            whose = "" if side is arm else f"{side.label}: "
            return Cell(None, whose + side.why_missing(quantity))
        if not side.clean:
            return Cell(None, f"every run of {side.label} is flagged {' or '.join(FLAGS_THAT_EXCLUDE)}")
    where = "seed in one block" if quantity.needs_block else "seed"
    return Cell(None, f"no {where} in common with {baseline.label}: run them in one command (with --force) for a ratio")


def _value_cell(column: Column, arm: Arm) -> Cell:
    quantity = column.quantity
    interval = arm.interval(quantity)
    if interval is None:
        return Cell(None, arm.why_missing(quantity))
    notes = []
    if interval.n < len(arm.runs):
        notes.append(f"{interval.n} of {len(arm.runs)} runs; the others: {arm.why_missing(quantity)}")
    if column.detail == "mixed":
        attribute = "train_energy_source" if quantity.name == "train_energy_j" else "energy_j_per_mtoken_phase"
        found = sorted({str(getattr(run, attribute)).replace("_", " ") for run in arm.runs})
        notes.append(f"{quantity.label}: {' and '.join(found)}")
    return Cell(interval, note="; ".join(notes))


def _flags(arm: Arm) -> tuple[tuple[str, str], ...]:
    """Each flag once, with the reason of the first run that has it and the number of runs."""
    found: dict[str, list[str]] = {}
    for run in arm.runs:
        for flag in run.flags:
            found.setdefault(flag.name, []).append(flag.reason)
        if run.flops is not None and run.flops.incomplete:
            found.setdefault("flops_incomplete", []).append(f"no formula for {', '.join(run.flops.incomplete)}")
    return tuple(
        (name, f"{name}, {len(reasons)} of {len(arm.runs)} runs of {arm.label}: {reasons[0]}")
        for name, reasons in found.items()
    )


def _notes(panel: Panel) -> tuple[str, ...]:
    notes = []
    if any(len(arm.runs) == 1 for arm in panel.arms):
        notes.append("An arm with one seed has no interval: its run-to-run noise is unknown.")
    for arm in panel.arms:
        notes += [f"Left out of means and intervals: {run.run_id} ({reason})." for run, reason in arm.left_out]
        if not arm.clean and arm.runs:
            notes.append(f"{arm.label} shows its flagged runs, without intervals and ratios, because it has no others.")
    for name, differences in config_differences(panel.arms).items():
        listed = "; ".join(differences) or "nothing that the YAML shows (see `attention` in their records)"
        notes.append(f"{name} names several configurations, which differ in {listed}.")
    notes += majority_notes(panel.arms, panel.quality.split)
    kernels = sorted({record.kernel_version for record in panel.records})
    if len(kernels) > 1:
        notes.append(f"The runs were made with different kernel versions: {', '.join(kernels)}.")
    return (*notes, *carbon_notes(panel.arms), *estimate_notes(panel.arms))
