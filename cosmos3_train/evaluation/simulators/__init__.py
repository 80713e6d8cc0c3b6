"""Simulators for closed-loop evaluation: one small interface, and the table of those that exist.

A simulator shows its caller an image and a robot state, takes one action per control period, and reports
coverage for the score. It never ends an episode: the caller counts `episode_steps` (30 simulated seconds) and
stops when it likes. A policy acts on `Observation` only; `coverage` is for the report.

The physics packages belong to the development group, not to the package's dependencies, so a simulator's
module is imported when one is built, not when this table is read.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np


class Observation(NamedTuple):
    """What the robot sees at the start of a control period."""

    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    state: np.ndarray
    """float32 [S], in the robot's own units."""


class Simulator(Protocol):
    """One world, one robot. The same seed and actions give the same observations, bit for bit."""

    control_hz: float
    """Control periods per simulated second."""
    episode_steps: int
    """Control periods in 30 simulated seconds."""
    action_width: int
    """Channels of one action."""

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names."""
        ...

    def step(self, action: np.ndarray) -> Observation:
        """Act for one control period; `action` is float32 [action_width] in the robot's own units.

        Raises ValueError for another shape or a value that is not finite. Values off the table are clipped to it.
        """
        ...

    @property
    def coverage(self) -> float:
        """Share of the goal that the block covers now, in [0, 1]."""
        ...

    @property
    def max_coverage(self) -> float:
        """Largest coverage since `reset`, looked at every 0.1 simulated seconds in every contract."""
        ...


def _pusht() -> Simulator:
    from cosmos3_train.evaluation.simulators.pusht import PushT

    return PushT()


def _pusht_moves() -> Simulator:
    from cosmos3_train.evaluation.simulators.pusht import PushTMoves

    return PushTMoves()


SIMULATORS: dict[str, Callable[[], Simulator]] = {"pusht": _pusht, "pusht_moves": _pusht_moves}
"""Name as an embodiment card writes it -> constructor."""
