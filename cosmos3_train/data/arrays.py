"""Files of named arrays (HDF5, Zarr): what is asked of them, and pictures that lie in them row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.image_bytes import decode_images


class ArrayInfo(NamedTuple):
    """Of an array: its shape, rows first, and the kind of its dtype as numpy has it ("f", "u", "S", "O", ...)."""

    shape: tuple[int, ...]
    kind: str


class Arrays(Protocol):
    """A file of named arrays. Names are paths without a leading '/'; "" is the root group."""

    @property
    def path(self) -> Path: ...

    def groups(self, group: str) -> list[str]:
        """Names of the groups directly inside a group."""
        ...

    def names(self, group: str) -> list[str]:
        """Names of the arrays anywhere inside a group, relative to it."""
        ...

    def info(self, name: str) -> ArrayInfo | None:
        """Of an array; None where there is none."""
        ...

    def read(self, name: str, rows: np.ndarray | slice | None = None) -> np.ndarray:
        """Rows of an array, by rising distinct numbers or a slice; None reads all of it.

        Raises:
            UserError: no such array, or one that is damaged.
        """
        ...

    def attribute(self, group: str, name: str) -> Any:
        """An attribute of a group or array; None where there is none."""
        ...

    def attributes(self, group: str) -> list[str]:
        """Names of a group's attributes."""
        ...


@dataclass(frozen=True)
class View:
    """How stored pictures become upright RGB.

    rotate_180, flip_vertical: turned, mirrored top to bottom
    colour: order of the stored channels
    white:  what floats call white, 255 or 1
    empty_chunks: of Zarr: chunks that are not there hold the fill value
    """

    rotate_180: bool = False
    flip_vertical: bool = False
    colour: Literal["rgb", "bgr"] = "rgb"
    white: float = 255.0
    empty_chunks: bool = False

    def text(self) -> str:
        """What differs from the default, as a row names it: "rotate_180=True&colour=bgr"."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(View) if getattr(self, f.name) != f.default]
        return "&".join(f"{name}={value}" for name, value in changed)

    @staticmethod
    def parse(text: str) -> View:
        """The inverse of `text`."""
        given = dict(part.split("=") for part in text.split("&") if part)
        kinds: dict[str, Callable[[str], Any]] = {"colour": str, "white": float}
        return View(**{name: kinds.get(name, lambda word: word == "True")(value) for name, value in given.items()})


def even_slice(rows: np.ndarray) -> slice | None:
    """The slice that rising distinct numbers are, None where they are not evenly spaced."""
    if len(rows) == 0:
        return slice(0, 0)
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    return slice(int(rows[0]), int(rows[-1]) + 1, step) if (np.diff(rows) == step).all() else None


def missing(file: Arrays, name: str, group: str = "") -> UserError:
    """The error that a file has no such array."""
    relative = name.removeprefix(f"{group}/") if group else name
    inside = f"{file.path}, {group}" if group else str(file.path)
    return UserError(f"{inside}: no array {relative!r}.{nearest(relative, file.names(group))}")


def check_pictures(info: ArrayInfo, where: str) -> None:
    """Raise `UserError` unless an array can hold pictures: [T, H, W, 3] uint8 or floats, or T encoded pictures."""
    if len(info.shape) == 4 and info.shape[3] == 3 and info.kind in "uf":
        return
    if (len(info.shape) == 2 and info.kind == "u") or (len(info.shape) == 1 and info.kind in "SO"):
        return
    raise UserError(
        f"{where}: has shape {list(info.shape)} and dtype kind {info.kind!r}; pictures are [T, H, W, 3] of uint8 or "
        "floats, or T rows of JPEG or PNG bytes"
    )


def picture_array(name: str, view: View) -> str:
    """The place inside a file of a camera's pictures: what `read_array_pictures` takes apart again."""
    return f"{name}?{view.text()}"


def read_array_pictures(open_file: Callable[[Path], Arrays], path: Path, inside: str, numbers: Sequence[int]) -> Tensor:
    """Pictures uint8 [T, 3, H, W], RGB and upright, of rows of an array, in one read where they are evenly spaced.

    Args:
        inside: as `picture_array`.
        numbers: rising row numbers.

    Raises:
        UserError: the file, the array or a picture is missing or damaged.
    """
    name, _, view = inside.rpartition("?")
    file = open_file(path)
    info = file.info(name)
    if info is None:
        raise missing(file, name)
    where = f"{path}: {name}"
    check_pictures(info, where)
    rows, place = np.unique(np.asarray(numbers, dtype=np.int64), return_inverse=True)
    if rows[0] < 0 or rows[-1] >= info.shape[0]:
        raise UserError(f"{where}: has {info.shape[0]} pictures, row {rows[-1]} is asked for; prepare the log again")
    pictures = _upright(file.read(name, rows), View.parse(view), f"{where}, from row {rows[0]}")
    # In numpy: torch's own copy runs on OpenMP threads, which a forked reader of a process that used them never gets.
    return torch.from_numpy(np.ascontiguousarray(pictures[place].transpose(0, 3, 1, 2)))


def _upright(stored: np.ndarray, view: View, where: str) -> np.ndarray:
    """uint8 [T, H, W, 3], RGB, of an array's rows."""
    if stored.ndim < 4:
        # Padding behind an encoded picture need not be cut off: JPEG and PNG say themselves where they end.
        pictures = decode_images([bytes(row) for row in stored], where).numpy().transpose(0, 2, 3, 1)
    elif stored.dtype == np.uint8:
        pictures = stored
    elif stored.dtype.kind == "f":
        pictures = _from_floats(stored, view.white, where)
    else:
        raise UserError(f"{where}: pictures are {stored.dtype}; uint8 or floats are read")
    if view.colour == "bgr":
        pictures = pictures[..., ::-1]
    if view.rotate_180:
        pictures = pictures[:, ::-1, ::-1]
    return pictures[:, ::-1] if view.flip_vertical else pictures


def _from_floats(stored: np.ndarray, white: float, where: str) -> np.ndarray:
    low, high = float(stored.min()), float(stored.max())
    if not (low >= 0 and high <= white * 1.001):
        raise UserError(f"{where}: pictures hold values from {low:g} to {high:g}; the mapping's white is {white:g}")
    if white > 1 and 0 < high <= 1:
        raise UserError(f"{where}: pictures hold values from 0 to {high:g}; give the camera of the mapping white: 1")
    return np.clip(np.rint(stored * (255.0 / white)), 0, 255).astype(np.uint8)
