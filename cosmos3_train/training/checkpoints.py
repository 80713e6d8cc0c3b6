"""Checkpoints of a run: trainables, their average, the optimizer and the run's position, whole or not at all.

A checkpoint is a folder `step_000200/` of safetensors and one JSON file. It is written beside its name and renamed into
place, so a kill at any moment leaves the last whole one. No random state is kept: every draw of a run is a function of
the seed and the place where it is made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.files import write_whole

STATE = "state.json"
PARTS = ("trainables", "average", "optimizer")


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    step: optimizer steps made (skipped ones left out);  drawn: steps' worth of samples drawn, skipped ones included
    samples: samples drawn over all ranks;  skipped: steps left out for a non-finite gradient
    skipped_in_a_row: of those, the ones since the last step that was made, which patience counts
    """

    step: int = 0
    drawn: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, tensors by parameter name; `average` is empty without an EMA."""

    position: Position
    trainables: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step_NNNNNN` atomically, then remove all but the newest `keep`.

    Where it is there already, only steps were left out since, which change no tensor: its position alone is replaced.

    Raises:
        UserError: the disk is full or read-only; the earlier checkpoints are untouched.
    """
    name = f"step_{checkpoint.position.step:06d}"
    target, partial = folder / name, folder / f".{name}.partial"
    state = (json.dumps(asdict(checkpoint.position), indent=2) + "\n").encode()
    try:
        if (target / STATE).is_file():
            write_whole(target / STATE, state)
            return target
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for part in PARTS:
            tensors: Mapping[str, Tensor] = getattr(checkpoint, part)
            if tensors:
                save_file(
                    {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial / f"{part}.safetensors"
                )
        (partial / STATE).write_bytes(state)
        for file in partial.iterdir():
            _flush(file)
        partial.replace(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:  # a full disk is the latter where safetensors meets it
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(
            f"{target}: the checkpoint could not be written ({reason}); free some space and run "
            f"the same command again, which goes on from the last whole checkpoint"
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = {path.name.removeprefix("step_"): path for path in folder.glob("step_*") if (path / STATE).is_file()}
    # By number: as text, step 1000000 would come before step 999999.
    return [found[step] for step in sorted((step for step in found if step.isdigit()), key=int)]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UserError: a file is missing or damaged; names it and says what to do.
    """
    try:
        position = Position(**json.loads((path / STATE).read_text()))
        tensors = {
            part: load_file(path / f"{part}.safetensors") if (path / f"{part}.safetensors").is_file() else {}
            for part in PARTS
        }
    except (OSError, SafetensorError, json.JSONDecodeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: damaged checkpoint ({reason}); remove the folder to go on from the one before"
        ) from error
    return Checkpoint(position=position, **tensors)


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
