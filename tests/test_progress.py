"""What a user sees of a run: one live line on a terminal, plain lines elsewhere, all on stderr."""

from __future__ import annotations

import io
import sys

import pytest

from loras_bench import progress
from loras_bench.progress import PLAIN_INTERVAL_S, Progress, describe

STEP = {
    "phase": "train",
    "step": 12,
    "steps": 77,
    "loss": 2.34567,
    "tokens_per_s": 98765.4,
    "power_w": 612.4,
    "energy_j": 12345.6,
    "left_s": 65.9,
}


def test_a_step_tells_loss_speed_watts_joules_and_time_left():
    assert describe(STEP) == "train step 12/77  loss 2.346  98,765 tokens/s  612 W  12,346 J  1:05 left"


def test_what_is_unknown_is_left_out_and_never_zero():
    unknown = dict.fromkeys(("loss", "tokens_per_s", "power_w", "energy_j", "left_s"))
    assert describe(STEP | unknown) == "train step 12/77"


def test_zero_is_a_value():
    assert describe({"phase": "train", "step": 1, "steps": 2, "energy_j": 0.0}) == "train step 1/2  0 J"


def test_other_phases_are_named():
    assert describe({"phase": "evaluating on test, attention same"}) == "evaluating on test, attention same"


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_in_a_pipe_a_line_comes_every_few_seconds(clock, capsys):
    with Progress() as shown:
        shown.start("lora/seed0-abc")
        for second in range(25):
            clock[0] = 100.0 + second
            shown.update({"phase": f"second {second}"})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["lora/seed0-abc", "  second 0", "  second 10", "  second 20"]
    assert PLAIN_INTERVAL_S == 10.0


def test_lines_are_not_wrapped_and_brackets_are_text(capsys):
    message = "lora/seed0-abc  failed: " + "a long reason " * 20 + "[bold]"
    with Progress() as shown:
        shown.say(message)
    assert capsys.readouterr().err == message + "\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch, **variables):
    for name in ("CI", "TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_on_a_terminal_one_line_is_rewritten_and_what_is_said_stays(monkeypatch):
    screen = on_terminal(monkeypatch)
    with Progress() as shown:
        assert shown.live is not None
        shown.start("lora/seed0-abc")
        shown.update(STEP)
        shown.say("lora/seed0-abc  completed  (3 s)")
    text = screen.getvalue()
    assert "98,765 tokens/s" in text
    assert "completed  (3 s)" in text
    assert "\x1b[2K" in text[text.index("tokens/s") :]  # the live line is erased before the other is printed


@pytest.mark.parametrize("variables", [{"CI": "true"}, {"TERM": "dumb"}])
def test_in_ci_and_on_a_dumb_terminal_lines_are_plain(monkeypatch, variables):
    screen = on_terminal(monkeypatch, **variables)
    with Progress() as shown:
        shown.start("lora/seed0-abc")
        shown.update(STEP)
    assert "\x1b" not in screen.getvalue()
    assert screen.getvalue().splitlines()[0] == "lora/seed0-abc"
