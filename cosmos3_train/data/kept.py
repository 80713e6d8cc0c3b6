"""Files that stay open between readings, a few a process: opening often costs more than what is then read."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

OPEN_FILES = 8

Opened = TypeVar("Opened")


class KeptFiles(Generic[Opened]):
    """The files last used, open; the one that was not used for longest is closed when another is opened.

    A file is known by its process, for a forked reader shares its parent's file offset and must open its own; and by
    its inode, so that a log that is replaced under a running process is opened anew.
    """

    def __init__(
        self,
        open_file: Callable[[Path, str], Opened],
        close_file: Callable[[Opened], None] = lambda _: None,
        most: int = OPEN_FILES,
    ) -> None:
        """Args:
        open_file: from a path, and a place inside the file, to what is kept.
        close_file: its end; nothing where it ends with its last reference.
        most: files open at once.
        """
        self._open_file, self._close_file, self._most = open_file, close_file, most
        self._open: OrderedDict[tuple[int, str, int, str], Opened] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: Path, inside: str = "") -> Opened:
        """The file, opened where it is not.

        Raises:
            OSError: it is not there; and whatever `open_file` raises.
        """
        key = (os.getpid(), str(path), path.stat().st_ino, inside)
        if key not in self._open:
            self._open[key] = self._open_file(path, inside)
            while len(self._open) > self._most:
                self._drop(next(iter(self._open)))
        self._open.move_to_end(key)
        return self._open[key]

    def close(self, path: Path | None = None) -> None:
        """Close this process's files of one path, or all."""
        for key in list(self._open):
            if key[0] == os.getpid() and path in (None, Path(key[1])):
                self._drop(key)

    def _drop(self, key: tuple[int, str, int, str]) -> None:
        stale = self._open.pop(key)
        if key[0] == os.getpid():
            self._close_file(stale)
