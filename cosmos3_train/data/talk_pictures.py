"""Pictures of conversations: their size without decoding, and decoded."""

from __future__ import annotations

import io
import stat
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from cosmos3_train.config import UserError
from cosmos3_train.data.card import PictureOptions
from cosmos3_train.data.pixels import TooLarge, check_pixels
from cosmos3_train.data.talk import Reference
from cosmos3_train.data.unusable import Unusable
from cosmos3_train.data.video import decode_frames, opened, video_times
from cosmos3_train.types import Picture

MISSING = "a picture is missing"
UNREADABLE = "a picture cannot be read"
TOO_LARGE = "a picture has more pixels than are read"
LEAST_FRAMES = 4
"""That are taken of a video, as transformers' own processor does where it has them."""

_BROKEN = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError,
    KeyError, TypeError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's readers raise for damaged bytes."""
_LARGE = (TooLarge, Image.DecompressionBombError, Image.DecompressionBombWarning)


class Faulty(Unusable):
    """A picture whose file is missing, or cannot be read. path: of it, in the folder that the set's pictures lie in"""

    def __init__(self, reason: str, example: str, path: str) -> None:
        super().__init__(reason, example)
        self.path = path


class Shape(NamedTuple):
    """What a picture's tokens depend on. size: (H, W) in pixels;  numbers, fps, pixels: as of `Picture`"""

    size: tuple[int, int]
    numbers: tuple[int, ...] | None
    fps: float
    pixels: tuple[int | None, int | None]


def frame_numbers(count: int, fps: float, options: PictureOptions) -> tuple[int, ...]:
    """Which of a video's frames are taken: evenly, first and last included, as transformers' processor takes them."""
    wanted = min(max(int(count / fps * options.video_fps), LEAST_FRAMES), options.video_frames, count)
    return tuple(np.linspace(0, count - 1, wanted).round().astype(int).tolist())


def stamp_of(path: Path) -> list[int]:
    """[size, time of the last change in ns] of a picture's file, which become others where it is mended; [] of none."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name that no file can have
        return []
    return [found.st_size, found.st_mtime_ns] if stat.S_ISREG(found.st_mode) else []


def check_there(root: Path, reference: Reference) -> None:
    """Raise `Faulty` where a picture's file is missing."""
    if reference.content is None and not stamp_of(root / reference.path):
        raise Faulty(MISSING, reference.path[:160], reference.path)


def picture_shape(root: Path, reference: Reference, options: PictureOptions) -> Shape:
    """A picture's shape, from its header or its index.

    Raises:
        Unusable: it is missing, too large, no picture, or a video of one frame.
    """
    check_there(root, reference)
    try:
        if reference.kind == "video":
            numbers, fps, _ = _film(root, reference, options)
            stream = opened(root / reference.path).streams.video[0]
            return Shape((stream.height, stream.width), numbers, fps, options.video_pixels)
        with _opened(root, reference) as image:
            return Shape((image.height, image.width), None, 0.0, options.image_pixels)
    except (UserError, *_BROKEN) as error:
        raise _fault(reference, error) from None


def read_picture(root: Path, reference: Reference, options: PictureOptions) -> Picture:
    """A picture, decoded.

    Raises:
        Unusable: it is missing, too large or damaged.
    """
    check_there(root, reference)
    try:
        if reference.kind == "video":
            numbers, fps, times = _film(root, reference, options)
            # Not `frames_at`: a file's name may hold '#', which sets apart places inside of logs' files.
            frames = decode_frames(root / reference.path, times[list(numbers)])
            return Picture(frames, numbers, fps, options.video_pixels)
        with _opened(root, reference) as image:
            ImageOps.exif_transpose(image, in_place=True)
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            pixels = np.asarray(rgb).transpose(2, 0, 1).copy()
        return Picture(torch.from_numpy(pixels)[None], pixels=options.image_pixels)
    except (UserError, *_BROKEN) as error:
        raise _fault(reference, error) from None


def _film(root: Path, reference: Reference, options: PictureOptions) -> tuple[tuple[int, ...], float, np.ndarray]:
    """The frames that are taken of a video, its rate, and when each of its frames is shown."""
    if reference.content is not None:
        raise Unusable(UNREADABLE, "a video that lies in a column; only files are read")
    times, fps = video_times(root / reference.path)
    if len(times) < 2:
        raise _fault(reference, "the video has one frame")
    return frame_numbers(len(times), fps, options), fps, times


def _opened(root: Path, reference: Reference) -> Image.Image:
    """An image, not decoded yet."""
    try:
        image = Image.open(root / reference.path if reference.content is None else io.BytesIO(reference.content))
        check_pixels(image.height, image.width, reference.path or "an image")
    except _LARGE as error:  # Pillow's limit is wider
        raise _fault(reference, error) from None
    return image


def _fault(reference: Reference, error: Exception | str) -> Unusable:
    reason = TOO_LARGE if isinstance(error, _LARGE) else UNREADABLE
    unknown = isinstance(error, UnidentifiedImageError)  # its own words hold an address in memory
    problem = "of no kind of image that is known" if unknown else " ".join(str(error).split())[:160]
    if not reference.path:
        return Unusable(reason, problem)
    return Faulty(reason, problem if reference.path in problem else f"{reference.path}: {problem}", reference.path)
