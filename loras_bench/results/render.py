"""Tables as Markdown, CSV, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from loras_bench.errors import UserError
from loras_bench.results.formatting import format_difference, format_interval, format_ratio, scaled_unit
from loras_bench.results.tables import Column, Row, Table

TERMINAL_WIDTH = 150
PAPER_WIDTH = 95
"""Characters of a line; wider tables are stacked. A page of a two-column paper holds fewer than a terminal."""
DASH = "–"


@dataclass(frozen=True)
class Text:
    """A piece of a table as people see it, with the letters of its footnotes."""

    text: str
    marks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} [{','.join(self.marks)}]" if self.marks else self.text


class Footnotes:
    """Gives each distinct text a letter, in order of first use."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """The letter of the text: a to z, then aa, ab, ..."""
        if text not in self.texts:
            self.texts.append(text)
        return self._letter(self.texts.index(text))

    def _letter(self, index: int) -> str:
        high, low = divmod(index, 26)
        return (self._letter(high - 1) if high else "") + "abcdefghijklmnopqrstuvwxyz"[low]

    def listed(self) -> list[tuple[str, str]]:
        """(letter, text) pairs."""
        return [(self._letter(index), text) for index, text in enumerate(self.texts)]


Grid = list[list[Text]]
"""Two rows of headings (what; unit and origin), then one row per arm; the first columns name the arm."""


def render(tables: Sequence[Table], format: str = "md") -> str:
    """All tables as one text.

    Raises:
        UserError: The format is not one of md, csv, tex and json.
    """
    writers: dict[str, Callable[[Sequence[Table]], str]] = {
        "md": lambda tables: "\n\n".join(map(_markdown, tables)) + "\n",
        "tex": lambda tables: "\n\n".join(map(_latex, tables)) + "\n",
        "csv": _csv,
        "json": _json,
    }
    if format not in writers:
        raise UserError(f"unknown table format `{format}`", f"one of {', '.join(writers)}")
    return writers[format](tables)


def _grids(table: Table, notes: Footnotes, width: int) -> list[tuple[str, Grid]]:
    """The table as stacked grids of text, none wider than so many characters, each with its title."""
    names = _arm_columns(table.rows, notes)
    grids: list[tuple[str, Grid]] = []
    for group, columns in groupby(table.columns, key=lambda column: column.group):
        grid = names
        for column in columns:
            texts = _column(column, table, notes)
            wider = [[*line, text] for line, text in zip(grid, texts, strict=True)]
            if sum(_widths(wider)) + 3 * len(wider[0]) + 1 > width:
                grids.append((group, grid))
                group = f"{column.group}, continued"
                wider = [[*line[:1], text] for line, text in zip(names, texts, strict=True)]
            grid = wider
        grids.append((group, grid))
        names = [line[:1] for line in names]  # methods and seeds are told once
    return grids


def _arm_columns(rows: Sequence[Row], notes: Footnotes) -> Grid:
    grid = [[Text("arm"), Text("methods"), Text("seeds")], [Text(""), Text(""), Text("n")]]
    for row in rows:
        marks = tuple(notes.mark(text) for _, text in row.flags)
        seeds = str(len(row.arm.runs)) if row.arm.clean else "0"
        grid.append([Text(row.arm.label, marks), Text(" + ".join(row.arm.methods) or "none"), Text(seeds)])
    return grid


def _column(column: Column, table: Table, notes: Footnotes) -> list[Text]:
    factor, unit = _scale(column, table)
    texts = _headings(column, unit, table.baseline)
    for row in table.rows:
        cell = row.cells[column.key]
        if cell.interval is None:
            texts.append(Text(DASH, (notes.mark(cell.missing),)))
            continue
        marks = (notes.mark(cell.note),) if cell.note else ()
        if column.kind == "value":
            texts.append(Text(format_interval(cell.interval, factor), marks))
        elif row.arm.label == table.baseline:
            texts.append(Text("baseline"))
        else:
            style = format_ratio if column.kind == "ratio" else format_difference
            texts.append(Text(style(cell.interval), marks))
    return texts


def _scale(column: Column, table: Table) -> tuple[float, str]:
    """One prefix for all columns of a unit, so that they can be compared at a glance."""
    unit = column.quantity.unit
    alike = [other.key for other in table.columns if other.kind == "value" and other.quantity.unit == unit]
    cells = (row.cells[key] for row in table.rows for key in alike)
    largest = max((abs(cell.interval.mean) for cell in cells if cell.interval), default=0.0)
    return scaled_unit(unit, largest, limit=1e6 if column.quantity.is_energy else 1e3)


def _headings(column: Column, unit: str, baseline: str) -> list[Text]:
    quantity = column.quantity
    if column.kind == "ratio":
        return [Text(f"{quantity.label} / {baseline}"), Text(f"{quantity.provenance}, paired")]
    if column.kind == "difference":
        return [Text(f"difference from {baseline}"), Text(f"{quantity.provenance}, paired")]
    origin = f"{quantity.provenance} ({column.detail})" if column.detail else quantity.provenance
    return [Text(quantity.label), Text(f"{unit}, {origin}" if unit else origin)]


def _widths(grid: Grid) -> list[int]:
    return [max(len(str(text)) for text in column) for column in zip(*grid, strict=True)]


def _markdown(table: Table) -> str:
    notes = Footnotes()
    lines = [f"### {table.key}"]
    for title, grid in _grids(table, notes, TERMINAL_WIDTH):
        widths = _widths(grid)
        left = [name.text in ("arm", "methods") for name in grid[0]]
        lines += ["", f"{title}:", ""]
        for number, line in enumerate(grid):
            # A bar ends a Markdown cell; footnotes are plain text and may have it.
            texts = [str(text).replace("|", "\\|") for text in line]
            padded = [t.ljust(w) if to_left else t.rjust(w) for t, w, to_left in zip(texts, widths, left, strict=True)]
            lines.append(f"| {' | '.join(padded)} |")
            if number == 0:
                rules = ["-" * w if to_left else "-" * (w - 1) + ":" for w, to_left in zip(widths, left, strict=True)]
                lines.append(f"| {' | '.join(rules)} |")
    lines += ["", "Mean ± half of the 95 % Student-t interval over seeds; [low, high] for paired comparisons."]
    lines += [f"- [{letter}] {text}" for letter, text in notes.listed()]
    lines += [f"- {note}" for note in table.notes]
    return "\n".join([*lines, f"- {table.energy_statement}"])


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after a line's \\ a bare bracket would be read as a length
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "°": r"$^\circ$",
}


def escape_latex(text: str) -> str:
    """Plain text for LaTeX's text mode."""
    return "".join(_LATEX.get(character, character) for character in text)


