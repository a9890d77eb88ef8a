"""The one exception that a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can mend.

    The message says what is wrong with its value, which key holds it, and what to type instead. The command line
    prints it alone, without a traceback, and exits with status 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'? "`` for the closest known word, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'? " if close else ""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, but for its exit code."""
