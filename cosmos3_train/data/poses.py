"""Rotations and rigid poses as logs write them, and the moves between them. Pure functions, computed in float64.

A pose is a matrix T [4, 4]: it takes points of the body's own frame to the frame of the log. The move from one pose to
the next is T_i⁻¹·T_{i+1}, in the frame of the earlier pose, written as nine numbers: its translation, then the first
two columns of its rotation (standing still is 0 0 0, 1 0 0, 0 1 0).
"""

from __future__ import annotations

import numpy as np

from cosmos3_train.config import UserError

NUMBERS = {
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "axis_angle": 3,
    "rot6d": 6,
    "euler": 3,
    "matrix": 9,
}
"""How a rotation is written -> how many numbers that takes."""

MOVE = 9
STILL = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""The move of a body that does not."""
SLACK = 0.02
"""How far from 1 a quaternion's length, and from orthonormal a matrix, may be before it is no rotation."""


def to_matrices(values: np.ndarray, form: str, order: str = "xyz", where: str = "rotation") -> np.ndarray:
    """Rotation matrices float64 [T, 3, 3] of rotations [T, n] in a form of `NUMBERS`; angles in radians.

    Args:
        order: of euler angles: "xyz" turns about the fixed axes, x first; "XYZ" about the body's own, X first.
        where: for the message.

    Raises:
        UserError: a finite value that is no rotation: another form was meant, or the log is damaged.
    """
    values = np.asarray(values, dtype=np.float64)
    if form == "euler":
        return _from_euler(values, order)
    if form == "axis_angle":
        return _from_axis_angle(values)
    if form in ("quaternion_xyzw", "quaternion_wxyz"):
        length = np.linalg.norm(values, axis=1)
        _refuse(np.abs(length - 1) > SLACK, where, form, values)
        unit = values / length[:, None]
        return _from_quaternion(unit if form == "quaternion_wxyz" else unit[:, [3, 0, 1, 2]])
    columns = values.reshape(-1, 2, 3).swapaxes(1, 2) if form == "rot6d" else values.reshape(-1, 3, 3)
    error = np.abs(columns.swapaxes(1, 2) @ columns - np.eye(columns.shape[2])).max(axis=(1, 2))
    mirrored = np.zeros(len(values), bool) if form == "rot6d" else np.linalg.det(columns) < 0
    _refuse((error > SLACK) | mirrored, where, form, values)
    return orthonormal(columns)


def from_matrices(rotations: np.ndarray, form: str, order: str = "xyz") -> np.ndarray:
    """The inverse of `to_matrices`: [T, n] of [T, 3, 3]; quaternions with w ≥ 0, angles in radians."""
    if form == "matrix":
        return rotations.reshape(-1, 9)
    if form == "rot6d":
        return rotations[:, :, :2].swapaxes(1, 2).reshape(-1, 6)
    if form == "euler":
        return _to_euler(rotations, order)
    quaternion = _to_quaternion(rotations)
    if form == "quaternion_wxyz":
        return quaternion
    if form == "quaternion_xyzw":
        return quaternion[:, [1, 2, 3, 0]]
    assert form == "axis_angle", form
    sine = np.linalg.norm(quaternion[:, 1:], axis=1)
    angle = 2 * np.arctan2(sine, quaternion[:, 0])
    return quaternion[:, 1:] * np.where(sine < 1e-12, 2.0, angle / np.where(sine < 1e-12, 1.0, sine))[:, None]


def orthonormal(columns: np.ndarray) -> np.ndarray:
    """The rotations [T, 3, 3] whose first two columns span those of [T, 3, 2 or 3] (Gram and Schmidt's way)."""
    first = columns[:, :, 0] / np.linalg.norm(columns[:, :, 0], axis=1, keepdims=True)
    second = columns[:, :, 1] - first * (first * columns[:, :, 1]).sum(axis=1, keepdims=True)
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=2)


