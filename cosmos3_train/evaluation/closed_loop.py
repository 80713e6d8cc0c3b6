"""A policy in its world: all episodes in lockstep, one pack a look.

The protocol: 30 simulated seconds an episode; at each look the policy sees the picture (and the state, where its
embodiment has a state row), gives a chunk, and the first `execute` actions are carried out unseen. Its score is the
largest coverage of the episode. The simulator is never read to act.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from cosmos3_train.config import Embodiment, UserError, nearest
from cosmos3_train.data.actions import still
from cosmos3_train.evaluation.sampling import RobotSampler
from cosmos3_train.evaluation.simulators import SIMULATORS, Observation, Simulator
from cosmos3_train.runtime import leave_if_asked

SECONDS = 30.0
"""Simulated length of an episode."""

LOOKS_PER_EPISODE = 1 << 20
"""Above the looks of any episode, so that (episode, look) is one number for the noise."""


@dataclass(frozen=True)
class Episode:
    """One rollout.

    seed:         that the simulator was reset with
    max_coverage: the largest of the episode, in [0, 1];  last_coverage: at its end
    looks:        how often the policy was asked
    frames:       uint8 [H, W, 3] at every look and at the end, only where it was filmed
    times:        simulated seconds of the frames
    """

    seed: int
    max_coverage: float
    last_coverage: float
    looks: int
    frames: list[np.ndarray] = field(default_factory=list, repr=False)
    times: list[float] = field(default_factory=list, repr=False)


def rollout(
    policy: RobotSampler,
    simulator: str,
    seeds: Sequence[int],
    instruction: str,
    *,
    seconds: float = SECONDS,
    execute: int | None = None,
    noise_seed: int = 0,
    record: Collection[int] = (),
    progress: bool = True,
) -> list[Episode]:
    """Roll a policy out from every seed, all in lockstep.

    Args:
        simulator: its name, see `simulators.SIMULATORS`.
        seeds: of the episodes; never those that made training data.
        instruction: the words given to the policy.
        seconds: simulated length of an episode.
        execute: actions of a chunk carried out before the next look; None takes the embodiment's.
        noise_seed: of the policy's noise, drawn from (noise_seed, episode seed, look).
        record: seeds of the episodes to film.

    Returns:
        Episodes in the order of `seeds`.

    Raises:
        UserError: no such simulator, or it is not this embodiment's.
    """
    card = policy.embodiment
    worlds = [make_simulator(simulator, card) for _ in seeds]
    steps = _steps(seconds, worlds[0]) if worlds else 0
    execute = execute or card.execute
    seen = [world.reset(seed) for world, seed in zip(worlds, seeds, strict=True)]
    films: dict[int, list[tuple[float, np.ndarray]]] = {seed: [] for seed in seeds if seed in record}
    with tqdm(total=steps, desc="closed loop", unit="step", disable=not progress, dynamic_ncols=True) as bar:
        for look, start in enumerate(range(0, steps, execute)):
            _film(films, seeds, seen, start / worlds[0].control_hz)
            numbers = [seed * LOOKS_PER_EPISODE + look for seed in seeds]
            images, states = [o.image for o in seen], [o.state for o in seen]
            chunks = policy.act(images, states if card.state_row else None, instruction, noise_seed, numbers)
            count = min(execute, steps - start)
            seen = [_carry_out(world, chunk[:count]) for world, chunk in zip(worlds, chunks, strict=True)]
            bar.update(count)
            bar.set_postfix_str(f"coverage {np.mean([world.max_coverage for world in worlds]):.3f}")
    if worlds:
        _film(films, seeds, seen, steps / worlds[0].control_hz)
    return [
        Episode(
            seed=seed,
            max_coverage=world.max_coverage,
            last_coverage=world.coverage,
            looks=math.ceil(steps / execute),
            frames=[frame for _, frame in films.get(seed, [])],
            times=[time for time, _ in films.get(seed, [])],
        )
        for world, seed in zip(worlds, seeds, strict=True)
    ]


def still_coverage(
    simulator: str, seeds: Sequence[int], embodiment: Embodiment, seconds: float = SECONDS
) -> list[Episode]:
    """The episodes of a robot that does nothing: it stays where it is, whatever it sees."""
    found = []
    world = make_simulator(simulator, embodiment)
    for seed in seeds:
        leave_if_asked()
        seen = world.reset(seed)
        for _ in range(_steps(seconds, world)):
            seen = world.step(stay(seen.state, embodiment))
        found.append(Episode(seed=seed, max_coverage=world.max_coverage, last_coverage=world.coverage, looks=0))
    return found


def stay(state: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """float32 [width]: the action that stays: zero in channels that are changes, the state in those that are places.

    Raises:
        UserError: a channel is a place and the state is not as wide as the action.
    """
    absolute = any(not channel.relative for channel in embodiment.action)
    if absolute and len(state) != embodiment.width:
        raise UserError(
            f"embodiment {embodiment.name!r}: standing still needs the robot's place, but its state has {len(state)} "
            f"numbers and its action {embodiment.width}; mark the channels that are changes with relative: true"
        )
    return still(embodiment, state).astype(np.float32)


def mean_coverage(episodes: Sequence[Episode]) -> float:
    """Mean of the episodes' largest coverages."""
    return float(np.mean([episode.max_coverage for episode in episodes]))


def standard_error(episodes: Sequence[Episode]) -> float:
    """Of `mean_coverage`; nan for fewer than two episodes."""
    values = [episode.max_coverage for episode in episodes]
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def make_simulator(name: str, embodiment: Embodiment) -> Simulator:
    """A simulator for an embodiment.

    Raises:
        UserError: unknown, or its action width or rate is not the embodiment's.
    """
    if name not in SIMULATORS:
        raise UserError(f"embodiment {embodiment.name!r}: simulator {name!r} is unknown.{nearest(name, SIMULATORS)}")
    world = SIMULATORS[name]()
    if world.action_width != embodiment.width or abs(world.control_hz - embodiment.control_hz) > 1e-6:
        raise UserError(
            f"embodiment {embodiment.name!r} has {embodiment.width} action channels at {embodiment.control_hz:g} Hz, "
            f"simulator {name!r} takes {world.action_width} at {world.control_hz:g} Hz; correct the card's simulator"
        )
    return world


def _steps(seconds: float, world: Simulator) -> int:
    return round(seconds * world.control_hz)


def _carry_out(world: Simulator, actions: np.ndarray) -> Observation:
    seen = None
    for action in actions:
        seen = world.step(action)
    assert seen is not None
    return seen


def _film(
    films: dict[int, list[tuple[float, np.ndarray]]], seeds: Sequence[int], seen: Sequence[Observation], time: float
) -> None:
    for seed, observation in zip(seeds, seen, strict=True):
        if seed in films:
            films[seed].append((time, observation.image))
