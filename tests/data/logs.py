"""Small LeRobot v3.0 logs for the tests, written with pyarrow and PyAV alone, so that the reader meets a second writer.

Every frame carries its own number as black and white cells, which survive H.264: `frame_number` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmos3_train.config import Channel, Embodiment
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset

CAMERA = "observation.image"
BITS = 12


def numbered_frame(number: int, height: int = 96, width: int = 96) -> np.ndarray:
    """uint8 [H, W, 3]: the bits of `number` as cells of a 4 x 3 grid, white for 1."""
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    for bit in range(BITS):
        row, column = divmod(bit, 4)
        if number >> bit & 1:
            top, left = row * height // 3, column * width // 4
            frame[top : top + height // 3, left : left + width // 4] = 255
    return frame


def prepared_logs(root: Path, lengths: dict[str, list[int]]) -> dict[str, PreparedDataset]:
    """Logs of episodes of these lengths, prepared below `root`, by name."""
    found = {}
    for name, episodes in lengths.items():
        log = make_log(root / name / "log", episodes)
        prepare(dataset_card(name=name), embodiment(), log, root / name / "out", progress=False)
        found[name] = PreparedDataset(root / name / "out", None)
    return found


def frame_number(frame: np.ndarray) -> int:
    """The inverse, of uint8 [3, H, W]."""
    _, height, width = frame.shape
    number = 0
    for bit in range(BITS):
        row, column = divmod(bit, 4)
        y, x = row * height // 3 + height // 6, column * width // 4 + width // 8
        number |= int(frame[:, y - 2 : y + 3, x - 2 : x + 3].mean() > 127) << bit
    return number


def embodiment(**changes) -> Embodiment:
    """A two-channel robot at 10 Hz with windows of 5 frames."""
    card = {
        "name": "mover",
        "domain_id": 4,
        "control_hz": 10.0,
        "chunk": 4,
        "execute": 2,
        "action": [Channel("x", unit="px", low=0.0, high=512.0), Channel("y", unit="px", low=0.0, high=512.0)],
        "cameras": [CAMERA],
        "state_key": "observation.state",
    }
    return Embodiment(**{**card, **changes})


def dataset_card(**changes) -> DatasetCard:
    return DatasetCard(**{"name": "moves", "format": "lerobot_v3", **changes})


def default_actions(episode: int, length: int) -> np.ndarray:
    """float32 [length, 2]: channel 0 counts frames, channel 1 is random but fixed."""
    noise = np.random.default_rng(episode).uniform(0, 512, length)
    return np.stack([np.arange(length) % 512, noise], axis=1).astype(np.float32)


def make_log(
    root: Path,
    lengths: Sequence[int],
    *,
    fps: float = 10,
    cameras: dict[str, tuple[int, int]] | None = None,
    episodes_a_file: int = 3,
    actions: dict[int, np.ndarray] | None = None,
    extra: dict[str, list[np.ndarray]] | None = None,
    keyframe_every: int = 2,
    timestamps: dict[int, np.ndarray] | None = None,
    version: str = "v3.0",
    said: Sequence[dict[str, str]] = (),
) -> Path:
    """A log of `lengths` episodes. Frame i of episode e shows number 100·e + i (modulo 4096).

    Args:
        cameras: name → (height, width).
        episodes_a_file: of videos and of data alike.
        actions, timestamps: of some episodes, in place of the default ones.
        extra: further columns, one array an episode.
        said: further columns of the table of episodes.
    """
    cameras = cameras or {CAMERA: (96, 96)}
    actions, timestamps, extra = actions or {}, timestamps or {}, extra or {}
    tables, rows, index = [], [], 0
    for episode, length in enumerate(lengths):
        file = episode // episodes_a_file
        values = actions.get(episode, default_actions(episode, length))
        times = timestamps.get(episode, np.arange(length) / fps)
        columns = {
            "action": pa.array(list(values), pa.list_(pa.float32())),
            "observation.state": pa.array(list(values[:, :2] + 1), pa.list_(pa.float32())),
            "timestamp": pa.array(times, pa.float32()),
            "frame_index": pa.array(range(length), pa.int64()),
            "episode_index": pa.array([episode] * length, pa.int64()),
            "index": pa.array(range(index, index + length), pa.int64()),
            "task_index": pa.array([episode % 2] * length, pa.int64()),
            **{name: pa.array(list(parts[episode])) for name, parts in extra.items()},
        }
        tables.append((file, pa.table(columns)))
        place = {"data/chunk_index": 0, "data/file_index": file}
        earlier = sum(lengths[file * episodes_a_file : episode])
        for camera in cameras:
            place |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file}
            place |= {f"videos/{camera}/from_timestamp": earlier / fps}
            place |= {f"videos/{camera}/to_timestamp": (earlier + length) / fps}
        tasks = [f"do task {episode % 2}"]
        entry = {"episode_index": episode, "tasks": tasks, "length": length, "stats/action/count": [length]}
        rows.append(entry | place | (said[episode] if said else {}))
        index += length
    for file in sorted({file for file, _ in tables}):
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables([table for other, table in tables if other == file]), path)
        for camera, size in cameras.items():
            episodes = range(file * episodes_a_file, min((file + 1) * episodes_a_file, len(lengths)))
            numbers = [(100 * episode + frame) % 4096 for episode in episodes for frame in range(lengths[episode])]
            video = root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
            write_video(video, [numbered_frame(number, *size) for number in numbers], fps, keyframe_every)
    _write_meta(root, rows, fps, cameras, extra, version, width=actions.get(0, np.zeros((1, 2))).shape[1])
    return root


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float, keyframe_every: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(fps))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": str(keyframe_every), "crf": "18"}
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_meta(root: Path, rows: list[dict], fps, cameras, extra, version: str, width: int) -> None:
    features = {camera: {"dtype": "video", "shape": [*size, 3]} for camera, size in cameras.items()}
    features |= {"action": {"dtype": "float32", "shape": [width]}}
    features |= {"observation.state": {"dtype": "float32", "shape": [2]}}
    features |= {name: {"dtype": "float32", "shape": [1]} for name in extra}
    info = {"codebase_version": version, "fps": fps, "features": features, "total_episodes": len(rows)}
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": ["do task 0", "do task 1"]})
    pq.write_table(tasks, root / "meta" / "tasks.parquet")
    half = (len(rows) + 1) // 2  # several files, as large logs have
    for file, part in enumerate([rows[:half], rows[half:]]):
        if part:
            pq.write_table(pa.Table.from_pylist(part), root / f"meta/episodes/chunk-000/file-{file:03d}.parquet")
