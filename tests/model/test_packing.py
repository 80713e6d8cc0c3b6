"""Samples packed together hold, to the last bit, what each holds alone, whatever its neighbours' shapes are."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.flow.noise_levels import draw_level, mode_heavy, shift
from cosmos3_train.flow.tasks import TASKS
from cosmos3_train.model.packing import Layout, Values, draw_noise, noisy_values, pack, patchify
from cosmos3_train.runtime import draw
from cosmos3_train.types import NoiseLevels, TokenSample
from tests.parity.upstream import make_sample

LAYOUT = Layout(
    patch=2, channels=48, action_width=64, sound_width=64, margin=15000, base_fps=24.0, sound_fps=25.0, modulate=True,
    reset_spatial=True, temporal=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def samples() -> list[TokenSample]:
    """Every task in several shapes, odd sides among them, a conversation, and more of one shape than are formed at
    once."""
    mixed = [
        make_sample(
            task, 11 * turn + place, state_row=bool(turn % 2), latent=(1 if row.image else 3 + turn, 3, 4 + turn)
        )
        for turn in range(3)
        for place, (task, row) in enumerate(TASKS.items())
    ]
    talk = TokenSample("talk", 99, "conversation", torch.arange(9), labels=torch.arange(9))
    alike = [make_sample("policy", 100 + n, latent=(3, 4, 4), text=6, domain=n % 2) for n in range(240)]
    return [*mixed[:20], talk, *alike, *mixed[20:]]


def noised(samples: list[TokenSample]) -> tuple[list[Values], list[NoiseLevels]]:
    noise = [draw_noise(s, draw(1, "noise", s.number)) for s in samples]
    sigmas = torch.rand((len(samples), 3), generator=draw(1, "σ"), dtype=torch.float64).tolist()
    return noise, [NoiseLevels(*row) for row in sigmas]


def test_a_pack_holds_what_its_samples_hold_alone(samples):
    noise, levels = noised(samples)
    together = pack(samples, None, levels, LAYOUT, noise)
    stream = torch.cat([torch.arange(n) for n in (len(together.video), len(together.sound), len(together.action))])
    kind = torch.tensor([0] * len(together.video) + [1] * len(together.sound) + [2] * len(together.action))
    places = torch.arange(len(together.order)).split(together.generation_lengths)
    targets = (together.video_target, together.sound_target, together.action_target)
    for place, sample in enumerate(samples):
        alone = pack([sample], None, [levels[place]], LAYOUT, [noise[place]])
        rows = together.order[places[place]]
        for column, name in enumerate(("video", "sound", "action")):
            own = stream[rows[kind[rows] == column]]
            assert torch.equal(getattr(together, name)[own], getattr(alone, name)), sample.key
            target, single = targets[column], getattr(alone, f"{name}_target")
            if single is not None:
                ours = target.sample == place
                assert torch.equal(target.velocity[ours], single.velocity), sample.key
                assert torch.equal(target.valid[ours], single.valid), sample.key
                assert torch.equal(target.elements[place], single.elements[0]), sample.key
                assert torch.equal(target.levels[ours], single.levels), sample.key
        assert torch.equal(together.positions[:, places[place]], alone.positions), sample.key
        assert torch.equal(together.noisy[places[place]], alone.noisy), sample.key


def test_what_is_packed_is_the_path_between_data_and_noise(samples):
    """x_σ and v of each sample written out: σ·ε + (1−σ)·x0 where generated, x0 where given, ε − x0."""
    noise, levels = noised(samples)
    together = pack(samples, None, levels, LAYOUT, noise)
    given_values = pack(
        samples, [noisy_values(*each) for each in zip(samples, noise, levels, strict=True)], levels, LAYOUT
    )
    for name in ("video", "sound", "action"):
        assert torch.equal(getattr(together, name), getattr(given_values, name))
    expected, targets = [], []
    for sample, eps, level in zip(samples, noise, levels, strict=True):
        if sample.video is not None:
            given = sample.video_given[None, :, None, None]
            x = torch.where(given, sample.video, level.video * eps.video + (1 - level.video) * sample.video)
            expected.append(patchify(x, 2))
            targets.append(patchify((eps.video - sample.video)[:, ~sample.video_given], 2))
    assert torch.equal(together.video, torch.cat(expected))
    assert torch.equal(together.video_target.velocity, torch.cat(targets))


@pytest.mark.parametrize("amount", [3.0, 10.0])
def test_a_level_is_the_distributions_formula_to_the_last_bit(amount):
    drawn = [draw_level("mode", amount, draw(3, n)) for n in range(200)]
    again = [torch.rand((), generator=draw(3, n), dtype=torch.float64) for n in range(200)]
    assert drawn == [float(shift(mode_heavy(one), amount).clamp(0, 1)) for one in again]


def test_levels_are_float32_whatever_they_are_written_as(samples):
    noise, _ = noised(samples[:2])
    whole = pack(samples[:2], None, [NoiseLevels(1, 1, 0)] * 2, LAYOUT, noise)
    assert whole.levels.dtype == torch.float32 and whole.levels.tolist() == [1, 0, 1] * 2
