"""Progress of runs on stderr: a live line on a terminal, one plain line every few seconds in a pipe or in CI."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_INTERVAL_S = 10.0


class Progress:
    """Shows what the worker reports; `with Progress() as progress:`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=8, transient=True) if _is_terminal() else None
        self.title = ""
        self.shown_at = 0.0

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def start(self, title: str) -> None:
        """Begin a run."""
        self.title, self.shown_at = title, 0.0
        if self.live is None:
            self.say(title)

    def say(self, message: str) -> None:
        """Print a line that stays."""
        self.console.print(Text(message), soft_wrap=True)

    def update(self, event: dict[str, Any]) -> None:
        """Show the newest state of the run: its phase, and in training its numbers."""
        line = describe(event)
        if self.live is not None:
            self.live.update(Text.assemble((self.title, "bold"), "  ", line), refresh=True)
        elif time.monotonic() - self.shown_at >= PLAIN_INTERVAL_S:
            self.shown_at = time.monotonic()
            self.say(f"  {line}")


def describe(event: dict[str, Any]) -> str:
    """One line for a progress event; what is not known is left out."""
    if "step" not in event:
        return str(event["phase"])
    parts = [f"{event['phase']} step {event['step']}/{event['steps']}"]
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("tokens_per_s") is not None:
        parts.append(f"{event['tokens_per_s']:,.0f} tokens/s")
    if event.get("power_w") is not None:
        parts.append(f"{event['power_w']:.0f} W")
    if event.get("energy_j") is not None:
        parts.append(f"{event['energy_j']:,.0f} J")
    if event.get("left_s") is not None:
        minutes, seconds = divmod(int(event["left_s"]), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


def _is_terminal() -> bool:
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
