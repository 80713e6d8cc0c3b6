"""TFRecord files of `tf.train.Example`, read without TensorFlow.

A record is: length (uint64), masked CRC-32C of the length (uint32), payload, masked CRC-32C of the payload (uint32),
all little-endian. An `Example` is a map from a key to a list of bytes, floats or integers, as a protocol buffer. It is
read in place: what is not asked for (most of a record is pictures) is stepped over by its length and never touched.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import google_crc32c
import numpy as np
from torch import Tensor

from cosmos3_train.config import UserError
from cosmos3_train.data.image_bytes import decode_images

SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<shard>\d+)-of-(?P<shards>\d+)")
"""Name of one of several files."""

HEADER = 12
FOOTER = 4
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_KINDS = {1: "bytes", 2: "float", 3: "int"}


@dataclass(frozen=True)
class Values:
    """Where the values of one key of an example lie: bytes [start, stop) of the file, and their kind."""

    kind: str  # "bytes", "float" or "int"
    start: int
    stop: int


Content = mmap.mmap | bytes
"""A file, mapped; an empty one cannot be."""


class NotAnExample(ValueError):
    """Bytes that are no `Example`, or a list that is not of the kind asked for."""


def record_places(path: Path) -> list[tuple[int, int]]:
    """(first byte, length) of the payload of every record of a file. Reads and checks the lengths alone.

    Raises:
        UserError: the file is missing, cut off or damaged.
    """
    content, places, at = _content(path), [], 0
    while at < len(content):
        start = at + HEADER
        if start > len(content):
            raise UserError(f"{path}: cut off in record {len(places)}; copy the file again")
        length, checksum = struct.unpack_from("<QI", content, at)
        if masked_crc32c(content[at : at + 8]) != checksum:
            packed = ", it is compressed: unpack it" if content[:2] in (b"\x1f\x8b", b"x\x9c") else ""
            raise UserError(
                f"{path}: record {len(places)} at byte {at}: its length has a wrong checksum"
                f"{packed or '; copy the file again'}"
            )
        at = start + length + FOOTER
        if at > len(content):
            raise UserError(f"{path}: cut off in record {len(places)}; copy the file again")
        places.append((start, length))
    return places


def check_payload(path: Path, start: int) -> None:
    """Raise `UserError` unless the payload that begins at a byte of the file has its checksum."""
    content = _content(path)
    stop = start + _length(content, start)
    (checksum,) = struct.unpack_from("<I", content, stop)
    if masked_crc32c(content[start:stop]) != checksum:
        raise UserError(f"{path}: the record at byte {start - HEADER} has a wrong checksum; copy the file again")


def masked_crc32c(content: bytes) -> int:
    """The checksum of TFRecord: CRC-32C, rotated and shifted so that data which holds checksums has another."""
    checksum = google_crc32c.value(content)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


class Example:
    """One record, its values read when asked for. Keys that it has not raise `KeyError`.

    Raises:
        NotAnExample: from every method, where the bytes are not what they should be.
    """

    def __init__(self, path: Path, start: int) -> None:
        """The record of a file whose payload begins at a byte, as `record_places` says."""
        self._content = _content(path)
        self.values: dict[str, Values] = {}
        for _, _, features in _fields(self._content, start, start + _length(self._content, start), 1):
            for _, _, entry in _fields(self._content, *features, 1):
                self._add(*entry)

    def _add(self, start: int, stop: int) -> None:
        key, values = "", None
        for number, _, span in _fields(self._content, start, stop):
            if number == 1:
                key = _text(self._content[span[0] : span[1]])
            elif number == 2:
                for kind, wire, where in _fields(self._content, *span):
                    if kind in _KINDS and wire == _LENGTH:
                        values = Values(_KINDS[kind], *where)
        if values is not None:  # else the list is empty, of no kind
            self.values[key] = values

    def count(self, key: str) -> int:
        """How many values a key has, without reading them."""
        kind, total = self.values[key].kind, 0
        for wire, (start, stop) in self._parts(key):
            if wire != _LENGTH or kind == "bytes":
                total += 1
            elif kind == "float":
                total += (stop - start) // 4
            else:
                total += int((np.frombuffer(self._content[start:stop], np.uint8) < 0x80).sum())
        return total

    def numbers(self, key: str) -> np.ndarray:
        """float32 or int64 [N]: the values of a key that holds floats or integers."""
        kind, found = self.values[key].kind, []
        if kind == "bytes":
            raise NotAnExample(f"{key!r} holds bytes; numbers are expected")
        for wire, (start, stop) in self._parts(key):
            content = self._content[start:stop]
            if kind == "float" and wire in (_LENGTH, _FIXED32) and (stop - start) % 4 == 0:
                found.append(np.frombuffer(content, "<f4"))
            elif kind == "int" and wire in (_LENGTH, _VARINT):
                found.append(_integers(content))
            else:
                raise NotAnExample(f"{key!r} holds something else than {kind}s")
        return np.concatenate(found) if found else np.zeros(0, np.float32 if kind == "float" else np.int64)

    def byte_places(self, key: str) -> np.ndarray:
        """int64 [N, 2]: bytes [start, stop) in the file of each value of a key that holds bytes."""
        if self.values[key].kind != "bytes":
            raise NotAnExample(f"{key!r} holds numbers; bytes are expected")
        places = [span for wire, span in self._parts(key) if wire == _LENGTH]
        return np.array(places, np.int64).reshape(-1, 2)

    def bytes(self, key: str) -> list[bytes]:
        """The values of a key that holds bytes."""
        return [self._content[start:stop] for start, stop in self.byte_places(key).tolist()]

    def texts(self, key: str) -> list[str]:
        """The same as words."""
        return [_text(content) for content in self.bytes(key)]

    def _parts(self, key: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """(wire type, bytes [start, stop)) of each entry of the list: a value, or many of them packed."""
        values = self.values[key]
        for _, wire, span in _fields(self._content, values.start, values.stop, 1):
            yield wire, span


def read_tfrecord_pictures(path: Path, inside: str, numbers: Sequence[int]) -> Tensor:
    """Pictures uint8 [T, 3, H, W], RGB, of one key of one record.

    Args:
        inside: "START/KEY", the payload's first byte and the key.
        numbers: of the pictures in their list.

    Raises:
        UserError: the record or a picture is damaged, or the list ends before a number.
    """
    start, _, key = inside.partition("/")
    where = f"{path}: record at byte {int(start) - HEADER}, {key!r}"
    status = path.stat()
    try:
        places = _picture_places(path, status.st_ino, status.st_size, int(start), key)
    except (NotAnExample, KeyError) as error:
        raise UserError(f"{where}: no such pictures ({error}); copy the file again") from None
    if numbers and max(numbers) >= len(places):
        raise UserError(f"{where}: has {len(places)} pictures, number {max(numbers)} is asked for; prepare it again")
    content = _content(path)
    return decode_images((content[first:stop] for first, stop in places[list(numbers)].tolist()), where)


@lru_cache(maxsize=1024)
def _picture_places(path: Path, inode: int, size: int, start: int, key: str) -> np.ndarray:
    """Kept, since the windows of an episode share it: `Example.byte_places`."""
    return Example(path, start).byte_places(key)


def _content(path: Path) -> Content:
    try:
        status = path.stat()
        return _mapped(path, status.st_ino, status.st_size)
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; copy the log again") from None


@lru_cache(maxsize=64)
def _mapped(path: Path, inode: int, size: int) -> Content:
    """Kept by inode and size, so that a file that was replaced is mapped anew."""
    if size == 0:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _length(content: Content, start: int) -> int:
    """Of the payload that begins at a byte."""
    if not HEADER <= start <= len(content):
        raise NotAnExample(f"no record at byte {start - HEADER}")
    (length,) = struct.unpack_from("<Q", content, start - HEADER)
    if start + length + FOOTER > len(content):
        raise NotAnExample(f"no whole record at byte {start - HEADER}")
    return length


# ------------------------------------------------------------------------------------------------ protocol buffers


def _fields(
    content: Content, start: int, stop: int, wanted: int | None = None
) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(field number, wire type, bytes [start, stop) of the value) of a message, of one field or of all."""
    while start < stop:
        tag, start = _varint(content, start, stop)
        number, wire = tag >> 3, tag & 7
        if wire == _LENGTH:
            length, start = _varint(content, start, stop)
            end = start + length
        elif wire == _VARINT:
            _, end = _varint(content, start, stop)
        elif wire == _FIXED32:
            end = start + 4
        elif wire == _FIXED64:
            end = start + 8
        else:
            raise NotAnExample(f"wire type {wire} at byte {start}")
        if end > stop:
            raise NotAnExample(f"a field runs over its message's end at byte {stop}")
        if wanted is None or number == wanted:
            yield number, wire, (start, end)
        start = end


def _varint(content: Content, at: int, stop: int) -> tuple[int, int]:
    """(value, first byte behind it)."""
    value = shift = 0
    while at < stop and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise NotAnExample(f"an integer without an end at byte {at}")


def _integers(content: bytes) -> np.ndarray:
    """int64 [N] of varints one behind the other; negative ones are ten bytes long, in two's complement."""
    raw = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if len(raw) and (not len(ends) or ends[-1] != len(raw) - 1):
        raise NotAnExample("a list of integers is cut off")
    if len(ends) == len(raw):
        return raw.astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 10:
        raise NotAnExample("an integer without an end")
    found = np.zeros(len(ends), np.uint64)
    for place in range(int(sizes.max())):
        has = sizes > place
        found[has] |= (raw[starts[has] + place].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * place)
    return found.view(np.int64)


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise NotAnExample("words that are not UTF-8") from None
