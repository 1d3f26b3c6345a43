"""Numbers for people: 3 to 4 significant digits, thousands separators, prefixes of units."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loras_bench.results.statistics import Interval

_DECIMAL = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15), ("E", 1e18))
_BINARY = (("", 1.0), ("Ki", 2.0**10), ("Mi", 2.0**20), ("Gi", 2.0**30), ("Ti", 2.0**40))
_PREFIXED = ("J", "FLOP", "B")
"""Units that take prefixes, alone or before a slash; seconds, watts and pure numbers do not."""


def scaled_unit(unit: str, largest: float, limit: float = 1000.0) -> tuple[float, str]:
    """A prefix under which the largest value stays below the limit.

    Returns:
        What to divide values by, and the unit with its prefix (`GiB`, `kJ/Mtoken`).
    """
    if unit.split("/")[0] not in _PREFIXED:
        return 1.0, unit
    prefixes = _BINARY if unit == "B" else _DECIMAL
    prefix, factor = next((p for p in prefixes if abs(largest) / p[1] < limit), prefixes[-1])
    return factor, prefix + unit


def _last_place(value: float, digits: int) -> int:
    """Decimal places that show so many significant digits; negative to the left of the point."""
    return digits - 1 - math.floor(math.log10(abs(value))) if value else 0


def format_number(value: float, digits: int = 4, places: int | None = None) -> str:
    """`22,380`, `0.6912`, `3.25e-07`.

    Args:
        value: A finite number.
        digits: Significant digits to keep.
        places: Decimal places, instead of digits; negative rounds to tens, hundreds and so on.
    """
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}e}"
    places = _last_place(value, digits) if places is None else places
    return f"{round(value, places):,.{max(places, 0)}f}"


def format_interval(interval: Interval, factor: float = 1.0, digits: int = 4) -> str:
    """`12,340 ± 70`, both to one last place; the mean alone where there is no interval or all seeds gave one number."""
    mean, half = interval.mean / factor, interval.half_width
    if half is None or half <= 1e-9 * abs(interval.mean):
        return format_number(mean, digits)
    half /= factor
    largest = max(abs(mean), half)
    places = _last_place(largest, digits)
    if half and round(half, places) == 0:
        return f"{format_number(mean, digits)} ± {format_number(half, 1)}"
    if largest >= 1e9 or 0 < largest < 1e-4:
        return f"{format_number(mean, digits)} ± {format_number(half, 2)}"
    return f"{format_number(mean, places=places)} ± {format_number(half, places=places)}"


def format_ratio(interval: Interval) -> str:
    """`0.842 [0.821, 0.863]`: a ratio's interval is not symmetric."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def format_difference(interval: Interval) -> str:
    """`+0.57 [+0.51, +0.63]`."""
    values = [value for value in (interval.mean, interval.low, interval.high) if value is not None]
    places = _last_place(max(map(abs, values)), 3)
    mean, *bounds = [("+" if value > 0 else "") + format_number(value, places=max(places, 0)) for value in values]
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that can be read as it stands; the first `left` columns are text, the others numbers."""
    grid = [heads, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*grid, strict=True)]
    rule = ["-" * (width + 1) for width in widths]
    lines = [
        f"| {' | '.join(_pad(cell, widths[index], index < left) for index, cell in enumerate(row))} |" for row in grid
    ]
    marks = [f":{dashes}" if index < left else f"{dashes}:" for index, dashes in enumerate(rule)]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])


def _pad(cell: str, width: int, to_left: bool) -> str:
    return cell.ljust(width) if to_left else cell.rjust(width)
