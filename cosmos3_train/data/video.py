"""Frames out of mp4s by time, also of those inside archives, and several camera views on one canvas.

Every file is decoded on one thread: readers run in several processes already, and an FFmpeg thread pool does not
survive a fork. Open files are kept, a few per process, since opening costs more than decoding a short window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from cosmos3_train.config import UserError
from cosmos3_train.data import archives, torchcodec
from cosmos3_train.data.kept import KeptFiles
from cosmos3_train.data.pictures import read_pictures
from cosmos3_train.data.pixels import MOST_PIXELS, check_pixels

PLAYLISTS = ("hls", "dash", "concat")
"""FFmpeg's formats that are lists of other files."""


class VideoTimes(NamedTuple):
    """float64 [T]: when each frame of a video is shown, seconds into the file, rising; and its frames a second."""

    times: np.ndarray
    fps: float


class Decoded(NamedTuple):
    """A video, decoded whole. times: float64 [T], when its frames are shown, rising, seconds into the file;  fps: its
    rate, 0 where it cannot be opened;  faults: (seconds, what is wrong there), NaN seconds where that is not known."""

    times: np.ndarray
    fps: float
    faults: list[tuple[float, str]]


def frames_at(
    root: Path, place: str, timestamps: Sequence[float] | np.ndarray, size: tuple[int, int] | None = None
) -> Tensor:
    """The frames of a place of a log at the given times, as `decode_frames`.

    Args:
        root: the log's folder.
        place: "file.mp4", "shard.tar#member" for one in an archive (`archives.place_of`), or "file#inside" for pictures
            that are stored one by one (`pictures.read_pictures`).
        size: (H, W) that videos are resized to; None leaves them as they are.
    """
    path, inside = archives.split_place(root, place)
    if not is_video(root, place):
        return read_pictures(path, inside, timestamps)
    return decode_frames(path, timestamps, inside, size)


def is_video(root: Path, place: str) -> bool:
    """Whether a place of a log is a video, of its own or in an archive; else its pictures are stored one by one."""
    path, inside = archives.split_place(root, place)
    return not inside or path.suffix == archives.SUFFIX


def reading_size(size: tuple[int, int], tier: int) -> tuple[int, int]:
    """(H, W) at which a clip without a robot is read: as it is, or shrunk until its shorter side is 4/3 of the tier.

    That still covers every canvas of the tier, and is all that of a 4K clip ever has to fit into memory.
    """
    shorter, least = min(size), math.ceil(tier * 4 / 3)
    if shorter <= least:
        return size
    return round(size[0] * least / shorter), round(size[1] * least / shorter)


def video_times(path: Path, inside: str = "") -> VideoTimes:
    """When a video's frames are shown, from its file's index where it has one; without decoding.

    Args:
        path, inside: as of `decode_frames`.

    Raises:
        UserError: it is missing or corrupt, or has no frames; `TooLarge` for its frames' size.
    """
    container = opened(path, inside)
    stream = container.streams.video[0]
    try:
        assert stream.time_base is not None
        listed = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
        if listed and len(listed) == stream.frames:
            # The index has decoding times. Shown frames have the same ones in another order, from `start_time` on.
            ticks = np.sort(np.asarray(listed, dtype=np.int64))
            ticks += (stream.start_time or 0) - ticks[0]
        else:
            container.seek(0)
            shown = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            ticks = np.unique(np.asarray(shown, dtype=np.int64))
        fps = float(stream.average_rate or stream.guessed_rate or 0)
    except (av.FFmpegError, OSError) as error:
        close(path)
        raise corrupt(path, inside, error) from None
    if not len(ticks) or not fps > 0:
        raise UserError(f"{named(path, inside)}: the video has no frames; copy the log again")
    return VideoTimes(ticks * float(stream.time_base), fps)


def decode_whole(path: Path, inside: str = "") -> Decoded:
    """Decode every frame of a video and keep none: what cannot be decoded is told, not raised. From any thread.

    Args:
        path, inside: as of `decode_frames`.
    """
    times: list[float] = []
    wrong: list[tuple[float, str]] = []
    try:
        container = _open(path, inside)
    except UserError as error:
        return Decoded(np.zeros(0), 0.0, [(math.nan, str(error))])
    except FileNotFoundError:
        return Decoded(np.zeros(0), 0.0, [(math.nan, f"{path}: the video is missing")])
    with container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        try:
            for frame in container.decode(stream):
                if frame.time is None:
                    continue
                if frame.is_corrupt:  # FFmpeg has made up what it could not decode
                    wrong.append((frame.time, f"the frame at {frame.time:.4f} s is damaged"))
                times.append(frame.time)
        except (av.FFmpegError, OSError) as error:
            after = times[-1] if times else 0.0
            reason = " ".join(str(error).split())
            wrong.append((after, f"no frame can be decoded after {after:.4f} s ({reason})"))
    return Decoded(np.sort(np.asarray(times, dtype=np.float64)), fps, wrong)


