"""Words for the user: lines and tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

FINISHED, FAILED, USER_ERROR, INTERRUPTED, QUIET = 0, 1, 2, 75, 130
"""Exit codes. 75 is BSD's 'temporary failure, try again', which batch systems read as a request to run it again; 130
is what a shell gives a program that Ctrl-C ended."""


def say(text: str = "", to: TextIO | None = None) -> None:
    """A line for the user."""
    (to or sys.stdout).write(text + "\n")
    (to or sys.stdout).flush()


def say_error(error: Exception | str) -> None:
    """One line on standard error, whatever the message holds."""
    say(f"error: {' '.join(str(error).split())}", sys.stderr)


def say_table(rows: Iterable[Sequence[str]], gap: int = 2, widest: int = 56) -> None:
    """Rows of equal length, each column as wide as its longest cell (at most `widest`); the last is not padded."""
    lines = [tuple(row) for row in rows]
    if not lines:
        return
    widths = [min(widest, max(len(cell) for cell in column)) for column in list(zip(*lines, strict=True))[:-1]]
    for line in lines:
        cells = [f"{cell:<{width}}" for cell, width in zip(line[:-1], widths, strict=True)]
        say((" " * gap).join([*cells, line[-1]]).rstrip())
