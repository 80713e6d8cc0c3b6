"""Files written whole or not at all, and a full disk said in one line."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from cosmos3_train.config import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
def disk_full_is_the_users(output: Path) -> Iterator[None]:
    """Turn "no space left" (or over quota, or beyond the largest file allowed) into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"{output}: the disk is full ({error.strerror}); free some space and run the same command again, "
            "finished blocks are kept"
        ) from None
