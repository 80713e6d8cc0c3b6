"""Rollouts in the real simulators, with a random model: lockstep, films, counting, and the robot that stands still."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from cosmos3_train.config import Channel, UserError, load_embodiment
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.data.statistics import Moments, Statistics
from cosmos3_train.evaluation.closed_loop import (
    Episode,
    make_simulator,
    mean_coverage,
    rollout,
    standard_error,
    stay,
    still_coverage,
)
from cosmos3_train.evaluation.sampling import RobotSampler
from cosmos3_train.evaluation.simulators import SIMULATORS
from cosmos3_train.model.encoders import Encoder
from tests.data.logs import embodiment
from tests.evaluation.tiny import tiny_backbone, tiny_parts

ROOT = Path(__file__).parents[2]


def policy_for(name: str) -> RobotSampler:
    card = load_embodiment(name, ROOT)
    low, high = ([0.0, 0.0], [512.0, 512.0]) if name == "pusht" else ([-30.0, -30.0], [30.0, 30.0])
    moments = Moments(count=9, mean=low, std=high, min=low, max=high, q01=low, q10=low, q50=low, q90=high, q99=high)
    normaliser = Normaliser(card, Statistics("d", name, "f", moments))
    return RobotSampler(tiny_backbone(), Encoder(tiny_parts(), {name: card}), card, normaliser, steps=2)


@pytest.fixture(scope="module")
def moves() -> RobotSampler:
    return policy_for("pusht_moves")


def test_all_seeds_in_lockstep_are_the_seeds_one_by_one(moves):
    seeds = [100000, 100003, 100007]
    together = rollout(moves, "pusht_moves", seeds, "Push.", seconds=4.8, record=seeds, progress=False)
    assert [e.seed for e in together] == seeds
    for episode in together:
        (alone,) = rollout(moves, "pusht_moves", [episode.seed], "Push.", seconds=4.8, record=seeds, progress=False)
        assert episode.max_coverage == pytest.approx(alone.max_coverage, abs=1e-2)
        for ours, theirs in zip(episode.frames, alone.frames, strict=True):
            assert np.mean(ours != theirs) < 0.02  # rounding in the pack may move an edge by a pixel


def test_looks_steps_and_films(moves):
    (filmed, plain) = rollout(moves, "pusht_moves", [1, 2], "Push.", seconds=4.0, execute=8, record=[1], progress=False)
    # 4 s at 5 Hz are 20 steps: looks before steps 0, 8 and 16, and a last picture at the end.
    assert filmed.looks == 3 and filmed.times == [0.0, 1.6, 3.2, 4.0]
    assert len(filmed.frames) == 4 and filmed.frames[0].shape == (96, 96, 3) and filmed.frames[0].dtype == np.uint8
    assert not np.array_equal(filmed.frames[0], filmed.frames[-1])
    assert plain.frames == [] and plain.times == []
    assert np.array_equal(filmed.frames[0], SIMULATORS["pusht_moves"]().reset(1).image)
    assert filmed.max_coverage >= filmed.last_coverage >= 0
    (longer,) = rollout(moves, "pusht_moves", [1], "Push.", seconds=4.0, progress=False, execute=20)
    assert longer.looks == 1


def test_the_same_rollout_twice_is_the_same(moves):
    one, two = (rollout(moves, "pusht_moves", [5], "Push.", seconds=3.2, record=[5], progress=False)[0] for _ in "ab")
    assert one.max_coverage == two.max_coverage
    assert all(np.array_equal(a, b) for a, b in zip(one.frames, two.frames, strict=True))
    (other,) = rollout(moves, "pusht_moves", [5], "Push.", seconds=3.2, record=[5], noise_seed=1, progress=False)
    assert not np.array_equal(one.frames[-1], other.frames[-1])


def test_both_contracts_run():
    (episode,) = rollout(policy_for("pusht"), "pusht", [100001], "Push.", seconds=1.6, progress=False)
    assert episode.looks == 2 and 0 <= episode.max_coverage <= 1


@pytest.mark.parametrize("name", ["pusht", "pusht_moves"])
def test_standing_still_moves_nothing(name):
    card = load_embodiment(name, ROOT)
    world = make_simulator(name, card)
    before = world.reset(100004)
    for _ in range(20):
        after = world.step(stay(before.state, card))
    assert np.abs(after.state - before.state).max() < 0.5
    (episode,) = still_coverage(name, [100004], card, seconds=4)
    world.reset(100004)
    assert episode.max_coverage == pytest.approx(world.coverage, abs=0.02) and episode.looks == 0


def test_wrong_simulators_are_the_users_errors():
    card = load_embodiment("pusht", ROOT)
    with pytest.raises(UserError, match=r"'pushtt' is unknown\. Did you mean 'pusht'"):
        make_simulator("pushtt", card)
    with pytest.raises(UserError, match=r"at 10 Hz, simulator 'pusht_moves' takes 2 at 5 Hz"):
        make_simulator("pusht_moves", card)
    with pytest.raises(UserError, match="its state has 3 numbers"):
        stay(np.zeros(3), embodiment())
    assert stay(np.zeros(3), embodiment(action=[Channel("d", relative=True)])).tolist() == [0.0]


def test_means():
    episodes = [Episode(seed, value, value, 1) for seed, value in enumerate((0.2, 0.4, 0.9))]
    assert mean_coverage(episodes) == pytest.approx(0.5)
    assert standard_error(episodes) == pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1) / math.sqrt(3))
    assert math.isnan(standard_error(episodes[:1]))
