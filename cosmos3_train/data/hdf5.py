"""HDF5 files as `Arrays`. Every error of the library becomes one line that names the file.

Open files are kept, a few a process. None is open while this process forks: the HDF5 library knows an open file by its
inode, so a child that opened it again would be given its parent's descriptor and cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from cosmos3_train.config import UserError
from cosmos3_train.data.arrays import ArrayInfo, even_slice, missing, read_array_pictures
from cosmos3_train.data.kept import KeptFiles

_BROKEN = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
"""What h5py raises for damaged files."""

_files = KeptFiles[h5py.File](lambda path, _: h5py.File(path, "r"), lambda file: file.close())
_lock = threading.RLock()


@dataclass(frozen=True)
class Hdf5File:
    """An HDF5 file; see `Arrays`. Holds nothing open itself."""

    path: Path

    def groups(self, group: str) -> list[str]:
        """See `Arrays.groups`."""
        with _opened(self.path) as file:
            inside = _item(file, group)
            if not isinstance(inside, h5py.Group):
                return []
            return [str(name) for name in inside if isinstance(_item(inside, str(name)), h5py.Group)]

    def names(self, group: str) -> list[str]:
        """See `Arrays.names`."""
        found: list[str] = []
        with _opened(self.path) as file:
            inside = _item(file, group)
            if isinstance(inside, h5py.Group):
                inside.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        return found

    def info(self, name: str) -> ArrayInfo | None:
        """See `Arrays.info`."""
        with _opened(self.path) as file:
            item = _item(file, name)
            return ArrayInfo(item.shape or (), item.dtype.kind) if isinstance(item, h5py.Dataset) else None

    def read(self, name: str, rows: np.ndarray | slice | None = None) -> np.ndarray:
        """See `Arrays.read`."""
        with _opened(self.path) as file:
            item = _item(file, name)
            if not isinstance(item, h5py.Dataset):
                raise missing(self, name)
            if item.external:
                raise UserError(f"{self.path}: {name!r} keeps its values in another file, which is not followed")
            if isinstance(rows, np.ndarray):
                rows = even_slice(rows) or rows
            return np.asarray(item[()] if rows is None else item[rows])

    def attribute(self, group: str, name: str) -> Any:
        """See `Arrays.attribute`."""
        with _opened(self.path) as file:
            item = _item(file, group)
            return None if item is None else item.attrs.get(name)

    def attributes(self, group: str) -> list[str]:
        """See `Arrays.attributes`."""
        with _opened(self.path) as file:
            item = _item(file, group)
            return [] if item is None else list(item.attrs)


def read_hdf5_pictures(path: Path, inside: str, numbers: Sequence[int]) -> Tensor:
    """See `arrays.read_array_pictures`."""
    return read_array_pictures(Hdf5File, path, inside, numbers)


def close_all() -> None:
    """Close the kept files."""
    with _lock:
        _files.close()


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """A kept file, held by this thread alone."""
    with _lock:
        try:
            yield _files.get(path)
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{path}: the file is missing; copy the log again") from None
        except _BROKEN as error:
            _files.close(path)
            problem = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{path}: not a readable HDF5 file ({problem}); copy the log again") from None


def _item(group: h5py.Group, name: str) -> Any:
    """A group or an array by its path, None where there is none."""
    return group.get(name or "/")


def _before_fork() -> None:
    _lock.acquire()
    close_all()


os.register_at_fork(before=_before_fork, after_in_parent=_lock.release, after_in_child=_lock.release)
