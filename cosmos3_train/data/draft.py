"""A first draft of an embodiment card, from what a log shows. What it does not show is left open and marked, or asked.

An open value is written ???, which no reader of a card accepts: a draft loads only when all of them are filled in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cosmos3_train.config import TIERS, VIEW_POINTS, UserError
from cosmos3_train.data.sources.lerobot import LeRobotLog
from cosmos3_train.data.sources.log import Log
from cosmos3_train.data.video import frames_at

OPEN = '"???"'
MARK = "TO FILL IN"
FRAMES = 50_000
"""Rows that are looked at, of episodes evenly over the log."""
FOLLOWS, MOVES = 0.8, 0.5
"""Least correlation of an action with the state after it (a place), and with the change of state (a move)."""
CHUNK = 16
NO_GRIPPER = "no gripper"

Ask = Callable[[str, Sequence[str]], str]
"""Puts a question, with the answers that are allowed (none: any), and returns one, or "" where nobody answers."""


@dataclass
class Draft:
    """text: of the card;  open: what is to be filled in, in words"""

    lines: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def say(self, line: str, remark: str = "") -> None:
        self.lines.append(f"{line}   # {remark}" if remark else line)


@dataclass(frozen=True)
class _Seen:
    """Actions [T, W] and states of the same episodes, one after the other; a state [T, S] where the log has one."""

    action: list[np.ndarray]
    state: list[np.ndarray]


def draft(log: Log, name: str, domain: int, ask: Ask) -> Draft:
    """Draft the card of the robot that a log was recorded with.

    Args:
        name: of the embodiment.
        domain: a free slot of the action heads.

    Raises:
        UserError: the log has no camera or no action, or cannot be read.
    """
    if not log.cameras:
        raise UserError(f"{log.root}: the log has no camera that can be read, and a robot's card names at least one")
    action_key, others = _action_column(log)
    state_key = _state_column(log)
    seen = _look(log, action_key, state_key)
    card = Draft()
    card.say(f"# Drafted from {log.root.name}: {len(log.episodes)} episodes at {log.fps:g} Hz. What is marked")
    card.say(f"# {MARK} cannot be seen in a log; a value of ??? is refused until it is replaced.")
    card.say(f"name: {_yaml(name)}")
    card.say(f"domain_id: {domain}", "a free slot")
    card.say(f"control_hz: {log.fps:g}")
    _chunk(card, log)
    card.say(f"action_key: {_yaml(action_key)}", f"the log also has {', '.join(others)}" if others else "")
    _channels(card, log, action_key, state_key, seen, ask)
    if state_key is not None:
        card.say(f"state_key: {_yaml(state_key)}", _ranges(seen.state))
        card.say("state_row: false", "true: the policy reads the state, in the action's own units")
    _cameras(card, log, ask)
    card.say("normaliser: quantile")
    return card


# ------------------------------------------------------------------------------------------------ columns


def _action_column(log: Log) -> tuple[str, list[str]]:
    """The column of the actions, and others that could be it."""
    found = [name for name in log.columns if name.startswith("action")]
    if not found:
        raise UserError(
            f"{log.root}: the log has no column whose name begins with 'action' (it has {', '.join(log.columns)}); "
            "write the card by hand: its action can be made from recorded poses (`recorded`)"
        )
    best = "action" if "action" in found else max(found, key=lambda name: log.width(name) or 0)
    return best, [name for name in found if name != best]


def _state_column(log: Log) -> str | None:
    found = [name for name in log.columns if name in ("observation.state", "state") or "state" in name.split(".")]
    return next((name for name in ("observation.state", "state") if name in found), found[0] if found else None)


def _look(log: Log, action_key: str, state_key: str | None) -> _Seen:
    total = sum(episode.length for episode in log.episodes)
    episodes = log.episodes[:: max(1, -(-total // FRAMES))]
    columns = [action_key, *([state_key] if state_key is not None else [])]
    seen = _Seen([], [])
    for record in log.records(episodes, columns):
        for name, parts in zip(columns, (seen.action, seen.state), strict=False):
            if isinstance(record.columns[name], list):
                raise UserError(f"{log.root}: column {name!r} holds words; numbers are expected")
            parts.append(record.columns[name])
    if not seen.action:
        raise UserError(f"{log.root}: the log has no rows")
    return seen


def _names(log: Log, column: str, width: int) -> list[str]:
    """The channels' names as the log has them, or numbered ones."""
    names = log.features[column].get("names") if isinstance(log, LeRobotLog) and column in log.features else None
    if isinstance(names, dict):  # {"motors": [...]} in older logs
        names = [name for part in names.values() if isinstance(part, list) for name in part]
    if isinstance(names, list) and len(names) == width and len({str(name) for name in names}) == width:
        return [str(name) for name in names]
    return [f"action_{index}" for index in range(width)]


