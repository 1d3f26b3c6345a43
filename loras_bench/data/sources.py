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
    """One split: `columns` holds one list of texts per text field, `labels` one class index per row."""

    columns: tuple[list[str], ...]
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.columns[0])

    def take(self, indices: Sequence[int]) -> Split:
        columns = tuple([column[i] for i in indices] for column in self.columns)
        return Split(columns, None if self.labels is None else [self.labels[i] for i in indices])

    @cached_property
    def sha256(self) -> str:
        """Of the rows in order, texts and labels."""
        digest = hashlib.sha256()
        for row in zip(*self.columns, *([] if self.labels is None else [self.labels]), strict=True):
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
            label_names = tuple(
                sorted({str(label) for label in _column(spec, "train", tables["train"], spec.label_field)})
            )
        splits = {name: _split(spec, name, table, label_names) for name, table in tables.items()}
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
                f"cannot read {path}: {_first_line(error)}", "is the file complete and in UTF-8?"
            ) from error
    return tables


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


def _split(spec: DatasetSpec, name: str, table: Table, label_names: Sequence[str]) -> Split:
    columns = tuple(list(_column(spec, name, table, text_field)) for text_field in spec.text_fields)
    for text_field, column in zip(spec.text_fields, columns, strict=True):
        if wrong := [i for i, text in enumerate(column) if not isinstance(text, str)]:
            raise UserError(f"`{spec.name}` {name} row {wrong[0]}: `{text_field}` is no text", "mend or remove the row")
    if spec.label_field is None:
        return Split(columns)
    # The catalog's labels are indices; those of other sets may be anything, and are numbered by name.
    known = (
        {str(i): i for i in range(len(label_names))} if spec.label_names else {n: i for i, n in enumerate(label_names)}
    )
    labels = [str(label) for label in _column(spec, name, table, spec.label_field)]
    if unknown := set(labels) - set(known):
        raise UserError(
            f"`{spec.name}` {name} has the label {min(unknown)}, which is not one of: {', '.join(known)}",
            "a split without public labels cannot be used",
        )
    return Split(columns, [known[label] for label in labels])


def _column(spec: DatasetSpec, split: str, table: Table, name: str) -> Sequence[Any]:
    if name not in table:
        raise UserError(f"`{spec.name}` {split} has no field `{name}`", f"its fields: {', '.join(table)}")
    return table[name]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
