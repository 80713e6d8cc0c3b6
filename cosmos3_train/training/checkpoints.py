"""Checkpoints of a run: trainables, their average, the optimizer and the run's position, whole or not at all.

A checkpoint is a folder `step_000200/`, of one form for every strategy. In it `trainables/` (and `average/`,
`optimizer/`) is a torch distributed checkpoint in safetensors, which `torch.distributed.checkpoint` loads into any
sharding by its `HuggingFaceStorageReader`: `whole.safetensors` holds what every rank has whole, `shard_00003` the rows
that rank 3 has of what is sharded (under ZeRO elements, flat). `files_00003.json` has the hashes of what rank 3 wrote,
`state.json` the position. Rows are read as they are wanted, so a run goes on from it on any number of ranks and under
any strategy, and one process exports it.

Written and read by ourselves, for torch's own writer gathers a plan of all ranks at every save, hashes nothing, and has
no form for ZeRO's elements; its other format is a pickle.

It is written beside its name and renamed into place, so a kill at any moment leaves the last whole one. No random state
is kept: every draw of a run is a function of the seed and the place where it is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmos3_train.config import UserError, first_line, nearest
from cosmos3_train.data.files import write_whole
from cosmos3_train.runtime import is_first_rank, rank, world_size
from cosmos3_train.training.disk import told_in_one_line
from cosmos3_train.training.strategy import meet

STATE = "state.json"
PARTS = ("trainables", "average", "optimizer")
WHOLE = "whole.safetensors"
OURS, TORCHS = "rows", "DCP_SHARDING_INFO"
"""Keys of a shard's header: `Rows` by name, and where they begin as torch's reader looks it up."""
UNREADABLE = (OSError, SafetensorError, json.JSONDecodeError, TypeError, ValueError)
GLANCE_SECONDS = 0.02
"""Between two looks of the first rank's thread at what the others have written."""

LARGE_PAGE = 2 << 20
"""Bytes of a large page of the host's memory."""
COPIERS = 8
"""Threads that copy a checkpoint's tensors to the host: six times as fast as one, on 16 cores a process."""


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    step: optimizer steps made (skipped ones left out);  drawn: steps' worth of samples drawn, skipped ones included
    samples: samples drawn over all ranks;  skipped: steps left out for a gradient that was not finite, or a spike
    skipped_in_a_row: of those, the ones since the last step that was made, which patience counts
    usual_norm: of the gradient in the steps before, of which `norms` were looked at (`spikes`)
    """

    step: int = 0
    drawn: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    usual_norm: float = 0.0
    norms: int = 0


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor: `count` of `total`, from `first` on.

    shape: where they are not rows, but elements of the flattened tensor, its shape
    """

    first: int
    count: int
    total: int
    shape: list[int] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, tensors by parameter name; `average` is empty without an EMA.

    rows: of the parameters of which this rank holds some rows alone, here and in the optimizer
    writers: how many ranks have something to write
    """

    position: Position
    trainables: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rows: dict[str, Rows] = field(default_factory=dict)
    writers: int = 1


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, keep_every: int = 0) -> Path:
    """Write `folder/step_NNNNNN` atomically, then remove older ones. As `Saving`, waited for."""
    saving = Saving(folder, checkpoint, keep, keep_every)
    saving.finish()
    return saving.target


class Saving:
    """A checkpoint on its way to the disk, which a thread writes while the run goes on.

    With `rows` every rank makes one, with its own rows in it, else the first rank alone. The first rank's thread makes
    it whole as soon as it sees every rank's part; until then, and after an error, those before are untouched. Where
    `folder/step_NNNNNN` is there already, only steps were left out since, which change no tensor: its position alone is
    replaced.

    Args:
        folder: of the checkpoints.
        checkpoint: copied, so that the run may go on.
        keep: of the checkpoints that are whole, the newest so many stay;
        keep_every: and those whose step it divides (0: no others).

    Raises:
        UserError: the disk is full or read-only, or the run's folder is gone.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, keep: int, keep_every: int = 0) -> None:
        name = f"step_{checkpoint.position.step:06d}"
        self.folder, self.step = folder, checkpoint.position.step
        self.keep, self.keep_every = keep, keep_every
        self.target, self._partial = folder / name, folder / f".{name}.partial"
        self._state = (json.dumps(asdict(checkpoint.position), indent=2) + "\n").encode()
        self._shards, self._written = bool(checkpoint.rows), threading.Event()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        with self._told_in_one_line():
            if (self.target / STATE).is_file():
                if is_first_rank():
                    write_whole(self.target / STATE, self._state)
                return
            if is_first_rank():
                folder.mkdir(exist_ok=True)  # no parents: where a mount is gone, they would be made below it
                for left in folder.glob(".step_*.partial"):  # by a save that was killed, or by ranks of one that failed
                    shutil.rmtree(left, ignore_errors=True)
                self._partial.mkdir()
        if self._shards:
            meet(f"the checkpoint of step {self.step}")
        self._thread = threading.Thread(target=self._carry_out, args=(_copied(checkpoint),), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what this rank's thread has met, if anything: a full disk's `UserError`, or a mistake of ours."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until the checkpoint is whole; under sharding every rank does."""
        if self._thread is None:
            return
        self._written.wait()
        self.check()
        if self._shards:
            meet(f"all parts of the checkpoint of step {self.step}")
        self._thread.join()
        self.check()
        if self._shards:
            meet(f"the end of the checkpoint of step {self.step}")

    def wait_alone(self) -> None:
        """As far as this rank can, in a run that ends with an error."""
        if self._thread is not None and not self._shards:
            self._thread.join()

    def _carry_out(self, checkpoint: Checkpoint) -> None:
        try:
            with self._told_in_one_line():
                _write_parts(self._partial, checkpoint)
                self._written.set()
                if is_first_rank():
                    self._make_whole(checkpoint.writers)
        except Exception as error:  # noqa: BLE001  the run raises it; ended in silence, the other ranks would wait
            self._error = error
        finally:
            self._written.set()

    def _make_whole(self, writers: int) -> None:
        while sum(path.match("files_*.json") for path in self._partial.iterdir()) < writers:  # raises if it is gone
            time.sleep(GLANCE_SECONDS)
        (self._partial / STATE).write_bytes(self._state)
        for path in (*self._partial.iterdir(), self._partial):
            _flush(path)
        self._partial.replace(self.target)
        _flush(self.folder)
        for old in list_checkpoints(self.folder)[: -self.keep]:
            if not self.keep_every or int(old.name.removeprefix("step_")) % self.keep_every:
                shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _told_in_one_line(self) -> Iterator[None]:
        try:
            with told_in_one_line(f"{self.target}: the checkpoint"):
                yield
        except UserError:
            # Ranks that still write would find the folder gone, and tell that as the reason: the next save removes it.
            if not self._shards:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise


def _copied(checkpoint: Checkpoint) -> Checkpoint:
    """With its tensors in the host's memory, in copies of their own. The run waits for it."""
    parts: dict[str, Mapping[str, Tensor]] = {part: getattr(checkpoint, part) for part in PARTS}
    with ThreadPoolExecutor(COPIERS) as pool:
        copies = {
            part: dict(zip(tensors, pool.map(_copy, tensors.values()), strict=True)) for part, tensors in parts.items()
        }
    return replace(checkpoint, **copies)


def _copy(tensor: Tensor) -> Tensor:
    # Written to before: a copy from a GPU meets new pages one by one, several threads or not, at 1.4 GB/s.
    room = _room(tensor).zero_()
    with torch.cuda.device_of(tensor):  # a thread begins on the first GPU
        return room.copy_(tensor.detach())


def _room(tensor: Tensor) -> Tensor:
    """New memory of the host for a tensor's values, in large pages if it is large: to meet small ones takes longer."""
    size = tensor.numel() * tensor.element_size()
    if size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    pages = mmap.mmap(-1, size)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)


