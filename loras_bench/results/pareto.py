"""Which arms are worth their cost: the Pareto front of each panel, and what of it is inside the noise.

An arm dominates another when it is no worse on both axes and better on one. Means decide who dominates whom; whether a
verdict is more than noise is read from the paired t-intervals of the differences that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from loras_bench.errors import UserError
from loras_bench.results.formatting import format_interval, scaled_unit
from loras_bench.results.panels import Arm, Panel, PanelKey, build_panels
from loras_bench.results.quantities import Quantity, find_quantity
from loras_bench.results.record import Record
from loras_bench.results.statistics import Interval

Point = tuple[float, float]


@dataclass(frozen=True)
class Doubt:
    """A verdict on an arm that rests on differences to `other` which the runs do not resolve.

    Attributes:
        other: The arm it is compared with.
        axes: Labels of the unresolved quantities.
        known: True: the intervals include zero. False: there are no intervals (one seed, no block in common).
    """

    other: str
    axes: tuple[str, ...]
    known: bool


@dataclass(frozen=True)
class FrontierArm:
    """One arm as a point, with its verdict.

    Attributes:
        y_dense: The metric evaluated with dense attention, where it was.
        dominated_by: The arms on the front that are no worse on both axes; empty for arms on the front.
    """

    arm: Arm
    x: Interval
    y: Interval
    y_dense: Interval | None
    dominated_by: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = ()

    @property
    def status(self) -> str:
        """The verdict in words."""
        verdict = f"dominated by {', '.join(self.dominated_by)}" if self.dominated_by else "on the front"
        noise = [f"{' and '.join(d.axes)} against {d.other}" for d in self.doubts if d.known]
        unknown = [d.other for d in self.doubts if not d.known]
        parts = [f"inside the noise: {'; '.join(noise)}"] if noise else []
        parts += [f"noise against {', '.join(unknown)} unknown"] if unknown else []
        return f"{verdict} ({'; '.join(parts)})" if parts else verdict


@dataclass(frozen=True)
class Frontier:
    """The verdicts of one panel.

    Attributes:
        arms: From the best x to the worst.
        left_out: Labels of arms without x or y, each with the reason.
        fallback: Why x is not the quantity that was asked for; empty where it is.
    """

    key: PanelKey
    x: Quantity
    y: Quantity
    arms: tuple[FrontierArm, ...]
    left_out: tuple[tuple[str, str], ...]
    fallback: str = ""

    @property
    def title(self) -> str:
        """What is drawn, and instead of what."""
        title = f"{self.y.label} against {self.x.label}"
        return f"{title[0].upper()}{title[1:]}{' (no measured joules)' if self.fallback else ''}"


def non_dominated(points: Sequence[Point], larger_y: bool = False) -> list[bool]:
    """Which points no other point dominates: small x is better, and small y, or large y if `larger_y`.

    Identical points do not dominate each other; of points with one x, all but the best y are dominated.

    Returns:
        One truth value per point, in order.
    """
    sign = -1 if larger_y else 1
    losses = [(x, sign * y) for x, y in points]
    return [not any(_dominates(other, point) for other in losses) for point in losses]


def _dominates(a: Point, b: Point) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def frontiers(records: Iterable[Record], x: str = "train_energy_j", y: str | None = None) -> list[Frontier]:
    """The Pareto front of every panel of comparable records.

    Args:
        records: Any records; they are never compared across panels.
        x: A numeric field of the record (`train_energy_j`, `flops.total`, `peak_memory_bytes`) or a metric.
        y: A metric of quality, evaluated as trained, or a field. By default perplexity or accuracy, by task.

    Raises:
        UserError: No such field or metric, or x and y are the same.
    """
    records = list(records)
    found_x = find_quantity(x, records)
    if y is not None and find_quantity(y, records) == found_x:
        raise UserError(f"both axes are `{x}`", "give --x a cost and --y a quality")
    result = []
    for panel in build_panels(records):
        panel_x = _in_panel(found_x, panel)
        result.append(
            _frontier(panel, panel_x, panel.quality if y is None else _in_panel(find_quantity(y, records), panel))
        )
    return result


def _in_panel(quantity: Quantity, panel: Panel) -> Quantity:
    """A metric is read on the split that this panel was evaluated on."""
    return quantity if quantity.split is None else replace(quantity, split=panel.quality.split)


def _frontier(panel: Panel, x: Quantity, y: Quantity) -> Frontier:
    fallback = ""
    if x.is_energy and all(arm.interval(x) is None for arm in panel.arms):
        reasons = dict.fromkeys(arm.why_missing(x) for arm in panel.arms)
        fallback = f"no measured joules: {'; '.join(reasons)}"
        x = Quantity("flops.total")
    arms: list[FrontierArm] = []
    left_out: list[tuple[str, str]] = []
    for arm in panel.arms:
        x_interval, y_interval = arm.interval(x), arm.interval(y)
        if x_interval is None or y_interval is None:
            missing = x if x_interval is None else y
            left_out.append((arm.label, f"no {missing.label}: {arm.why_missing(missing)}"))
            continue
        dense = None if y.split is None else arm.interval(replace(y, attention="dense"))
        arms.append(FrontierArm(arm, x_interval, y_interval, dense))
    judged = [_judge(arm, arms, x, y) for arm in arms]
    judged.sort(key=lambda arm: (_loss(arm, x, y), arm.arm.label))
    return Frontier(panel.key, x, y, tuple(judged), tuple(left_out), fallback)


def _loss(arm: FrontierArm, x: Quantity, y: Quantity) -> Point:
    """The point with both axes turned so that small is better."""
    return (-arm.x.mean if x.larger_is_better else arm.x.mean, -arm.y.mean if y.larger_is_better else arm.y.mean)


def _judge(arm: FrontierArm, arms: Sequence[FrontierArm], x: Quantity, y: Quantity) -> FrontierArm:
    """Who dominates the arm, and which comparisons of that verdict the runs do not resolve."""
    points = [_loss(other, x, y) for other in arms]
    front = [other for other, kept in zip(arms, non_dominated(points), strict=True) if kept]
    dominators = [other for other in front if _dominates(_loss(other, x, y), _loss(arm, x, y))]
    if dominators:
        doubts = [_doubt_dominated(arm, other, x, y) for other in dominators]
        if None in doubts:  # one clear dominator is enough
            doubts = []
    else:
        doubts = [_doubt_front(arm, other, x, y) for other in arms if other is not arm]
    names = tuple(other.arm.label for other in dominators)
    return replace(arm, dominated_by=names, doubts=tuple(doubt for doubt in doubts if doubt is not None))


def _doubt_dominated(arm: FrontierArm, other: FrontierArm, x: Quantity, y: Quantity) -> Doubt | None:
    """`other` dominates `arm` for certain only if it is better, or equal, beyond noise on every axis."""
    resolved = {axis: _resolved(arm.arm, other.arm, axis) for axis in (x, y)}
    unresolved = [axis for axis, answer in resolved.items() if not answer]
    return _doubt(other, unresolved, resolved) if unresolved else None


def _doubt_front(arm: FrontierArm, other: FrontierArm, x: Quantity, y: Quantity) -> Doubt | None:
    """`arm` stands beside `other` for certain if it is better beyond noise on one axis."""
    mine, theirs = _loss(arm, x, y), _loss(other, x, y)
    better = [axis for axis, a, b in zip((x, y), mine, theirs, strict=True) if a < b]
    resolved = {axis: _resolved(arm.arm, other.arm, axis) for axis in better}
    return None if not better or any(resolved.values()) else _doubt(other, better, resolved)


def _doubt(other: FrontierArm, axes: Sequence[Quantity], resolved: dict[Quantity, bool | None]) -> Doubt:
    return Doubt(
        other.arm.label, tuple(axis.label for axis in axes), known=all(resolved[axis] is not None for axis in axes)
    )


def _resolved(arm: Arm, other: Arm, quantity: Quantity) -> bool | None:
    """Whether the difference of two arms is more than noise; None where there is no interval to tell.

    Costs are compared by their logarithms and qualities by differences; a difference of zero in every seed is known.
    """
    interval, same = (
        (arm.difference(other, quantity), 0.0) if quantity.split is not None else (arm.ratio(other, quantity), 1.0)
    )
    if interval is None or interval.low is None:
        return None
    return interval.low == interval.high == same or interval.excludes(same)


def describe(results: Sequence[Frontier]) -> str:
    """The verdicts as plain lines: arm, x, y, status."""
    return "\n\n".join(map(_describe, results)) + "\n"


def _describe(frontier: Frontier) -> str:
    x_factor, x_unit = axis_scale(frontier.x, [arm.x for arm in frontier.arms])
    y_factor, y_unit = axis_scale(frontier.y, [arm.y for arm in frontier.arms])
    lines = [["arm", "n", x_unit, y_unit, "status"]]
    for arm in frontier.arms:
        x_text, y_text = format_interval(arm.x, x_factor), format_interval(arm.y, y_factor)
        lines.append([arm.arm.label, str(min(arm.x.n, arm.y.n)), x_text, y_text, arm.status])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    missing = [f"left out: {label} ({reason})" for label, reason in frontier.left_out]
    missing += [frontier.fallback] if frontier.fallback else []
    return "\n".join(chain([str(frontier.key), frontier.title], table, missing))


def axis_scale(quantity: Quantity, intervals: Sequence[Interval]) -> tuple[float, str]:
    """What to divide an axis by, and its name: `train energy (kJ, measured)`."""
    largest = max((abs(interval.mean) for interval in intervals), default=0.0)
    factor, unit = scaled_unit(quantity.unit, largest)
    return factor, f"{quantity.label} ({', '.join(filter(None, (unit, quantity.provenance)))})"
