"""Members of uncompressed tar archives, read in place by byte range.

Nothing is ever unpacked, so no name in an archive can become a path on this disk.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from cosmos3_train.config import UserError
from cosmos3_train.data.files import is_there

SUFFIX = ".tar"
BLOCK = 512


class Member(NamedTuple):
    """A regular file of an archive: its name there, and the bytes [offset, offset + size) of the archive."""

    name: str
    offset: int
    size: int


def list_members(path: Path) -> list[Member]:
    """The regular files of an archive, in its order. Reads headers alone.

    Raises:
        UserError: not an uncompressed tar archive, or one that is truncated or damaged.
    """
    found = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"] = []  # it would keep every header that it has passed
                if member.isreg() and not member.issparse():
                    found.append(Member(member.name, member.offset_data, member.size))
            file.seek(archive.offset)
            # `tarfile` takes a damaged header in the middle for the end, and would lose the rest without a word.
            if any(file.read(BLOCK)):
                raise tarfile.ReadError(f"the header at byte {archive.offset:,} is damaged")
    except FileNotFoundError:
        raise UserError(f"{path}: the archive is missing; fetch it again") from None
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable uncompressed tar archive ({reason}); fetch it again") from None
    return found


def place_of(file: str, member: Member) -> str:
    """How a row names a member: "shard.tar#member@offset+size", from which it is read without the archive's headers."""
    return f"{file}#{member.name}@{member.offset}+{member.size}"


def range_of(inside: str) -> tuple[int, int]:
    """(offset, size) of what stands behind '#' in such a place."""
    offset, _, size = inside.rpartition("@")[2].partition("+")
    return int(offset), int(size)


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Those bytes of a file.

    Raises:
        UserError: it is missing, or shorter.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fetch it again") from None
    if len(content) != size:
        raise UserError(f"{path}: ends before byte {offset + size:,}; fetch it again")
    return content


def split_place(root: Path, place: str) -> tuple[Path, str]:
    """The file of a place of a log, and what inside of it the place is: "" for the whole file, also for one whose own
    name holds '#'."""
    file, _, inside = place.partition("#")
    # The archive first: a set has few, and what a network's disk does not have it is asked for every time.
    if "#" in place and not is_there(root / file) and is_there(root / place):
        return root / place, ""
    return root / file, inside


def read_place(root: Path, place: str) -> bytes:
    """What stands at a place: a file, or a part of one.

    Raises:
        UserError: as `read_part`.
    """
    path, inside = split_place(root, place)
    if inside:
        return read_part(path, *range_of(inside))
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fetch it again") from None


class Part(io.RawIOBase):
    """Bytes [offset, offset + size) of a file as a file of its own, for reading."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        super().__init__()
        self._file = os.open(path, os.O_RDONLY)
        self._offset, self._size, self._place = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        wanted = max(0, min(len(buffer), self._size - self._place))
        content = os.pread(self._file, wanted, self._offset + self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()
