"""Makes PushT episodes by the expert, as a LeRobot v3.0 log.

    python data/pusht/make_episodes.py --contract pusht --episodes 60 --first-seed 60000 --output DIR

Episodes are planned in `--workers` processes and written in the order of their seeds, so the log does not depend
on how many there are. An episode ends one second after coverage first passes 0.95, or after 30 s; one whose
largest coverage is below `--least-coverage` is counted and left out, and the next seed takes its place.
`--states FILE.npz` also stores the poses, from which `--from-states FILE.npz` draws the same log without
planning, with neither the physics nor OpenCV installed.

Seeds 0 to 89,999 make data; 100,000 to 100,049 are for evaluation and are never used here.
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cosmos3_train.data.lerobot_writer import LeRobotWriter
from cosmos3_train.evaluation.simulators.pusht_camera import IMAGE_PIXELS, PushTCamera

INSTRUCTION = "Push the T-shaped block onto the T-shaped target."
CAMERA = "observation.images.top"
LAST_DATA_SEED = 89_999
EVALUATION_SEEDS = range(100_000, 100_050)
DONE_COVERAGE = 0.95
SECONDS_AFTER_DONE = 1.0


@dataclass(frozen=True)
class Contract:
    """What differs between the two logs."""

    fps: int
    channels: tuple[str, str]
    state: tuple[str, str]
    moved_camera: bool


CONTRACTS = {
    "pusht": Contract(10, ("target_x_px", "target_y_px"), ("agent_x_px", "agent_y_px"), False),
    "pusht_moves": Contract(5, ("move_y_cm", "move_x_cm"), ("agent_y_cm", "agent_x_cm"), True),
}


@dataclass(frozen=True)
class Episode:
    """One episode of T steps as poses, from which its pictures can be drawn."""

    seed: int
    max_coverage: float
    agent: np.ndarray
    """float32 [T, 2] x, y px, before the step."""
    block: np.ndarray
    """float32 [T, 3] x px, y px, angle rad, before the step."""
    action: np.ndarray
    """float32 [T, 2] in the contract's units."""
    state: np.ndarray
    """float32 [T, 2] in the contract's units."""


def plan_episode(contract: str, seed: int) -> Episode:
    """Let the expert play the episode of `seed`."""
    assert 0 <= seed <= LAST_DATA_SEED and seed not in EVALUATION_SEEDS, f"seed {seed} may not make data"
    # Here, not above: drawing stored states needs neither.
    from expert import Expert

    from cosmos3_train.evaluation.simulators.pusht import PushT, PushTMoves

    robot = PushT() if contract == "pusht" else PushTMoves()
    expert, world = Expert(robot.control_hz), robot.world
    world.reset(seed)
    rows: list[tuple[tuple[float, ...], tuple[float, ...], np.ndarray, np.ndarray]] = []
    steps_after_done = 0
    for _ in range(robot.episode_steps):
        done = world.max_coverage > DONE_COVERAGE
        steps_after_done += done
        if steps_after_done > SECONDS_AFTER_DONE * robot.control_hz:
            break
        target = expert.target(world.agent, world.block, done=done)
        action = robot.action_to((float(target[0]), float(target[1])))
        rows.append((world.agent, world.block, action, robot.state_of(world.agent)))
        world.drive(robot.target_of(action), 1.0 / robot.control_hz)
    agent, block, action, state = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    return Episode(seed, world.max_coverage, agent, block, action, state)


def draw(contract: str, episode: Episode) -> np.ndarray:
    """Pictures uint8 [T, 96, 96, 3] of an episode, by the contract's camera."""
    camera = PushTCamera(moved=CONTRACTS[contract].moved_camera)
    poses = zip(episode.agent.tolist(), episode.block.tolist(), strict=True)
    return np.stack([camera.draw(agent, block) for agent, block in poses])


def _planned(contract: str, seed: int, least: float) -> tuple[Episode, np.ndarray | None]:
    episode = plan_episode(contract, seed)
    return episode, draw(contract, episode) if episode.max_coverage >= least else None


