"""Frames by torchcodec, where it is installed and finds an FFmpeg: PyAV's own pixels, a tenth to a third sooner.

It is asked by frame number, as a constant rate has them, which needs no scan of the file; what it gives is held against
the times that were wanted. Whatever it cannot do is left to PyAV, and so is every error's message.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cosmos3_train.config import first_line
from cosmos3_train.data.kept import KeptFiles

logger = logging.getLogger(__name__)

FAILURES = (ImportError, OSError, RuntimeError, ValueError, IndexError)
"""What torchcodec raises without FFmpeg's libraries, and for files and times that are not as they should be."""

LIBRARY = "libtorchcodec"
"""What it says that it could not load, where it finds no FFmpeg."""


def frames(path: Path, times: Sequence[float]) -> Tensor | None:
    """The frames nearest to the given times, None where PyAV is to look.

    Args:
        path: of a file of its own.
        times: rising, in seconds from the file's start.

    Returns:
        uint8 [T, 3, H, W], RGB, the colours of a pixel side by side in memory.
    """
    if _decoders() is None:
        return None
    try:
        decoder = _files.get(path)
        if decoder.metadata.rotation:
            return None
        rate, count = decoder.metadata.average_fps, decoder.metadata.num_frames
        begin = decoder.metadata.begin_stream_seconds or 0.0
        numbers = [round((time - begin) * rate) for time in times]
        if not all(0 <= number < count for number in numbers):
            return None
        found = decoder.get_frames_at(numbers)
    except FAILURES:
        _files.close(path)
        return None
    off = np.abs(found.pts_seconds.numpy() - np.asarray(times))
    # As PyAV's reader has it: times are float32 in logs, and 1 % keeps a rounding from being an error.
    return found.data if off.max() <= 0.5 / rate * 1.01 else None


@functools.cache
def _decoders() -> Any:
    """torchcodec's module of decoders, None where there is none that works."""
    try:
        module = importlib.import_module("torchcodec.decoders")
    except ModuleNotFoundError:
        return None
    except FAILURES as error:
        return _says_why(error)
    try:
        module.VideoDecoder(b"")  # it looks for FFmpeg when it is first used, and again at every use until it finds one
    except FAILURES as error:
        if LIBRARY in str(error):
            return _says_why(error)
    return module


def _says_why(error: Exception) -> None:
    logger.info("torchcodec is installed and does not work (%s): PyAV reads the videos", first_line(error))


def _open(path: Path, inside: str) -> Any:
    return _decoders().VideoDecoder(str(path), dimension_order="NCHW", num_ffmpeg_threads=1, seek_mode="approximate")


_files = KeptFiles(_open)
