"""Words for the user: lines and tables on standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from cosmos3_train.config import UserError
from cosmos3_train.runtime import local_rank

FINISHED, FAILED, USER_ERROR, INTERRUPTED, QUIET = 0, 1, 2, 75, 130
"""Exit codes. 75 is BSD's 'temporary failure, try again', which batch systems read as a request to run it again; 130
is what a shell gives a program that Ctrl-C ended."""
LAUNCHER_ENDS_US_SECONDS = 20.0
"""Within these a launcher ends a process whose neighbour has failed."""


def say(text: str = "", to: TextIO | None = None) -> None:
    """A line for the user."""
    (to or sys.stdout).write(text + "\n")
    (to or sys.stdout).flush()


def say_error(error: Exception | str) -> None:
    """One line on standard error, whatever the message holds."""
    say(f"error: {' '.join(str(error).split())}", sys.stderr)


def leave_to_first() -> None:
    """Before ranks tell a mistake that those of a machine find alike: the first of them tells it, and its end has the
    launcher end the others, for which they wait here (`Interrupted`). One that is not ended tells a mistake of its own.
    """
    if local_rank() > 0:
        time.sleep(LAUNCHER_ENDS_US_SECONDS)


@contextmanager
def first_tells() -> Iterator[None]:
    """For what every rank looks at before they meet, and before its log has a file."""
    try:
        yield
    except UserError:
        leave_to_first()
        raise


def say_table(rows: Iterable[Sequence[str]], gap: int = 2, widest: int = 56) -> None:
    """Rows of equal length, each column as wide as its longest cell (at most `widest`); the last is not padded."""
    lines = [tuple(row) for row in rows]
    if not lines:
        return
    widths = [min(widest, max(len(cell) for cell in column)) for column in list(zip(*lines, strict=True))[:-1]]
    for line in lines:
        cells = [f"{cell:<{width}}" for cell, width in zip(line[:-1], widths, strict=True)]
        say((" " * gap).join([*cells, line[-1]]).rstrip())
