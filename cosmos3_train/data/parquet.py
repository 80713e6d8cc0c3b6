"""Parquet files of logs: tables, columns as arrays, and pictures that lie in a column. Every error names the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.image_bytes import decode_images
from cosmos3_train.data.kept import KeptFiles

CLOCK_HZ = 1e6
"""Pictures in Parquet are numbered by microseconds since their episode began, so that a log whose times jump is read
by its times and not by counting rows."""


_BROKEN = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises for damaged files: a name that is not UTF-8 is one too."""


def read_parquet(path: Path, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
    """A Parquet file, or a `UserError` that names it."""
    try:
        return (
            pq.ParquetFile(path).read(columns)
            if filters is None
            else pq.read_table(path, columns=columns, filters=filters)
        )
    except FileNotFoundError:
        raise UserError(f"{path}: the Parquet file is missing; copy the log again") from None
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def parquet_columns(path: Path) -> list[str]:
    """Names of a Parquet file's columns, or a `UserError` that names the file."""
    return _schema(path).names


def parquet_texts(path: Path) -> list[str]:
    """Names of those that hold words."""
    return [field.name for field in _schema(path) if is_text(field.type)]


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the Parquet file is missing; copy the log again") from None
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds words."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def matrix(column: pa.ChunkedArray, where: str, dtype: type) -> np.ndarray:
    """[T, W] of a column of lists (fixed or not) or numbers. Missing values become NaN, which the checks then name.

    Raises:
        UserError: it holds no numbers, or rows that are empty or of different widths.
    """
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    rows = len(array)
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if array.null_count:
            raise UserError(f"{where}: row {array.is_null().to_pylist().index(True)} is empty")
        array = array.flatten()
        if rows and len(array) % rows:
            raise UserError(f"{where}: rows have different widths")
    if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
        raise UserError(f"{where}: holds {kind}; numbers are expected")
    return array.cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(rows, -1).astype(dtype)


def picture_column(episode: int, fps: float, column: str) -> str:
    """The place inside a Parquet file of an episode's pictures: what `read_parquet_pictures` takes apart again.

    Args:
        fps: the log's rate, which gives the times of a file that has no `timestamp` column.
    """
    return f"{episode}/{fps!r}/{column}"


def read_parquet_pictures(path: Path, inside: str, numbers: Sequence[int]) -> Tensor:
    """Pictures uint8 [T, 3, H, W], RGB, of one episode and column of a file with columns `episode_index` and, mostly,
    `timestamp`; of them, the row groups alone that hold the pictures asked for.

    Args:
        inside: as `picture_column`.
        numbers: microseconds since the episode began.

    Raises:
        UserError: the file or a picture is damaged, or there is none at one of the times.
    """
    episode, fps, column = inside.split("/", 2)
    where = f"{path}: episode {episode}, column {column!r}"
    table = _files.get(path)
    rows = np.flatnonzero(table.owner == int(episode))
    if not len(rows):
        raise UserError(f"{path}: holds no row of episode {episode}; the log is damaged")
    times = np.arange(len(rows)) / float(fps) if table.times is None else table.times[rows]
    wanted = np.asarray(numbers) / CLOCK_HZ
    nearest_row = np.abs(times[None] - wanted[:, None]).argmin(axis=1)
    missed = np.abs(times[nearest_row] - wanted) > 1e-3  # the times come from this very column
    if missed.any():
        raise UserError(f"{where}: no picture at {wanted[missed][0]:.4f} s; the log has changed, prepare it again")
    cells = table.cells(path, column, rows[nearest_row])
    return decode_images([_picture_bytes(path, cell, where) for cell in cells], where, nearest_row.tolist())


@dataclass(frozen=True)
class _Opened:
    """An open file. owner: int64 [rows], the episode of each; times: float64 [rows] in seconds; starts: the first row
    of each row group, and the number of rows."""

    file: pq.ParquetFile
    owner: np.ndarray
    times: np.ndarray | None
    starts: np.ndarray

    def cells(self, path: Path, column: str, rows: np.ndarray) -> list[Any]:
        """Values of a column at rising rows, as plain Python."""
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        found: list[Any] = []
        for group in dict.fromkeys(groups.tolist()):
            try:
                part = self.file.read_row_group(group, columns=[column], use_threads=False)
            except _BROKEN as error:
                raise _unreadable(path, error) from None
            if column not in part.column_names:
                raise UserError(f"{path}: no column {column!r}.{nearest(column, self.file.schema_arrow.names)}")
            here = rows[groups == group] - self.starts[group]
            found += part.column(column).take(pa.array(here)).to_pylist()
        return found


def _open(path: Path, inside: str) -> _Opened:
    try:
        file = pq.ParquetFile(path)
        wanted = [name for name in ("episode_index", "timestamp") if name in file.schema_arrow.names]
        table = file.read(wanted, use_threads=False)
        if "episode_index" not in wanted:
            raise UserError(f"{path}: no column 'episode_index'; pictures are found by it")
    except _BROKEN as error:
        raise _unreadable(path, error) from None
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    times = matrix(table.column("timestamp"), str(path), np.float64)[:, 0] if "timestamp" in wanted else None
    owner = table.column("episode_index").to_numpy()
    return _Opened(file, owner, times, np.concatenate([[0], np.cumsum(sizes)]))


_files = KeptFiles(_open, lambda opened: opened.file.close())


def _picture_bytes(path: Path, cell: Any, where: str) -> bytes:
    """Of a picture's cell: bytes, or a struct of bytes and, where those are missing, a path inside the log."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return content
    name = cell.get("path") if isinstance(cell, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{where}: a row holds no picture; the log is damaged")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{where}: a picture's path {name!r} leads out of the log; it is not followed")
    for folder in path.parents:
        if (folder / "meta" / "info.json").is_file():
            try:
                return (folder / name).read_bytes()
            except OSError:
                break
    raise UserError(f"{where}: the picture {name!r} is missing; copy the log again")


def _unreadable(path: Path, error: Exception) -> UserError:
    problem = " ".join(str(error).split())[:160]
    return UserError(f"{path}: not a readable Parquet file ({problem}); copy the log again")
