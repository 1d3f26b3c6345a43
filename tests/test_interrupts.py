"""Interrupts: the first one is told, later ones cannot break what it started."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from loras_bench.interrupts import undisturbed

TWICE = """
import os, signal
from loras_bench.interrupts import raise_once
raise_once()
try:
    os.kill(os.getpid(), signal.{first})
    print("not interrupted")
except KeyboardInterrupt as error:
    os.kill(os.getpid(), signal.{second})
    print(error)
print("done")
"""


@pytest.mark.parametrize(
    ("first", "second"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM")]
)
def test_the_first_interrupt_raises_and_the_second_is_ignored(first, second):
    """Ctrl-C reaches a worker from the terminal and from its parent."""
    code = TWICE.format(first=first, second=second)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted by the user\ndone\n", "")


def test_interrupts_are_ignored_while_undisturbed_and_come_back_after_it():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with undisturbed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="disk"), undisturbed():
        raise ValueError("disk full")
    assert signal.getsignal(signal.SIGINT) is before
