"""LeRobot v3.0 logs, read by their files: `meta/` and `data/` are Parquet, `videos/` are mp4s of many episodes each.

The `lerobot` package is not used: its version pins conflict with torch and diffusers. Only the columns asked for are
read, and of a data file only the row groups of the episodes asked for. Times are the log's own `timestamp` column;
frame i of a camera stands at `from_timestamp + timestamps[i]` of its mp4.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, VideoPlace

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclass(frozen=True)
class LeRobotLog:
    """A `Log`. `features` is `info.json`'s; `cameras` are those of them that are stored as video."""

    root: Path
    fps: float
    features: dict[str, dict[str, Any]]
    cameras: tuple[str, ...]
    tasks: dict[int, str]
    episodes: tuple[Episode, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The features that are not video."""
        return tuple(key for key in self.features if key not in self.cameras)

    def check_camera(self, name: str) -> None:
        """Raise `UserError` unless `name` is a camera of the log."""
        if name in self.cameras:
            return
        if self.features.get(name, {}).get("dtype") == "image":
            raise UserError(f"{self.root}: camera {name!r} is stored as images in Parquet; store it as video (mp4)")
        raise UserError(f"{self.root}: no camera {name!r} in the log.{nearest(name, self.cameras)}")

    def check_column(self, name: str) -> None:
        """Raise `UserError` unless `name` is a column of the log that is not video."""
        if name not in self.features or name in self.cameras:
            raise UserError(f"{self.root}: no column {name!r} in the log.{nearest(name, self.columns)}")

    def width(self, column: str) -> int | None:
        """How many numbers a row of the column holds, as `info.json` declares it (None where it does not)."""
        shape = self.features[column].get("shape")
        return int(np.prod(shape)) if shape is not None else None

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
        for name in columns:
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
            timestamps = _matrix(table.column("timestamp"), f"{where}, column 'timestamp'", np.float64)[:, 0]
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
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                values[name] = column.to_pylist()
            else:
                values[name] = _matrix(column, f"{where}, column {name!r}", np.float32)
        return EpisodeRecord(
            index=episode.index,
            length=episode.length,
            timestamps=timestamps,
            tasks=self._tasks_of_rows(episode, table, where),
            columns=values,
            video=episode.video,
        )

    def _tasks_of_rows(self, episode: Episode, table: pa.Table, where: str) -> tuple[str, ...]:
        if "task_index" in table.column_names and self.tasks:
            numbers = table.column("task_index").to_pylist()
            unknown = [number for number in numbers if number not in self.tasks]
            if unknown:
                raise UserError(f"{where}: task_index {unknown[0]} is not in meta/tasks.parquet")
            return tuple(self.tasks[number] for number in numbers)
        return (episode.tasks[0] if episode.tasks else "",) * episode.length


def open_lerobot(root: str | Path) -> LeRobotLog:
    """Open a LeRobot v3.x folder. Reads `meta/` only.

    Raises:
        UserError: not a LeRobot folder, another version, or a file of `meta/` that is missing or corrupt.
    """
    root = Path(root)
    info = _read_info(root)
    features = info["features"]
    cameras = tuple(key for key, feature in features.items() if feature.get("dtype") == "video")
    return LeRobotLog(
        root=root,
        fps=float(info["fps"]),
        features=features,
        cameras=cameras,
        tasks=_read_tasks(root / "meta" / "tasks.parquet"),
        episodes=_read_episodes(root, cameras, info.get("data_path", DATA_PATH), info.get("video_path") or VIDEO_PATH),
    )


def read_parquet(path: Path, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
    """A Parquet file, or a `UserError` that names it."""
    try:
        return (
            pq.ParquetFile(path).read(columns)
            if filters is None
            else pq.read_table(path, columns=columns, filters=filters)
        )
    except FileNotFoundError:
        raise UserError(f"{path}: the Parquet file is missing; copy the log again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_one_line(error)}); copy the log again") from None


def parquet_columns(path: Path) -> list[str]:
    """Names of a Parquet file's columns, or a `UserError` that names the file."""
    try:
        return pq.read_schema(path).names
    except FileNotFoundError:
        raise UserError(f"{path}: the Parquet file is missing; copy the log again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_one_line(error)}); copy the log again") from None


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the LeRobot log's folder (the one that holds meta/info.json)")
    if not path.is_file():
        raise UserError(f"{root}: not a LeRobot log, for meta/info.json is missing")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({_one_line(error)})") from None
    if not isinstance(info, dict):
        raise UserError(f"{path}: holds a {type(info).__name__}; a mapping is expected")
    version = str(info.get("codebase_version", "missing"))
    if not version.startswith(("v3.", "3.")):
        raise UserError(
            f"{path}: codebase_version is {version}; version 3 (v3.0) is read. Convert the log with LeRobot's own "
            "converter to v3.0 first"
        )
    for key, kind in (("fps", (int, float)), ("features", dict)):
        if not isinstance(info.get(key), kind):
            raise UserError(f"{path}: {key} is {info.get(key)!r}; a LeRobot v3 info.json has it")
    return info


def _read_tasks(path: Path) -> dict[int, str]:
    """task_index → instruction. The instruction is the pandas index, under whatever name it was stored, or a column."""
    table = read_parquet(path)
    words = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if "task_index" not in table.column_names or not words:
        raise UserError(f"{path}: needs task_index and the task's words; it has {', '.join(table.column_names)}")
    word = "task" if "task" in words else words[0]
    return dict(zip(table.column("task_index").to_pylist(), table.column(word).to_pylist(), strict=True))


def _read_episodes(root: Path, cameras: Sequence[str], data_path: str, video_path: str) -> tuple[Episode, ...]:
    folder = root / "meta" / "episodes"
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    if not files:
        raise UserError(f"{folder}: the log has no episode table (meta/episodes/chunk-*/file-*.parquet)")
    place = ("chunk_index", "file_index")
    wanted = ["episode_index", "length", *(f"data/{key}" for key in place)]
    wanted += [f"videos/{camera}/{key}" for camera in cameras for key in (*place, "from_timestamp")]
    episodes: list[Episode] = []
    for path in files:
        present = parquet_columns(path)
        for name in wanted:
            if name not in present:
                raise UserError(f"{path}: no column {name!r}.{nearest(name, present)}")
        rows = read_parquet(path, wanted + (["tasks"] if "tasks" in present else [])).to_pylist()
        for row in rows:
            video = {}
            for camera in cameras:
                prefix = f"videos/{camera}/"
                file = _fill(video_path, root, row[prefix + "chunk_index"], row[prefix + "file_index"], camera)
                video[camera] = VideoPlace(file, float(row[prefix + "from_timestamp"]))
            file = _fill(data_path, root, row["data/chunk_index"], row["data/file_index"])
            tasks = tuple(row.get("tasks") or ())
            episodes.append(Episode(int(row["episode_index"]), int(row["length"]), tasks, file, video))
    episodes.sort(key=lambda episode: episode.index)
    for earlier, later in pairwise(episodes):
        if earlier.index == later.index:
            raise UserError(f"{folder}: episode {later.index} stands twice")
    return tuple(episodes)


def _fill(template: str, root: Path, chunk: int, file: int, camera: str = "") -> str:
    try:
        return template.format(chunk_index=chunk, file_index=file, video_key=camera)
    except (KeyError, IndexError, ValueError):
        raise UserError(f"{root}/meta/info.json: path template {template!r} is not a LeRobot v3 one") from None


def _matrix(column: pa.ChunkedArray, where: str, dtype: type) -> np.ndarray:
    """[T, W] of a column of lists (fixed or not) or numbers. Missing values become NaN, which the checks then name."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    rows = len(array)
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if array.null_count:
            raise UserError(f"{where}: row {array.is_null().to_pylist().index(True)} is empty")
        array = array.flatten()
        if rows and len(array) % rows:
            raise UserError(f"{where}: rows have different widths")
    if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
        raise UserError(f"{where}: holds {kind}; numbers are expected")
    return array.cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(rows, -1).astype(dtype)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
