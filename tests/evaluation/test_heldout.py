"""Held-out loss against sums by hand, its spread over noise levels, and action errors against known baselines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cosmos3_train.config import Channel, Objective, UserError
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.evaluation.heldout import (
    action_error,
    action_tasks,
    band_shares,
    heldout_loss,
    hold_action,
    spread_level,
)
from cosmos3_train.flow.noise_levels import BANDS, draw_level
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.packing import Layout, draw_noise, noisy_values, pack
from cosmos3_train.runtime import draw
from cosmos3_train.types import IGNORED_LABEL, NoiseLevels, TokenSample
from tests.data.logs import dataset_card, embodiment, make_log
from tests.evaluation.tiny import tiny_backbone, tiny_parts
from tests.parity.upstream import make_sample


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def test_levels_are_spread_over_the_bands():
    for levels in (1, 2, 5):
        sigmas = [spread_level(place, turn, levels) for place in range(40) for turn in range(levels)]
        counts = np.bincount((np.array(sigmas) * BANDS).astype(int), minlength=BANDS)
        assert counts.tolist() == [4 * levels] * BANDS
        assert len({round(s, 6) for s in sigmas}) == len(sigmas)


@pytest.mark.parametrize(("distribution", "amount"), [("mode", 3.0), ("logit_normal", 5.0), ("uniform", 1.0)])
def test_band_shares_are_how_often_training_draws_a_band(distribution, amount):
    generator = draw(0, "shares")
    drawn = np.array([draw_level(distribution, amount, generator) for _ in range(4000)])
    counts = np.bincount(np.minimum((drawn * BANDS).astype(int), BANDS - 1), minlength=BANDS) / 4000
    shares = band_shares(distribution, amount)
    assert sum(shares) == pytest.approx(1)
    assert np.abs(counts - shares).max() < 0.025


def loss_by_hand(backbone, one, place, seed):
    sigma = spread_level(place, 0, 1)
    noise = draw_noise(one, draw(seed, "heldout", one.number, 0))
    level = NoiseLevels(sigma, sigma, sigma)
    packed = pack([one], [noisy_values(one, noise, level)], [level], Layout.of(backbone.config), [noise])
    with torch.no_grad():
        velocities = backbone(packed)
    found = {}
    if not one.video_given.all():
        error = (velocities.video - packed.video_target.velocity).square() * packed.video_target.valid
        found["video"] = (sigma, float(error.sum() / one.video.numel()))
    if not one.action_given.all():
        error = (velocities.action - packed.action_target.velocity)[:, : one.action_width].square()
        found["action"] = (sigma, float(error.sum() / (one.action.shape[0] * one.action_width)))
    return found


def test_heldout_loss_is_the_weighted_mean_of_the_samples_own(backbone):
    tasks = ["policy", "inverse_dynamics", "forward_dynamics", "policy", "policy", "forward_dynamics"] * 2
    samples = [make_sample(task, number, width=2) for number, task in enumerate(tasks)]
    objective = Objective()
    found = heldout_loss(backbone, samples, objective, seed=4, levels=1)
    again = heldout_loss(backbone, samples, objective, seed=4, levels=1, tokens_per_pack=60)
    by_hand = [loss_by_hand(backbone, one, place, 4) for place, one in enumerate(samples)]
    shares = band_shares("mode", 3.0)
    total = 0.0
    for name, weight in (("video", objective.video), ("action", objective.action)):
        looks = [b[name] for b in by_hand if name in b]
        w = np.array([shares[int(sigma * BANDS)] for sigma, _ in looks])
        expected = float((w * [loss for _, loss in looks]).sum() / w.sum())
        assert found.by_modality[name] == pytest.approx(expected, rel=1e-5)
        assert again.by_modality[name] == pytest.approx(expected, rel=1e-5)
        total += weight * expected
        for band in range(BANDS):
            here = [loss for sigma, loss in looks if int(sigma * BANDS) == band]
            value = found.by_band[name][band]
            assert (value is None) == (not here)
            assert not here or value == pytest.approx(np.mean(here), rel=1e-5)
    assert found.total == pytest.approx(total, rel=1e-5)
    metrics = found.metrics()
    assert metrics["heldout/loss"] == found.total and metrics["heldout/loss/action"] == found.by_modality["action"]
    assert heldout_loss(backbone, samples, objective, seed=4, levels=1) == found
    assert heldout_loss(backbone, samples, objective, seed=5, levels=1) != found


def test_conversations_give_the_mean_loss_of_their_labelled_tokens(backbone):
    generator = draw(1, "talk")
    samples = []
    for number, length in enumerate((7, 12)):
        text = torch.randint(0, 90, (length,), generator=generator)
        labels = torch.full((length,), IGNORED_LABEL)
        labels[2:5] = text[3:6]
        samples.append(TokenSample(str(number), number, "conversation", text, labels=labels))
    found = heldout_loss(backbone, [samples[0], make_sample("policy", 9), samples[1]], Objective(), 0)
    losses = []
    for one in samples:
        packed = pack([one], [draw_noise(one, generator)], [NoiseLevels(0, 0, 0)], Layout.of(backbone.config))
        with torch.no_grad():
            hidden = backbone.understand(packed).text_hidden
        losses.append(F.cross_entropy(backbone.lm_head(hidden), packed.labels, reduction="none"))
    assert found.by_modality["text"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert "text" not in found.by_band and found.samples == 3


def test_no_sample_is_the_users_error(backbone):
    with pytest.raises(UserError, match="no held-out samples"):
        heldout_loss(backbone, [], Objective(), 0)


# ------------------------------------------------------------------------------------------------ actions


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    make_log(folder / "log", [9, 10, 11], cameras={"observation.image": (32, 32)})
    card = embodiment()
    prepare(dataset_card(), card, folder / "log", folder / "prepared", heldout_fraction=0.4, progress=False)
    return PreparedDataset(folder / "prepared", card)


@pytest.mark.parametrize("task", ["policy", "inverse_dynamics"])
def test_action_errors_are_in_the_robots_units(backbone, dataset, task):
    """A model whose action velocities are zero leaves the noise: its error is known, and so are the baselines'."""
    still = tiny_backbone()
    with torch.no_grad():
        still.action_proj_out.fc.weight.zero_()
        still.action_proj_out.bias.weight.zero_()
    encoder, count = Encoder(tiny_parts(), {"mover": dataset.embodiment}), dataset.count("heldout")
    found = action_error(still, encoder, dataset, task, windows=1000, steps=2, seed=3)
    assert found.windows == count and found.channels == ["x", "y"] and found.units == ["px", "px"]
    rows = [dataset.window("heldout", index) for index in range(count)]
    truth = np.array([row["action"] for row in rows])
    held = np.array([[row["state"]] * 4 for row in rows]) - truth
    mean = np.array(dataset.statistics.action.mean) - truth
    guess = []
    for number in range(count):
        generator = draw(3, "sample", number)
        torch.randn((48, 2, 2, 2), generator=generator)
        noise = torch.randn((4, 64), generator=generator)[:, :2]
        guess.append(dataset.normaliser.denormalise(noise).numpy())
    model = np.array(guess) - truth
    for name, deviation in (("model", model), ("mean", mean), ("hold", held)):
        assert found.rmse[name].overall == pytest.approx(math.sqrt((deviation**2).mean()), rel=1e-4)
        assert found.mae[name].overall == pytest.approx(np.abs(deviation).mean(), rel=1e-4)
        for channel in range(2):
            expected = math.sqrt((deviation[..., channel] ** 2).mean())
            assert found.rmse[name].channels[channel] == pytest.approx(expected, rel=1e-4)
    assert found.constant == min(found.rmse["mean"].overall, found.rmse["hold"].overall)
    assert found.metrics()["heldout/action_error"] == found.error == found.rmse["model"].overall


