"""Pareto plots fit for a paper: PNG, SVG and PDF of every panel, and the numbers as CSV."""

from __future__ import annotations

import csv
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.errors import UserError
from loras_bench.results.labels import place_labels
from loras_bench.results.pareto import Frontier, FrontierArm, axis_scale
from loras_bench.results.quantities import Quantity
from loras_bench.results.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by readers of all kinds of colour vision; without its yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
PANEL_INCHES = (6.4, 4.7)
GREY = "#666666"
NOISE: dict[str, Any] = {
    "color": GREY,
    "linewidth": 0.9,
    "linestyle": (0, (3, 2)),
    "marker": "o",
    "markersize": 15,
    "markerfacecolor": "none",
    "markeredgewidth": 0.9,
}
"""A ring around each of two arms that the runs do not tell apart, and a line between them."""
STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3
    "svg.fonttype": "none",
    "svg.hashsalt": "loras-bench",  # one drawing gives one file
}


def write_pareto(frontiers: Sequence[Frontier], out_dir: Path) -> list[Path]:
    """Draw every panel to PNG (200 dpi), SVG and PDF, several also side by side, and write all numbers to one CSV.

    Args:
        frontiers: From `pareto.frontiers`.
        out_dir: Folder to write to; it is made where it does not exist.

    Returns:
        The paths written.

    Raises:
        UserError: There is nothing to draw, or the folder cannot be made.
    """
    import matplotlib

    drawn = [frontier for frontier in frontiers if frontier.arms]
    if not drawn:
        raise UserError("nothing to plot: no arm has both numbers", "`loras-bench table` tells what is missing and why")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out_dir}: {error.strerror}", "give another folder with --out") from None
    paths = [write_frontier_csv(frontiers, out_dir / "pareto.csv")]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        if len(drawn) == 1:
            return paths + _save(draw(drawn), out_dir / "pareto")
        for frontier, name in zip(drawn, _file_names(drawn), strict=True):
            paths += _save(draw([frontier]), out_dir / name)
        return paths + _save(draw(drawn), out_dir / "pareto")


def draw(frontiers: Sequence[Frontier]) -> Figure:
    """One figure with a subplot for every panel, two in a row. Draws on a figure of its own, never on pyplot's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(frontiers), 2)
    rows = -(-len(frontiers) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    drawn = [(axes, frontier, _draw_panel(axes, frontier)) for axes, frontier in zip(grid, frontiers, strict=False)]
    for axes in grid[len(frontiers) :]:
        axes.set_axis_off()
    figure.draw_without_rendering()  # labels are placed in pixels, which the layout decides
    figure.set_layout_engine("none")
    for axes, frontier, colours in drawn:
        points = _scaled(frontier, [(arm.x, arm.y) for arm in frontier.arms])
        means = [(x.mean, y.mean) for x, y in points]
        place_labels(axes, means, [arm.arm.label for arm in frontier.arms], colours)
    return figure


def _draw_panel(axes: Axes, frontier: Frontier) -> list[str]:
    """Draw everything but the names of the arms; return the arms' colours."""
    names = sorted(arm.arm.label for arm in frontier.arms)
    styles = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    points = _scaled(frontier, [(arm.x, arm.y) for arm in frontier.arms])
    for arm, (x, y) in zip(frontier.arms, points, strict=True):
        _draw_arm(axes, arm, x, y, *styles[arm.arm.label])
        if arm.y_dense is not None and arm.y_dense.mean != arm.y.mean:
            (_, y_dense), *_ = _scaled(frontier, [(arm.x, arm.y_dense)])
            _draw_dense(axes, x.mean, y.mean, y_dense.mean, *styles[arm.arm.label])
    _draw_noise(axes, frontier, points)
    axes.margins(0.18)
    _draw_front(axes, frontier, points)
    _describe_axes(axes, frontier)
    _draw_legend(axes, frontier)
    return [_darker(styles[arm.arm.label][0]) for arm in frontier.arms]


