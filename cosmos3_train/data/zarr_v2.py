"""Zarr v2 stores, folders and zips, as `Arrays`. Every error becomes one line that names the store.

The `zarr` package is not used: it reads through an event loop on a thread of its own, which a forked reader has not,
and takes three times as long for a window of pictures. A v2 store is JSON beside compressed chunks; `numcodecs`
decompresses them. Codecs are a closed list, for a store may name one that unpickles.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numcodecs.blosc
import numpy as np
from numcodecs.compat import ensure_ndarray
from numcodecs.registry import get_codec
from torch import Tensor

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.arrays import ArrayInfo, View, missing, read_array_pictures
from cosmos3_train.data.kept import KeptFiles

CODECS = (
    "adler32", "astype", "bitround", "blosc", "bz2", "crc32", "delta", "fixedscaleoffset", "gzip", "lz4", "lzma",
    "packbits", "quantize", "shuffle", "vlen-array", "vlen-bytes", "vlen-utf8", "zlib", "zstd",
)  # fmt: skip
PICTURE_CODECS = {f"imagecodecs_{kind}": kind for kind in ("jpeg", "jpeg2k", "jpegxl", "png", "webp")}
"""Codec of a picture a chunk -> what the package `imagecodecs` calls it."""

numcodecs.blosc.use_threads = False  # readers run in several processes, and its threads do not survive a fork


@dataclass(frozen=True)
class ZarrStore:
    """A Zarr v2 store; see `Arrays`. Holds nothing open itself.

    empty_chunks: a chunk that is not there holds the fill value, as Zarr has it. In a log it rather is one that was not
                  copied, and would be silent zeros: so it is an error unless this is set
    """

    path: Path
    empty_chunks: bool = False

    def check(self) -> None:
        """Raise `UserError` unless it is a store of version 2."""
        files = _kept(self.path).files
        if files.read(".zgroup") is not None:
            return
        if files.read("zarr.json") is not None:
            raise UserError(f"{self.path}: is Zarr version 3; version 2 is read. Write it with zarr_format=2")
        raise UserError(f"{self.path}: not a Zarr store, for .zgroup is missing; copy the log again")

    def groups(self, group: str) -> list[str]:
        """See `Arrays.groups`."""
        return _kept(self.path).files.holders(group, ".zgroup", deep=False)

    def names(self, group: str) -> list[str]:
        """See `Arrays.names`."""
        return _kept(self.path).files.holders(group, ".zarray", deep=True)

    def info(self, name: str) -> ArrayInfo | None:
        """See `Arrays.info`."""
        array = self._array(name)
        return None if array is None else ArrayInfo(array.shape, array.dtype.kind)

    def read(self, name: str, rows: np.ndarray | slice | None = None) -> np.ndarray:
        """See `Arrays.read`."""
        array = self._array(name)
        if array is None:
            raise missing(self, name)
        if not array.shape:
            return self._chunk(name, array, ())
        if not isinstance(rows, np.ndarray):
            rows = np.arange(array.shape[0])[slice(None) if rows is None else rows]
        found = np.empty((len(rows), *array.shape[1:]), dtype=array.dtype)
        numbers, size = rows // array.chunks[0], array.chunks[0]
        for number in np.unique(numbers).tolist():
            first, stop = np.searchsorted(numbers, [number, number + 1])
            for others in product(*map(range, array.grid[1:])):
                spans = list(zip(others, array.chunks[1:], array.shape[1:], strict=True))
                place = [slice(o * chunk, min((o + 1) * chunk, shape)) for o, chunk, shape in spans]
                inside = [slice(0, span.stop - span.start) for span in place]
                chunk = self._chunk(name, array, (number, *others))
                found[(slice(first, stop), *place)] = chunk[(rows[first:stop] - number * size, *inside)]
        return found

    def attribute(self, group: str, name: str) -> Any:
        """See `Arrays.attribute`."""
        return self._json(f"{group}/.zattrs".lstrip("/")).get(name)

    def attributes(self, group: str) -> list[str]:
        """See `Arrays.attributes`."""
        return list(self._json(f"{group}/.zattrs".lstrip("/")))

    def missing_chunk(self, name: str) -> str | None:
        """A chunk of an array that is not there, None where all are."""
        array = self._array(name)
        if array is None:
            raise missing(self, name)
        present = _kept(self.path).files.below(name)
        keys = (array.key(place) for place in product(*map(range, array.grid)))
        return next((key for key in keys if key not in present), None)

    def described_by(self, names: Sequence[str]) -> list[Path]:
        """Files of a folder that say what it holds, and those of the named arrays; none of a zip, which ends in a list
        of what it holds, with checksums."""
        if not self.path.is_dir():
            return []
        arrays = [self.path / name for name in self.names("")]
        folders = {folder for array in arrays for folder in (array, *array.parents) if folder.is_relative_to(self.path)}
        found = [path for folder in folders for path in folder.glob(".z*")]
        found += [path for name in names for path in (self.path / name).rglob("*") if path.is_file()]
        return sorted(set(found))

    def _array(self, name: str) -> _Array | None:
        kept = _kept(self.path)
        if name not in kept.arrays:
            if kept.files.read(f"{name}/.zarray") is None:
                return None
            kept.arrays[name] = _parsed(self._json(f"{name}/.zarray"), f"{self.path}: {name}")
        return kept.arrays[name]

    def _json(self, key: str) -> dict[str, Any]:
        """A file of the store as JSON, empty where there is none."""
        content = _kept(self.path).files.read(key)
        try:
            parsed = {} if content is None else json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: {key} is not valid JSON ({error}); copy the log again") from None
        if not isinstance(parsed, dict):
            raise UserError(f"{self.path}: {key} holds a {type(parsed).__name__}; a mapping is expected")
        return parsed

    def _chunk(self, name: str, array: _Array, place: tuple[int, ...]) -> np.ndarray:
        """A chunk, whole, also at the edge of the array."""
        key = f"{name}/{array.key(place)}"
        content: Any = _kept(self.path).files.read(key)
        if content is None and self.empty_chunks:
            return np.full(array.chunks, array.fill, dtype=array.dtype)
        if content is None:
            raise UserError(f"{self.path}: chunk {key} is missing; copy the log again")
        try:
            for decode in array.decoders:
                content = decode(content)
            values = ensure_ndarray(content)
            if array.dtype.kind != "O":
                values = values.reshape(-1, order="A").view(array.dtype)
            return values.reshape(array.chunks, order=array.order)
        except ImportError:
            raise UserError(
                f"{self.path}: {name!r} is compressed as pictures ({', '.join(array.codecs)}); install the package "
                "imagecodecs to read it"
            ) from None
        except Exception as error:  # noqa: BLE001 - codecs raise whatever they like for damaged bytes
            problem = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{self.path}: chunk {key} is damaged ({problem}); copy the log again") from None


def read_zarr_pictures(path: Path, inside: str, numbers: Sequence[int]) -> Tensor:
    """See `arrays.read_array_pictures`."""
    view = View.parse(inside.rpartition("?")[2])
    return read_array_pictures(partial(ZarrStore, empty_chunks=view.empty_chunks), path, inside, numbers)


# ------------------------------------------------------------------------------------------------ arrays


@dataclass(frozen=True)
class _Array:
    """What `.zarray` says. decoders: from a chunk's bytes to its values, in this order."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    fill: Any
    order: Any
    separator: str
    codecs: tuple[str, ...]
    decoders: tuple[Callable[[Any], Any], ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """How many chunks there are along each axis."""
        return tuple(math.ceil(size / chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))

    def key(self, place: Sequence[int]) -> str:
        """Name of a chunk's file in the array's folder."""
        return self.separator.join(map(str, place)) or "0"


def _parsed(content: dict[str, Any], where: str) -> _Array:
    try:
        shape, chunks = tuple(map(int, content["shape"])), tuple(map(int, content["chunks"]))
        dtype, order = np.dtype(content["dtype"]), content["order"]
        stages = [*([content["compressor"]] if content["compressor"] else []), *reversed(content["filters"] or [])]
        codecs = tuple(stage["id"] for stage in stages)
        if len(shape) != len(chunks) or min(chunks, default=1) < 1 or min(shape, default=0) < 0 or order not in "CF":
            raise ValueError(f"shape {shape}, chunks {chunks}, order {order!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its .zarray is damaged ({error!r}); copy the log again") from None
    unknown = [name for name in codecs if name not in CODECS and name not in PICTURE_CODECS]
    if unknown:
        raise UserError(f"{where}: is stored by codec {unknown[0]!r}, which is not read.{nearest(unknown[0], CODECS)}")
    if dtype.kind not in "biufSU" and not (dtype.kind == "O" and codecs and codecs[-1].startswith("vlen-")):
        raise UserError(f"{where}: holds {dtype}; numbers or words are read")
    decoders = tuple(_decoder(stage, where) for stage in stages)
    fill = content.get("fill_value") or 0
    return _Array(shape, chunks, dtype, fill, order, content.get("dimension_separator", "."), codecs, decoders)


def _decoder(stage: dict[str, Any], where: str) -> Callable[[Any], Any]:
    kind = PICTURE_CODECS.get(stage["id"])
    if kind is not None:
        return partial(_decode_picture, kind)
    try:
        return get_codec(dict(stage)).decode
    except Exception as error:  # noqa: BLE001 - the codec's constructor may raise anything for a value it does not take
        problem = " ".join(str(error).split())[:160]
        raise UserError(f"{where}: codec {stage} cannot be made ({problem}); copy the log again") from None


def _decode_picture(kind: str, content: bytes) -> np.ndarray:
    """Raises ImportError where `imagecodecs` is not installed: 80 MB, which few logs need."""
    import imagecodecs  # pyright: ignore[reportMissingImports]

    return np.ascontiguousarray(getattr(imagecodecs, f"{kind}_decode")(content))


# ------------------------------------------------------------------------------------------------ files


class _Files(Protocol):
    """The files of a store by their path in it."""

    def read(self, key: str) -> bytes | None: ...

    def below(self, folder: str) -> set[str]:
        """Paths of the files in a folder, relative to it."""
        ...

    def holders(self, folder: str, file: str, deep: bool) -> list[str]:
        """Folders that hold a file of such a name, directly inside a folder or anywhere, relative to it."""
        ...


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, key: str) -> bytes | None:
        try:
            return (self._path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self._path}: {key} cannot be read ({error.strerror})") from None

    def below(self, folder: str) -> set[str]:
        found, top = set(), str(self._path / folder)
        for inside, _, files in os.walk(top):
            prefix = "" if inside == top else os.path.relpath(inside, top) + "/"
            found |= {prefix + name for name in files}
        return found

    def holders(self, folder: str, file: str, deep: bool) -> list[str]:
        found, todo = [], [""]
        while todo:
            inside = todo.pop()
            for path in sorted(self._path.joinpath(folder, inside).glob("*/")):
                name = f"{inside}/{path.name}".lstrip("/")
                if (path / file).is_file():
                    found.append(name)
                if deep and not (path / ".zarray").is_file():  # an array's folder holds chunks, maybe a million
                    todo.append(name)
        return found

    def close(self) -> None:
        """Nothing is open."""


