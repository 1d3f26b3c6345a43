"""Names beside the points of a plot, placed so that they cover neither each other nor anything that is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Point = tuple[float, float]

DISTANCES = (8.0, 13.0, 20.0, 30.0, 42.0)
"""Points between a marker and its name; the nearest free place wins, and from the third on a line leads to it."""
# Diagonal places first: they keep clear of error bars.
DIRECTIONS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
LINE_CLEARANCE = 3.0
MARKER_CLEARANCE = 9.0


def place_labels(axes: Axes, points: Sequence[Point], texts: Sequence[str], colours: Sequence[str]) -> None:
    """Write each text beside its point: of the places around it, the nearest that covers least.

    The layout of the figure must be settled and everything else be drawn, because the search is done in pixels.

    Args:
        axes: Where the points are drawn.
        points: (x, y) in data units.
        texts: One name per point.
        colours: One colour per name.
    """
    taken = list(_obstacles(axes))
    # Crowded points choose first, since they have the fewest free places.
    for index in sorted(range(len(points)), key=lambda index: _distance_to_nearest(axes, points, index)):
        label = axes.annotate(
            texts[index], points[index], textcoords="offset points", xytext=(0, 0), color=colours[index], zorder=6
        )
        width, height = label.get_window_extent().size
        pixels: Any = axes.transData.transform(points[index])
        costs = {
            place: _cost(axes, _box(axes, pixels, place, width, height), place, taken)
            for place in ((dx * d, dy * d * 0.8) for d in DISTANCES for dx, dy in DIRECTIONS)
        }
        best = min(costs, key=lambda place: costs[place])
        taken.append(_box(axes, pixels, best, width, height))
        label.set_position(best)
        label.set_horizontalalignment(_side(best[0], "left", "center", "right"))
        label.set_verticalalignment(_side(best[1], "bottom", "center", "top"))
        if max(map(abs, best)) >= DISTANCES[2]:
            line = {"arrowstyle": "-", "color": colours[index], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
            axes.annotate("", points[index], best, textcoords="offset points", arrowprops=line)


def _side(offset: float, positive: Any, zero: Any, negative: Any) -> Any:
    return positive if offset > 0 else negative if offset < 0 else zero


def _box(axes: Axes, pixels: Sequence[float], place: Point, width: float, height: float) -> Bbox:
    """What a text of that size covers, in pixels, when it is put there (in points from its marker)."""
    from matplotlib.transforms import Bbox

    scale = axes.get_figure().dpi / 72  # type: ignore[union-attr]
    left = pixels[0] + place[0] * scale - width * _side(place[0], 0.0, 0.5, 1.0)
    bottom = pixels[1] + place[1] * scale - height * _side(place[1], 0.0, 0.5, 1.0)
    return Bbox.from_bounds(left, bottom, width, height)


def _cost(axes: Axes, box: Bbox, place: Point, taken: Sequence[Bbox]) -> float:
    """Covered pixels, those outside the axes counted ten times; a longer way breaks ties."""
    covered = sum(_common_area(box, other) for other in taken)
    outside = box.width * box.height - _common_area(box, axes.get_window_extent())
    return float(covered + 10 * outside + max(map(abs, place)))


def _common_area(box: Bbox, other: Bbox) -> float:
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _obstacles(axes: Axes) -> Iterator[Bbox]:
    """Boxes, in pixels, around every line, marker and error bar of the axes."""
    from matplotlib.collections import LineCollection
    from matplotlib.transforms import Bbox

    paths = [(line.get_xydata(), line.get_marker() not in (None, "None", "none", "")) for line in axes.lines]
    paths += [(part, False) for c in axes.collections if isinstance(c, LineCollection) for part in c.get_segments()]
    for path, has_markers in paths:
        pixels: Any = axes.transData.transform(path)  # type: ignore[arg-type]
        if has_markers:
            yield from (Bbox([point, point]).padded(MARKER_CLEARANCE) for point in pixels)
        for start, end in pairwise(pixels):
            # A slanted line is cut into short pieces, or its box would forbid a whole region.
            pieces = 1 if min(abs(end - start)) < 1 else 12
            cuts = [start + (end - start) * i / pieces for i in range(pieces + 1)]
            for a, b in pairwise(cuts):
                yield Bbox([(min(a[0], b[0]), min(a[1], b[1])), (max(a[0], b[0]), max(a[1], b[1]))]).padded(
                    LINE_CLEARANCE
                )


def _distance_to_nearest(axes: Axes, points: Sequence[Point], index: int) -> float:
    """Distance to the nearest other point, in pixels."""
    pixels = axes.transData.transform(points)
    x, y = pixels[index]
    others = (other for i, other in enumerate(pixels) if i != index)
    return float(min((((x - a) ** 2 + (y - b) ** 2) ** 0.5 for a, b in others), default=0.0))
