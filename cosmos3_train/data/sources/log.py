"""What every source of robot logs gives, whatever its format: episodes, their columns, and where their frames lie.

A source is one file beside this one with a class that is a `Log` and a function that opens it; `OPENERS` in this
package's `__init__` names it. Nothing above this folder knows a format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class VideoPlace(NamedTuple):
    """Where an episode's frames lie: a place relative to the log's folder (`video.frames_at`), and its first frame's
    time there in seconds."""

    path: str
    from_timestamp: float


@dataclass(frozen=True)
class Episode:
    """What `meta/episodes` says about one episode; its rows are not read yet.

    said: name → text, what else the log says of it, such as the recording that it was
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: str
    video: dict[str, VideoPlace]
    said: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode, read.

    timestamps: float64 [T], seconds since the episode began
    tasks:      the instruction at each of the T rows
    columns:    asked-for name → float32 [T, W], or list of T strings for a text column
    video:      camera → where its frames lie
    faults:     reason → (how many of it were left out or put right, an example)
    """

    index: int
    length: int
    timestamps: np.ndarray
    tasks: tuple[str, ...]
    columns: dict[str, Any]
    video: dict[str, VideoPlace]
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The instruction at the first row."""
        return self.tasks[0]


class Log(Protocol):
    """An opened log. Opening reads what is small; `records` reads the rest, episode by episode.

    root:     the log's folder
    fps:      rows and frames a second
    episodes: in the log's order; indices are distinct
    cameras, columns: names of what has frames that can be read, and of everything else that a row holds
    """

    @property
    def root(self) -> Path: ...

    @property
    def fps(self) -> float: ...

    @property
    def episodes(self) -> tuple[Episode, ...]: ...

    @property
    def cameras(self) -> tuple[str, ...]: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    def check_camera(self, name: str) -> None:
        """Raise `UserError` unless `name` is a camera of the log whose frames can be read."""
        ...

    def check_column(self, name: str) -> None:
        """Raise `UserError` unless `name` is a column of the log that is no camera."""
        ...

    def width(self, column: str) -> int | None:
        """How many numbers a row of the column holds, where that is known without reading it."""
        ...

    def records(self, episodes: Sequence[Episode], columns: Sequence[str]) -> Iterator[EpisodeRecord]:
        """Read episodes in the order given, which should be the log's for speed.

        Raises:
            UserError: a file is missing or corrupt, or does not hold what the log says of it.
        """
        ...

    def described_by(self) -> Iterable[Path]:
        """The small files that say what the log holds: the prepared rows depend on every byte of them."""
        ...


def left_out_of(log: Log) -> dict[str, tuple[int, str]]:
    """What is no episode of a log: reason → (how many, an example). It is the attribute `left_out`, which a `Log` has
    where its opening leaves something out."""
    return getattr(log, "left_out", {})


def read_besides(log: Log) -> set[str]:
    """Places that episodes are read from besides their `data_file` and their videos. It is the attribute `besides`,
    which a `Log` has where there are any."""
    return set(getattr(log, "besides", ()))
