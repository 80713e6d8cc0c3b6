"""Makes PushT episodes by the expert, as a LeRobot v3.0 log.

    python data/pusht/make_episodes.py --contract pusht --episodes 60 --first-seed 60000 --output DIR

Episodes are planned in `--workers` processes and written in the order of their seeds, so the log does not depend
on how many there are. An episode ends one second after coverage first passes 0.95, or after 30 s; one whose
largest coverage is below `--least-coverage` is counted and left out, and the next seed takes its place.
`--states FILE.npz` also stores the poses, from which `--from-states FILE.npz ...` draws the same log without
planning, with neither the physics nor OpenCV installed; without `--output` nothing is drawn. The contracts
pusht_turned and pusht_swapped are drawn so from pusht's poses alone: the same play, told by robots with other
actions, rates and cameras, from which Cosmos3-Pico learns that robots differ. pusht_turned's camera hangs another
way in each episode, and its moves are what that camera sees.

`--disturbed SHARE` knocks the agent off its course every few seconds in that share of the seeds. What happens
during a knock is not recorded: the log goes on with a new episode right after it, so that every recorded action is
the expert's own and the log shows how to recover from places to which the expert alone would never have come.

Seeds 0 to 89,999 make data; 100,000 to 100,049 are for evaluation and are never used here.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cosmos3_train.data.lerobot_writer import LeRobotWriter
from cosmos3_train.evaluation.simulators.pusht_camera import IMAGE_PIXELS, LOOKS, TABLE_PIXELS, Look, PushTCamera

INSTRUCTION = "Push the T-shaped block onto the T-shaped target."
CAMERA = "observation.images.top"
LAST_DATA_SEED = 89_999
EVALUATION_SEEDS = range(100_000, 100_050)
DONE_COVERAGE = 0.95
SECONDS_AFTER_DONE = 1.0
LEAST_SECONDS = 1.7
"""A shorter recording between two knocks holds no window of 17 frames at 10 Hz and is dropped."""
EPISODES_AHEAD = 128
"""Stored episodes drawn at a time: 1.4 MB each."""
KNOCK_EVERY_SECONDS = (1.8, 6.0)
KNOCK_SECONDS = (0.2, 0.6)
KNOCK_PX = 45.0
"""Standard deviation, per axis, of where a knock pulls the agent from where it is."""


@dataclass(frozen=True)
class Contract:
    """What differs between the logs.

    looks:   of the camera, keys of `LOOKS`, by turns over the seeds
    told:    (actions, states) of this contract from target and agent [T, 2] in table pixels and the camera's look; None
             where the contract has a simulator, in which the expert plays
    every:   of the stored steps, which are 10 a second: every how many-th is told
    """

    fps: int
    channels: tuple[str, str]
    state: tuple[str, str]
    looks: tuple[str, ...]
    told: Callable[[np.ndarray, np.ndarray, Look], tuple[np.ndarray, np.ndarray]] | None = None
    every: int = 1

    def look_of(self, seed: int) -> str:
        """The camera's look in the episodes of a seed."""
        return self.looks[seed % len(self.looks)]


def _told_as_seen(target: np.ndarray, agent: np.ndarray, look: Look) -> tuple[np.ndarray, np.ndarray]:
    move, seen = target - agent, agent
    for _ in range(look.turns % 4):
        move = np.stack([move[:, 1], -move[:, 0]], 1)
        seen = np.stack([seen[:, 1], TABLE_PIXELS - seen[:, 0]], 1)
    return move, seen


def _told_swapped(target: np.ndarray, agent: np.ndarray, look: Look) -> tuple[np.ndarray, np.ndarray]:
    return target[:, ::-1] / PIXELS_PER_DECIMETRE, agent[:, ::-1] / PIXELS_PER_DECIMETRE


PIXELS_PER_DECIMETRE = TABLE_PIXELS / 10.0
CONTRACTS = {
    "pusht": Contract(10, ("target_x_px", "target_y_px"), ("agent_x_px", "agent_y_px"), ("own",)),
    "pusht_moves": Contract(5, ("move_y_cm", "move_x_cm"), ("agent_y_cm", "agent_x_cm"), ("warm",)),
    "pusht_turned": Contract(
        10, ("move_x_px", "move_y_px"), ("agent_x_px", "agent_y_px"), ("grey", "violet", "cool", "dim"), _told_as_seen
    ),
    "pusht_swapped": Contract(
        5, ("target_y_dm", "target_x_dm"), ("agent_y_dm", "agent_x_dm"), ("dim",), _told_swapped, every=2
    ),
}


class Row(NamedTuple):
    """A step of an episode, before it is made."""

    agent: tuple[float, float]
    block: tuple[float, float, float]
    action: np.ndarray
    state: np.ndarray


@dataclass(frozen=True)
class Episode:
    """One episode of T steps as poses, from which its pictures can be drawn."""

    seed: int
    max_coverage: float
    """Of the whole play of the seed."""
    agent: np.ndarray
    """float32 [T, 2] x, y px, before the step."""
    block: np.ndarray
    """float32 [T, 3] x px, y px, angle rad, before the step."""
    action: np.ndarray
    """float32 [T, 2] in the contract's units."""
    state: np.ndarray
    """float32 [T, 2] in the contract's units."""
    look: str
    """Of the camera, a key of `LOOKS`."""