def test_fewer_windows_are_spread_and_the_same_every_time(backbone, dataset):
    encoder = Encoder(tiny_parts(), {"mover": dataset.embodiment})
    ask = dict(windows=3, steps=2, seed=0)
    found = action_error(backbone, encoder, dataset, "policy", **ask)
    assert found.windows == 3
    assert found == action_error(backbone, encoder, dataset, "policy", tokens_per_pack=100000, **ask)


def test_a_dataset_without_heldout_episodes_is_the_users_error(backbone, tmp_path):
    make_log(tmp_path / "log", [9])
    card = embodiment()
    prepare(dataset_card(), card, tmp_path / "log", tmp_path / "prepared", heldout_fraction=0.0, progress=False)
    encoder, dataset = Encoder(tiny_parts(), {"mover": card}), PreparedDataset(tmp_path / "prepared", card)
    with pytest.raises(UserError, match="no held-out windows"):
        action_error(backbone, encoder, dataset, "policy", windows=2, steps=1, seed=0)


def test_hold_stays_where_the_robot_is():
    mixed = embodiment(action=[Channel("x"), Channel("dy", relative=True)])
    row = {"state": [3.0, 4.0], "action": [[7.0, 8.0], [9.0, 10.0]]}
    assert hold_action(row, mixed).tolist() == [3.0, 0.0]
    assert hold_action({**row, "state": None}, mixed).tolist() == [7.0, 0.0]
    assert hold_action({**row, "state": [1.0, 2.0, 3.0]}, embodiment()).tolist() == [7.0, 8.0]


def test_the_task_whose_actions_are_measured():
    assert action_tasks({"forward_dynamics": 1.0, "inverse_dynamics": 1.0}) == ["inverse_dynamics"]
    assert action_tasks({"inverse_dynamics": 1.0, "policy": 0.5}) == ["inverse_dynamics", "policy"]
    assert action_tasks({"image_to_video": 1.0, "policy": 0.0}) == []
