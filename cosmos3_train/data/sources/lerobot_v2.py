"""LeRobot v2.0 and v2.1 logs, GR00T's among them: one Parquet file and one mp4 a camera for every episode.

`meta/` is JSON: info.json, tasks.jsonl, episodes.jsonl. Statistics (stats.json of v2.0, episodes_stats.jsonl of v2.1)
and GR00T's modality.json are not needed and may be missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos3_train.config import UserError
from cosmos3_train.data.json_lines import read_json_lines
from cosmos3_train.data.sources.lerobot import LeRobotLog, fill, in_order, picture_places, read_info, stored_as
from cosmos3_train.data.sources.log import Episode, VideoPlace

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
CHUNK_EPISODES = 1000


def open_lerobot_v2(root: str | Path) -> LeRobotLog:
    """Open a LeRobot v2.x folder. Reads `meta/` only.

    Raises:
        UserError: not a LeRobot folder, another version, or a file of `meta/` that is missing or corrupt.
    """
    root = Path(root)
    info = read_info(root, "2")
    return LeRobotLog(
        root=root,
        fps=float(info["fps"]),
        features=info["features"],
        cameras=stored_as(info["features"], "video") + stored_as(info["features"], "image"),
        tasks=_read_tasks(root / "meta" / "tasks.jsonl"),
        episodes=_read_episodes(root, info),
    )


def _read_tasks(path: Path) -> dict[int, str]:
    """task_index → instruction."""
    tasks = {}
    for where, *_, row in read_json_lines(path):
        number, words = row.get("task_index"), row.get("task")
        if not isinstance(number, int) or not isinstance(words, str):
            raise UserError(f"{where}: needs task_index and task; it has {', '.join(row) or 'nothing'}")
        tasks[number] = words
    return tasks


def _read_episodes(root: Path, info: dict[str, Any]) -> tuple[Episode, ...]:
    data_path, video_path = info.get("data_path") or DATA_PATH, info.get("video_path") or VIDEO_PATH
    chunk_episodes = info.get("chunks_size") or CHUNK_EPISODES
    if not isinstance(chunk_episodes, int) or chunk_episodes < 1:
        raise UserError(f"{root}/meta/info.json: chunks_size is {chunk_episodes!r}; it is a number of episodes")
    videos, pictures = stored_as(info["features"], "video"), stored_as(info["features"], "image")
    path = root / "meta" / "episodes.jsonl"
    episodes: list[Episode] = []
    for where, *_, row in read_json_lines(path):
        index, length, tasks = row.get("episode_index"), row.get("length"), row.get("tasks") or ()
        for key, value in (("episode_index", index), ("length", length)):
            if not isinstance(value, int) or value < 0:
                raise UserError(f"{where}: {key} is {value!r}; a whole number is expected")
        assert isinstance(index, int) and isinstance(length, int)
        if not isinstance(tasks, str | list | tuple):
            raise UserError(f"{where}: tasks is {tasks!r}; a list of instructions is expected")
        place = {"episode_chunk": index // chunk_episodes, "episode_index": index}
        data_file = fill(data_path, root, **place)
        video = picture_places(pictures, data_file, index, float(info["fps"]))
        for camera in videos:
            video[camera] = VideoPlace(fill(video_path, root, **place, video_key=camera), 0.0)
        words = (tasks,) if isinstance(tasks, str) else tuple(str(task) for task in tasks)
        said = {key: value for key, value in row.items() if isinstance(value, str)}
        episodes.append(Episode(index, length, words, data_file, video, said))
    return in_order(episodes, path)
