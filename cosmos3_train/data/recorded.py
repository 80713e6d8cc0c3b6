"""Actions made from what a robot recorded, as its embodiment card says (`recorded`), and the way back.

Row i of an action says how to get from row i of the log to row i + 1, so an episode of T rows has T − 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cosmos3_train.config import Embodiment, Recorded, UserError, column_part, nearest
from cosmos3_train.data import poses

TRANSFORM = 16


def recorded_columns(embodiment: Embodiment) -> list[str]:
    """The columns of the log that the action, and the state where it is made too, come from."""
    named = [text for piece in embodiment.recorded for text in (piece.column, piece.rotation)]
    named += [piece.state for piece in embodiment.recorded if embodiment.makes_state]
    return list(dict.fromkeys(column_part(text)[0] for text in named if text))


def check_recorded(embodiment: Embodiment, widths: Mapping[str, int | None], where: str) -> None:
    """Raise `UserError` for the first piece that names no column, or a part that its column has not.

    Args:
        widths: column -> how many numbers a row of it has; None where that is not known.
        where: dataset, for the message.
    """
    for piece in embodiment.recorded:
        if not column_part(piece.column)[0]:
            raise UserError(
                f"{where}: embodiment {embodiment.name!r} does not say which column of the log recorded "
                f"{piece.name!r} comes from; set it, or give the whole action in {embodiment.action_key!r}"
            )
        wanted = [(piece.column, _numbers_of_column(piece)), (piece.rotation, _numbers_of_rotation(piece))]
        wanted += [(piece.state, _numbers_of_column(piece))] if embodiment.makes_state else []
        for text, count in wanted:
            name, first, stop = column_part(text)
            width = widths.get(name)
            if not text or width is None:
                continue
            if stop is not None and stop > width:
                raise UserError(
                    f"{where}: recorded {piece.name!r} takes {text}, but {name!r} has {width} numbers a row"
                )
            found = width if first is None or stop is None else stop - first
            if found != count:
                raise UserError(
                    f"{where}: recorded {piece.name!r} takes {found} numbers from {text}; "
                    f"a {piece.kind}{f' written as {piece.form}' if piece.kind == 'pose' else ''} has {count} there"
                )


def made_actions(columns: Mapping[str, Any], embodiment: Embodiment, where: str) -> np.ndarray:
    """float32 [T − 1, width]: the action of every row but the last, from columns [T, n].

    Raises:
        UserError: a column holds words, or a rotation that is none.
    """
    pieces = []
    for piece in embodiment.recorded:
        if piece.kind == "pose":
            there = _poses(columns, piece, where)
            pieces.append(poses.to_moves(there)[:-1] if piece.moves else poses.moves_between(there))
        else:
            values = _values(columns, piece, piece.column, where)
            pieces.append(values[1:] if piece.next else values[:-1])
    return np.concatenate(pieces, axis=1).astype(np.float32)


def made_states(columns: Mapping[str, Any], embodiment: Embodiment, where: str) -> np.ndarray:
    """float32 [T, width]: the state of every row, in the action's own units."""
    pieces = [_values(columns, piece, piece.state, where) for piece in embodiment.recorded]
    return np.concatenate(pieces, axis=1).astype(np.float32)


def targets(action: np.ndarray, now: Mapping[str, np.ndarray], embodiment: Embodiment) -> dict[str, np.ndarray]:
    """What a robot is to be told, in the log's own columns, units and forms: the way back from `made_actions`.

    Moves are carried out from where the robot is, one after the other; moves that the log recorded as such stay moves.

    Args:
        action: [n, width] in the units of the embodiment card (after the normaliser's `denormalise`).
        now: column -> [n], the row of the log at which the actions begin; needed of pose columns alone.

    Returns:
        The card's column (with its part) -> float64 [n, numbers]: where each action leads.
    """
    found, place = {}, 0
    rows = {name: np.asarray(row, dtype=np.float64)[None] for name, row in now.items()}
    for piece in embodiment.recorded:
        part = np.asarray(action[:, place : place + len(piece.channels())], dtype=np.float64)
        place += part.shape[1]
        if piece.kind == "values":
            found[piece.column] = part
        elif piece.kind == "gripper":
            found[piece.column] = piece.closed + part * (piece.open - piece.closed)
        else:
            tool = tool_of(piece)
            if piece.moves:
                there = tool @ poses.to_steps(part) @ poses.inverse(tool)
            else:
                start = _poses(rows, piece, "the robot's row now")[0]
                there = poses.carried_out(start, part) @ poses.inverse(tool)
            found |= _written(there, piece)
    return found


# ------------------------------------------------------------------------------------------------ a piece


def _poses(columns: Mapping[str, Any], piece: Recorded, where: str) -> np.ndarray:
    """[T, 4, 4]: the poses of the tool, in metres; moves of the tool where the log has moves."""
    where = f"{where}: recorded {piece.name!r}"
    first = _column(columns, piece.column, where)
    if piece.form == "transform":
        whole = first.reshape(-1, 4, 4)
        position, rotation = whole[:, :3, 3], poses.to_matrices(whole[:, :3, :3].reshape(-1, 9), "matrix", where=where)
    else:
        position, angles = first, _column(columns, piece.rotation, where)
        if piece.degrees and piece.form in ("euler", "axis_angle"):
            angles = np.radians(angles)
        rotation = poses.to_matrices(angles, piece.form, piece.order, where)
    there, tool = poses.to_poses(position * piece.metres, rotation), tool_of(piece)
    return poses.inverse(tool) @ there @ tool if piece.moves else there @ tool


def _written(there: np.ndarray, piece: Recorded) -> dict[str, np.ndarray]:
    """Poses [n, 4, 4] in the piece's columns, units and form."""
    position, rotation = there[:, :3, 3] / piece.metres, there[:, :3, :3]
    if piece.form == "transform":
        return {piece.column: poses.to_poses(position, rotation).reshape(-1, TRANSFORM)}
    angles = poses.from_matrices(rotation, piece.form, piece.order)
    if piece.degrees and piece.form in ("euler", "axis_angle"):
        angles = np.degrees(angles)
    return {piece.column: position, piece.rotation: angles}


def _values(columns: Mapping[str, Any], piece: Recorded, text: str, where: str) -> np.ndarray:
    values = _column(columns, text, f"{where}: recorded {piece.name!r}")
    return (values - piece.closed) / (piece.open - piece.closed) if piece.kind == "gripper" else values


def _column(columns: Mapping[str, Any], text: str, where: str) -> np.ndarray:
    """float64 [T, n] of a column or a part of it."""
    name, first, stop = column_part(text)
    if name not in columns:
        raise UserError(f"{where}: no column {name!r}.{nearest(name, columns)}")
    values = columns[name]
    if isinstance(values, list):
        raise UserError(f"{where}: column {name!r} holds words, not numbers")
    return np.asarray(values, dtype=np.float64)[:, first:stop]


def tool_of(piece: Recorded) -> np.ndarray:
    """[4, 4]: the frame whose moves the model learns, seen from the recorded one."""
    tool = np.eye(4)
    if piece.tool:
        tool[:3] = np.asarray(piece.tool).reshape(3, 4)
        tool[:3, :3] = poses.orthonormal(tool[None, :3, :3])[0]
    return tool


def _numbers_of_column(piece: Recorded) -> int:
    if piece.kind == "pose":
        return TRANSFORM if piece.form == "transform" else 3
    return len(piece.channels())


def _numbers_of_rotation(piece: Recorded) -> int:
    return poses.NUMBERS.get(piece.form, 0)
