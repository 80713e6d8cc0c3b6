"""Steps that were left out, kept with all their numbers so that they can be looked at again: one file a rank.

A file holds a `PackedStep`: its tensors, and in the header what they are of. Only the newest few are kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmos3_train.config import UserError
from cosmos3_train.runtime import rank
from cosmos3_train.training.batching import PackedStep
from cosmos3_train.types import DomainRows, ModalityTarget, PackedSequence, PictureTokens, Slices, Spans

logger = logging.getLogger(__name__)

FOLDER = "skipped"
KEPT = 8
"""Steps of which the files stay."""
RECORDS = {
    record.__name__: record for record in (PackedSequence, ModalityTarget, Spans, DomainRows, PictureTokens, Slices)
}


def keep_skipped(run_folder: Path, step: PackedStep, norm: float) -> None:
    """Write this rank's share of a step that was left out. A disk that takes no more is told and ends no run."""
    folder = run_folder / FOLDER
    path = folder / f"draw_{step.step:08d}.rank_{rank():05d}.safetensors"
    partial = path.with_suffix(".partial")
    tensors: dict[str, Tensor] = {}
    told = {
        "draw": step.step,
        "norm": repr(norm),
        "counts": step.counts,
        "samples": step.samples,
        "keys": step.keys,
        "packs": [_described(pack, f"pack{n}", tensors) for n, pack in enumerate(step.packs)],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"step": json.dumps(told)})
        partial.replace(path)
        for old in sorted(folder.glob(f"draw_*.rank_{rank():05d}.safetensors"))[:-KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        logger.warning("%s: the skipped step's batch could not be kept (%s)", path, error)


def list_skipped(run_folder: Path) -> dict[int, list[Path]]:
    """Files of the steps that were left out, by which draw of the run each was, rank by rank."""
    found: dict[int, list[Path]] = {}
    for path in sorted((run_folder / FOLDER).glob("draw_*.rank_*.safetensors")):
        found.setdefault(int(path.name.split(".")[0].removeprefix("draw_")), []).append(path)
    return found


def read_skipped(path: Path) -> tuple[PackedStep, float]:
    """One rank's share of a step, and the norm of the gradient that it was left out for.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        packs = [_made(one, tensors) for one in told["packs"]]
        step = PackedStep(told["draw"], packs, told["counts"], told["samples"], told["keys"])
        return step, float(told["norm"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); remove the file") from error


def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value for JSON, its tensors put aside under names."""
    if isinstance(value, Tensor):
        tensors[name] = value.cpu().clone().contiguous()
        return {"tensor": name}
    if is_dataclass(value):
        parts = {one.name: _described(getattr(value, one.name), f"{name}.{one.name}", tensors) for one in fields(value)}
        return {"record": type(value).__name__, "fields": parts}
    if isinstance(value, tuple):
        return {"tuple": [_described(one, f"{name}.{n}", tensors) for n, one in enumerate(value)]}
    assert value is None or isinstance(value, str | int | float), f"{name}: {type(value)} is not kept"
    return value


def _made(told: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse."""
    if not isinstance(told, dict):
        return told
    if "tensor" in told:
        return tensors[told["tensor"]]
    if "tuple" in told:
        return tuple(_made(one, tensors) for one in told["tuple"])
    return RECORDS[told["record"]](**{name: _made(one, tensors) for name, one in told["fields"].items()})
