"""What LeRobot logs of every version share: `meta/info.json`, and rows of Parquet with LeRobot's own columns.

The `lerobot` package is not used: its version pins conflict with torch and diffusers. Only the columns asked for are
read, and of a data file only the row groups of the episodes asked for. Times are the log's own `timestamp` column;
frame i of a camera stands at `from_timestamp + timestamps[i]` of its mp4. A camera that is stored as pictures in the
Parquet files is read from there, by the same times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cosmos3_train.config import UserError, from_plain, nearest
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.files import is_there
from cosmos3_train.data.parquet import CLOCK_HZ, is_text, matrix, parquet_columns, picture_column, read_parquet
from cosmos3_train.data.pictures import place_inside
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, VideoPlace
from cosmos3_train.data.video import is_video

READ_BY = {"2": "lerobot_v2", "3": "lerobot_v3"}
"""Major version of a log -> the format of its dataset card."""

ANNOTATION = "annotation."
"""Columns of GR00T's logs that begin so number the words of `meta/tasks`."""


NOT_HERE = "episode of a partial copy whose files are not here"


@dataclass(frozen=True)
class LeRobotMapping:
    """The `mapping` of a dataset card.

    partial: true where only some of the log's files were copied; episodes of the others are left out and counted
    """

    partial: bool = False


