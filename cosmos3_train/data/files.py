"""Files written whole or not at all, by one process at a time, and what the disk refuses said in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from cosmos3_train.config import UserError

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip
"""What is wrong with a place, or with the right to it."""

LEASE_SECONDS = 120.0
"""For so long a network disk may hold the locks of a machine that is gone: NFS 90 s."""


def is_there(path: Path) -> bool:
    """Whether a file is, of any name: `Path.is_file` raises where it is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_disk_full(error: Exception) -> bool:
    """Whether there is no space left, a quota is spent, or a file has grown too large: by an `OSError`, or safetensors'
    own error, which has the number in its words."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return any(f"os error {code})" in str(error) for code in DISK_FULL)


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the file under this process's own name, bring it to disk, rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One process of this machine prepares a folder at a time; the others wait, and find it done.

    Raises:
        UserError: it has no name of its own, as "." has none, or the lock beside it cannot be made or taken.
    """
    if folder.name in ("", ".."):
        raise UserError(f"{folder}: no name for a prepared folder; give one of its own, such as prepared/NAME")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        opened = _lock_beside(folder).open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another prepared folder") from None
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a network's, such as Lustre unless it is mounted with -o flock
            raise UserError(
                f"{folder}: cannot be locked ({error.strerror}); have its file system mounted with locks (flock), or "
                "choose a prepared folder on another one"
            ) from None
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process writes a folder at a time; another one's is refused, on other machines too where the disk has locks.

    The lock is of the process, and not of those that it forks, which may outlive it for a while.

    Raises:
        UserError: another process is at work there; says which.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(_lock_beside(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # what is wrong with the place, whoever writes there says
        yield
        return
    try:
        _lock(lock, folder)
        with contextlib.suppress(OSError):  # a full disk is told by whoever has more to write
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(lock)


def _lock_beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def _lock(lock: int, folder: Path) -> None:
    """Take the lock, at once or never; that of a dead machine when its disk's server has found out."""
    ends, told = time.monotonic() + LEASE_SECONDS, False
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            who = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
        except OSError as error:
            logger.info("%s: nothing keeps a second run out (%s)", folder, error.strerror)
            return
        if who.endswith(f" on {socket.gethostname()}") or time.monotonic() > ends:
            raise UserError(
                f"{folder}: {who} is at work there; wait for its end, or name another folder (if that machine is gone, "
                f"delete {_lock_beside(folder)})"
            )
        if not told:
            logger.info("%s: %s has locked it; waiting %g s for its end", folder, who, LEASE_SECONDS)
        told = True
        time.sleep(1)


@contextlib.contextmanager
def disk_is_the_users(output: Path) -> Iterator[None]:
    """Turn "no space left" (or over quota, or beyond the largest file allowed) into a `UserError`, and what is refused
    of a place, be it read or written."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSED:
            place = "" if error.filename is None else f" ({error.filename})"
            raise UserError(
                f"{output}: {error.strerror}{place}; mend that, or choose another output, and run the command again"
            ) from None
        if not is_disk_full(error):
            raise
        raise UserError(
            f"{output}: the disk is full ({error.strerror}); free some space and run the same command again, "
            "finished blocks are kept"
        ) from None