def _write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    """What this rank has to write, and last the hashes of it."""
    hashes = {}
    for part in PARTS:
        tensors: Mapping[str, Tensor] = getattr(checkpoint, part)
        rows = {name: checkpoint.rows.get(_parameter(name, part)) for name, value in tensors.items() if value.dim()}
        sharded = {name: own for name, own in rows.items() if own is not None}
        whole = {name: value for name, value in tensors.items() if name not in sharded}
        if whole and is_first_rank():
            hashes |= _write(folder, f"{part}/{WHOLE}", whole, {})
        if sharded:
            # Torch finds a piece by where it begins: one of no rows would hide the next one.
            own = {name: tensors[name] for name in sharded if tensors[name].numel()}
            begins = {name: {"saved_offsets": [sharded[name].first] + [0] * (own[name].dim() - 1)} for name in own}
            places = {OURS: {name: asdict(sharded[name]) for name in own}, TORCHS: begins}
            hashes |= _write(folder, f"{part}/shard_{rank():05d}.safetensors", own, places)
    if hashes:
        # Whole or not at all, for the first rank waits for it.
        write_whole(folder / f"files_{rank():05d}.json", (json.dumps(hashes, indent=2) + "\n").encode())


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, str]:
    (folder / name).parent.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / name, {key: json.dumps(value) for key, value in header.items()})
    _flush(folder / name)
    return {name: _hash(folder / name)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _parameter(name: str, part: str) -> str:
    """The parameter that a tensor belongs to."""
    return name.rpartition(".")[0] if part == "optimizer" else name


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = {path.name.removeprefix("step_"): path for path in folder.glob("step_*") if (path / STATE).is_file()}
    # By number: as text, step 1000000 would come before step 999999.
    return [found[step] for step in sorted((step for step in found if step.isdigit()), key=int)]


def load_checkpoint(path: Path, rows: Mapping[str, Rows] | None = None) -> Checkpoint:
    """Read a checkpoint folder.

    Args:
        rows: of the parameters of which only some rows are wanted; of all others everything is.

    Raises:
        UserError: a file is missing or damaged; names it and says what to do.
    """
    rows = dict(rows or {})
    try:
        position = Position(**json.loads((path / STATE).read_text()))
        _check_hashes(path, PARTS, rank(), world_size())
        trainables, average, optimizer = (dict(_read_part(path, part, rows)) for part in PARTS)
    except UNREADABLE as error:
        raise _damaged(path, error) from error
    return Checkpoint(position, trainables, average, optimizer, rows)


def load_result(path: Path, *, averaged: bool) -> tuple[Position, dict[str, Tensor]]:
    """Of a checkpoint folder what is evaluated and exported, read by this process alone: the average, or the trainables
    where the run keeps none. No other tensor is read.

    Raises:
        UserError: as `load_checkpoint`.
    """
    part = "average" if averaged else "trainables"
    try:
        position = Position(**json.loads((path / STATE).read_text()))
        _check_hashes(path, (part,))
        return position, dict(_read_part(path, part, {}))
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(f"{path}: damaged checkpoint ({reason}); remove the folder to go on from the one before")


def _check_hashes(path: Path, parts: Sequence[str], reader: int = 0, readers: int = 1) -> None:
    """Compare the files of these parts with their hashes: of several readers each its share."""
    files: dict[str, str] = {}
    for told in sorted(path.glob("files_*.json")):
        files |= json.loads(told.read_text(encoding="utf-8"))
    wanted = sorted(name for name in files if name.partition("/")[0] in parts)
    for name in wanted[reader::readers]:
        if _hash(path / name) != files[name]:
            raise ValueError(f"{name} has changed since it was written")


@dataclass(frozen=True)
class _Piece:
    """Elements of a tensor that is flattened, from `first` on, as a file holds them: flat, or as rows of `width`."""

    file: Path
    first: int
    count: int
    shape: tuple[int, ...]
    width: int

    def read(self, name: str, low: int, high: int) -> Tensor:
        """The elements [low, high) of the tensor, which the file has."""
        low, high = low - self.first, high - self.first
        begin, end = low // self.width, -(-high // self.width)
        with safe_open(self.file, framework="pt") as opened:
            found: Tensor = opened.get_slice(name)[begin:end]
        return found.flatten()[low - begin * self.width : high - begin * self.width]


def _read_part(path: Path, part: str, wanted: Mapping[str, Rows]) -> Iterator[tuple[str, Tensor]]:
    pieces: dict[str, list[_Piece]] = {}
    for file in sorted((path / part).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            places = json.loads((opened.metadata() or {}).get(OURS, "{}"))
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                shape = opened.get_slice(name).get_shape()
                if not shape:
                    yield name, opened.get_tensor(name)
                    continue
                held = Rows(**places[name]) if name in places else Rows(0, shape[0], shape[0])
                pieces.setdefault(name, []).append(_piece(file, held, shape[1:]))
    for name, found in pieces.items():
        total = math.prod(found[0].shape)
        own = wanted.get(_parameter(name, part))
        low, high, shape = (0, total, found[0].shape) if own is None else _elements(own, found[0].shape)
        if sum(piece.count for piece in found) != total or high > total:
            raise ValueError(f"rows of {part} {name!r} are missing")
        yield name, _joined(name, sorted(found, key=lambda piece: piece.first), low, high).view(shape)


def _piece(file: Path, held: Rows, rest: Sequence[int]) -> _Piece:
    if held.shape is not None:
        return _Piece(file, held.first, held.count, tuple(held.shape), 1)
    width = math.prod(rest)
    return _Piece(file, held.first * width, held.count * width, (held.total, *rest), width)


def _elements(wanted: Rows, shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """The wanted rows of a tensor of that shape as elements: first, the one after the last, and the rows' shape."""
    if wanted.total != (shape[0] if wanted.shape is None else math.prod(shape)):
        raise ValueError(f"{wanted.total} rows are expected of a tensor of {list(shape)}")
    if wanted.shape is not None:
        return wanted.first, wanted.first + wanted.count, (wanted.count,)
    width = math.prod(shape[1:])
    return wanted.first * width, (wanted.first + wanted.count) * width, (wanted.count, *shape[1:])


def _joined(name: str, pieces: list[_Piece], low: int, high: int) -> Tensor:
    """The elements [low, high) of a tensor, read from those files that hold some of them."""
    parts = [
        piece.read(name, max(piece.first, low), min(piece.first + piece.count, high))
        for piece in pieces
        if max(piece.first, low) < min(piece.first + piece.count, high)
    ]
    if not parts:
        return pieces[0].read(name, pieces[0].first, pieces[0].first)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def check_names(path: Path, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `UserError` where a checkpoint's trainables are not the run's, naming the first that differs."""
    for name in sorted(saved.keys() ^ expected.keys()):
        side = "has" if name in saved else "lacks"
        raise UserError(f"{path}: {side} the trainable {name!r}, unlike this run.{nearest(name, expected)}")
    for name, value in expected.items():
        if saved[name].shape != value.shape:
            raise UserError(f"{path}: {name!r} is {list(saved[name].shape)}, this run's is {list(value.shape)}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
