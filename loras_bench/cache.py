"""The folder on disk for what is costly to make and can always be made again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached_folder(kind: str, key: str, make: Callable[[Path], None]) -> Path | None:
    """The folder $XDG_CACHE_HOME/loras_bench/<kind>/<key> (~/.cache by default), filled by `make` if it is new.

    It appears whole, by a rename: neither a killed process nor a second one at the same time leaves half of it.

    Args:
        kind: What sort of thing, such as `tokens`.
        key: A hash of everything that the content depends on.
        make: Writes the content into an empty folder.

    Returns:
        The folder, or None where none can be written.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loras_bench" / kind
    folder = base / key
    if folder.is_dir():
        return folder
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base, prefix=".making-") as making:
            content = Path(making) / key
            content.mkdir()
            make(content)
            content.rename(folder)
    except OSError:
        return folder if folder.is_dir() else None  # another process was faster, or the disk is full or read-only
    return folder
