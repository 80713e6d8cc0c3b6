"""Small sets of captioned video for the tests: real mp4s whose frames carry their own number, in the layouts of the
published sets."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np

from cosmos3_train.data.card import DatasetCard
from tests.data.logs import numbered_frame

SIZE = (96, 160)


def mp4(frames: int, first: int = 0, *, fps: int = 24, size: tuple[int, int] = SIZE, b_frames: int = 2) -> bytes:
    """An H.264 mp4 whose frame i shows the number first + i (modulo 4096)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "8", "crf": "20", "bf": str(b_frames), "preset": "ultrafast"}
        stream.codec_context.thread_count = 1
        for number in range(first, first + frames):
            picture = av.VideoFrame.from_ndarray(numbered_frame(number % 4096, *size), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def write_files(root: Path, files: Mapping[str, bytes | dict | str]) -> Path:
    """Files below a folder; a mapping becomes JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_bytes(content))
    return root


def write_tar(path: Path, members: Mapping[str, bytes | dict | str]) -> Path:
    """An uncompressed archive of such files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            data = _bytes(content)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def row(stem: str, frames: int, caption: str | None = None, *windows: dict[str, Any], fps: int = 24) -> dict[str, Any]:
    """The published fine-tuning row of `videos/<stem>.mp4`."""
    found: dict[str, Any] = {"uuid": stem, "duration": frames / fps, "width": SIZE[1], "height": SIZE[0]}
    found |= {"vision_path": f"videos/{stem}.mp4"}
    found |= {"t2w_windows": list(windows)} if windows else {}
    return found | ({"caption": caption} if caption is not None else {})


def window(first: int, last: int, caption: str | None = None, **more: Any) -> dict[str, Any]:
    found = {"start_frame": first, "end_frame": last, "temporal_interval": 1}
    return found | ({"caption": caption} if caption is not None else {}) | more


def video_card(**changes: Any) -> DatasetCard:
    """A card of rows with windows of 9 frames."""
    card = {"name": "scenes", "format": "jsonl_video", "captions": ["caption_json", "caption"], "frames": 9}
    return DatasetCard(**{**card, **changes})


def numbers(frames: Any) -> list[int]:
    """The numbers that uint8 [T, 3, H, W] shows."""
    from tests.data.logs import frame_number

    return [frame_number(np.asarray(frame)) for frame in frames]


def _bytes(content: bytes | dict | str) -> bytes:
    if isinstance(content, bytes):
        return content
    return content.encode() if isinstance(content, str) else json.dumps(content).encode()
