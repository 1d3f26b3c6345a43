"""The results file of `peers.py`: one entry for each device, shape and arm, merged with what is there."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loras_bench.benchmarking.report import write_json
from loras_bench.config import canonical_hash
from loras_bench.errors import UserError

SCHEMA_VERSION = 1
Entry = dict[str, Any]


class Results:
    """Entries in the order in which they were first measured; each names its environment, which many share.

    Raises:
        UserError: The file is there and is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.opened_at = path, time.time()
        content = self._read()
        self.entries: list[Entry] = content["entries"]
        self.environments: dict[str, Any] = content["environments"]

    def get(self, device: str, shape: str, arm: str) -> Entry | None:
        """What is known about an arm."""
        key = (device, shape, arm)
        return next((entry for entry in self.entries if _key(entry) == key), None)

    def put(self, entry: Entry) -> None:
        """Keep an entry, in the place of an earlier one of the same arm, and write the file."""
        environment = entry["environment"]
        name = canonical_hash(environment)
        self.environments[name] = environment
        entry = entry | {"environment": name}
        places = [index for index, other in enumerate(self.entries) if _key(other) == _key(entry)]
        if places:
            self.entries[places[0]] = entry
        else:
            self.entries.append(entry)
        used = {entry["environment"] for entry in self.entries}
        self.environments = {name: content for name, content in self.environments.items() if name in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema_version": SCHEMA_VERSION, "entries": self.entries, "environments": self.environments}
        write_json(self.path, content)

    def best(self, device: str, shape: str, arms: Sequence[str]) -> str | None:
        """The arm with the fewest joules per token, or where there is no counter the fastest; None if none ran."""
        found = [entry for arm in arms if (entry := self.get(device, shape, arm)) and entry["status"] == "completed"]
        return min(found, key=cost)["arm"] if found else None

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"entries": [], "environments": {}}
        except (OSError, ValueError) as error:
            raise UserError(f"--out {self.path} cannot be read: {error}", "give another file") from None
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"--out {self.path} is no results file of this benchmark", "give another file")
        return content


def cost(entry: Entry) -> float:
    """What makes an arm the best: joules per million tokens, or without a counter seconds per million tokens."""
    joules = entry["energy_j_per_mtoken"]
    return float(1e6 / entry["tokens_per_s"] if joules is None else joules)


def _key(entry: Entry) -> tuple[str, str, str]:
    return entry["device"], entry["shape"]["name"], entry["arm"]
