"""The denoising loss by hand: means, what they count, padding, and σ as a function of the sample's place alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosmos3_train.config import Objective
from cosmos3_train.flow.noise_levels import draw_level
from cosmos3_train.flow.velocity_loss import sample_losses
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.objectives.flow_matching import counts, losses, noise_levels, noisy_pack
from cosmos3_train.runtime import draw
from cosmos3_train.types import ModalityTarget, TokenSample, Velocities
from tests.parity.upstream import make_sample

LAYOUT = Layout(
    patch=2, channels=48, action_width=64, sound_width=64, margin=15000, base_fps=24.0, sound_fps=25.0, modulate=True,
    reset_spatial=True, temporal=4,
)  # fmt: skip


def predicted_as(packed, video: float, action: float, sound: float = 0.0) -> Velocities:
    """Velocities that miss their target by a constant everywhere, in padding too."""

    def off(target: ModalityTarget | None, width: int, by: float) -> torch.Tensor:
        return torch.zeros((0, width)) if target is None else target.velocity + by

    return Velocities(
        video=off(packed.video_target, 192, video),
        action=off(packed.action_target, 64, action),
        sound=off(packed.sound_target, 64, sound),
        text_hidden=torch.zeros((0, 8)),
    )


def test_hand_computed_losses_of_one_sample():
    target = ModalityTarget(
        velocity=torch.tensor([[1.0, 2.0, 9.0], [0.0, -1.0, 9.0]]),
        valid=torch.tensor([[True, True, False], [True, True, False]]),
        sample=torch.tensor([1, 1]),
        elements=torch.tensor([0.0, 6.0]),  # three rows of two channels, one of them given
        levels=torch.tensor([0.5, 0.5]),
    )
    found = sample_losses(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), target)
    assert found.tolist() == [0.0, (1 + 4 + 0 + 4) / 6]


@pytest.mark.parametrize(("mean_over", "video", "action"), [("all", 4 * 2 / 3, 9.0), ("generated", 4.0, 9.0)])
def test_a_policy_sample_that_misses_by_a_constant(mean_over, video, action):
    """Three latent frames, the first given: off by 2 at two of three; every action row generated, off by 3."""
    sample = make_sample("policy", 1, latent=(3, 3, 5), width=5)
    packed = noisy_pack([sample], LAYOUT, Objective(mean_over=mean_over), seed=0)
    found = losses(predicted_as(packed, 2.0, 3.0), packed)
    assert float(found["video"]) == pytest.approx(video, rel=1e-6)
    assert float(found["action"]) == pytest.approx(action, rel=1e-6)
    assert "sound" not in found


@pytest.mark.parametrize(("mean_over", "expected"), [("all", 9 * 8 / 9), ("generated", 9.0)])
def test_a_given_state_row_counts_only_in_the_mean_over_all(mean_over, expected):
    sample = make_sample("policy", 1, latent=(3, 2, 2), state_row=True)
    packed = noisy_pack([sample], LAYOUT, Objective(mean_over=mean_over), seed=0)
    assert float(losses(predicted_as(packed, 0.0, 3.0), packed)["action"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mean_over", ["all", "generated"])
def test_padding_never_counts(mean_over):
    """Odd latent sides pad patches and unused channels pad actions: neither values nor counts come from them."""
    sample = make_sample("policy", 1, latent=(2, 3, 3), width=2)
    packed = noisy_pack([sample], LAYOUT, Objective(mean_over=mean_over), seed=0)
    video, action = packed.video_target, packed.action_target
    assert video is not None and action is not None
    assert int(video.valid.sum()) == 48 * 3 * 3 and video.velocity.numel() == 4 * 192
    assert int(action.valid.sum()) == 4 * 2
    frames = 2 if mean_over == "all" else 1
    assert video.elements.tolist() == [frames * 48 * 9] and action.elements.tolist() == [4 * 2]
    right = predicted_as(packed, 0.0, 0.0)
    wild = replace(
        right,
        video=torch.where(video.valid, right.video, 1e6),
        action=torch.where(action.valid, right.action, 1e6),
    )
    assert [float(value) for value in losses(wild, packed).values()] == [0.0, 0.0]
    assert float(packed.action[:, 2:].abs().max()) == 0, "unused channels stay zero in the input too"


def test_counts_of_a_step():
    tasks = ["policy", "forward_dynamics", "inverse_dynamics", "text_to_video", "video_to_sound", "sound_to_video"]
    samples = [make_sample(task, n) for n, task in enumerate(tasks)]
    samples.append(TokenSample("talk", 9, "conversation", torch.arange(5), labels=torch.arange(5)))
    assert counts(samples, Objective()) == {"video": 6, "action": 3, "sound": 2}
    assert counts(samples, Objective(mean_over="generated")) == {"video": 4, "action": 2, "sound": 1}


def test_a_wholly_given_modality_has_no_loss_and_no_target_rows():
    packed = noisy_pack([make_sample("inverse_dynamics", 1)], LAYOUT, Objective(), seed=0)
    assert packed.video_target is not None and packed.video_target.velocity.shape[0] == 0
    assert float(losses(predicted_as(packed, 5.0, 0.0), packed)["video"]) == 0.0


def test_given_values_are_clean_and_generated_ones_are_on_the_path():
    sample = make_sample("policy", 1, latent=(2, 2, 2), width=3)
    packed = noisy_pack([sample], LAYOUT, Objective(), seed=4)
    alone = pack([sample], [values_of(sample)], [noise_levels(sample, Objective(), 4)], LAYOUT)
    assert torch.equal(packed.video[0], alone.video[0]), "the given first frame"
    assert not torch.equal(packed.video[1], alone.video[1])
    target = packed.video_target
    assert target is not None
    sigma = float(target.levels[0])
    torch.testing.assert_close(packed.video[1] - sigma * target.velocity[0], alone.video[1])  # x0 = x_σ − σ·v


def values_of(sample):
    from cosmos3_train.model.packing import Values

    return Values(video=sample.video, sound=sample.sound, action=sample.action)


def test_noise_and_levels_are_functions_of_the_seed_and_the_number_alone():
    sample, other = make_sample("policy", 5), make_sample("text_to_video", 6)
    alone = noisy_pack([sample], LAYOUT, Objective(), seed=1)
    torch.manual_seed(99)
    among = noisy_pack([other, replace(sample, key="renamed")], LAYOUT, Objective(), seed=1)
    assert torch.equal(alone.video, among.video[-alone.video.shape[0] :])
    assert torch.equal(alone.action, among.action)
    assert noise_levels(sample, Objective(), 1) != noise_levels(sample, Objective(), 2)
    assert noise_levels(sample, Objective(), 1) != noise_levels(replace(sample, number=6), Objective(), 1)


def test_one_level_a_sample_unless_an_own_one_is_asked_for():
    sample = make_sample("text_to_video_sound", 5)
    shared = noise_levels(sample, Objective(), 0)
    assert shared.video == shared.action == shared.sound
    own = noise_levels(sample, Objective(independent_action=True, independent_sound=True), 0)
    assert own.video == shared.video and len({own.video, own.action, own.sound}) == 3
    only = noise_levels(sample, Objective(independent_action=True), 0)
    assert only.sound == shared.video and only.action == own.action


def test_an_own_level_reaches_its_tokens():
    sample = make_sample("policy", 3, latent=(2, 2, 2))
    packed = noisy_pack([sample], LAYOUT, Objective(independent_action=True), seed=0)
    expected = noise_levels(sample, Objective(independent_action=True), 0)
    by_token = packed.levels[packed.level_index]
    assert by_token[:2].tolist() == pytest.approx([expected.video] * 2)
    assert by_token[2:].tolist() == pytest.approx([expected.action] * 4)


@pytest.mark.parametrize(
    ("task", "tier", "distribution", "shift"),
    [("text_to_image", 256, "logit_normal", 3.0), ("policy", 256, "mode", 3.0), ("policy", 480, "mode", 5.0),
     ("image_to_video", 720, "mode", 10.0)],
)  # fmt: skip
def test_the_task_and_the_tier_choose_the_distribution_and_the_shift(task, tier, distribution, shift):
    sample = replace(make_sample(task, 5), tier=tier)
    expected = draw_level(distribution, shift, draw(0, "level", 5))
    assert noise_levels(sample, Objective(), 0).video == expected


def test_a_conversation_has_no_noise():
    talk = TokenSample("talk", 0, "conversation", torch.arange(4), labels=torch.arange(4))
    packed = noisy_pack([talk], LAYOUT, Objective(), seed=0)
    assert packed.video_target is packed.action_target is packed.sound_target is None
    assert packed.generation_spans.total == 0 and losses(predicted_as(packed, 1, 1), packed) == {}
