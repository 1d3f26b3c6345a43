"""Texts and labels of a located data set, by split, with a hash of the content and a fixed validation set."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.catalog import DataLocation, DatasetSpec, locate_data, missing_data
from loras_bench.errors import ConfigError, UserError

if TYPE_CHECKING:
    from loras_bench.config import DataConfig

Table = Mapping[str, Sequence[Any]]
"""The rows of one split as a file or the hub gives them: a column for each field."""


@dataclass(frozen=True)
class Split:
    """One split: `columns` holds one list of texts per text field, `labels` one class index per row.

    The columns of instructions are prompts and responses. `choices` are the responses that a prompt allows, where they
    are few; the label is then the index of the right one.
    """

    columns: tuple[list[str], ...]
    labels: list[int] | None = None
    choices: list[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return len(self.columns[0])

    def take(self, indices: Sequence[int]) -> Split:
        columns = tuple([column[i] for i in indices] for column in self.columns)
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Split(columns, labels, None if self.choices is None else [self.choices[i] for i in indices])

    @cached_property
    def sha256(self) -> str:
        """Of the rows in order: texts, labels and choices."""
        digest = hashlib.sha256()
        rest = [column for column in (self.labels, self.choices) if column is not None]
        for row in zip(*self.columns, *rest, strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """A data set as read; `validation` says in words where its validation split comes from."""

    spec: DatasetSpec
    origin: str
    splits: Mapping[str, Split]
    label_names: tuple[str, ...]
    validation: str

    @cached_property
    def content_hash(self) -> str:
        lines = [f"{name} {split.sha256}\n" for name, split in self.splits.items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

    def protocol(self, split: str) -> dict[str, Any]:
        """Where the split comes from, for the record."""
        how = {
            "data_set": self.spec.name,
            "split": split,
            "origin": self.origin,
            "content_hash": self.content_hash,
            "validation": self.validation,
        }
        return {**how, "python": platform.python_version()} if self.spec.embedded else how


def read_source(config: DataConfig) -> Source:
    """Locate and read every split of a data set, and set validation rows aside where it has no validation split.

    Raises:
        ConfigError: See `locate_data`; or `validation_rows` does not fit the data set.
        UserError: See `locate_data`; or a file cannot be read, or a field or label is not as expected.
    """
    location = locate_data(config)
    spec = location.spec
    label_names = spec.label_names
    if spec.embedded:
        from loras_bench.data.embedded import read_embedded

        splits = read_embedded(spec)
    else:
        tables = _read_hub(location) if location.hub else _read_files(location)
        if spec.label_field and not label_names:
            labels = _column(location, "train", tables["train"], spec.label_field)
            label_names = tuple(sorted({str(label) for label in labels}))
        splits = {name: _split(location, name, table, label_names) for name, table in tables.items()}
    if config.validation_rows is None:
        how = "the data set's own split" if "validation" in splits else "none"
        return Source(spec, location.origin, splits, label_names, how)
    splits = _set_aside(spec, splits, config.validation_rows)
    how = f"{config.validation_rows} training rows set aside: those whose text has the smallest SHA-256"
    return Source(spec, location.origin, splits, label_names, how)


def _set_aside(spec: DatasetSpec, splits: Mapping[str, Split], count: int) -> dict[str, Split]:
    """Move `count` training rows to a validation split.

    Ordering by a hash of the text is a fixed random choice that depends on no library's random numbers and on no row
    order, and keeps copies of a text on one side.
    """
    train = splits["train"]
    if "validation" in splits:
        raise ConfigError(f"data.validation_rows: `{spec.name}` has a validation split of its own", "remove the key")
    if count >= len(train):
        raise ConfigError(
            f"data.validation_rows is {count}, but `{spec.name}` has {len(train)} training rows",
            "set fewer rows aside (a plain text file is a single row)",
        )
    texts = list(zip(*train.columns, strict=True))
    order = sorted(range(len(train)), key=lambda i: (hashlib.sha256(json.dumps(texts[i]).encode()).digest(), i))
    chosen = set(order[:count])
    rest = train.take([i for i in range(len(train)) if i not in chosen])
    return {**splits, "train": rest, "validation": train.take(sorted(chosen))}


def _read_files(location: DataLocation) -> dict[str, Table]:
    from datasets import load_dataset

    tables: dict[str, Table] = {}
    for split, path in location.files.items():
        try:
            if ".jsonl" in path.suffixes:
                dataset = load_dataset("json", data_files=str(path), split="train")
                tables[split] = {name: dataset[name][:] for name in dataset.column_names}
            else:
                tables[split] = {"text": [_read_text(path)]}
        except Exception as error:  # whatever a library says of a broken file, the user must learn which file
            raise UserError(
                f"cannot read {path}{_broken_line(path)}: {_first_line(error)}", "is the file complete and in UTF-8?"
            ) from error
    return tables


def _broken_line(path: Path) -> str:
    """` line N` of JSON Lines that cannot be parsed; nothing where the trouble is another."""
    number = 0
    try:
        for number, line in enumerate(_read_text(path).split("\n"), start=1):  # noqa: B007 (read when it fails)
            if line.strip():
                json.loads(line)
    except json.JSONDecodeError:
        return f" line {number}" if ".jsonl" in path.suffixes else ""
    except (OSError, EOFError, ValueError, lzma.LZMAError):
        pass
    return ""


def _read_text(path: Path) -> str:
    """The text, byte for byte: `datasets` would turn every kind of line end into a newline, and bytes are counted."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        content = lzma.decompress(content)
    elif path.suffix == ".gz":
        content = gzip.decompress(content)
    return content.decode("utf-8")


