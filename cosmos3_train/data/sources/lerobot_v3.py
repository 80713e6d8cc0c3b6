"""LeRobot v3.0 logs: `meta/` and `data/` are Parquet, `videos/` are mp4s, each of them of many episodes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.parquet import is_text, parquet_columns, parquet_texts, read_parquet
from cosmos3_train.data.sources.lerobot import LeRobotLog, fill, in_order, picture_places, read_info, stored_as
from cosmos3_train.data.sources.log import Episode, VideoPlace

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def open_lerobot(root: str | Path) -> LeRobotLog:
    """Open a LeRobot v3.x folder. Reads `meta/` only.

    Raises:
        UserError: not a LeRobot folder, another version, or a file of `meta/` that is missing or corrupt.
    """
    root = Path(root)
    info = read_info(root, "3")
    return LeRobotLog(
        root=root,
        fps=float(info["fps"]),
        features=info["features"],
        cameras=stored_as(info["features"], "video") + stored_as(info["features"], "image"),
        tasks=_read_tasks(root / "meta" / "tasks.parquet"),
        episodes=_read_episodes(root, info),
    )


def _read_tasks(path: Path) -> dict[int, str]:
    """task_index → instruction. The instruction is the pandas index, under whatever name it was stored, or a column."""
    table = read_parquet(path)
    words = [field.name for field in table.schema if is_text(field.type)]
    if "task_index" not in table.column_names or not words:
        raise UserError(f"{path}: needs task_index and the task's words; it has {', '.join(table.column_names)}")
    word = "task" if "task" in words else words[0]
    return dict(zip(table.column("task_index").to_pylist(), table.column(word).to_pylist(), strict=True))


def _read_episodes(root: Path, info: dict[str, Any]) -> tuple[Episode, ...]:
    data_path, video_path = info.get("data_path") or DATA_PATH, info.get("video_path") or VIDEO_PATH
    videos, pictures = stored_as(info["features"], "video"), stored_as(info["features"], "image")
    folder = root / "meta" / "episodes"
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    if not files:
        raise UserError(f"{folder}: the log has no episode table (meta/episodes/chunk-*/file-*.parquet)")
    place = ("chunk_index", "file_index")
    wanted = ["episode_index", "length", *(f"data/{key}" for key in place)]
    wanted += [f"videos/{camera}/{key}" for camera in videos for key in (*place, "from_timestamp")]
    episodes: list[Episode] = []
    for path in files:
        present = parquet_columns(path)
        for name in wanted:
            if name not in present:
                raise UserError(f"{path}: no column {name!r}.{nearest(name, present)}")
        texts = parquet_texts(path)
        also = [name for name in dict.fromkeys(["tasks", *texts]) if name in present]
        rows = read_parquet(path, wanted + also).to_pylist()
        for row in rows:
            for name in wanted:
                _check_cell(row[name], name, f"{path}: episode {row['episode_index']}")
            index = int(row["episode_index"])
            data = {key: row[f"data/{key}"] for key in place}
            data_file = fill(data_path, root, **data)
            video = picture_places(pictures, data_file, index, float(info["fps"]))
            for camera in videos:
                prefix = f"videos/{camera}/"
                parts = {key: row[prefix + key] for key in place}
                file = fill(video_path, root, **parts, video_key=camera)
                video[camera] = VideoPlace(file, float(row[prefix + "from_timestamp"]))
            said = {name: row[name] for name in texts if row[name] is not None}
            tasks = row.get("tasks") or ()
            if not isinstance(tasks, str | list):
                raise UserError(f"{path}: episode {index}: tasks is {tasks!r}; a list of instructions is expected")
            words = (tasks,) if isinstance(tasks, str) else tuple(tasks)
            episodes.append(Episode(index, int(row["length"]), words, data_file, video, said))
    return in_order(episodes, folder)


def _check_cell(value: Any, name: str, where: str) -> None:
    """Raise `UserError` unless a cell of the table of episodes can be what its column is: a time, else a number from 0,
    which pandas may have stored as a fraction."""
    time = name.endswith("from_timestamp")
    fits = isinstance(value, int | float) and math.isfinite(value) and (time or (value >= 0 and value == int(value)))
    if not fits:
        kind = "a time in seconds" if time else "a whole number"
        raise UserError(f"{where}: {name} is {value!r}; {kind} is expected, the log is damaged")
