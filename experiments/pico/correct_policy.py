"""Let the expert correct Cosmos3-Pico's own play, and keep what the expert does as poses.

    python experiments/pico/correct_policy.py --policy data/cosmos3_pico --seeds 600 --states FILE.npz

The log of an expert shows the places to which an expert comes. A policy that is a little off comes to others, near the
goal above all, and has to guess there. So here the policy plays for a while, then the expert takes over and is
recorded, then the policy plays again, until the block is home or the episode's time is over (DAgger: Ross, Gordon and
Bagnell, 2011). Each recording begins where the policy's own play led, and every recorded action is the expert's. What
comes out is a states file as `data/pusht/make_episodes.py --states` writes it, of contract pusht.

The policy's own noise differs with the seed of the episode; the file depends on `--seeds`, `--batch` and the weights.
"""

import argparse
import logging
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cosmos3_train.config import Model, load_embodiment
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.evaluation.sampling import RobotSampler
from cosmos3_train.evaluation.simulators.pusht import PushT
from cosmos3_train.export.usage import robot_statistics
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_backbone, load_parts

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data" / "pusht"))
from expert import Expert
from make_episodes import (
    CONTRACTS,
    DONE_COVERAGE,
    INSTRUCTION,
    LAST_DATA_SEED,
    LEAST_SECONDS,
    SECONDS_AFTER_DONE,
    Episode,
    Row,
    episode_of,
    save_states,
)

logger = logging.getLogger("correct_policy")

ROOT = Path(__file__).resolve().parents[2]
ROBOT = "pusht"
SOLVER_STEPS = 10
LOOKS = (1, 6)
"""How many chunks the policy plays before the expert takes over, drawn from this range."""
CORRECTION = (18, 34)
"""Steps of the expert's that are recorded then: a window takes 17 frames."""


class Play:
    """One seed's episode, in which policy and expert take turns."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.after_done = seed, 0, 0
        self.robot, self.expert = PushT(), Expert(PushT.control_hz)
        self.seen = self.robot.reset(seed)
        self.draws = np.random.default_rng([seed, 3])
        self.recorded: list[Episode] = []

    @property
    def over(self) -> bool:
        """Whether the time is up or the block has been home for a second."""
        return self.step >= self.robot.episode_steps or self.after_done >= SECONDS_AFTER_DONE * self.robot.control_hz

    def follow(self, chunk: np.ndarray) -> None:
        """Carry the policy's actions out."""
        for action in chunk:
            self._advance(action)

    def correct(self) -> None:
        """Let the expert play from here, and record it."""
        self.expert.reset()  # what it does next is what the picture asks for
        world, rows = self.robot.world, []
        for _ in range(int(self.draws.integers(*CORRECTION))):
            if self.over:
                break
            target = self.expert.target(world.agent, world.block, done=world.max_coverage > DONE_COVERAGE)
            action = self.robot.action_to((float(target[0]), float(target[1])))
            rows.append(Row(world.agent, world.block, action, self.robot.state_of(world.agent)))
            self._advance(action)
        if len(rows) >= LEAST_SECONDS * self.robot.control_hz:
            self.recorded.append(episode_of(self.seed, world.max_coverage, rows, CONTRACTS[ROBOT].look_of(self.seed)))

    def _advance(self, action: np.ndarray) -> None:
        if not self.over:
            self.seen = self.robot.step(action)
            self.step += 1
            self.after_done += self.robot.max_coverage > DONE_COVERAGE


def load_policy(folder: Path) -> RobotSampler:
    """The policy of a pipeline folder that says how its robot was normalised."""
    embodiment, device = load_embodiment(ROBOT, ROOT), torch.device("cpu")
    statistics = robot_statistics(folder, ROBOT)
    assert statistics is not None, f"{folder} has no statistics of robot {ROBOT}"
    model = Model(path=str(folder.resolve()), dtype="float32", checkpoint_activations=False)
    encoder = Encoder(load_parts(model, device), {ROBOT: embodiment})
    return RobotSampler(
        load_backbone(model, device), encoder, embodiment, Normaliser(embodiment, statistics), SOLVER_STEPS
    )


def play_batch(policy: RobotSampler, seeds: list[int]) -> list[Episode]:
    """The recordings of these seeds' episodes, played in lockstep, in the order of the seeds."""
    plays = [Play(seed) for seed in seeds]
    look = 0
    while running := [play for play in plays if not play.over]:
        turns = [int(play.draws.integers(*LOOKS)) for play in running]
        for turn in range(max(turns)):
            acting = [play for play, last in zip(running, turns, strict=True) if turn < last and not play.over]
            if not acting:
                break
            chunks = policy.act(
                [play.seen.image for play in acting],
                [play.seen.state for play in acting],
                INSTRUCTION,
                0,
                [1000 * play.seed + look for play in acting],
            )
            for play, chunk in zip(acting, chunks, strict=True):
                play.follow(chunk[: policy.embodiment.execute])
            look += 1
        for play in running:
            play.correct()
    return [episode for play in plays for episode in play.recorded]


_policy: RobotSampler | None = None


def _start(folder: Path) -> None:
    global _policy
    torch.set_num_threads(1)
    _policy = load_policy(folder)


def _play(seeds: list[int]) -> list[Episode]:
    assert _policy is not None
    return play_batch(_policy, seeds)


def main() -> None:
    """Play, correct, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("data/cosmos3_pico"))
    parser.add_argument("--first-seed", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, default=600)
    parser.add_argument("--batch", type=int, default=20, help="episodes that a worker plays in lockstep")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--states", type=Path, required=True, metavar="FILE.npz")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    if seeds[-1] > LAST_DATA_SEED:
        parser.error(f"--first-seed {seeds[0]} --seeds {len(seeds)}: data come from seeds 0 to {LAST_DATA_SEED}")
    batches = [seeds[first : first + options.batch] for first in range(0, len(seeds), options.batch)]
    if robot_statistics(options.policy, ROBOT) is None:
        parser.error(f"--policy {options.policy}: no statistics of robot {ROBOT} say what its actions mean")
    options.states.parent.mkdir(parents=True, exist_ok=True)
    partial = options.states.with_suffix(".partial.npz")
    context = multiprocessing.get_context("spawn")
    kept: list[Episode] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(options.workers, context, _start, (options.policy,)))
        bar = stack.enter_context(tqdm(total=len(seeds), unit="seed"))
        for batch, recorded in zip(batches, pool.map(_play, batches), strict=True):
            kept += recorded
            bar.update(len(batch))
            save_states(ROBOT, kept, partial)
    partial.replace(options.states)
    steps = sum(len(episode.action) for episode in kept)
    logger.info("%s: %d corrections of %d seeds, %d steps", options.states, len(kept), len(seeds), steps)


if __name__ == "__main__":
    main()