class _Zip:
    """Some zips hold the store, others the folder that it is in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise UserError(f"{path}: the store is missing; copy the log again") from None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: not a readable zip ({error}); copy the log again") from None
        names = self._zip.namelist()
        top = min((name for name in names if name.endswith((".zgroup", "zarr.json"))), key=len, default="")
        self._prefix = top.rpartition("/")[0] + "/" if "/" in top else ""
        self._names = {name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)}

    def read(self, key: str) -> bytes | None:
        if key not in self._names:
            return None
        try:
            return self._zip.read(self._prefix + key)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
            raise UserError(f"{self._path}: {key} is damaged ({error}); copy the log again") from None

    def below(self, folder: str) -> set[str]:
        return {name.removeprefix(f"{folder}/") for name in self._names if name.startswith(f"{folder}/")}

    def holders(self, folder: str, file: str, deep: bool) -> list[str]:
        start = f"{folder}/" if folder else ""
        found = [
            name.removeprefix(start) for name in self._names if name.startswith(start) and name.endswith(f"/{file}")
        ]
        holders = sorted(name.removesuffix(f"/{file}") for name in found)
        return [name for name in holders if deep or "/" not in name]

    def close(self) -> None:
        self._zip.close()


@dataclass(frozen=True)
class _Kept:
    files: _Folder | _Zip
    arrays: dict[str, _Array] = field(default_factory=dict)


def _kept(path: Path) -> _Kept:
    try:
        return _stores.get(path)
    except OSError:
        raise UserError(f"{path}: the store is missing; copy the log again") from None


def _open(path: Path, inside: str) -> _Kept:
    return _Kept(_Folder(path) if path.is_dir() else _Zip(path))


_stores = KeptFiles(_open, lambda kept: kept.files.close())