def to_poses(positions: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Poses [T, 4, 4] of positions [T, 3] and rotations [T, 3, 3]."""
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations, positions
    return poses


def inverse(poses: np.ndarray) -> np.ndarray:
    """Of rigid poses [..., 4, 4]."""
    turned = poses[..., :3, :3].swapaxes(-1, -2)
    inverted = np.zeros_like(poses)
    inverted[..., :3, :3] = turned
    inverted[..., :3, 3] = -(turned @ poses[..., :3, 3:])[..., 0]
    inverted[..., 3, 3] = 1.0
    return inverted


def moves_between(poses: np.ndarray) -> np.ndarray:
    """Moves [T − 1, 9] between neighbouring poses [T, 4, 4]."""
    return to_moves(inverse(poses[:-1]) @ poses[1:])


def to_moves(steps: np.ndarray) -> np.ndarray:
    """Moves [n, 9] of rigid transforms T_i⁻¹·T_{i+1} [n, 4, 4]."""
    return np.concatenate([steps[:, :3, 3], from_matrices(steps[:, :3, :3], "rot6d")], axis=1)


def to_steps(moves: np.ndarray) -> np.ndarray:
    """Rigid transforms [n, 4, 4] of moves [n, 9], whose two columns need not be orthonormal: a model guesses them."""
    moves = np.asarray(moves, dtype=np.float64)
    return to_poses(moves[:, :3], orthonormal(moves[:, 3:].reshape(-1, 2, 3).swapaxes(1, 2)))


def carried_out(start: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """The poses [n, 4, 4] that moves [n, 9] lead to, one after the other, from the pose `start` [4, 4]."""
    poses, pose = [], np.asarray(start, dtype=np.float64)
    for step in to_steps(moves):
        pose = pose @ step
        poses.append(pose)
    return np.stack(poses) if poses else np.zeros((0, 4, 4))


# ------------------------------------------------------------------------------------------------ forms


def _refuse(bad: np.ndarray, where: str, form: str, values: np.ndarray) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        shown = ", ".join(f"{value:.4g}" for value in values[row])
        raise UserError(f"{where}, row {row}: ({shown}) is no rotation written as {form}; correct the form or the log")


def _from_quaternion(wxyz: np.ndarray) -> np.ndarray:
    w, x, y, z = wxyz.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def _to_quaternion(rotations: np.ndarray) -> np.ndarray:
    """wxyz [T, 4], w ≥ 0. Of the four columns of the matrix 4·q·qᵀ the longest is taken, so nothing cancels."""
    r = rotations
    trace = np.trace(r, axis1=1, axis2=2)
    a, b, c = r[:, 2, 1] - r[:, 1, 2], r[:, 0, 2] - r[:, 2, 0], r[:, 1, 0] - r[:, 0, 1]
    xy, xz, yz = r[:, 0, 1] + r[:, 1, 0], r[:, 0, 2] + r[:, 2, 0], r[:, 1, 2] + r[:, 2, 1]
    diagonal = [1 + 2 * r[:, axis, axis] - trace for axis in range(3)]
    columns = np.stack(
        [
            np.stack([1 + trace, a, b, c], axis=1),
            np.stack([a, diagonal[0], xy, xz], axis=1),
            np.stack([b, xy, diagonal[1], yz], axis=1),
            np.stack([c, xz, yz, diagonal[2]], axis=1),
        ],
        axis=1,
    )
    best = np.argmax(columns[:, range(4), range(4)], axis=1)
    quaternion = columns[np.arange(len(r)), best]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)
    return np.where(quaternion[:, :1] < 0, -quaternion, quaternion)


def _from_axis_angle(vectors: np.ndarray) -> np.ndarray:
    half = np.linalg.norm(vectors, axis=1, keepdims=True) / 2
    return _from_quaternion(np.concatenate([np.cos(half), vectors * np.sinc(half / np.pi) / 2], axis=1))


def _from_euler(angles: np.ndarray, order: str) -> np.ndarray:
    total = np.tile(np.eye(3), (len(angles), 1, 1))
    for axis, angle in zip(order, angles.T, strict=True):
        turn = _about("xyz".index(axis.lower()), angle)
        total = total @ turn if order.isupper() else turn @ total
    return total


def _about(axis: int, angle: np.ndarray) -> np.ndarray:
    turn = np.tile(np.eye(3), (len(angle), 1, 1))
    second, third = (axis + 1) % 3, (axis + 2) % 3
    turn[:, second, second] = turn[:, third, third] = np.cos(angle)
    turn[:, third, second] = np.sin(angle)
    turn[:, second, third] = -turn[:, third, second]
    return turn


def _to_euler(rotations: np.ndarray, order: str) -> np.ndarray:
    """Angles [T, 3]. Where the middle one is ±90°, only a sum of the others is known: the last turn is then 0."""
    own = order.lower() if order.isupper() else order[::-1]  # about fixed axes is about its own in the other order
    i, j, k = ("xyz".index(axis) for axis in own)
    sign = 1.0 if (j - i) % 3 == 1 else -1.0
    middle = np.arcsin(np.clip(sign * rotations[:, i, k], -1, 1))
    locked = np.hypot(rotations[:, i, i], rotations[:, i, j]) < 1e-9
    first = np.arctan2(-sign * rotations[:, j, k], rotations[:, k, k])
    last = np.arctan2(-sign * rotations[:, i, j], rotations[:, i, i])
    first = np.where(locked, np.arctan2(sign * rotations[:, k, j], rotations[:, j, j]), first)
    angles = np.stack([first, middle, np.where(locked, 0.0, last)], axis=1)
    return angles if order.isupper() else angles[:, ::-1]
