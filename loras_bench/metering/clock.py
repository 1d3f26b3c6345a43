"""Time for the meter: a seam, so that tests run hours of measuring in milliseconds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """What the meter needs of time."""

    def now(self) -> float:
        """Monotonic seconds."""

    def sleep(self, seconds: float) -> None:
        """Wait."""

    def every(self, interval_s: float, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` every `interval_s` in the background; the function returned stops it."""


class SystemClock:
    """The machine's monotonic clock; `every` runs its callback in a daemon thread."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def every(self, interval_s: float, callback: Callable[[], None]) -> Callable[[], None]:
        stopped = threading.Event()

        def loop() -> None:
            deadline = self.now() + interval_s
            while not stopped.wait(max(0.0, deadline - self.now())):
                callback()
                # A missed deadline is skipped, never made up for by a burst: the trace must show the hole.
                deadline += interval_s * max(1, math.ceil((self.now() - deadline) / interval_s))

        thread = threading.Thread(target=loop, name="loras-bench-meter", daemon=True)
        thread.start()

        def stop() -> None:
            stopped.set()
            thread.join(timeout=2.0)

        return stop