def decode_frames(
    path: str | Path,
    timestamps: Sequence[float] | np.ndarray,
    inside: str = "",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """The frames nearest to the given times.

    Args:
        path: an mp4 (or whatever FFmpeg reads).
        timestamps: rising times in seconds from the file's start.
        inside: where in an archive the mp4 stands.
        size: (H, W) that frames are resized to, by area.

    Returns:
        uint8 [T, 3, H, W], RGB.

    Raises:
        UserError: the file is missing or corrupt, or has no frame within half a frame period of a time.
    """
    path = Path(path)
    times = [float(time) for time in timestamps]
    assert times and times == sorted(times)
    container = opened(path, inside)  # before torchcodec does, for it refuses what is no video of its own
    if not inside and size is None and (sooner := torchcodec.frames(path, times)) is not None:
        return sooner
    try:
        stream = container.streams.video[0]
        period = 1.0 / float(stream.average_rate or stream.guessed_rate or 24)
        found = _nearest_frames(container, stream, times, period, times[0] - period, size)
        if found[0] is None:  # some files seek only to a later keyframe: once more, from the beginning
            found = _nearest_frames(container, stream, times, period, 0.0, size)
    except (av.FFmpegError, OSError) as error:
        close(path)
        raise corrupt(path, inside, error) from None
    for time, frame in zip(times, found, strict=True):
        if frame is None:
            where = named(path, inside)
            raise UserError(f"{where}: no frame within half a frame period ({period / 2:.4f} s) of {time:.4f} s")
    # In numpy: torch's own copy runs on OpenMP threads, which a forked reader of a process that used them never gets.
    # The colours of a pixel stay side by side (`channels_last`), as they are decoded: resizing is then twice as fast.
    stacked = np.stack([frame for frame in found if frame is not None])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


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
    _files.close(None if path is None else Path(path))


def _nearest_frames(
    container: InputContainer,
    stream: VideoStream,
    times: list[float],
    period: float,
    seek_to: float,
    size: tuple[int, int] | None,
) -> list[np.ndarray | None]:
    """uint8 [H, W, 3] nearest to each time, None where there is none within half a period."""
    assert stream.time_base is not None
    container.seek(max(0, int(seek_to / stream.time_base)), stream=stream, backward=True)
    limit = period / 2 * 1.01  # timestamps are float32 in logs: 1 % keeps a rounding from being an error
    near: dict[int, av.VideoFrame] = {}
    distance = [limit] * len(times)
    found: list[np.ndarray | None] = [None] * len(times)
    reformatter = VideoReformatter()  # one for all: `frame.to_ndarray(format=...)` makes one a frame, 4 ms each
    last: tuple[av.VideoFrame, np.ndarray] | None = None  # two times may be nearest to one frame

    def settle(place: int) -> None:
        nonlocal last
        frame = near.pop(place)
        if last is None or last[0] is not frame:
            last = frame, _to_rgb(reformatter, frame, size)
        found[place] = last[1]

    for frame in container.decode(stream):
        if frame.time is None:
            continue
        for place, time in enumerate(times):
            if abs(frame.time - time) < distance[place]:
                near[place], distance[place] = frame, abs(frame.time - time)
        # A frame that no later one can displace is made small at once: whole ones of 4K are 12 MB each.
        for place in [place for place in near if frame.time - times[place] > distance[place]]:
            settle(place)
        if frame.time >= times[-1] - period / 20:
            break
    for place in sorted(near):
        settle(place)
    return found


def _to_rgb(reformatter: VideoReformatter, frame: av.VideoFrame, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W, 3] as it is to be seen: phones store pictures lying on their side and say by how much."""
    turns = frame.rotation // 90 % 4
    height, width = (None, None) if size is None else size if turns % 2 == 0 else size[::-1]
    picture = reformatter.reformat(
        frame, width=width, height=height, format="rgb24", threads=1, interpolation=Interpolation.AREA if size else None
    ).to_ndarray()
    return np.rot90(picture, turns) if turns else picture


def named(path: Path, inside: str) -> str:
    """A video's place, for messages."""
    return f"{path}#{inside}" if inside else str(path)


def corrupt(path: Path, inside: str, error: Exception) -> UserError:
    """What FFmpeg's error is to the user."""
    return UserError(
        f"{named(path, inside)}: the video is corrupt ({' '.join(str(error).split())}); copy the log again"
    )


def open_anew(path: Path, inside: str) -> InputContainer:
    """A video's file, opened; whoever asked closes it.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        source = archives.Part(path, *archives.range_of(inside)) if inside else str(path)
        container = av.open(source, mode="r", metadata_errors="replace")  # a title may be in any encoding
    except (av.FFmpegError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{named(path, inside)}: not a readable video ({reason}); copy the log again") from None
    if container.format.name in PLAYLISTS:
        container.close()
        raise UserError(
            f"{named(path, inside)}: a playlist ({container.format.name}), which may name files anywhere; give the "
            "video itself"
        )
    return container


def opened(path: Path, inside: str = "") -> InputContainer:
    """A video's file, opened once in a process and kept; whoever reads it seeks first.

    Raises:
        UserError: it is missing, or no video.
    """
    try:
        return _files.get(path, inside)
    except FileNotFoundError:  # before it is opened: a kept file is known by its inode
        raise UserError(f"{path}: the video is missing; copy the log again") from None


def _open(path: Path, inside: str) -> InputContainer:
    container = open_anew(path, inside)
    if not container.streams.video:
        container.close()
        raise UserError(f"{named(path, inside)}: the file has no video stream; copy the log again")
    codec = cast(Any, container.streams.video[0].codec_context)
    if codec is None:  # of a kind that FFmpeg does not know, as a damaged header may say
        container.close()
        raise UserError(f"{named(path, inside)}: the video's codec is not known; copy the log again")
    try:
        check_pixels(codec.height, codec.width, named(path, inside))
    except UserError:
        container.close()
        raise
    codec.thread_count = 1
    codec.options = {"max_pixels": str(MOST_PIXELS)}  # a stream may have larger frames than its header says
    return container


_files = KeptFiles(_open, InputContainer.close)