# ------------------------------------------------------------------------------------------------ the card's lines


def _chunk(card: Draft, log: Log) -> None:
    longest = max(episode.length for episode in log.episodes)
    chunk = min(CHUNK, (longest - 1) // 4 * 4)
    if chunk < 4:
        raise UserError(f"{log.root}: the longest episode has {longest} rows; a window takes at least 5")
    card.say(f"chunk: {chunk}", f"a choice: {chunk / log.fps:.2g} s of actions a window")
    card.say(f"execute: {max(1, chunk // 2)}", "a choice: actions carried out before the next look")


def _channels(card: Draft, log: Log, action_key: str, state_key: str | None, seen: _Seen, ask: Ask) -> None:
    width = seen.action[0].shape[1]
    names = _names(log, action_key, width)
    places = _state_places(log, state_key, names, seen)
    turns = _rotation_columns(np.concatenate(seen.action))
    card.say("action:", "low and high, outside which a value is an error, are open; add them where you know them")
    for index, name in enumerate(names):
        values = np.concatenate([part[:, index] for part in seen.action])
        remarks = [_range(values)]
        relative, why = _relative(seen, index, places[index])
        missing = []
        unit = "1" if index in turns else ask(f"unit of {name} ({_range(values)})", ())
        if not unit:
            missing.append("unit")
        if relative is None:
            answer = ask(f"is {name} a change (yes) or a place (no)?", ("yes", "no"))
            relative = {"yes": True, "no": False}.get(answer)
            if relative is None:
                missing.append("relative (a change: true, a place: false)")
        remarks += [why] if why else []
        meaning = _gripper(name, values, ask) if len(np.unique(values)) == 2 or "gripper" in name.lower() else None
        if meaning == "":
            missing.append("meaning (a gripper's ends, such as 'gripper, 0 closed, 1 open', or what else it is)")
        remarks += ["part of two orthonormal columns: a rotation"] if index in turns else []
        remarks += [f"{MARK}: {', '.join(missing)}"] if missing else []
        card.open += [f"{name}: {word}" for word in missing]
        said = OPEN if relative is None else str(relative).lower()
        entry = f"name: {_yaml(name)}, unit: {_yaml(unit) if unit else OPEN}, relative: {said}"
        entry += "" if meaning is None else f", meaning: {_yaml(meaning) if meaning else OPEN}"
        card.say(f"  - {{{entry}{', rotation: true' if index in turns else ''}}}", "; ".join(remarks))


def _gripper(name: str, values: np.ndarray, ask: Ask) -> str:
    """Which end of what looks like a gripper is which, "" where nobody says it: no log shows it, and a scan needs it to
    find a swapped one."""
    low, high = (f"{end:g}" for end in (values.min(), values.max()))
    if low == high:
        return ""
    answer = ask(f"{name} goes from {low} to {high}: which is an open gripper", (low, high, NO_GRIPPER))
    closed = {low: high, high: low}.get(answer)
    return answer if closed is None else f"gripper, {closed} closed, {answer} open"


def _cameras(card: Draft, log: Log, ask: Ask) -> None:
    sizes, first = {}, log.episodes[0]
    for camera in log.cameras:
        place = first.video[camera]
        sizes[camera] = tuple(frames_at(log.root, place.path, [place.from_timestamp]).shape[2:])
    shown = "; ".join(f"{camera}: {width}×{height}" for camera, (height, width) in sizes.items())
    card.say(f"cameras: [{', '.join(_yaml(camera) for camera in sizes)}]", shown)
    heights, widths = ([size[axis] for size in sizes.values()] for axis in (0, 1))
    if len(sizes) == 1:
        layout, height, width = "single", heights[0], widths[0]
    elif len(set(heights)) == 1:
        layout, height, width = "row", heights[0], sum(widths)
    elif len(set(widths)) == 1:
        layout, height, width = "column", sum(heights), widths[0]
    else:
        layout, height, width = "", max(heights), sum(widths)
    if layout:
        card.say(f"layout: {layout}", "" if layout == "single" else "a choice: leave out cameras that do not help")
    else:
        card.say("layout: single", f"{MARK}: the cameras' sizes fit no layout; keep one of them, or those that do")
        card.open.append("cameras: keep those that fit a layout")
    fitting = [tier for tier in TIERS if tier >= math.sqrt(height * width)]
    tier = fitting[0] if fitting else TIERS[-1]
    card.say(f"resolution_tier: {tier}", f"the composed frame has {width}×{height} pixels")
    view = ask("view point", VIEW_POINTS)
    if not view:
        card.open.append("view_point")
    card.say(f"view_point: {view or OPEN}", "" if view else f"{MARK}: one of {', '.join(VIEW_POINTS)}")


# ------------------------------------------------------------------------------------------------ what values show


def _state_places(log: Log, state_key: str | None, names: Sequence[str], seen: _Seen) -> list[int | None]:
    """Which number of the state each channel of the action is about: by name, or by place where both are as wide."""
    if state_key is None or not seen.state:
        return [None] * len(names)
    width = seen.state[0].shape[1]
    known = _names(log, state_key, width)
    if all(name in known for name in names):
        return [known.index(name) for name in names]
    return [index if width == len(names) else None for index in range(len(names))]


def _relative(seen: _Seen, index: int, place: int | None) -> tuple[bool | None, str]:
    """Whether a channel looks like a change, None where that cannot be told; and why."""
    if place is None:
        return None, ""
    pairs = [(a[:-1, index], s[1:, place], s[1:, place] - s[:-1, place]) for a, s in zip(*_both(seen), strict=True)]
    action, after, change = (np.concatenate(part) for part in zip(*pairs, strict=True))
    follows, moves = _correlation(action, after), _correlation(action, change)
    if follows >= FOLLOWS and follows > moves:
        return False, f"follows the state after it ({follows:.2f}): a place"
    if moves >= MOVES and moves > follows:
        return True, f"follows the change of state ({moves:.2f}): a change"
    return None, f"correlation with the state after it {follows:.2f}, with its change {moves:.2f}"


def _both(seen: _Seen) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return seen.action, seen.state


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(dtype=np.float64), other - other.mean(dtype=np.float64)
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale > 0 else 0.0


def _rotation_columns(action: np.ndarray) -> set[int]:
    """Channels that belong to six in a row which always are two orthonormal columns."""
    found: set[int] = set()
    for first in range(action.shape[1] - 5):
        if first in found:
            continue
        pair = action[:, first : first + 6].reshape(-1, 2, 3).astype(np.float64)
        if np.abs(pair @ pair.swapaxes(1, 2) - np.eye(2)).max() < 0.01:
            found |= set(range(first, first + 6))
    return found


def _range(values: np.ndarray) -> str:
    return f"seen {values.min():.4g} to {values.max():.4g}"


def _ranges(parts: Sequence[np.ndarray]) -> str:
    values = np.concatenate(parts)
    return "; ".join(f"{low:.4g} to {high:.4g}" for low, high in zip(values.min(0), values.max(0), strict=True))


def _yaml(word: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", word)
    reserved = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # x and y are the usual names of channels
    return word if plain and word.lower() not in reserved else json.dumps(word, ensure_ascii=False)