def _latex(table: Table) -> str:
    notes = Footnotes()
    lines = ["% needs \\usepackage{booktabs}", r"\begin{table*}", r"\centering\small"]
    lines.append(rf"\caption{{{escape_latex(str(table.key))}. Mean $\pm$ half of the 95\,\% Student-t interval.}}")
    for title, grid in _grids(table, notes, PAPER_WIDTH):
        alignment = "".join("l" if name.text in ("arm", "methods") else "r" for name in grid[0])
        lines += [
            rf"\par\medskip {escape_latex(title)}\par\smallskip",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
        ]
        for number, line in enumerate(grid):
            lines.append(" & ".join(map(_latex_cell, line)) + r" \\")
            if number == 1:
                lines.append(r"\midrule")
        lines += [r"\bottomrule", r"\end{tabular}"]
    remarks = [rf"\textsuperscript{{{letter}}}\,{escape_latex(text)}" for letter, text in notes.listed()]
    remarks += [escape_latex(note) for note in (*table.notes, table.energy_statement)]
    lines += [r"\par\medskip\begin{minipage}{\textwidth}\footnotesize", "\\\\\n".join(remarks), r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table*}"])


def _latex_cell(text: Text) -> str:
    marks = rf"\textsuperscript{{{','.join(text.marks)}}}" if text.marks else ""
    return escape_latex(text.text) + marks


def _csv(tables: Sequence[Table]) -> str:
    """One row per arm in full precision; columns that a panel does not have stay empty."""
    rows = [_csv_row(table, row) for table in tables for row in table.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(table: Table, row: Row) -> dict[str, Any]:
    arm = row.arm
    line: dict[str, Any] = asdict(table.key) | {
        "arm": arm.label,
        "config_hash": arm.config_hash,
        "methods": " + ".join(arm.methods),
        "seeds": " ".join(str(run.seed) for run in arm.runs),
        "left_out": "; ".join(f"{run.run_id}: {reason}" for run, reason in arm.left_out),
        "flags": "; ".join(text for _, text in row.flags),
        "baseline": table.baseline,
    }
    for column in table.columns:
        cell = row.cells[column.key]
        numbers = _numbers(row, column)
        line |= {f"{column.key}_{name}": "" if value is None else value for name, value in numbers.items()}
        line[f"{column.key}_origin"] = _origin(column)
        line[f"{column.key}_note"] = cell.missing or cell.note
    return line


def _numbers(row: Row, column: Column) -> dict[str, float | None]:
    interval = row.cells[column.key].interval
    if interval is None:
        return {"n": 0, "mean": None, "ci_low": None, "ci_high": None}
    return {"n": interval.n, "mean": interval.mean, "ci_low": interval.low, "ci_high": interval.high}


def _origin(column: Column) -> str:
    return f"{column.quantity.provenance} ({column.detail})" if column.detail else column.quantity.provenance


def _json(tables: Sequence[Table]) -> str:
    return json.dumps([_json_panel(table) for table in tables], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _json_panel(table: Table) -> dict[str, Any]:
    return asdict(table.key) | {
        "baseline": table.baseline,
        "columns": [
            {"key": c.key, "label": c.quantity.label, "kind": c.kind, "unit": _json_unit(c), "origin": _origin(c)}
            for c in table.columns
        ],
        "arms": [_json_arm(table, row) for row in table.rows],
        "notes": list(table.notes),
        "energy_statement": table.energy_statement,
    }


def _json_unit(column: Column) -> str:
    return "" if column.kind == "ratio" else column.quantity.unit


def _json_arm(table: Table, row: Row) -> dict[str, Any]:
    return {
        "arm": row.arm.label,
        "config_hash": row.arm.config_hash,
        "methods": list(row.arm.methods),
        "seeds": [run.seed for run in row.arm.runs],
        "left_out": [{"run_id": run.run_id, "reason": reason} for run, reason in row.arm.left_out],
        "flags": dict(row.flags),
        "values": {
            column.key: _numbers(row, column) | {"note": row.cells[column.key].missing or row.cells[column.key].note}
            for column in table.columns
        },
    }