def planned_episodes(
    contract: str, first_seed: int, workers: int, least: float
) -> Iterator[tuple[Episode, np.ndarray | None]]:
    """Episodes from `first_seed` on, in order; the picture is None where coverage stayed below `least`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: list[Future[tuple[Episode, np.ndarray | None]]] = []
        seeds = iter(range(first_seed, LAST_DATA_SEED + 1))
        try:
            while True:
                for seed in seeds:
                    waiting.append(pool.submit(_planned, contract, seed, least))
                    if len(waiting) >= 3 * workers:
                        break
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def stored_episodes(contract: str, file: Path) -> Iterator[tuple[Episode, np.ndarray | None]]:
    """Episodes of a states file, drawn; ValueError where it is of another contract."""
    with np.load(file, allow_pickle=False) as stored:
        if str(stored["contract"]) != contract:
            raise ValueError(f"--from-states {file} holds contract {stored['contract']}; --contract is {contract}")
        arrays = {name: stored[name] for name in stored.files}
    ends = np.cumsum(arrays["length"])
    for k, (end, length) in enumerate(zip(ends.tolist(), arrays["length"].tolist(), strict=True)):
        part = {name: arrays[name][end - length : end] for name in ("agent", "block", "action", "state")}
        episode = Episode(int(arrays["seed"][k]), float(arrays["max_coverage"][k]), **part)
        yield episode, draw(contract, episode)


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
    if options.from_states is not None:
        source = stored_episodes(options.contract, options.from_states)
    else:
        source = planned_episodes(options.contract, options.first_seed, options.workers, options.least_coverage)
    kept: list[Episode] = []
    left_out = 0
    writer = LeRobotWriter(
        options.output,
        fps=contract.fps,
        cameras={CAMERA: (IMAGE_PIXELS, IMAGE_PIXELS)},
        columns={"action": list(contract.channels), "observation.state": list(contract.state)},
        robot_type=options.contract,
        crf=options.crf,
        gop=options.gop,
    )
    with writer, tqdm(total=options.episodes, unit="episode", disable=None) as bar:
        for episode, pictures in source:
            if pictures is None:
                left_out += 1
                continue
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
    size = sum(f.stat().st_size for f in options.output.rglob("*") if f.is_file())
    print(
        f"{options.output}: {len(kept)} episodes of seeds {kept[0].seed} to {kept[-1].seed} ({left_out} left out), "
        f"{steps.sum()} steps ({steps.mean():.0f} an episode), mean largest coverage {coverage.mean():.3f} "
        f"(least {coverage.min():.3f}), {size / 1e6:.2f} MB"
    )


def main() -> None:
    """Read the command line and make the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contract", choices=sorted(CONTRACTS), required=True)
    parser.add_argument("--episodes", type=int, default=100, help="episodes to keep")
    parser.add_argument("--first-seed", type=int, default=0, help=f"0 to {LAST_DATA_SEED}")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--workers", type=int, default=1, help="processes that plan")
    parser.add_argument("--crf", type=int, default=23, help="H.264 rate factor: higher is smaller and worse")
    parser.add_argument("--gop", type=int, default=2, help="frames from key frame to key frame: higher is smaller")
    parser.add_argument("--least-coverage", type=float, default=0.9, help="leave out episodes below this")
    parser.add_argument("--states", type=Path, help="also store the poses in this npz file")
    parser.add_argument("--from-states", type=Path, help="draw this file's episodes; plan nothing")
    options = parser.parse_args()
    if not 0 <= options.first_seed <= LAST_DATA_SEED:
        parser.error(f"--first-seed {options.first_seed}: data come from seeds 0 to {LAST_DATA_SEED}")
    if options.output.exists():
        parser.error(f"--output {options.output} exists: name a new folder or remove that one")
    make_log(options)


if __name__ == "__main__":
    main()
