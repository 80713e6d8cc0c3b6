"""PushT's simulators: the same world as gym-pusht's, deterministic, and each contract as its card states it."""

import numpy as np
import pytest
from gym_pusht.envs.pusht import PushTEnv

from cosmos3_train.evaluation.simulators import SIMULATORS
from cosmos3_train.evaluation.simulators.pusht import PushT, PushTMoves
from cosmos3_train.evaluation.simulators.pusht_camera import PushTCamera


def _play(name: str, seed: int, steps: int) -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
    simulator = SIMULATORS[name]()
    draws = np.random.default_rng(seed)
    low, high = (0, 512) if name == "pusht" else (-20, 20)
    observations = [simulator.reset(seed)]
    coverages = [simulator.coverage]
    for _ in range(steps):
        observations.append(simulator.step(draws.uniform(low, high, 2).astype(np.float32)))
        coverages.append(simulator.coverage)
    return [o.image for o in observations], [o.state for o in observations], coverages


@pytest.mark.parametrize("name", sorted(SIMULATORS))
def test_same_seed_and_actions_give_the_same_episode(name: str) -> None:
    images, states, coverages = _play(name, 7, 40)
    again_images, again_states, again_coverages = _play(name, 7, 40)
    assert np.array_equal(images, again_images)
    assert np.array_equal(states, again_states)
    assert coverages == again_coverages
    assert not np.array_equal(images[0], images[-1])
    other_images, _, _ = _play(name, 8, 0)
    assert not np.array_equal(images[0], other_images[0])


@pytest.mark.parametrize("name", sorted(SIMULATORS))
def test_observations_have_the_stated_form(name: str) -> None:
    simulator = SIMULATORS[name]()
    for observation in (simulator.reset(3), simulator.step(np.full(2, 5, np.float32))):
        assert observation.image.shape == (96, 96, 3) and observation.image.dtype == np.uint8
        assert observation.image.flags.c_contiguous
        assert observation.state.shape == (2,) and observation.state.dtype == np.float32
    assert simulator.episode_steps / simulator.control_hz == 30
    assert simulator.action_width == 2


def test_the_world_is_gym_pushts() -> None:
    env, simulator = PushTEnv(obs_type="pixels"), PushT()
    draws = np.random.default_rng(0)
    squared = []
    for seed in (0, 11, 24):
        image, _ = env.reset(seed=seed)
        observation = simulator.reset(seed)
        squared.append((image.astype(float) - observation.image) ** 2)
        largest = simulator.coverage
        for _ in range(30):
            # Around the table's middle, so that the block is pushed about and not left alone.
            action = draws.uniform(130, 380, 2).astype(np.float32)
            image, _, _, _, info = env.step(action.astype(np.float64))
            observation = simulator.step(action)
            largest = max(largest, info["coverage"])
            np.testing.assert_array_equal(info["pos_agent"], simulator.world.agent)
            np.testing.assert_array_equal(info["block_pose"], simulator.world.block)
            assert simulator.coverage == info["coverage"]
            assert simulator.max_coverage == largest
            squared.append((image.astype(float) - observation.image) ** 2)
    assert 10 * np.log10(255**2 / np.mean(squared)) > 45


def test_moves_drive_the_target_from_the_agent_in_centimetres() -> None:
    moves, plain = PushTMoves(), PushT()
    start = moves.reset(5)
    plain.reset(5)
    x, y = moves.world.agent
    np.testing.assert_allclose(start.state * 5.12, (y, x), rtol=1e-6)
    dy, dx = 6.25, -12.5
    assert moves.target_of(np.array([dy, dx], np.float32)) == (max(x - 64, 0), y + 32)
    moved = moves.step(np.array([dy, dx], np.float32))
    for _ in range(2):  # one step at 5 Hz is two at 10 Hz with the target held
        plain.step(np.array([x - 64, y + 32], np.float32))
    np.testing.assert_allclose(moves.world.agent, plain.world.agent, atol=1e-4)
    assert moved.state[0] > start.state[0] and moved.state[1] < start.state[1]


def test_action_to_is_the_inverse_of_target_of() -> None:
    for simulator in (PushT(), PushTMoves()):
        simulator.reset(9)
        for target in ((0.0, 512.0), (100.5, 300.25), simulator.world.agent):
            np.testing.assert_allclose(simulator.target_of(simulator.action_to(target)), target, atol=1e-3)


def test_targets_off_the_table_are_clipped() -> None:
    assert PushT().target_of(np.array([-40.0, 9999.0])) == (0.0, 512.0)
    moves = PushTMoves()
    moves.reset(0)
    assert moves.target_of(np.array([-1000.0, 1000.0])) == (512.0, 0.0)


def test_the_moved_camera_is_turned_and_warmer() -> None:
    agent, block = (100.0, 400.0), (300.0, 200.0, 1.0)
    plain, moved = PushTCamera().draw(agent, block), PushTCamera("warm").draw(agent, block)
    turned = np.rot90(plain).astype(float)
    # The tint is monotonic in every channel, so the turned picture correlates with it and the unturned one less.
    for c in range(3):
        fit = np.corrcoef(turned[..., c].ravel(), moved[..., c].ravel())[0, 1]
        assert fit > 0.999 and fit > np.corrcoef(plain[..., c].ravel(), moved[..., c].ravel())[0, 1] + 0.1
    assert moved.mean() < 0.9 * plain.mean()
    assert moved[..., 0].mean() > moved[..., 2].mean() + 20


@pytest.mark.parametrize("name", sorted(SIMULATORS))
def test_standing_still_covers_little(name: str) -> None:
    simulator = SIMULATORS[name]()
    largest = []
    for seed in range(100_000, 100_020):
        observation = simulator.reset(seed)
        stay = observation.state if name == "pusht" else np.zeros(2, np.float32)
        for _ in range(3):
            simulator.step(stay)
        largest.append(simulator.max_coverage)
    assert min(largest) >= 0 and max(largest) <= 1
    assert np.mean(largest) < 0.15


@pytest.mark.parametrize("action", [np.zeros(3), np.zeros((1, 2)), np.array([np.nan, 0]), np.array([0, np.inf])])
def test_a_bad_action_is_refused(action: np.ndarray) -> None:
    simulator = PushT()
    simulator.reset(0)
    with pytest.raises(ValueError, match="action"):
        simulator.step(action)