@dataclass(frozen=True)
class LeRobotLog:
    """A `Log`. `features` is `info.json`'s; `cameras` are those of them that are stored as video or pictures."""

    root: Path
    fps: float
    features: dict[str, dict[str, Any]]
    cameras: tuple[str, ...]
    tasks: dict[int, str]
    episodes: tuple[Episode, ...]
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The features that are no cameras."""
        return tuple(key for key in self.features if key not in self.cameras)

    def check_camera(self, name: str) -> None:
        """Raise `UserError` unless `name` is a camera of the log."""
        if name not in self.cameras:
            raise UserError(f"{self.root}: no camera {name!r} in the log.{nearest(name, self.cameras)}")

    def check_column(self, name: str) -> None:
        """Raise `UserError` unless `name` is a column of the log that is no camera."""
        if name not in self.features or name in self.cameras:
            raise UserError(f"{self.root}: no column {name!r} in the log.{nearest(name, self.columns)}")

    def width(self, column: str) -> int | None:
        """How many numbers a row of the column holds, as `info.json` declares it (None where it does not)."""
        shape = self.features[column].get("shape")
        return math.prod(shape) if shape is not None else None

    def described_by(self) -> list[Path]:
        """See `Log.described_by`: all of `meta/`."""
        return [path for path in sorted((self.root / "meta").rglob("*")) if path.is_file()]

    def records(self, episodes: Sequence[Episode], columns: Sequence[str]) -> Iterator[EpisodeRecord]:
        """Read episodes in the order given, which should be the log's for speed.

        Raises:
            UserError: a data file is missing or corrupt, or does not hold the rows that the episode's entry promises.
        """
        start = 0
        while start < len(episodes):  # neighbours in one file are read in one go
            stop = start
            while stop < len(episodes) and episodes[stop].data_file == episodes[start].data_file:
                stop += 1
            yield from self._from_one_file(episodes[start:stop], columns)
            start = stop

    def _from_one_file(self, episodes: Sequence[Episode], columns: Sequence[str]) -> Iterator[EpisodeRecord]:
        path = self.root / episodes[0].data_file
        numbers = [episode.index for episode in episodes]
        present = parquet_columns(path)
        optional = [name for name in ("timestamp", "task_index", "frame_index") if name in present]
        for name in ("episode_index", *columns):
            if name not in present:
                raise UserError(f"{path}: no column {name!r}, though info.json declares it.{nearest(name, present)}")
        table = read_parquet(
            path,
            list(dict.fromkeys(["episode_index", *optional, *columns])),
            [("episode_index", ">=", min(numbers)), ("episode_index", "<=", max(numbers))],
        )
        owner = table.column("episode_index").to_numpy()
        for episode in episodes:
            rows = np.flatnonzero(owner == episode.index)
            if len(rows) != episode.length:
                raise UserError(
                    f"{path}: episode {episode.index} has {len(rows)} rows, but meta/episodes says {episode.length}; "
                    "the log is damaged"
                )
            if len(rows) == 0:
                continue
            part = table.slice(int(rows[0]), len(rows)) if rows[-1] - rows[0] + 1 == len(rows) else table.take(rows)
            yield self._record(episode, part, columns, path)

    def _record(self, episode: Episode, table: pa.Table, columns: Sequence[str], path: Path) -> EpisodeRecord:
        where = f"{path}: episode {episode.index}"
        if "timestamp" in table.column_names:
            timestamps = matrix(table.column("timestamp"), f"{where}, column 'timestamp'", np.float64)[:, 0]
        else:
            timestamps = np.arange(episode.length) / self.fps
        bad = np.flatnonzero(~np.isfinite(timestamps) | (np.diff(timestamps, prepend=-np.inf) <= 0))
        if len(bad):
            raise UserError(
                f"{where}: timestamp of row {bad[0]} is {timestamps[bad[0]]}; times must rise from row to row"
            )
        values: dict[str, Any] = {}
        for name in columns:
            column = table.column(name)
            if is_text(column.type):
                values[name] = column.to_pylist()
            elif name.startswith(ANNOTATION) and pa.types.is_integer(column.type):
                values[name] = self._words(column, f"{where}, column {name!r}")
            else:
                values[name] = matrix(column, f"{where}, column {name!r}", np.float32)
        if "task_index" in table.column_names and self.tasks:
            tasks = tuple(self._words(table.column("task_index"), f"{where}: task_index"))
        else:
            tasks = (episode.tasks[0] if episode.tasks else "",) * episode.length
        return EpisodeRecord(
            index=episode.index,
            length=episode.length,
            timestamps=timestamps,
            tasks=tasks,
            columns=values,
            video=episode.video,
        )

    def _words(self, column: pa.ChunkedArray, where: str) -> list[str]:
        numbers = column.to_pylist()
        unknown = [number for number in numbers if number not in self.tasks]
        if unknown:
            raise UserError(f"{where} {unknown[0]} is not in the log's table of tasks (meta/tasks)")
        return [self.tasks[number] for number in numbers]


def those_here(log: LeRobotLog, card: DatasetCard) -> LeRobotLog:
    """The log, or with `mapping.partial` its episodes whose files are here. A camera of which no file is here is not
    asked for.

    Raises:
        UserError: the mapping has another key, or no episode is whole.
    """
    mapping: LeRobotMapping = from_plain(LeRobotMapping, card.mapping, f"dataset {card.name!r}: mapping")
    if not mapping.partial:
        return log
    places = {place.path for episode in log.episodes for place in episode.video.values()}
    videos = {place for place in places if is_video(log.root, place)}
    here = {file for file in videos | {e.data_file for e in log.episodes} if is_there(log.root / file)}
    copied = {camera for e in log.episodes for camera, place in e.video.items() if place.path in here}

    def missing(episode: Episode) -> list[str]:
        shown = [place.path for camera, place in episode.video.items() if camera in copied and place.path in videos]
        return [file for file in (episode.data_file, *shown) if file not in here]

    lacking = {episode.index: files for episode in log.episodes if (files := missing(episode))}
    if not lacking:
        return log
    first = next(iter(lacking))
    example = f"episode {first}: {lacking[first][0]}"
    if len(lacking) == len(log.episodes):
        raise UserError(f"{log.root}: no episode has all of its files here ({example}); copy more of the log")
    episodes = tuple(episode for episode in log.episodes if episode.index not in lacking)
    return replace(log, episodes=episodes, left_out={NOT_HERE: (len(lacking), example)})


def read_info(root: Path, version: str) -> dict[str, Any]:
    """`meta/info.json` of a log of a major version ("2" or "3"), with at least `fps` and `features`.

    Raises:
        UserError: not a LeRobot folder, or another version.
    """
    path = root / "meta" / "info.json"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the LeRobot log's folder (the one that holds meta/info.json)")
    if not path.is_file():
        raise UserError(f"{root}: not a LeRobot log, for meta/info.json is missing")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(info, dict):
        raise UserError(f"{path}: holds a {type(info).__name__}; a mapping is expected")
    found = str(info.get("codebase_version", "missing"))
    major = found.removeprefix("v").partition(".")[0]
    if major != version and major in READ_BY:
        raise UserError(
            f"{path}: codebase_version is {found}, but the dataset card's format is {READ_BY[version]}; write "
            f"format: {READ_BY[major]}"
        )
    if major != version:
        raise UserError(
            f"{path}: codebase_version is {found}; versions 2 and 3 are read. Convert the log with LeRobot's own "
            "converter first"
        )
    for key, kind in (("fps", (int, float)), ("features", dict)):
        if not isinstance(info.get(key), kind):
            raise UserError(f"{path}: {key} is {info.get(key)!r}; a LeRobot info.json has it")
    for name, feature in info["features"].items():
        if not isinstance(feature, dict):
            raise UserError(f"{path}: features.{name} is {feature!r}; a mapping with dtype and shape is expected")
        shape = feature.get("shape")
        whole = isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)
        if shape is not None and not whole:
            raise UserError(f"{path}: features.{name}.shape is {shape!r}; a list of whole numbers is expected")
    if not info["fps"] > 0:
        raise UserError(f"{path}: fps is {info['fps']}; a log's rate is above 0")
    return info


def stored_as(features: dict[str, dict[str, Any]], kind: str) -> tuple[str, ...]:
    """Names of the features of a dtype: "video" and "image" are cameras."""
    return tuple(name for name, feature in features.items() if feature.get("dtype") == kind)


def picture_places(cameras: Sequence[str], data_file: str, episode: int, fps: float) -> dict[str, VideoPlace]:
    """Where the frames of cameras lie that are stored as pictures in the Parquet file."""
    return {
        camera: VideoPlace(place_inside(data_file, picture_column(episode, fps, camera), CLOCK_HZ), 0.0)
        for camera in cameras
    }


def in_order(episodes: list[Episode], listed_in: Path) -> tuple[Episode, ...]:
    """Episodes by index.

    Raises:
        UserError: one is listed twice.
    """
    episodes = sorted(episodes, key=lambda episode: episode.index)
    for earlier, later in pairwise(episodes):
        if earlier.index == later.index:
            raise UserError(f"{listed_in}: episode {later.index} stands twice")
    return tuple(episodes)


def fill(template: Any, root: Path, **parts: Any) -> str:
    """A path template of `info.json`, filled.

    Raises:
        UserError: it names other parts than its version's.
    """
    try:
        filled = template.format(**parts)
        if "\0" in filled:
            raise ValueError("holds a zero byte")
        return filled
    except (KeyError, IndexError, ValueError, AttributeError, TypeError, MemoryError, OverflowError):  # '{:9999999999}'
        known = ", ".join(parts)
        raise UserError(
            f"{root}/meta/info.json: path template {template!r} is not of this version, which has {known}"
        ) from None
