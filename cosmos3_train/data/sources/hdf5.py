"""HDF5 logs: robomimic's and LIBERO's (a group an episode), ALOHA's (a file an episode), and others by a mapping.

Opening reads names of groups, shapes and attributes alone. Episodes are numbered from 0, by file and group in natural
order. Frame i stands at i / rate_hz of the dataset card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.arrays import missing
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.hdf5 import Hdf5File
from cosmos3_train.data.sources.mapped import (
    ArrayLog,
    ArrayMapping,
    Stretch,
    find_files,
    natural,
    rate_of,
    read_mapping,
    text_of,
)


@dataclass(frozen=True)
class Hdf5Mapping(ArrayMapping):
    """The mapping of an HDF5 log.

    files:    *.h*5 finds .hdf5 and .h5
    episodes: pattern of the groups that are episodes, such as "data/demo_*"; "" where a file is an episode
    mask:     array with the names of the groups that count, such as "/mask/train"
    """

    files: Any = "*.h*5"
    episodes: str = ""
    mask: str | None = None


_LIBERO_CAMERA = {"rotate_180": True}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "robomimic": {
        "episodes": "data/demo_*",
        "columns": {
            "action": "actions",
            "observation.state": ["obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos"],
            "observation.joint_pos": "obs/robot0_joint_pos",
            "states": "states",
        },
        "cameras": {
            "observation.images.image": "obs/agentview_image",
            "observation.images.wrist_image": "obs/robot0_eye_in_hand_image",
        },
    },
    "libero": {
        "episodes": "data/demo_*",
        "columns": {
            "action": "actions",
            "observation.state": ["obs/ee_pos", "obs/ee_ori", "obs/gripper_states"],
            "observation.joint_states": "obs/joint_states",
        },
        "cameras": {
            "observation.images.image": {"path": "obs/agentview_rgb", **_LIBERO_CAMERA},
            "observation.images.wrist_image": {"path": "obs/eye_in_hand_rgb", **_LIBERO_CAMERA},
        },
        "instruction": {"attribute": "/data@problem_info", "key": "language_instruction"},
    },
    "aloha": {
        "columns": {
            "action": "action",
            "observation.state": "observations/qpos",
            "observation.velocity": "observations/qvel",
            "observation.effort": "observations/effort",
        },
        "cameras": {
            f"observation.images.{name}": f"observations/images/{name}"
            for name in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist", "top", "angle", "vis")
        },
    },
}
"""Name → mapping of a known layout. Arrays that a file has not are left out."""


def open_hdf5(card: DatasetCard, source: Path) -> ArrayLog:
    """Open the HDF5 log of a dataset card.

    Raises:
        UserError: the mapping does not fit, a file is missing or damaged, or lengths within an episode differ.
    """
    mapping = read_mapping(card, Hdf5Mapping, PRESETS)
    rate_of(card)
    stretches = []
    for path in find_files(source, mapping):
        file = Hdf5File(path)
        groups = _chosen(file, _episode_groups(file, mapping.episodes), mapping.mask)
        for number, group in enumerate(groups):
            length = _length(file, Stretch(path, group, 0, 0, number, len(groups)), mapping)
            stretches.append(Stretch(path, group, 0, length, number, len(groups)))
    return ArrayLog(card, source, mapping, Hdf5File, stretches)


def _episode_groups(file: Hdf5File, pattern: str) -> list[str]:
    """Groups that match a pattern of path parts, in natural order; the root for an empty one."""
    found = [""]
    for part in pattern.strip("/").split("/") if pattern.strip("/") else []:
        below = [(group, name) for group in found for name in file.groups(group)]
        found = [f"{group}/{name}".strip("/") for group, name in below if fnmatchcase(name, part)]
        if not found:
            known = nearest(part, [name for _, name in below])
            raise UserError(f"{file.path}: no group matches {part!r} of mapping.episodes {pattern!r}.{known}")
    return sorted(found, key=natural)


def _chosen(file: Hdf5File, groups: list[str], mask: str | None) -> list[str]:
    """The groups whose last name stands in the mask."""
    if mask is None:
        return groups
    if file.info(mask.strip("/")) is None:
        raise missing(file, mask.strip("/"))
    where = f"{file.path}: {mask}"
    names = {text_of(name, where) for name in file.read(mask.strip("/")).reshape(-1)}
    unknown = sorted(names - {group.rpartition("/")[2] for group in groups})
    if unknown:
        raise UserError(f"{where}: names {unknown[0]!r}, and mapping.episodes matches no such group")
    return [group for group in groups if group.rpartition("/")[2] in names]


def _length(file: Hdf5File, stretch: Stretch, mapping: Hdf5Mapping) -> int:
    """Rows of an episode: those of every array of the mapping that it has."""
    paths = [path for paths in mapping.columns.values() for path in paths]
    paths += [camera.path for camera in mapping.cameras.values()]
    lengths: dict[str, int] = {}
    for path in paths:
        info = file.info(stretch.array(path))
        if info is not None and not info.shape:
            raise UserError(f"{stretch.where}: {path!r} is a single value; a row a frame is expected")
        if info is not None:
            lengths[path] = info.shape[0]
    if not lengths:
        known = nearest(paths[0] if paths else "", file.names(stretch.group))
        raise UserError(f"{stretch.where}: has none of the arrays of the mapping.{known}")
    first, length = next(iter(lengths.items()))
    for path, other in lengths.items():
        if other != length:
            raise UserError(
                f"{stretch.where}: {first!r} has {length} rows, but {path!r} has {other}; the log is damaged, or they "
                "are not rows of the same frames: then set one to null in the mapping"
            )
    return length