def plan_episodes(contract: str, seed: int, *, disturbed: bool = False) -> list[Episode]:
    """Let the expert play from the start of `seed`: one episode, or those between the knocks where `disturbed`."""
    assert 0 <= seed <= LAST_DATA_SEED and seed not in EVALUATION_SEEDS, f"seed {seed} may not make data"
    # Here, not above: drawing stored states needs neither.
    from expert import Expert

    from cosmos3_train.evaluation.simulators.pusht import PushT, PushTMoves

    robot = PushT() if contract == "pusht" else PushTMoves()
    expert, world = Expert(robot.control_hz), robot.world
    world.reset(seed)
    draws = np.random.default_rng([seed, 1])
    recordings: list[list[Row]] = [[]]
    until_knock = _steps_between(draws, KNOCK_EVERY_SECONDS, robot.control_hz) if disturbed else robot.episode_steps
    step, steps_after_done = 0, 0
    while step < robot.episode_steps:
        done = world.max_coverage > DONE_COVERAGE
        steps_after_done += done
        if steps_after_done > SECONDS_AFTER_DONE * robot.control_hz:
            break
        if until_knock == 0 and not done:
            knock = np.array(world.agent) + draws.normal(0.0, KNOCK_PX, 2)
            for _ in range(_steps_between(draws, KNOCK_SECONDS, robot.control_hz)):
                world.drive((float(knock[0]), float(knock[1])), 1.0 / robot.control_hz)
                step += 1
            until_knock = _steps_between(draws, KNOCK_EVERY_SECONDS, robot.control_hz)
            expert.reset()  # what it does next is what the picture after the knock asks for
            recordings.append([])
            continue
        target = expert.target(world.agent, world.block, done=done)
        action = robot.action_to((float(target[0]), float(target[1])))
        recordings[-1].append(Row(world.agent, world.block, action, robot.state_of(world.agent)))
        world.drive(robot.target_of(action), 1.0 / robot.control_hz)
        step, until_knock = step + 1, until_knock - (not done)
    shortest = LEAST_SECONDS * robot.control_hz if disturbed else 1
    look = CONTRACTS[contract].look_of(seed)
    return [episode_of(seed, world.max_coverage, rows, look) for rows in recordings if len(rows) >= shortest]


def _steps_between(draws: np.random.Generator, seconds: tuple[float, float], control_hz: float) -> int:
    return round(draws.uniform(*seconds) * control_hz)


def episode_of(seed: int, max_coverage: float, rows: list[Row], look: str) -> Episode:
    """What was recorded of a seed, as a camera's look shows it."""
    agent, block, action, state = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    return Episode(seed, max_coverage, agent, block, action, state, look)


def draw(episode: Episode) -> np.ndarray:
    """Pictures uint8 [T, 96, 96, 3] of an episode, by its camera."""
    camera = PushTCamera(episode.look)
    poses = zip(episode.agent.tolist(), episode.block.tolist(), strict=True)
    return np.stack([camera.draw(agent, block) for agent, block in poses])


_Drawn = list[tuple[Episode, np.ndarray | None]]
"""Episodes of one seed with their pictures, or without where none are wanted."""


def _planned(contract: str, seed: int, disturbed: bool, least: float, drawn: bool) -> _Drawn:
    played = plan_episodes(contract, seed, disturbed=disturbed)
    return [(e, draw(e) if drawn else None) for e in played if e.max_coverage >= least]


