"""What every layout of a conversation set can say of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class TalkSource:
    """Rows of a set by file and place: the offset of a JSON line, the row of a Parquet file, the entry of meta.json.

    root: the set's folder;  files: of rows, relative to it;  strict: a row that is no conversation is the user's to
    mend, not to be counted
    """

    strict = False

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self.root = root
        self.files = tuple(file.relative_to(root).as_posix() for file in sorted(files))

    def places(self, file: str) -> np.ndarray:
        """int64 [n, 2]: number (from 0) and place of every row of a file."""
        raise NotImplementedError

    def rows(self, file: str, places: Sequence[int]) -> Iterator[Any]:
        """Rows at rising places of a file: what `talk.parse_talk` takes, or a `NoTalk` that says why there is none."""
        raise NotImplementedError

    def row(self, file: str, place: int) -> Any:
        """One row."""
        return next(iter(self.rows(file, [place])))

    def pictures(self, file: str) -> Path:
        """The folder that pictures of a file's rows lie in."""
        return (self.root / file).parent

    def called(self, file: str, number: int) -> str:
        """A row's name in keys."""
        return f"{file}/{number:06d}"

    def where(self, file: str, number: int) -> str:
        """A row, in messages."""
        return f"{self.root / file}, row {number}"

    def heldout(self, file: str) -> bool:
        """Whether all of a file is held out."""
        return False

    def fingerprint(self) -> str:
        """Of all that says what the rows are."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.encode())
            self._add(digest, self.root / file)
        return digest.hexdigest()[:32]

    def _add(self, digest: Any, path: Path) -> None:
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())


def numbered(count: int) -> np.ndarray:
    """`TalkSource.places` where a row's place is its number."""
    return np.repeat(np.arange(count, dtype=np.int64)[:, None], 2, axis=1)
