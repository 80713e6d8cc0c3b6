"""What can be wrong with the numbers of a log: of one episode, and of all of them together. Pure functions of arrays.

Each fault is told once an episode and channel, with its first row and how many more there are. What only all episodes
show (`Whole`) is told when all were seen.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from cosmos3_train.config import Channel, Embodiment
from cosmos3_train.data.actions import Normaliser, outside_range, range_words
from cosmos3_train.data.poses import SLACK
from cosmos3_train.data.statistics import Statistics, compute_moments

NOT_FINITE = "NaN or infinite"
FROZEN = "frozen channel"
OUT_OF_RANGE = "out-of-range value"
CLIPPED = "clipped channel"
GAPS = "gap in the time stamps"
RATE = "wrong rate"
GRIPPER = "gripper the wrong way round"
ROTATION = "rotation that is none"
MISSING = "missing frame"
VIDEO = "undecodable video"
SOUND = "unreadable sound"
DUPLICATE = "duplicate"
LONG = "caption over the token cap"
UNREADABLE = "unreadable"

FAR = 5.0
"""Normalised values beyond ±FAR are told: q01 and q99 stand at ±1, and heavy tails seldom reach five times that."""
OFTEN = 0.9
"""Share of the episodes that have to agree before one that does not is told, or all of them are."""
ENOUGH = 3
"""Episodes that say something about what is usual; and times that a channel stands at its end, before that is told."""
CUT, CUT_ROWS = 0.02, 10
"""Share of the rows that move, and rows, at which a channel stands at its end before that is told."""
FEW = 20
"""A channel of fewer different values is a command of steps, whose end is one of them."""


class Fault(NamedTuple):
    """kind: one of this module's;  row: the first of the episode, None where it is of the whole;  words: what is so"""

    kind: str
    row: int | None
    words: str


class Place(NamedTuple):
    """Where actions lie: file of the log, number of the episode, and which of its rows have them."""

    file: str
    episode: int
    rows: range | np.ndarray


# ------------------------------------------------------------------------------------------------ an episode


def not_finite(values: np.ndarray, names: Sequence[str]) -> Iterator[Fault]:
    """NaN and infinity in [T, W]; `names` are the channels'."""
    for channel, name in enumerate(names):
        bad = ~np.isfinite(values[:, channel])
        if bad.any():
            yield _first(NOT_FINITE, bad, f"{name} is {values[np.argmax(bad), channel]}")


def wrong_times(timestamps: np.ndarray, fps: float) -> Iterator[Fault]:
    """A rate that is not the log's; else steps that differ from its period by more than half of it."""
    if len(timestamps) < 2:
        return
    steps, period = np.diff(timestamps), 1.0 / fps
    usual = float(np.median(steps))
    if abs(usual - period) > 0.01 * period + 1e-4:  # float32 stamps of an hour are off by 0.1 ms
        yield Fault(RATE, None, f"rows are {1 / usual:.4g} a second by their time stamps, {fps:g} by the log")
        return
    bad = np.concatenate([[False], np.abs(steps - period) > 0.5 * period])
    if bad.any():
        row = int(np.argmax(bad))
        yield _first(GAPS, bad, f"{steps[row - 1]:.4f} s after the row before, {period:.4f} s are usual")


def no_rotations(action: np.ndarray, embodiment: Embodiment) -> Iterator[Fault]:
    """Six channels in a row that are no two orthonormal columns."""
    turned = [index for index, channel in enumerate(embodiment.action) if channel.rotation]
    for first in range(0, len(turned) - 5, 6):
        six = turned[first : first + 6]
        columns = action[:, six].astype(np.float64).reshape(-1, 2, 3)
        error = np.abs(columns @ columns.swapaxes(1, 2) - np.eye(2)).max(axis=(1, 2))
        bad = error > SLACK
        if bad.any():
            names = f"{embodiment.action[six[0]].name} to {embodiment.action[six[5]].name}"
            yield _first(ROTATION, bad, f"{names} are no orthonormal columns, off by {error[np.argmax(bad)]:.3g}")


def outside_card(action: np.ndarray, embodiment: Embodiment) -> Iterator[Fault]:
    """Values outside the range that the embodiment card gives."""
    outside = outside_range(action, embodiment)
    for index, channel in enumerate(embodiment.action):
        if outside[:, index].any():
            value = action[np.argmax(outside[:, index]), index]
            yield _first(
                OUT_OF_RANGE, outside[:, index], f"{channel.name} is {value:g}, the card says {range_words(channel)}"
            )


