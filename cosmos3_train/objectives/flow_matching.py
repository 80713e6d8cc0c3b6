"""Denoising: draw σ and ε for every sample, pack, and average each sample's velocity error over the whole step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cosmos3_train.config import Objective
from cosmos3_train.flow.noise_levels import draw_level, shift_for
from cosmos3_train.flow.tasks import TASKS
from cosmos3_train.flow.velocity_loss import sample_losses
from cosmos3_train.model.packing import Layout, draw_noise, pack
from cosmos3_train.runtime import draw
from cosmos3_train.types import NoiseLevels, PackedSequence, TokenSample, Velocities

MODALITIES = ("video", "action", "sound")


def noise_levels(sample: TokenSample, objective: Objective, seed: int) -> NoiseLevels:
    """σ of a sample, a function of (seed, sample number); one for all modalities unless configured otherwise."""
    if sample.task not in TASKS:
        return NoiseLevels(0.0, 0.0, 0.0)
    image = TASKS[sample.task].image
    distribution = objective.image_levels if image else objective.video_levels
    amount = shift_for(sample.tier, objective.shift)
    shared = draw_level(distribution, amount, draw(seed, "level", sample.number))

    def own(independent: bool, name: str) -> float:
        if not independent:
            return shared
        return draw_level(distribution, amount, draw(seed, "level", name, sample.number))

    return NoiseLevels(
        video=shared,
        action=own(objective.independent_action, "action"),
        sound=own(objective.independent_sound, "sound"),
    )


def noisy_pack(samples: Sequence[TokenSample], layout: Layout, objective: Objective, seed: int) -> PackedSequence:
    """A pack of samples with x_σ in its generation stream and v = ε − x0 as its targets, on the CPU in float32."""
    levels = [noise_levels(sample, objective, seed) for sample in samples]
    noise = [draw_noise(sample, draw(seed, "noise", sample.number)) for sample in samples]
    return pack(samples, None, levels, layout, noise, objective.mean_over)


def counts(samples: Sequence[TokenSample], objective: Objective) -> dict[str, int]:
    """How many samples take part in each modality's mean.

    As published, a sample counts where it has the modality at all, even wholly given (its loss is then 0); with
    `mean_over: generated` only where some of it is generated.
    """
    found: dict[str, int] = dict.fromkeys(MODALITIES, 0)
    for sample in samples:
        for name, given in (
            ("video", sample.video_given),
            ("action", sample.action_given),
            ("sound", sample.sound_given),
        ):
            if given is not None and (objective.mean_over == "all" or not bool(given.all())):
                found[name] += 1
    return found


def losses(velocities: Velocities, packed: PackedSequence) -> dict[str, Tensor]:
    """Summed sample losses of each modality that the pack has, float32 scalars; divide by the step's `counts`."""
    pairs = {
        "video": (velocities.video, packed.video_target),
        "action": (velocities.action, packed.action_target),
        "sound": (velocities.sound, packed.sound_target),
    }
    return {
        name: sample_losses(predicted, target).sum()
        for name, (predicted, target) in pairs.items()
        if target is not None
    }
