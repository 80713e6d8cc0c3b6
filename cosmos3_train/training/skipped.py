"""Steps that were left out, kept with all their numbers so that they can be looked at again: one file a rank.

A file holds a `PackedStep`: its tensors, and in the header what they are of. Only the newest few are kept. A step whose
packs the ranks share (`strategy.context_parallel`) is not, for no rank has a whole one.
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

from cosmos3_train.config import UserError, first_line
from cosmos3_train.runtime import rank, world_size
from cosmos3_train.training.batching import PackedStep
from cosmos3_train.types import DomainRows, ModalityTarget, PackedSequence, PictureTokens, Slices, Spans

logger = logging.getLogger(__name__)

FOLDER = "skipped"
KEPT = 8
"""Steps of which the files stay."""
FORM = 1
"""Of the files; another version of this module may write another."""
RECORDS = {
    record.__name__: record for record in (PackedSequence, ModalityTarget, Spans, DomainRows, PictureTokens, Slices)
}


def keep_skipped(run_folder: Path, step: PackedStep, norm: float) -> None:
    """Write this rank's share of a step that was left out. A disk that takes no more is told and ends no run."""
    if any(pack.slices is not None for pack in step.packs):
        return
    folder = run_folder / FOLDER
    path = folder / f"draw_{step.step:08d}.rank_{rank():05d}.safetensors"
    partial = path.with_suffix(".partial")
    tensors: dict[str, Tensor] = {}
    told = {
        "form": FORM,
        "ranks": world_size(),
        "draw": step.step,
        "norm": repr(norm),
        "counts": step.counts,
        "samples": step.samples,
        "keys": step.keys,
        "packs": [_described(pack, f"pack{n}", tensors) for n, pack in enumerate(step.packs)],
    }
    try:
        folder.mkdir(exist_ok=True)  # no parents: where a mount is gone, they would be made below it
        save_file(tensors, partial, {"step": json.dumps(told)})
        partial.replace(path)
        found = list_skipped(run_folder)
        for draw in sorted(found)[:-KEPT]:
            for old in found[draw].values():
                old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        logger.warning("%s: the skipped step's batch could not be kept (%s)", path, error)


def list_skipped(run_folder: Path) -> dict[int, dict[int, Path]]:
    """Files of the steps that were left out, by which draw of the run each was, and by rank."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted((run_folder / FOLDER).glob("draw_*.rank_*.safetensors")):
        draw, share, _ = path.name.split(".")
        found.setdefault(int(draw.removeprefix("draw_")), {})[int(share.removeprefix("rank_"))] = path
    return found


def read_shares(shares: Mapping[int, Path]) -> tuple[list[PackedStep], float]:
    """A step that was left out as its ranks had it, by rank, and the norm of its gradient.

    Raises:
        UserError: a file is damaged, or a rank's is missing.
    """
    found = {share: read_skipped(path) for share, path in shares.items()}
    path, (_, norm, ranks) = next((shares[share], one) for share, one in found.items())
    missing = set(range(ranks)) - found.keys()
    if missing:
        raise UserError(f"{path}: the share of rank {min(missing)} is missing, so the step cannot be made again")
    return [found[share][0] for share in range(ranks)], norm


def read_skipped(path: Path) -> tuple[PackedStep, float, int]:
    """One rank's share of a step, the norm of the gradient that it was left out for, and how many ranks there were.

    Raises:
        UserError: the file is damaged, or another version's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["step"])
            if told["form"] != FORM:
                raise UserError(f"{path}: written by another version of cosmos3_train; replay it with that one")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        packs = [_made(one, tensors) for one in told["packs"]]
        step = PackedStep(told["draw"], packs, told["counts"], told["samples"], told["keys"])
        return step, float(told["norm"]), told["ranks"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); remove the file") from error


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