def without_frame(timestamps: np.ndarray, shown: np.ndarray, fps: float) -> np.ndarray:
    """bool [T]: rows that have no frame within half a period.

    Args:
        timestamps, shown: of rows, and of frames, both rising, in seconds on one clock.
    """
    if not len(shown):
        return np.ones(len(timestamps), bool)
    after = np.searchsorted(shown, timestamps).clip(1, max(1, len(shown) - 1))
    near = np.minimum(np.abs(shown[after - 1] - timestamps), np.abs(shown[after % len(shown)] - timestamps))
    return near > 0.5 / fps * 1.01


def _first(kind: str, bad: np.ndarray, words: str) -> Fault:
    row, count = int(np.argmax(bad)), int(bad.sum())
    return Fault(kind, row, words if count == 1 else f"{words}; {count:,} rows in all")


# ------------------------------------------------------------------------------------------------ all of them


class Whole:
    """The actions of all episodes, kept on disk, for what one alone does not show. A fault's row counts its place's."""

    def __init__(self, embodiment: Embodiment) -> None:
        self.embodiment = embodiment
        self.places: list[Place] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        self._seen: dict[bytes, Place] = {}
        self._moves: list[np.ndarray] = []

    def add(self, place: Place, action: np.ndarray) -> Fault | None:
        """An episode's actions [T, W], all finite. A fault where they are those of an earlier one."""
        self.places.append(place)
        self._moves.append((action != action[:1]).any(axis=0))
        self._file.write(np.ascontiguousarray(action, dtype=np.float32).tobytes())
        digest = hashlib.blake2b(action.tobytes(), digest_size=16).digest()
        earlier = self._seen.setdefault(digest, place)
        if earlier is place or not self._moves[-1].any():
            return None
        return Fault(DUPLICATE, None, f"its {len(action)} actions are those of episode {earlier.episode}")

    def faults(self) -> Iterator[tuple[Place, Fault]]:
        """What all of them show, once the last was added."""
        if not self.places:
            return
        self._file.flush()
        rows = sum(len(place.rows) for place in self.places)
        values = np.memmap(self._file, np.float32, mode="r", shape=(rows, self.embodiment.width))
        starts = np.cumsum([0, *(len(place.rows) for place in self.places)])
        yield from self._frozen(values)
        yield from self._far(values, starts)
        yield from self._clipped(values, starts)
        yield from self._grippers(values, starts)

    def _frozen(self, values: np.ndarray) -> Iterator[tuple[Place, Fault]]:
        moves = np.stack(self._moves)
        for index, channel in enumerate(self.embodiment.action):
            if channel.low is not None and channel.low == channel.high:
                continue  # by its card
            if values[:, index].min() == values[:, index].max():
                words = f"{channel.name} is {values[0, index]:g} in every row of every episode"
                yield self.places[0], Fault(FROZEN, None, words)
            elif (
                moves[:, index].mean() >= OFTEN and moves[:, index].sum() >= ENOUGH and not _two_ends(values[:, index])
            ):
                for episode in np.flatnonzero(~moves[:, index]):
                    words = (
                        f"{channel.name} never changes, though it does in {moves[:, index].mean():.0%} of the episodes"
                    )
                    yield self.places[episode], Fault(FROZEN, None, words)

    def _far(self, values: np.ndarray, starts: np.ndarray) -> Iterator[tuple[Place, Fault]]:
        robot = self.embodiment
        statistics = Statistics("", robot.name, "", compute_moments([values], robot.width))
        kinds = dict.fromkeys((robot.normaliser, "quantile"))  # one far value alone stretches what minmax divides by
        kinds.pop("none", None)  # FAR is of normalised values, not of raw units
        normalisers = [Normaliser(replace(robot, normaliser=kind), statistics) for kind in kinds]
        for place, mine in self._episodes(values, starts):
            bad = np.zeros(mine.shape, bool)
            for normaliser in normalisers:
                bad |= (normaliser.normalise(torch.from_numpy(mine)).abs() > FAR).numpy()
            for index in np.flatnonzero(bad.any(axis=0)):
                words = (
                    f"{robot.action[index].name} is {mine[np.argmax(bad[:, index]), index]:g}, far beyond its usual "
                    f"{statistics.action.q01[index]:g} to {statistics.action.q99[index]:g} (1 % to 99 %)"
                )
                yield place, _first(OUT_OF_RANGE, bad[:, index], words)

    def _clipped(self, values: np.ndarray, starts: np.ndarray) -> Iterator[tuple[Place, Fault]]:
        """Channels that often stand at their largest or smallest value while the robot moves on."""
        for word, ends in (("largest", values.max(axis=0)), ("smallest", values.min(axis=0))):
            moving, rows, times, episodes = 0, *np.zeros((3, self.embodiment.width), int)
            first: dict[int, tuple[Place, int]] = {}
            for place, mine in self._episodes(values, starts):
                moves = (mine[1:] != mine[:-1]).any(axis=1)
                stands = _stands(mine == ends) & moves[:, None]
                moving += int(moves.sum())
                rows += stands.sum(axis=0)
                times += np.diff(stands, axis=0, prepend=False, append=False).sum(axis=0) // 2  # each begins and ends
                episodes += stands.any(axis=0)
                for index in np.flatnonzero(stands.any(axis=0)):
                    first.setdefault(int(index), (place, 1 + int(np.argmax(stands[:, index]))))
            often = (rows >= CUT_ROWS) & (rows >= CUT * moving)
            often &= (times >= ENOUGH) & (episodes >= min(ENOUGH, len(self.places)))
            for index in np.flatnonzero(often):
                channel, end = self.embodiment.action[index], float(ends[index])
                if _may_end(channel, end) or _two_ends(values[:, index]) or len(np.unique(values[:, index])) < FEW:
                    continue
                place, row = first[int(index)]
                words = (
                    f"{channel.name} stands at its {word} value {end:g} in {rows[index] / moving:.1%} of the rows that "
                    f"move, in {episodes[index]} of {len(self.places)} episodes: was it cut off when it was recorded? "
                    f"A model learns to stop there too; if the robot does, say so as the channel's "
                    f"{'high' if word == 'largest' else 'low'} in the embodiment card"
                )
                yield place, Fault(CLIPPED, row, words)

    def _episodes(self, values: np.ndarray, starts: np.ndarray) -> Iterator[tuple[Place, np.ndarray]]:
        """Each episode's actions [T, W]."""
        for place, first in zip(self.places, starts, strict=False):
            yield place, np.array(values[first : first + len(place.rows)])

    def _grippers(self, values: np.ndarray, starts: np.ndarray) -> Iterator[tuple[Place, Fault]]:
        """A two-valued gripper whose values are not the card's, or, for robots begin with an open hand, that begins
        closed nearly always."""
        for index, channel in enumerate(self.embodiment.action):
            ends = gripper_ends(channel.meaning)
            if ends is None or not _two_ends(values[:, index]):
                continue
            low, high = float(values[:, index].min()), float(values[:, index].max())
            if max(abs(low - min(ends)), abs(high - max(ends))) > 0.2 * abs(ends.open - ends.closed):
                words = f"{channel.name} is {low:g} or {high:g}, which are not the card's ends ({channel.meaning!r})"
                yield self.places[0], Fault(GRIPPER, None, words)
                continue
            moving = [place for place in range(len(self.places)) if self._moves[place][index]]
            begins = np.array([values[starts[place], index] for place in moving])
            closed = np.abs(begins - ends.closed) < np.abs(begins - ends.open)
            if len(moving) >= ENOUGH and closed.mean() >= OFTEN:
                words = (
                    f"{channel.name} begins at {begins[0]:g} in {closed.mean():.0%} of the {len(moving)} episodes in "
                    f"which it changes, which the card calls closed ({channel.meaning!r}): is it open?"
                )
                yield self.places[moving[int(np.argmax(closed))]], Fault(GRIPPER, 0, words)


