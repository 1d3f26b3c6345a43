"""The errors that a user causes and can mend; the command line prints them in two lines and exits with status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user asked for cannot be done: what is wrong, and what to do about it.

    Args:
        message: What is wrong, in one line, naming the file, key or value at fault.
        hint: What to do instead, in one line; printed under the message.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(UserError):
    """An experiment's YAML, or an override of it, is wrong or asks for an impossible combination."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known one that is close, or nothing."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
