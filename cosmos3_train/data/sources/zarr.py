"""Zarr replay buffers, as diffusion_policy and UMI write them: all episodes one after the other, and where each ends.

Opening reads shapes, the ends, and which chunks are there. Episodes are numbered from 0, by store and place. Frame i of
an episode stands at i / rate_hz of the dataset card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.arrays import missing
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.sources.mapped import ArrayLog, ArrayMapping, Stretch, find_files, rate_of, read_mapping
from cosmos3_train.data.zarr_v2 import ZarrStore


@dataclass(frozen=True)
class ZarrMapping(ArrayMapping):
    """The mapping of a Zarr log.

    files: *.zarr* finds folders and .zarr.zip
    ends:  array with the row after the last of each episode
    empty_chunks: chunks that are not there are no loss: they hold nothing but the fill value
    """

    files: Any = "*.zarr*"
    ends: str = "meta/episode_ends"
    empty_chunks: bool = False


_UMI_COLUMNS = ("eef_pos", "eef_rot_axis_angle", "gripper_width", "demo_start_pose", "demo_end_pose")

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "diffusion_policy_pusht": {
        "columns": {"action": "data/action", "observation.state": "data/state", "keypoint": "data/keypoint"},
        "cameras": {"observation.images.top": "data/img"},
        "instruction": {"constant": "Push the T-shaped block onto the T-shaped target."},
    },
    "umi": {
        "columns": {f"robot{n}_{name}": f"data/robot{n}_{name}" for n in (0, 1) for name in _UMI_COLUMNS},
        "cameras": {f"camera{n}_rgb": f"data/camera{n}_rgb" for n in (0, 1)},
    },
}
"""Name → mapping of a known layout. Arrays that a store has not are left out."""


def open_zarr(card: DatasetCard, source: Path) -> ArrayLog:
    """Open the Zarr log of a dataset card.

    Raises:
        UserError: the mapping does not fit, a store is missing, damaged or incomplete, or lengths differ.
    """
    mapping = read_mapping(card, ZarrMapping, PRESETS)
    rate_of(card)
    if mapping.empty_chunks:
        cameras = {name: replace(camera, empty_chunks=True) for name, camera in mapping.cameras.items()}
        mapping = replace(mapping, cameras=cameras)
    open_store = partial(ZarrStore, empty_chunks=mapping.empty_chunks)
    stretches: list[Stretch] = []
    described: list[Path] = []
    columns = [path for paths in mapping.columns.values() for path in paths]
    instruction = mapping.instruction.array if mapping.instruction else None
    for path in find_files(source, mapping):
        store = open_store(path)
        store.check()
        ends = _ends(store, mapping.ends.strip("/"))
        starts = [0, *ends[:-1]]
        for number, (first, end) in enumerate(zip(starts, ends, strict=True)):
            stretches.append(Stretch(path, "", first, end - first, number, len(ends)))
        cameras = [camera.path for camera in mapping.cameras.values()]
        present = _checked(store, [*columns, *cameras], ends[-1])
        small = [mapping.ends, *(name for name in columns if name.strip("/") in present)]
        small += [instruction] if instruction is not None else []
        described += store.described_by([name.strip("/") for name in small])
    return ArrayLog(card, source, mapping, open_store, stretches, described)


def _ends(store: ZarrStore, name: str) -> list[int]:
    """Row after the last of each episode."""
    info = store.info(name)
    if info is None:
        raise missing(store, name)
    ends = store.read(name)
    if (
        info.kind not in "iu"
        or ends.ndim != 1
        or not len(ends)
        or (np.diff(ends.astype(np.int64), prepend=0) <= 0).any()
    ):
        raise UserError(f"{store.path}: {name!r} does not rise from above 0; it has the end of each episode, in rows")
    return [int(end) for end in ends]


def _checked(store: ZarrStore, paths: list[str], rows: int) -> set[str]:
    """The arrays of the mapping that the store has, each with as many rows as the episodes, and all of its chunks."""
    present = set()
    for name in dict.fromkeys(path.strip("/") for path in paths):
        info = store.info(name)
        if info is None:
            continue
        present.add(name)
        if not info.shape or info.shape[0] != rows:
            raise UserError(f"{store.path}: {name!r} has shape {list(info.shape)}, but the episodes have {rows} rows")
        chunk = None if store.empty_chunks else store.missing_chunk(name)
        if chunk is not None:
            raise UserError(
                f"{store.path}: chunk {chunk} of {name!r} is missing; copy the log again, or where it only holds the "
                "fill value, say empty_chunks: true in the mapping"
            )
    if not present:
        known = nearest(paths[0] if paths else "", store.names(""))
        raise UserError(f"{store.path}: has none of the arrays of the mapping.{known}")
    return present
