"""Where can be written, asked before long work; and files that a reader, or a kill, finds whole: old or new."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from loras_bench.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a text file in the place of an earlier one.

    The text goes to a temporary file in the same folder, is flushed to the disk and renamed over the old file; then the
    folder itself is flushed, because the rename lives there.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; results are made to be shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder_handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder_handle)
    finally:
        os.close(folder_handle)


def check_folder(folder: Path, option: str = "--results") -> None:
    """Refuse a place to write to that is no folder and cannot become one."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file", "give a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{option} {folder}: {existing} is not writable", "give another folder")


def check_file(path: Path) -> None:
    """Refuse a place that cannot be written before minutes of measuring."""
    if path.is_dir():
        raise UserError(f"--json {path} is a folder", "give a file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--json {path}: its folder is not there or not writable", "make the folder first")
