"""Where records lie and how they are written, found and locked: `results/<name>/seed<k>-<hash>/result.json`."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loras_bench.errors import UserError
from loras_bench.files import write_whole
from loras_bench.results.record import SCHEMA_VERSION, Record

RECORD_FILE = "result.json"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Problem:
    """A file that could not be used, or not as it stands, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class RunLockedError(UserError):
    """Another process works on the same run."""


def run_folder(results: Path, run_id: str) -> Path:
    """The folder of a run: `<results>/<name>/seed<k>-<hash>`."""
    return results / run_id


def write_record(record: Record, folder: Path) -> Path:
    """Write `result.json`, whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / RECORD_FILE
    write_whole(target, record.model_dump_json(indent=1) + "\n")
    return target


def read_record(path: Path) -> Record:
    """Read one `result.json`.

    Raises:
        ValueError: It is no JSON, of another schema version, or does not have the fields of a record; the message is
            one line for the reader of a log.
        OSError: It cannot be read.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (line {error.lineno}: {error.msg})") from error
    if not isinstance(content, dict):
        raise ValueError("not a record: the file holds no JSON object")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema version {version!r}; this loras-bench reads version {SCHEMA_VERSION}")
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"not a record: {field}: {first['msg']} ({error.error_count()} errors in all)") from error


def load_records(paths: Iterable[Path | str]) -> tuple[list[Record], list[Problem]]:
    """Read every record under the given places.

    A file that cannot be read is named with the reason and skipped; it never hides the others. A run that is found
    twice counts once; where the two differ, the one that finished last counts and the other is named.

    Args:
        paths: Results folders, folders of an arm or of a run, or `result.json` files, in any mixture.

    Returns:
        The records, sorted by run id and device, and the problems in the order of their paths.

    Raises:
        UserError: A path does not exist.
    """
    found: dict[tuple[str, str], tuple[Record, Path]] = {}
    problems: list[Problem] = []
    for file in _record_files(paths, problems):
        try:
            record = read_record(file)
        except (ValueError, OSError) as error:
            problems.append(Problem(file, str(error)))
            continue
        # One config on two devices gives one run id and two results, which go to different panels.
        key = (record.run_id, record.device)
        if key not in found:
            found[key] = (record, file)
        elif record.model_dump_json() != found[key][0].model_dump_json():  # NaN is not equal to itself
            older, newer = sorted([found[key], (record, file)], key=lambda item: item[0].finished_at)
            found[key] = newer
            problems.append(Problem(older[1], f"an older result of {record.run_id}; {newer[1]} counts"))
    return [found[key][0] for key in sorted(found)], problems


def _record_files(paths: Iterable[Path | str], problems: list[Problem]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"no such file or folder: {path}", "give a results folder, a run folder or a result.json")
        # Hidden folders hold what is no arm of a comparison, such as pretraining.
        below = (file for file in sorted(path.rglob(RECORD_FILE)) if not _is_hidden(file.relative_to(path)))
        matches = [path] if path.is_file() else list(below)
        if not matches:
            problems.append(Problem(path, f"no {RECORD_FILE} in it"))
        for match in matches:
            files.setdefault(match.resolve(), match)
    return list(files.values())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def is_finished(record: Record, device: str, kernel_version: str) -> bool:
    """Whether a run need not be run again: it completed on this kind of device with these kernels."""
    return record.status == "completed" and record.device == device and record.kernel_version == kernel_version


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes; the system releases the lock even when the holder is killed.

    The lock file stays: to remove it would let two processes hold locks on two files of one name.

    Raises:
        RunLockedError: Another process holds it; the message names that process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunLockedError(
                f"{folder} is in use by {holder}", "wait until it ends, or give this command another --results folder"
            ) from error
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            # Explicitly, because children that were forked meanwhile still have the file open.
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)
