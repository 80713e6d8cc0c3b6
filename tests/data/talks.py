"""Conversation sets with pictures, of exactly the layouts that are published: real JPEG, PNG, MP4 and Parquet bytes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture_bytes(number: int, size: tuple[int, int] = (48, 64), form: str = "JPEG") -> bytes:
    """An encoded picture of (H, W), random."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, form)
    return written.getvalue()


def write_video(path: Path, frames: int = 30, fps: int = 10, size: tuple[int, int] = (48, 64)) -> Path:
    """An mp4 whose picture grows lighter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            grey = np.full((*size, 3), 40 + 5 * number, dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        file.mux(stream.encode())
    return path


def llava_row(number: int) -> dict:
    """A row of LLaVA-OneVision, every third one of words alone."""
    shown = number % 3 != 2
    ask = f"<image>\nWhat is in place {number}?" if shown else f"What is {number}?"
    return {
        "id": f"row_{number}",
        "image": {"bytes": picture_bytes(number), "path": f"{number}.jpg"} if shown else None,
        "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": f"A thing, {number}."}],
        "data_source": "ai2d(gpt4v)",
    }


def write_llava(folder: Path, rows: int = 24, change=lambda row: row) -> Path:
    """LLaVA-OneVision's folder: two Parquet files of a part, several row groups in each. Returns it."""
    part = folder / "ai2d(gpt4v)"
    part.mkdir(parents=True, exist_ok=True)
    kind = pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
            ("data_source", pa.string()),
        ]
    )
    made = [change(llava_row(number)) for number in range(rows)]
    for place, half in enumerate((made[: rows // 2], made[rows // 2 :])):
        table = pa.Table.from_pylist(half, schema=kind)
        pq.write_table(table, part / f"train-{place:05d}-of-00002.parquet", row_group_size=5)
    return folder


def write_videophy_tables(folder: Path, rows: int = 6) -> Path:
    """VideoPhy-2 as it is published, with its videos as `wget -x` saves them. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["caption", "video_url", "sa", "pc", "joint", "upsampled_caption"])
        table.writeheader()
        for number in range(rows):
            place = f"videos.example.org/model_{number % 2}/{number // 2}.mp4"  # names alone are not apart
            write_video(folder / "videos" / place, frames=20 + 3 * number)
            caption = f'A cup, number {number},\nfalls "slowly"'
            said = {"caption": caption, "video_url": f"https://{place}", "sa": 4, "pc": number % 5 + 1, "joint": 0}
            table.writerow(said | {"upsampled_caption": f"Longer: {caption}"})
    return folder


def write_videophy(folder: Path, train: int = 6, val: int = 2) -> Path:
    """VideoPhy-2 as upstream's recipe lays it out. Returns the folder."""
    for split, first, count in (("train", 0, train), ("val", train, val)):
        root, entries = folder / f"videophy2_{split}", []
        (root / "text").mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            write_video(root / "media" / f"video_{number}.mp4", frames=20 + 3 * number)
            talk = {
                "conversations": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "video", "video": "video_0"},
                            {"type": "text", "text": "Score from 1 to 5 how well it keeps to physics."},
                        ],
                    },
                    {"role": "assistant", "content": f"{number % 5 + 1}"},
                ]
            }
            (root / "text" / f"conversation_{number}.json").write_text(json.dumps(talk))
            entries.append(
                {"id": number, "media": f"media/video_{number}.mp4", "conversation": f"text/conversation_{number}.json"}
            )
        (root / "meta.json").write_text(json.dumps(entries))
    return folder