class Ends(NamedTuple):
    """The numbers of a closed and of an open gripper."""

    closed: float
    open: float


def gripper_ends(meaning: str) -> Ends | None:
    """Of a channel whose meaning says both, such as "gripper, 0 closed, 1 open"; None for any other."""
    found = {
        word: float(number) for number, word in re.findall(r"(-?\d+(?:\.\d+)?)\s*(?:is\s+)?(closed|open)", meaning)
    }
    return Ends(found["closed"], found["open"]) if len(found) == 2 else None


def _stands(at_end: np.ndarray) -> np.ndarray:
    """bool [T - 1, W], of rows from the second on: at the end as the row before was, from [T, W], which rows are.

    Not where an episode begins or ends so: an arm that is parked there, or rests before and after its work, is not cut.
    """
    came = np.logical_or.accumulate(~at_end, axis=0)
    goes = np.logical_or.accumulate(~at_end[::-1], axis=0)[::-1]
    return (at_end & came & goes)[1:] & at_end[:-1]


def _may_end(channel: Channel, end: float) -> bool:
    """Whether a channel's values end there by nature: at 0 (a speed, a force), at the card's range, a gripper's, or a
    rotation's."""
    stated = [side for side in (channel.low, channel.high) if side is not None]
    gripper = gripper_ends(channel.meaning) is not None or "gripper" in f"{channel.name} {channel.meaning}".lower()
    return end == 0 or channel.rotation or gripper or any(np.isclose(end, side, rtol=1e-6) for side in stated)


def _two_ends(values: np.ndarray) -> bool:
    """Whether nearly all numbers [N] lie at one of two ends, and some at each."""
    low, high = float(values.min()), float(values.max())
    near = 0.02 * (high - low)
    at_low, at_high = float((values <= low + near).mean()), float((values >= high - near).mean())
    return low < high and at_low + at_high > 0.98 and min(at_low, at_high) > 0
