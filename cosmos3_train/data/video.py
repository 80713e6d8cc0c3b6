"""Frames out of mp4s by time, and several camera views on one canvas.

Every file is decoded on one thread: readers run in several processes already, and an FFmpeg thread pool does not
survive a fork. Open files are kept, a few per process, since opening costs more than decoding a short window.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from cosmos3_train.config import UserError
from cosmos3_train.data.pictures import read_pictures

OPEN_FILES = 8
_open: OrderedDict[tuple[int, str, int], InputContainer] = OrderedDict()


def frames_at(root: Path, place: str, timestamps: Sequence[float] | np.ndarray) -> Tensor:
    """The frames of a place of a log at the given times, as `decode_frames`.

    Args:
        root: the log's folder.
        place: "file.mp4", or "file#inside" for pictures that are stored one by one (`pictures.read_pictures`).
    """
    file, _, inside = place.partition("#")
    return read_pictures(root / file, inside, timestamps) if inside else decode_frames(root / file, timestamps)


def decode_frames(path: str | Path, timestamps: Sequence[float] | np.ndarray) -> Tensor:
    """The frames nearest to the given times.

    Args:
        path: an mp4 (or whatever FFmpeg reads).
        timestamps: rising times in seconds from the file's start.

    Returns:
        uint8 [T, 3, H, W], RGB.

    Raises:
        UserError: the file is missing or corrupt, or has no frame within half a frame period of a time.
    """
    path = Path(path)
    times = [float(time) for time in timestamps]
    assert times and times == sorted(times)
    container = _container(path)
    try:
        stream = container.streams.video[0]
        period = 1.0 / float(stream.average_rate or stream.guessed_rate or 24)
        found = _nearest_frames(container, stream, times, period, times[0] - period)
        if found[0] is None:  # some files seek only to a later keyframe: once more, from the beginning
            found = _nearest_frames(container, stream, times, period, 0.0)
    except (av.FFmpegError, OSError) as error:
        close(path)
        raise UserError(f"{path}: the video is corrupt ({' '.join(str(error).split())}); copy the log again") from None
    for time, frame in zip(times, found, strict=True):
        if frame is None:
            raise UserError(f"{path}: no frame within half a frame period ({period / 2:.4f} s) of {time:.4f} s")
    # In numpy: torch's own copy runs on OpenMP threads, which a forked reader of a process that used them never gets.
    stacked = np.stack([frame.transpose(2, 0, 1) for frame in found if frame is not None])
    return torch.from_numpy(stacked)


def compose(views: Sequence[Tensor], layout: Literal["single", "row", "column", "over_two"]) -> Tensor:
    """Views uint8 [T, 3, H, W] on one canvas: one view as it is, side by side, one below the other, or the first above
    the two others at half its size.

    Raises:
        UserError: sizes do not fit the layout; nothing is scaled but the two smaller ones of "over_two".
    """
    if layout == "over_two":
        first, *others = views
        return torch.cat([first, torch.cat([_halved(view, first) for view in others], dim=3)], dim=2)
    if layout == "single":
        if len(views) != 1:
            raise UserError(f"layout is 'single' but there are {len(views)} views; use 'row' or 'column'")
        return views[0]
    side, across = (2, 3) if layout == "row" else (3, 2)
    sizes = {view.shape[side] for view in views}
    if len(sizes) != 1:
        shown = ", ".join(f"{view.shape[2]}x{view.shape[3]}" for view in views)
        extent = "height" if layout == "row" else "width"
        raise UserError(f"layout is {layout!r} but the views (height x width {shown}) differ in {extent}")
    return torch.cat(list(views), dim=across)


def _halved(view: Tensor, first: Tensor) -> Tensor:
    """A view at half the size of `first` [T, 3, H, W]: the mean of 2 × 2 pixels, or as it is where it has that size."""
    height, width = first.shape[2:]
    even = height % 2 == width % 2 == 0
    if even and tuple(view.shape[2:]) == (height // 2, width // 2):
        return view
    if not even or view.shape[2:] != first.shape[2:]:
        shown = f"{height}x{width} and {view.shape[2]}x{view.shape[3]}"
        raise UserError(f"layout is 'over_two' but views are {shown} (height x width); they are alike, and even")
    cells = view.numpy().reshape(len(view), 3, height // 2, 2, width // 2, 2)  # as in decode_frames: not with torch
    return torch.from_numpy(((cells.sum(axis=(3, 5), dtype=np.uint16) + 2) // 4).astype(np.uint8))


def close(path: str | Path | None = None) -> None:
    """Close one kept file of this process, or all."""
    for key in list(_open):
        if key[0] == os.getpid() and (path is None or key[1] == str(path)):
            _open.pop(key).close()


def _nearest_frames(
    container: InputContainer, stream: VideoStream, times: list[float], period: float, seek_to: float
) -> list[np.ndarray | None]:
    """uint8 [H, W, 3] nearest to each time, None where there is none within half a period."""
    assert stream.time_base is not None
    container.seek(max(0, int(seek_to / stream.time_base)), stream=stream, backward=True)
    limit = period / 2 * 1.01  # timestamps are float32 in logs: 1 % keeps a rounding from being an error
    near: list[av.VideoFrame | None] = [None] * len(times)
    distance = [limit] * len(times)
    for frame in container.decode(stream):
        if frame.time is None:
            continue
        for place, time in enumerate(times):
            if abs(frame.time - time) < distance[place]:
                near[place], distance[place] = frame, abs(frame.time - time)
        if frame.time >= times[-1] - period / 20:
            break
    converted: dict[int, np.ndarray] = {}
    reformatter = VideoReformatter()  # one for all: `frame.to_ndarray(format=...)` makes one a frame, 4 ms each
    for frame in near:
        if frame is not None and id(frame) not in converted:
            converted[id(frame)] = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return [None if frame is None else converted[id(frame)] for frame in near]


def _container(path: Path) -> InputContainer:
    # The process id is part of the key: a forked reader shares the parent's file offset and must open its own.
    # So is the file's inode: a log that is replaced under a running process is opened anew.
    try:
        key = (os.getpid(), str(path), path.stat().st_ino)
    except FileNotFoundError:
        raise UserError(f"{path}: the video is missing; copy the log again") from None
    if key in _open:
        _open.move_to_end(key)
        return _open[key]
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({' '.join(str(error).split())}); copy the log again") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{path}: the file has no video stream; copy the log again")
    container.streams.video[0].codec_context.thread_count = 1
    _open[key] = container
    while len(_open) > OPEN_FILES:
        oldest, stale = _open.popitem(last=False)
        if oldest[0] == os.getpid():
            stale.close()
    return container