def _darker(colour: str) -> str:
    """Text needs more contrast on white than markers do."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.7):02x}" for i in (1, 3, 5))


def _scaled(frontier: Frontier, points: Sequence[tuple[Interval, Interval]]) -> list[tuple[Interval, Interval]]:
    x_factor, _ = axis_scale(frontier.x, [arm.x for arm in frontier.arms])
    y_factor, _ = axis_scale(frontier.y, [arm.y for arm in frontier.arms])
    return [(_divide(x, x_factor), _divide(y, y_factor)) for x, y in points]


def _divide(interval: Interval, factor: float) -> Interval:
    low = None if interval.low is None else interval.low / factor
    high = None if interval.high is None else interval.high / factor
    return Interval(interval.n, interval.mean / factor, low, high)


def _draw_arm(axes: Axes, arm: FrontierArm, x: Interval, y: Interval, colour: str, marker: str) -> None:
    axes.errorbar(
        x.mean,
        y.mean,
        xerr=x.half_width,
        yerr=y.half_width,
        fmt=marker,
        color=colour,
        markerfacecolor="white" if arm.dominated_by else colour,
        markeredgewidth=1.5,
        markersize=7,
        elinewidth=1.1,
        capsize=2.5,
        zorder=4,
    )


def _draw_dense(axes: Axes, x: float, y: float, y_dense: float, colour: str, marker: str) -> None:
    axes.plot([x, x], [y, y_dense], color=colour, linewidth=0.9, linestyle=":", alpha=0.8, zorder=2)
    axes.plot([x], [y_dense], marker, color=colour, markersize=4.5, alpha=0.45, markeredgewidth=0, zorder=3)


def _draw_noise(axes: Axes, frontier: Frontier, points: Sequence[tuple[Interval, Interval]]) -> None:
    where = {arm.arm.label: (x.mean, y.mean) for arm, (x, y) in zip(frontier.arms, points, strict=True)}
    for pair in sorted(_noise_pairs(frontier), key=sorted):
        xs, ys = zip(*(where[name] for name in sorted(pair)), strict=True)
        axes.plot(xs, ys, zorder=2, **NOISE)


def _noise_pairs(frontier: Frontier) -> set[frozenset[str]]:
    return {frozenset((arm.arm.label, doubt.other)) for arm in frontier.arms for doubt in arm.doubts if doubt.known}


def _draw_front(axes: Axes, frontier: Frontier, points: Sequence[tuple[Interval, Interval]]) -> None:
    """The staircase of what is attainable: at each cost, the best quality that some arm reaches for no more."""
    front = [(x.mean, y.mean) for arm, (x, y) in zip(frontier.arms, points, strict=True) if not arm.dominated_by]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    worst_x = left if frontier.x.larger_is_better else right
    worst_y = bottom if frontier.y.larger_is_better else top
    corners = [(front[0][0], worst_y), front[0]]
    for x, y in front[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    xs, ys = zip(*corners, (worst_x, corners[-1][1]), strict=True)
    axes.plot(xs, ys, color=GREY, linewidth=1.2, alpha=0.75, zorder=1)
    axes.fill([*xs, worst_x], [*ys, worst_y], color="#F4F4F4", linewidth=0, zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _describe_axes(axes: Axes, frontier: Frontier) -> None:
    _, x_label = axis_scale(frontier.x, [arm.x for arm in frontier.arms])
    _, y_label = axis_scale(frontier.y, [arm.y for arm in frontier.arms])
    axes.set_xlabel(f"{x_label}, {_better(frontier.x)}")
    axes.set_ylabel(f"{y_label}, {_better(frontier.y)}")
    axes.locator_params(nbins=7)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    subtitle = [*textwrap.wrap(str(frontier.key), 96), *textwrap.wrap(_seeds(frontier), 96)]
    subtitle += textwrap.wrap(frontier.fallback, 96)
    title = textwrap.wrap(frontier.title, 60)
    above = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axes.annotate("\n".join(subtitle), xytext=(0, 7), fontsize=7.5, color=GREY, **above)  # type: ignore[arg-type]
    height = 10 + 10 * len(subtitle)
    axes.annotate("\n".join(title), xytext=(0, height), fontsize=11, fontweight="bold", **above)  # type: ignore[arg-type]


def _better(quantity: Quantity) -> str:
    return "higher is better" if quantity.larger_is_better else "lower is better"


def _seeds(frontier: Frontier) -> str:
    counts = sorted({min(arm.x.n, arm.y.n) for arm in frontier.arms})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts[-1] == 1:
        return "n = 1 seed: run-to-run noise unknown"
    return f"n = {n} seeds: mean and 95 % t-interval"


def _draw_legend(axes: Axes, frontier: Frontier) -> None:
    from matplotlib.lines import Line2D

    def handle(label: str, **style: Any) -> Line2D:
        settings: dict[str, Any] = {"color": GREY, "linestyle": "none", "markersize": 6} | style
        return Line2D([], [], label=label, **settings)

    handles = [handle("on the front", marker="o"), handle("Pareto front", linestyle="-", linewidth=1.2)]
    if any(arm.dominated_by for arm in frontier.arms):
        handles.insert(1, handle("dominated", marker="o", markerfacecolor="white", markeredgewidth=1.5))
    if any(arm.y_dense is not None and arm.y_dense.mean != arm.y.mean for arm in frontier.arms):
        handles.append(handle("evaluated dense", marker="o", markersize=4.5, alpha=0.45, markeredgewidth=0))
    if _noise_pairs(frontier):
        handles.append(handle("inside the noise", **(NOISE | {"markersize": 10})))
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg", "pdf")]
    for path, metadata in zip(paths, ({}, {"Date": None}, {"CreationDate": None}), strict=True):
        figure.savefig(path, dpi=200, metadata=metadata)
    return paths


def _file_names(frontiers: Sequence[Frontier]) -> list[str]:
    """File names from what the panels are; a number only where two would be the same."""
    names: list[str] = []
    for frontier in frontiers:
        key = frontier.key
        text = f"pareto-{key.dataset}-{key.model}-{key.sequence_length}-{key.budget}-{key.device}"
        name = re.sub(r"[^a-z0-9.]+", "-", text.lower().replace(",", "")).strip("-")
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def write_frontier_csv(frontiers: Sequence[Frontier], path: Path) -> Path:
    """One row per arm in full precision and the records' units: both numbers with their intervals, and the verdict."""
    rows = [
        asdict(frontier.key)
        | {"arm": arm.arm.label, "methods": " + ".join(arm.arm.methods)}
        | _csv_axis("x", frontier.x, arm.x)
        | _csv_axis("y", frontier.y, arm.y)
        | {
            "on_front": not arm.dominated_by,
            "dominated_by": "; ".join(arm.dominated_by),
            "inside_noise_of": "; ".join(doubt.other for doubt in arm.doubts if doubt.known),
            "noise_unknown_against": "; ".join(doubt.other for doubt in arm.doubts if not doubt.known),
            "remark": frontier.fallback,
        }
        for frontier in frontiers
        for arm in frontier.arms
    ]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _csv_axis(axis: str, quantity: Quantity, interval: Interval) -> dict[str, Any]:
    bounds = {"n": interval.n, "mean": interval.mean, "ci_low": interval.low, "ci_high": interval.high}
    names = {axis: quantity.name, f"{axis}_unit": quantity.unit, f"{axis}_origin": quantity.provenance}
    return names | {f"{axis}_{name}": value for name, value in bounds.items()}
