"""The plot of `loras-bench sensitivity`: divergence by layer and sparsity for each part, the chosen cells marked."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.results.plots import STYLE
from loras_bench.results.sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"feed_forward": "feed-forward", "attention": "attention"}
COLOURS = "YlOrRd"
ABSENT = "#F0F0F0"
LAYER_INCHES, ROW_INCHES = 0.27, 0.36


def write_heatmap(found: Sensitivity, stem: Path) -> list[Path]:
    """Draw a finished search to `<stem>.png` (200 dpi) and `<stem>.svg`; returns the paths."""
    import matplotlib

    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = draw_heatmap(found)
        for path, metadata in zip(paths, ({}, {"Date": None}), strict=True):
            figure.savefig(path, dpi=200, metadata=metadata)
    return paths


def draw_heatmap(found: Sensitivity) -> Figure:
    """One subplot a part on a figure of its own: a column for each layer, a row for each sparsity, dense at the top.

    Divergences below a thousandth of the largest share the lightest colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    assert found.choice is not None
    parts = {part: [0.0, *sorted(found.grid[part])] for part in TITLES}
    width = max(6.4, 2.6 + LAYER_INCHES * found.layer_count)
    height = 2.5 + ROW_INCHES * sum(map(len, parts.values()))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(parts), 1, sharex=True, height_ratios=[len(shares) for shares in parts.values()])
    shown = [one for one in found.measurements if one.sparsity in found.grid[one.part]]
    most = max(1e-9, *(one.divergence for one in shown))
    norm = LogNorm(most / 1000, most, clip=True)
    for axes, (part, shares) in zip(grid, parts.items(), strict=True):
        _draw_part(axes, found, part, shares, norm)
    grid[-1].set_xlabel("layer")
    grid[-1].set_xticks(_ticks(found.layer_count))
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=list(grid), pad=0.02, aspect=28, extend="min")
    bar.set_label("divergence, nats a label token")
    lines = (line for text in _title(found) for line in textwrap.wrap(text, int(12 * width)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9)
    return figure


def _draw_part(axes: Axes, found: Sensitivity, part: str, shares: list[float], norm: Any) -> None:
    from matplotlib import colormaps

    assert found.choice is not None
    known, chosen = found.known(), _by_layer(found.choice.layers, part)
    cells = [
        [known[layer, part, share].divergence if share else float("nan") for layer in range(found.layer_count)]
        for share in shares
    ]
    colours = colormaps[COLOURS].with_extremes(bad=ABSENT)
    axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(shares)), ["dense", *(f"{share:g}" for share in shares[1:])])
    axes.set_ylabel(f"{TITLES[part]}\nsparsity")
    axes.set_xticks([edge - 0.5 for edge in range(1, found.layer_count)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, len(shares))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    rows = [shares.index(chosen.get(layer, 0.0)) for layer in range(found.layer_count)]
    style: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.2, "linestyle": "none", "color": "black"}
    axes.plot(range(found.layer_count), rows, marker="o", markerfacecolor="white", **style)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _by_layer(layers: Mapping[str, Mapping[str, float]], part: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, shares in layers.items():
        first, _, last = key.partition("-")
        if part in shares:
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), shares[part])
    return found


def _ticks(layers: int) -> list[int]:
    return list(range(0, layers, 1 if layers <= 40 else 5))


def _title(found: Sensitivity) -> tuple[str, str]:
    assert found.choice is not None
    choice = found.choice
    return (
        f"{found.model} on {found.dataset}, {found.rows} rows. Circles: chosen for at most {choice.flops_budget:g} of "
        "dense LoRA's FLOPs.",
        f"Divergence of the chosen: parts added up {choice.predicted:.2g}, together {choice.joint.divergence:.2g}; of "
        f"the best uniform schedule {choice.uniform.joint.divergence:.2g}.",
    )