def _read_hub(location: DataLocation) -> dict[str, Table]:
    from datasets import load_dataset

    hub, spec = location.hub, location.spec
    assert hub is not None
    try:
        # Repositories that need a loading script are refused by `datasets` itself: no remote code runs.
        found = load_dataset(hub.repository, hub.subset, revision=hub.revision)
    except Exception as error:  # network, permission, unknown revision: all end here
        looked = (*location.looked[:-1], f"{location.looked[-1]} ({_first_line(error)})")
        raise missing_data(spec, looked) from error
    tables: dict[str, Table] = {}
    for split, theirs in hub.splits.items():
        if theirs not in found:
            continue
        table = {name: found[theirs][name][:] for name in found[theirs].column_names}
        if spec.hub_blank_line is not None:
            table = {"text": ["".join(line or spec.hub_blank_line for line in table["text"])]}
        tables[split] = table
    if "train" not in tables:
        raise UserError(f"{location.origin} has no train split", f"it has: {', '.join(found)}")
    return tables


def _split(location: DataLocation, name: str, table: Table, label_names: Sequence[str]) -> Split:
    spec = location.spec
    columns = tuple(list(_column(location, name, table, text_field)) for text_field in spec.text_fields)
    for text_field, column in zip(spec.text_fields, columns, strict=True):
        if wrong := [i for i, text in enumerate(column) if not isinstance(text, str)]:
            raise UserError(f"{_place(location, name, wrong[0])}: `{text_field}` is no text", "mend or remove the row")
    split = Split(columns)
    if spec.label_field is not None:
        split = Split(columns, _labels(location, name, table, label_names))
    if spec.task == "instruction":
        from loras_bench.data.prompts import as_instructions

        return as_instructions(spec, split, label_names, lambda row: _place(location, name, row))
    return split


def _labels(location: DataLocation, split: str, table: Table, label_names: Sequence[str]) -> list[int]:
    """The class index of each row."""
    spec = location.spec
    assert spec.label_field is not None
    # The catalog's labels are indices; those of other sets may be anything, and are numbered by name.
    known = (
        {str(i): i for i in range(len(label_names))} if spec.label_names else {n: i for i, n in enumerate(label_names)}
    )
    labels = [str(label) for label in _column(location, split, table, spec.label_field)]
    if wrong := [i for i, label in enumerate(labels) if label not in known]:
        raise UserError(
            f"{_place(location, split, wrong[0])} has the label {labels[wrong[0]]}, which is not one of: "
            + ", ".join(known),
            "a split without public labels cannot be used",
        )
    return [known[label] for label in labels]


def _column(location: DataLocation, split: str, table: Table, name: str) -> Sequence[Any]:
    if name not in table:
        raise UserError(f"{_place(location, split)} has no field `{name}`", f"its fields: {', '.join(table)}")
    return table[name]


def _place(location: DataLocation, split: str, row: int | None = None) -> str:
    """Where a split, or a row of it, was read: the file and its line, or the hub's split and the row's number."""
    path = location.files.get(split)
    place = str(path) if path else f"`{location.spec.name}` {split}"
    return place if row is None else f"{place} line {row + 1}" if path else f"{place} row {row}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
