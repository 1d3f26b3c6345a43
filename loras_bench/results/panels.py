"""Which records may be compared: panels of one task, data set, model, length, budget and device, made of arms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loras_bench.results.quantities import QUALITY_OF_TASK, Quantity, evaluated_split
from loras_bench.results.record import Record
from loras_bench.results.statistics import Interval, paired_difference, paired_ratio, seed_pairs, t_interval

FLAGS_THAT_EXCLUDE = ("resumed", "foreign_process")
"""Runs with these flags stay out of means and intervals: their joules are not those of one undisturbed run."""


@dataclass(frozen=True)
class PanelKey:
    """What all runs of a panel have in common."""

    task: str
    dataset: str
    model: str
    sequence_length: int
    budget: str
    device: str

    def __str__(self) -> str:
        length = f"length {self.sequence_length:,}"
        return f"{self.dataset}, {self.model}, {length}, trained on {self.budget}, {self.device}"


@dataclass(frozen=True)
class Arm:
    """The runs of one configuration: a row of the table, a point of the plot.

    Attributes:
        label: The experiment's name, with the hash where the name has several configurations.
        runs: The runs that count, by seed. When every completed run is flagged out, these runs, without intervals.
        clean: False in that case.
        left_out: The other runs, each with the reason.
    """

    label: str
    name: str
    config_hash: str
    runs: tuple[Record, ...]
    clean: bool
    left_out: tuple[tuple[Record, str], ...]

    @property
    def all_runs(self) -> list[Record]:
        """The runs that count and those that do not."""
        return [*self.runs, *(record for record, _ in self.left_out if record not in self.runs)]

    @property
    def methods(self) -> tuple[str, ...]:
        """Kinds of the methods, in stage order."""
        return tuple(self.all_runs[0].methods)

    def interval(self, quantity: Quantity) -> Interval | None:
        """Mean and t-interval of a quantity over the seeds; None where no run has it."""
        values = [value for run in self.runs if (value := quantity.read(run)) is not None]
        if not values:
            return None
        interval = t_interval(values)
        return interval if self.clean else Interval(interval.n, interval.mean)

    def pairs(self, other: Arm, quantity: Quantity) -> list[tuple[float, float]]:
        """The values of this arm and of the other, paired by seed; empty when either has only flagged runs."""
        if not (self.clean and other.clean):
            return []
        return seed_pairs(self.runs, other.runs, quantity.read, within_blocks=quantity.needs_block)

    def ratio(self, other: Arm, quantity: Quantity) -> Interval | None:
        """This arm's value over the other's, paired by seed; None without pairs or where a value is not positive."""
        pairs = self.pairs(other, quantity)
        return paired_ratio(pairs) if pairs and all(min(pair) > 0 for pair in pairs) else None

    def difference(self, other: Arm, quantity: Quantity) -> Interval | None:
        """This arm's value minus the other's, paired by seed; None without pairs."""
        pairs = self.pairs(other, quantity)
        return paired_difference(pairs) if pairs else None

    def why_missing(self, quantity: Quantity) -> str:
        """Why some or all runs have no such number."""
        if not self.runs:
            return "no completed run"
        return "; ".join(dict.fromkeys(quantity.why_missing(run) for run in self.runs if quantity.read(run) is None))


@dataclass(frozen=True)
class Panel:
    """Arms that may be compared with each other; the baseline comes first."""

    key: PanelKey
    arms: tuple[Arm, ...]

    @property
    def baseline(self) -> Arm:
        """The arm without methods where there is one (`full`), else the first by name."""
        return self.arms[0]

    @property
    def records(self) -> list[Record]:
        """All runs, also those left out of the intervals."""
        return [record for arm in self.arms for record in arm.all_runs]

    @property
    def quality(self) -> Quantity:
        """The task's metric, evaluated as trained."""
        split = evaluated_split(self.records)
        choices = [Quantity(name, split) for name in QUALITY_OF_TASK[self.key.task]]
        read = (one for one in choices if any(one.read(record) is not None for record in self.records))
        return next(read, choices[0])


def build_panels(records: Iterable[Record]) -> list[Panel]:
    """Group records into panels and arms; nothing is ever compared across panels."""
    groups: dict[PanelKey, list[Record]] = defaultdict(list)
    for record in records:
        groups[_key(record)].append(record)
    return [Panel(key, _arms(groups[key])) for key in sorted(groups, key=str)]


def _key(record: Record) -> PanelKey:
    training: dict[str, Any] = record.config.get("training") or {}
    if training.get("tokens") is not None:
        budget = f"{training['tokens']:,} tokens"
    elif training.get("epochs") is not None:
        budget = "1 epoch" if training["epochs"] == 1 else f"{training['epochs']:g} epochs"
    else:
        budget = "an unknown budget"
    return PanelKey(record.task, record.dataset, record.model, record.sequence_length, budget, record.device)


def _arms(records: list[Record]) -> tuple[Arm, ...]:
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.name, record.run_id.rpartition("-")[2]].append(record)
    names = [name for name, _ in groups]
    arms = [
        _arm(f"{name} [{config_hash[:6]}]" if names.count(name) > 1 else name, name, config_hash, runs)
        for (name, config_hash), runs in sorted(groups.items())
    ]
    # Several arms may have no methods; then the one with the most runs is the baseline.
    return tuple(sorted(arms, key=lambda arm: (not _is_full(arm), -len(arm.runs) if _is_full(arm) else 0, arm.label)))


def _is_full(arm: Arm) -> bool:
    return not arm.methods


def _arm(label: str, name: str, config_hash: str, records: list[Record]) -> Arm:
    completed: list[Record] = []
    left_out: list[tuple[Record, str]] = []
    for record in sorted(records, key=lambda record: record.seed):
        reason = _why_left_out(record)
        if reason is None:
            completed.append(record)
        else:
            left_out.append((record, reason))
    flagged = tuple(record for record, _ in left_out if record.status == "completed")
    return Arm(label, name, config_hash, tuple(completed) or flagged, bool(completed), tuple(left_out))


def _why_left_out(record: Record) -> str | None:
    if record.status != "completed":
        return f"{record.status}: {record.reason or 'no reason recorded'}"
    for flag in record.flags:
        if flag.name in FLAGS_THAT_EXCLUDE:
            return f"{flag.name}: {flag.reason}"
    return None


def config_differences(arms: Iterable[Arm]) -> dict[str, list[str]]:
    """For each name with several configurations, the settings in which they differ, as `key: value / value`."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for arm in arms:
        by_name[arm.name].append(_flat(arm.all_runs[0].config))
    differences: dict[str, list[str]] = {}
    for name, configs in by_name.items():
        if len(configs) > 1:
            keys = dict.fromkeys(key for config in configs for key in config)
            values = {key: [config.get(key) for config in configs] for key in keys}
            differences[name] = [
                f"{key}: {' / '.join(map(str, found))}"
                for key, found in values.items()
                if any(v != found[0] for v in found)
            ]
    return differences


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else None
    if items is None:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
