"""Interrupts of a worker: from the user, from a scheduler, or because the command that started it is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def raise_once() -> None:
    """Let the first interrupt of this process raise KeyboardInterrupt with its reason, and ignore all later ones.

    Ctrl-C reaches a worker twice, from the terminal and from its parent: the second must not end the writing of the
    record that the first caused. The death of the parent counts as an interrupt.
    """
    for number in _SIGNALS:
        signal.signal(number, _on_interrupt)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_follow_parent, args=(parent.sentinel,), daemon=True).start()


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    alone = parent is not None and not parent.is_alive()
    raise KeyboardInterrupt("the command that started the run is gone" if alone else "interrupted by the user")


def _follow_parent(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore interrupts for a moment; in the main thread only."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
