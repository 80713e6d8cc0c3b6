"""Frames that a log stores picture by picture, in a file that is no video: by the kind of file, by time.

`READERS` names what reads a kind of file. A picture's time is its number over the log's rate, which stands in the place
itself, "INSIDE@RATE", so that reading a window needs nothing but its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosmos3_train.config import UserError
from cosmos3_train.data.bags import read_bag_pictures
from cosmos3_train.data.hdf5 import read_hdf5_pictures
from cosmos3_train.data.parquet import read_parquet_pictures
from cosmos3_train.data.tfrecord import SHARD, read_tfrecord_pictures
from cosmos3_train.data.zarr_v2 import read_zarr_pictures

READERS: dict[str, Callable[[Path, str, Sequence[int]], Tensor]] = {
    ".h5": read_hdf5_pictures,
    ".hdf5": read_hdf5_pictures,
    ".mcap": read_bag_pictures,
    ".parquet": read_parquet_pictures,
    ".tfrecord": read_tfrecord_pictures,
    ".zarr": read_zarr_pictures,
    ".zip": read_zarr_pictures,
}
"""Ending of a file -> reader of pictures uint8 [T, 3, H, W], RGB, by (file, place inside, their rising numbers)."""


def place_inside(file: str, inside: str, fps: float) -> str:
    """How a row names pictures inside a file: what `read_pictures` takes apart again."""
    return f"{file}#{inside}@{fps!r}"


def read_pictures(path: Path, inside: str, timestamps: Sequence[float] | np.ndarray) -> Tensor:
    """Pictures uint8 [T, 3, H, W], RGB, at rising times in seconds from the first.

    Raises:
        UserError: no reader for such a file, or whatever the reader finds missing or damaged.
    """
    where, _, rate = inside.rpartition("@")
    ending = ".tfrecord" if SHARD.fullmatch(path.name) else path.suffix
    reader = READERS.get(ending)
    if reader is None:
        raise UserError(f"{path}: pictures in such a file are not read; those in {', '.join(READERS)} are")
    if not path.exists():
        raise UserError(f"{path}: the file is missing; copy the log again")
    numbers = [round(float(time) * float(rate)) for time in timestamps]
    pictures = reader(path, where, numbers)
    assert pictures.dtype == torch.uint8 and pictures.shape[:2] == (len(numbers), 3)
    return pictures