def planned_episodes(options: argparse.Namespace) -> Iterator[_Drawn]:
    """Episodes from `--first-seed` on, seed by seed in order; none of a seed whose coverage stayed too low."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        waiting: list[Future[_Drawn]] = []
        seeds = iter(range(options.first_seed, LAST_DATA_SEED + 1))
        drawn = options.output is not None
        try:
            while True:
                for seed in seeds:
                    disturbed = np.random.default_rng([seed, 2]).random() < options.disturbed
                    task = (options.contract, seed, bool(disturbed), options.least_coverage, drawn)
                    waiting.append(pool.submit(_planned, *task))
                    if len(waiting) >= 3 * options.workers:
                        break
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def read_states(contract: str, file: Path) -> list[Episode]:
    """Episodes of a states file, as `save_states` wrote it, told as `contract` tells them.

    Raises:
        ValueError: the file is of another contract's play.
    """
    teller = CONTRACTS[contract]
    with np.load(file, allow_pickle=False) as stored:
        if str(stored["contract"]) != (contract if teller.told is None else "pusht"):
            raise ValueError(f"--from-states {file} holds contract {stored['contract']}; --contract is {contract}")
        arrays = {name: stored[name] for name in stored.files}
    ends = np.cumsum(arrays["length"])
    episodes = []
    for k, (end, length) in enumerate(zip(ends.tolist(), arrays["length"].tolist(), strict=True)):
        part = {name: arrays[name][end - length : end] for name in ("agent", "block", "action", "state")}
        seed = int(arrays["seed"][k])
        look = teller.look_of(seed)
        if teller.told is not None:
            action, state = teller.told(part["action"], part["agent"], LOOKS[look])
            part |= {"action": action.astype(np.float32), "state": state.astype(np.float32)}
            part = {name: values[:: teller.every] for name, values in part.items()}
        episodes.append(Episode(seed, float(arrays["max_coverage"][k]), **part, look=look))
    return episodes


def stored_episodes(contract: str, files: list[Path], workers: int) -> Iterator[_Drawn]:
    """Episodes of states files, in their order, drawn by `workers` processes."""
    episodes = [episode for file in files for episode in read_states(contract, file)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for first in range(0, len(episodes), EPISODES_AHEAD):  # drawn faster than written: without an end memory fills
            some = episodes[first : first + EPISODES_AHEAD]
            for pair in zip(some, pool.map(draw, some, chunksize=8), strict=True):
                yield [pair]


def save_states(contract: str, episodes: list[Episode], file: Path) -> None:
    """Write the poses: contract; seed, length, max_coverage [E]; agent, block, action, state [sum of T, ...]."""
    np.savez_compressed(
        file,
        contract=np.array(contract),
        seed=np.array([e.seed for e in episodes], np.int64),
        length=np.array([len(e.action) for e in episodes], np.int64),
        max_coverage=np.array([e.max_coverage for e in episodes], np.float32),
        agent=np.concatenate([e.agent for e in episodes]),
        block=np.concatenate([e.block for e in episodes]),
        action=np.concatenate([e.action for e in episodes]),
        state=np.concatenate([e.state for e in episodes]),
    )


def make_log(options: argparse.Namespace) -> None:
    """Write the log that the command line asks for, and say what is in it."""
    contract = CONTRACTS[options.contract]
    if options.from_states:
        seeds = stored_episodes(options.contract, options.from_states, options.workers)
    else:
        seeds = planned_episodes(options)
    kept: list[Episode] = []
    left_out = 0
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=options.episodes, unit="episode", disable=None))
        writer = None
        if options.output is not None:
            writer = LeRobotWriter(
                options.output,
                fps=contract.fps,
                cameras={CAMERA: (IMAGE_PIXELS, IMAGE_PIXELS)},
                columns={"action": list(contract.channels), "observation.state": list(contract.state)},
                robot_type=options.contract,
                crf=options.crf,
                gop=options.gop,
            )
            stack.enter_context(writer)
        for played in seeds:
            left_out += not played
            for episode, pictures in played[: options.episodes - len(kept)]:
                if writer is not None:
                    columns = {"action": episode.action, "observation.state": episode.state}
                    writer.add_episode({CAMERA: pictures}, columns, INSTRUCTION)
                kept.append(episode)
                bar.update()
            if len(kept) == options.episodes:
                break
    if options.states is not None:
        save_states(options.contract, kept, options.states)
    coverage = np.array([e.max_coverage for e in kept])
    steps = np.array([len(e.action) for e in kept])
    print(
        f"{options.output or options.states}: {len(kept)} episodes of seeds {kept[0].seed} to {kept[-1].seed} "
        f"({left_out} seeds left out), {steps.sum()} steps ({steps.mean():.0f} an episode), "
        f"mean largest coverage {coverage.mean():.3f} (least {coverage.min():.3f})"
    )


def main() -> None:
    """Read the command line and make the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contract", choices=sorted(CONTRACTS), required=True)
    parser.add_argument("--episodes", type=int, default=100, help="episodes to keep")
    parser.add_argument("--first-seed", type=int, default=0, help=f"0 to {LAST_DATA_SEED}")
    parser.add_argument("--output", type=Path, help="folder to make; must not exist. Without it: --states only")
    parser.add_argument("--workers", type=int, default=1, help="processes that plan and draw")
    parser.add_argument("--disturbed", type=float, default=0.0, help="share of the seeds that is knocked about")
    parser.add_argument("--crf", type=int, default=23, help="H.264 rate factor: higher is smaller and worse")
    parser.add_argument("--gop", type=int, default=2, help="frames from key frame to key frame: higher is smaller")
    parser.add_argument("--least-coverage", type=float, default=0.9, help="leave out episodes below this")
    parser.add_argument("--states", type=Path, help="also store the poses in this npz file")
    parser.add_argument("--from-states", type=Path, nargs="+", help="draw these files' episodes; plan nothing")
    options = parser.parse_args()
    if not 0 <= options.first_seed <= LAST_DATA_SEED:
        parser.error(f"--first-seed {options.first_seed}: data come from seeds 0 to {LAST_DATA_SEED}")
    if CONTRACTS[options.contract].told is not None and not options.from_states:
        parser.error(f"--contract {options.contract} is drawn from pusht's poses: give their file with --from-states")
    if options.output is None and (options.states is None or options.from_states):
        parser.error("nothing to write: name an --output folder, or a --states file for what is planned")
    if options.output is not None and options.output.exists():
        parser.error(f"--output {options.output} exists: name a new folder or remove that one")
    make_log(options)


if __name__ == "__main__":
    main()
