"""Actions in and out of the model's units, and the checks that a log's actions obey the embodiment card.

A normaliser is an affine map a channel, x ↦ (x − offset) / scale, built from (embodiment card, statistics of the train
split). Nothing is clipped: values beyond q01 and q99 lie beyond ±1, and the inverse restores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cosmos3_train.config import Channel, Embodiment, UserError
from cosmos3_train.data import poses
from cosmos3_train.data.statistics import Moments, Statistics


class Normaliser:
    """Between the robot's own units and the model's.

    quantile maps q01..q99 to [-1, 1], minmax min..max to [-1, 1], meanstd to mean 0 and deviation 1, none nothing.
    A channel that never changes maps to 0 and back to its constant. A channel whose q01 equals its q99 but that does
    change now and then (a gripper that is nearly always open) falls back to min..max, or the rare event would be lost.
    The state row is in the action's own units, so it takes the action's map.
    """

    def __init__(self, embodiment: Embodiment, statistics: Statistics) -> None:
        moments = statistics.action
        if len(moments.mean) != embodiment.width:
            raise UserError(
                f"statistics of dataset {statistics.dataset!r} have {len(moments.mean)} action channels, embodiment "
                f"{embodiment.name!r} has {embodiment.width}; prepare the dataset again"
            )
        offset, scale = _affine(moments, embodiment.normaliser)
        self.width = embodiment.width
        self.offset = torch.tensor(offset, dtype=torch.float64)
        self.scale = torch.tensor(scale, dtype=torch.float64)
        # A constant channel has scale 0: it becomes 0 whatever stands there.
        self._inverse = torch.where(self.scale == 0, 0.0, 1.0 / torch.where(self.scale == 0, 1.0, self.scale))

    def normalise(self, raw: Tensor) -> Tensor:
        """[..., width] in the robot's units → float32 [..., width] in the model's (computed in float64)."""
        self._check(raw)
        return ((raw.double().cpu() - self.offset) * self._inverse).float()

    def denormalise(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalise`: [..., width] in the model's units → float32 in the robot's."""
        self._check(normalised)
        return (normalised.double().cpu() * self.scale + self.offset).float()

    def normalise_moments(self, raw: Moments) -> Moments:
        """Moments of the normalised values, from those of the raw ones: the map rises, so quantiles stay in order."""
        std = torch.tensor(raw.std, dtype=torch.float64) * self._inverse
        places = {name: values for name, values in vars(raw).items() if name not in ("count", "std")}
        there = {name: self.normalise(torch.tensor(values, dtype=torch.float64)) for name, values in places.items()}
        return replace(raw, std=std.tolist(), **{name: values.tolist() for name, values in there.items()})

    def _check(self, values: Tensor) -> None:
        if values.shape[-1] != self.width:
            raise UserError(f"actions have {values.shape[-1]} channels, the embodiment card has {self.width}")


def _affine(moments: Moments, kind: str) -> tuple[np.ndarray, np.ndarray]:
    width = len(moments.mean)
    low, high = np.asarray(moments.min, np.float64), np.asarray(moments.max, np.float64)
    if kind == "none":
        return np.zeros(width), np.ones(width)
    if kind == "meanstd":
        offset, scale = np.asarray(moments.mean, np.float64), np.asarray(moments.std, np.float64)
    else:
        bottom, top = low, high
        if kind == "quantile":
            q01, q99 = np.asarray(moments.q01, np.float64), np.asarray(moments.q99, np.float64)
            bottom, top = np.where(q01 == q99, low, q01), np.where(q01 == q99, high, q99)
        offset, scale = (top + bottom) / 2, (top - bottom) / 2
    constant = low == high
    return np.where(constant, low, offset), np.where(constant, 0.0, scale)


def still(embodiment: Embodiment, place: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64 [width]: the action that stays: zero in channels that are changes (for a turn, the first two columns of
    the identity), and where the robot is, `place` [width], in the others."""
    action = np.zeros(embodiment.width)
    turned = 0
    for index, channel in enumerate(embodiment.action):
        if not channel.relative:
            action[index] = place[index]
        elif channel.rotation:
            action[index] = poses.STILL[3 + turned % 6]
            turned += 1
    return action


def check_actions(action: np.ndarray, embodiment: Embodiment, where: str) -> None:
    """Raise `UserError` for the first action that cannot be: wrong width, NaN, infinite, outside its channel's range.

    Args:
        action: [T, W] in the robot's own units.
        where: dataset and episode, for the message.
    """
    if action.shape[1] != embodiment.width:
        raise UserError(
            f"{where}: column {embodiment.action_key!r} has {action.shape[1]} numbers a row, embodiment "
            f"{embodiment.name!r} has {embodiment.width} channels; correct the card's action or action_key"
        )
    column = "recorded" if embodiment.recorded else embodiment.action_key
    check_finite(action, [channel.name for channel in embodiment.action], column, where)
    outside = outside_range(action, embodiment)
    if outside.any():
        row, index = (int(number) for number in np.argwhere(outside)[0])
        raise UserError(
            f"{where}, row {row}: action channel {embodiment.action[index].name!r} is {action[row, index]:g}, outside "
            f"its range {range_words(embodiment.action[index])}; correct the log or the embodiment card's range"
        )


def outside_range(action: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """bool [T, W]: where an action is outside the range that its channel's card gives."""
    outside = np.zeros(action.shape, dtype=bool)
    for index, channel in enumerate(embodiment.action):
        # float32 rounding of a bound itself (0.1 is stored as 0.100000001) is not an error of the log.
        if channel.low is not None:
            outside[:, index] |= action[:, index] < np.nextafter(np.float32(channel.low), np.float32(-np.inf))
        if channel.high is not None:
            outside[:, index] |= action[:, index] > np.nextafter(np.float32(channel.high), np.float32(np.inf))
    return outside


def range_words(channel: Channel) -> str:
    """A channel's range, for people."""
    low = "-inf" if channel.low is None else f"{channel.low:g}"
    high = "inf" if channel.high is None else f"{channel.high:g}"
    return f"{low} to {high}{' ' + channel.unit if channel.unit else ''}"


def check_finite(values: np.ndarray, names: list[str], column: str, where: str) -> None:
    """Raise `UserError` for the first NaN or infinite value of [T, W]; `names` are the channels'."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, channel = (int(number) for number in bad[0])
        raise UserError(
            f"{where}, row {row}: channel {names[channel]!r} of {column!r} is {values[row, channel]}; "
            "every value must be a finite number, so correct the log or drop the episode"
        )
