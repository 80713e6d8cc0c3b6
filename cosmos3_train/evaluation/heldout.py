"""What a model is worth on episodes that never trained: its loss by noise level, and its actions in the robot's units.

Both are deterministic: the same windows, noise levels and noise every time, so that two evaluations differ by the
weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos3_train.config import Embodiment, Objective, UserError
from cosmos3_train.data.actions import still
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.evaluation.sampling import (
    TOKENS_PER_PACK,
    evaluating,
    in_packs,
    policy_sample,
    robot_actions,
    sample,
)
from cosmos3_train.flow.noise_levels import BANDS, Distribution, mode_heavy, shift, shift_for
from cosmos3_train.flow.tasks import TASKS
from cosmos3_train.flow.velocity_loss import sample_losses
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.omni import Cosmos3PackedTransformer, text_logits_loss
from cosmos3_train.model.packing import Layout, draw_noise, pack
from cosmos3_train.runtime import draw, leave_if_asked
from cosmos3_train.types import NoiseLevels, PackedSequence, TokenSample

MODALITIES = ("video", "action", "sound")
TEXT = "text"
GOLDEN = (math.sqrt(5) - 1) / 2

Looks = dict[str, list[tuple[float, float, float]]]
"""Of each modality: (σ, how much it weighs in the mean, loss) of every sample that was looked at."""

# ------------------------------------------------------------------------------------------------ loss


@dataclass(frozen=True)
class HeldoutLoss:
    """Losses on held-out samples.

    total:       as the objective weighs the modalities
    by_modality: video, action, sound: the mean over the noise levels that training draws, of the samples in which
                 some of the modality is generated; text: mean cross-entropy of the labelled tokens
    by_band:     the mean in each of the bands of σ, the cleanest first; None where no sample fell
    samples:     how many were looked at;  levels: noise levels of each
    """

    total: float
    by_modality: dict[str, float]
    by_band: dict[str, list[float | None]]
    samples: int
    levels: int

    def metrics(self, prefix: str = "heldout") -> dict[str, float]:
        """As a flat mapping for metrics.csv: heldout/loss, heldout/loss/action, heldout/loss/action/band_3 …"""
        found = {f"{prefix}/loss": self.total}
        found |= {f"{prefix}/loss/{name}": value for name, value in self.by_modality.items()}
        for name, bands in self.by_band.items():
            found |= {f"{prefix}/loss/{name}/band_{b}": value for b, value in enumerate(bands) if value is not None}
        return found


def heldout_loss(
    backbone: Cosmos3PackedTransformer,
    samples: Sequence[TokenSample],
    objective: Objective,
    seed: int,
    *,
    levels: int = 2,
    tokens_per_pack: int = TOKENS_PER_PACK,
) -> HeldoutLoss:
    """The training losses on held-out samples, by noise band.

    Each sample is denoised from `levels` noise levels. They are not drawn but spread: neighbouring samples take
    neighbouring bands, so that every band has the same number of looks, and the mean over levels weighs a band by how
    often training draws from it. All modalities of a sample share σ, also where training draws them independently.

    Args:
        samples: from an encoder without caption dropout.
        seed: of the noise ε, drawn from (seed, "heldout", sample number, level).

    Raises:
        UserError: there is no sample.
    """
    if not samples:
        raise UserError("no held-out samples; raise data.heldout_fraction or evaluation.heldout_samples")
    layout, device = Layout.of(backbone.config), next(backbone.parameters()).device
    looks: Looks = {name: [] for name in MODALITIES}
    text_sum, text_tokens = 0.0, 0
    with evaluating(backbone):
        for places in in_packs(samples, layout, tokens_per_pack):
            few = [samples[place] for place in places]
            understood = None
            for turn in range(levels):
                leave_if_asked()
                sigmas = [spread_level(place, turn, levels) for place in places]
                packed = _noisy_pack(few, sigmas, layout, objective, seed, turn).to(device)
                if understood is None:  # the text is the same at every level
                    understood = backbone.understand(packed)
                    if packed.labels.numel():
                        hidden, chunk = understood.text_hidden, objective.logits_chunk
                        text_sum += float(text_logits_loss(hidden, packed.labels, backbone.lm_head, chunk))
                        text_tokens += packed.labels.numel()
                _look(looks, backbone.generate(packed, understood), packed, few, sigmas, objective)
    text = {TEXT: text_sum / text_tokens} if text_tokens else {}
    return _summary(looks, text, objective, len(samples), levels)


def spread_level(place: int, turn: int, levels: int) -> float:
    """σ in (0, 1) of a sample's `turn`-th look: its band goes round with `place`, its place in the band is even too."""
    band = (place + turn * BANDS // levels) % BANDS
    within = ((place // BANDS) * GOLDEN + (turn + 0.5) / levels) % 1.0
    return (band + min(max(within, 0.01), 0.99)) / BANDS


@cache
def band_shares(distribution: Distribution, amount: float) -> tuple[float, ...]:
    """How often training draws σ from each band, for a base distribution and a shift."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    if distribution == "mode":
        t = mode_heavy(u)
    elif distribution == "logit_normal":
        t = torch.sigmoid(torch.special.ndtri(u))
    else:
        t = u
    counts = torch.histc(shift(t, amount).clamp(0, 1), bins=BANDS, min=0, max=1)
    return tuple((counts / counts.sum()).tolist())


def _noisy_pack(
    samples: Sequence[TokenSample],
    sigmas: Sequence[float],
    layout: Layout,
    objective: Objective,
    seed: int,
    turn: int,
) -> PackedSequence:
    noise = [draw_noise(s, draw(seed, "heldout", s.number, turn)) for s in samples]
    at = [NoiseLevels(sigma, sigma, sigma) for sigma in sigmas]
    return pack(samples, None, at, layout, noise, objective.mean_over)


def _look(
    looks: Looks,
    velocities: tuple[Tensor, Tensor, Tensor],
    packed: PackedSequence,
    samples: Sequence[TokenSample],
    sigmas: Sequence[float],
    objective: Objective,
) -> None:
    """Add a pack's losses, each sample's where it generates some of the modality."""
    video, sound, action = velocities
    predicted = {"video": video, "action": action, "sound": sound}
    targets = {"video": packed.video_target, "action": packed.action_target, "sound": packed.sound_target}
    for name, target in targets.items():
        if target is None:
            continue
        losses = sample_losses(predicted[name], target).tolist()
        for one, sigma, loss in zip(samples, sigmas, losses, strict=True):
            if _generates(one, name):
                looks[name].append((sigma, _weight(one, objective, sigma), loss))


def _weight(sample: TokenSample, objective: Objective, sigma: float) -> float:
    image = TASKS[sample.task].image
    distribution = objective.image_levels if image else objective.video_levels
    shares = band_shares(distribution, shift_for(sample.tier, objective.shift))
    return shares[min(int(sigma * BANDS), BANDS - 1)]


def _generates(sample: TokenSample, modality: str) -> bool:
    given = {"video": sample.video_given, "action": sample.action_given, "sound": sample.sound_given}[modality]
    return given is not None and not bool(given.all())


def _summary(
    looks: Looks,
    text: dict[str, float],
    objective: Objective,
    samples: int,
    levels: int,
) -> HeldoutLoss:
    by_modality, by_band = {}, {}
    for name, found in looks.items():
        if not found:
            continue
        sigma, weight, loss = np.asarray(found, dtype=np.float64).T
        by_modality[name] = float((weight * loss).sum() / weight.sum())
        bands = np.minimum((sigma * BANDS).astype(int), BANDS - 1)
        by_band[name] = [float(loss[bands == b].mean()) if (bands == b).any() else None for b in range(BANDS)]
    by_modality |= text
    weights = {"video": objective.video, "action": objective.action, "sound": objective.sound, TEXT: objective.text}
    total = sum(weights[name] * value for name, value in by_modality.items())
    return HeldoutLoss(total=total, by_modality=by_modality, by_band=by_band, samples=samples, levels=levels)


# ------------------------------------------------------------------------------------------------ actions


@dataclass(frozen=True)
class Errors:
    """An error in the robot's own units: over all channels, and of each."""

    overall: float
    channels: list[float]


@dataclass(frozen=True)
class ActionError:
    """Sampled actions of held-out windows against those of the log, beside two policies that need no model.

    task:       policy, or inverse_dynamics
    windows:    how many, spread evenly over the held-out split;  seed: of the noise
    channels, units: of the embodiment card
    rmse, mae:  root mean square and mean absolute error of "model", of "mean" (the train split's mean action) and of
                "hold" (stay: the robot's state in channels that are places, zero in those that are changes)
    """

    task: str
    windows: int
    seed: int
    channels: list[str]
    units: list[str]
    rmse: dict[str, Errors]
    mae: dict[str, Errors]

    @property
    def error(self) -> float:
        """The model's root mean square error over all channels."""
        return self.rmse["model"].overall

    @property
    def constant(self) -> float:
        """The root mean square error of the better of the two policies without a model."""
        return min(self.rmse["mean"].overall, self.rmse["hold"].overall)

    def metrics(self, prefix: str = "heldout") -> dict[str, float]:
        """As a flat mapping for metrics.csv."""
        return {
            f"{prefix}/action_error": self.error,
            f"{prefix}/action_error/constant": self.constant,
            f"{prefix}/action_error/mae": self.mae["model"].overall,
            **{
                f"{prefix}/action_error/{name}": value
                for name, value in zip(self.channels, self.rmse["model"].channels, strict=True)
            },
        }


def action_tasks(tasks: Mapping[str, float]) -> list[str]:
    """Of a mixture entry's tasks, those whose actions are measured: inverse dynamics first, then policy.

    What was done in a video has one right answer, so its error says whether the model knows the robot's actions. A
    policy has more than one, and even a perfect one differs from the log.
    """
    return [name for name in ("inverse_dynamics", "policy") if tasks.get(name, 0) > 0]


def action_error(
    backbone: Cosmos3PackedTransformer,
    encoder: Encoder,
    dataset: PreparedDataset,
    task: str,
    *,
    windows: int,
    steps: int,
    seed: int,
    guidance: float = 1.0,
    tokens_per_pack: int = TOKENS_PER_PACK,
) -> ActionError:
    """Sample the actions of held-out windows and compare them with the log's.

    Args:
        encoder: without caption dropout; its video tokenizer needs weights unless the dataset's latents are cached.
        task: "policy" or "inverse_dynamics", see `action_tasks`.
        windows: at most as many as the split has.
        steps: solver steps.

    Raises:
        UserError: the dataset has no held-out windows.
    """
    assert encoder.caption_dropout == 0, "a dropped caption would be measured"
    card, count = dataset.embodiment, dataset.count("heldout")
    if count == 0:
        raise UserError(f"dataset {dataset.name!r} has no held-out windows; raise data.heldout_fraction and prepare")
    windows = min(windows, count)
    indexes = [int((place + 0.5) * count / windows) for place in range(windows)]
    rows = [dataset.window("heldout", index) for index in indexes]
    make = _policy_samples if task == "policy" else _inverse_samples
    tokens = make(encoder, dataset, indexes, rows)
    values = sample(
        backbone, encoder.parts, tokens, steps=steps, seed=seed, guidance=guidance, tokens_per_pack=tokens_per_pack
    )
    found = {
        "model": np.stack([robot_actions(value, card, dataset.normaliser) for value in values]),
        "mean": np.broadcast_to(np.asarray(dataset.statistics.action.mean), (windows, card.chunk, card.width)),
        "hold": np.stack([np.broadcast_to(hold_action(row, card), (card.chunk, card.width)) for row in rows]),
    }
    truth = np.asarray([row["action"] for row in rows], dtype=np.float64)
    differences = {name: value.astype(np.float64) - truth for name, value in found.items()}
    return ActionError(
        task=task,
        windows=windows,
        seed=seed,
        channels=[channel.name for channel in card.action],
        units=[channel.unit for channel in card.action],
        rmse={name: _errors(d**2, math.sqrt) for name, d in differences.items()},
        mae={name: _errors(np.abs(d), float) for name, d in differences.items()},
    )


def hold_action(row: Mapping[str, Any], embodiment: Embodiment) -> np.ndarray:
    """float64 [width]: the action that stays where the robot is.

    Zero in channels that are changes. In channels that are places, the robot's state, where the log has one as wide as
    the action; otherwise the window's own first action, which flatters this baseline.
    """
    state = row["state"]
    place = state if state is not None and len(state) == embodiment.width else row["action"][0]
    return still(embodiment, place)


def _policy_samples(
    encoder: Encoder, dataset: PreparedDataset, indexes: Sequence[int], rows: Sequence[Mapping[str, Any]]
) -> list[TokenSample]:
    card, found = dataset.embodiment, []
    for number, (index, row) in enumerate(zip(indexes, rows, strict=True)):
        leave_if_asked()
        state = dataset.normaliser.normalise(torch.tensor(row["state"])) if card.state_row else None
        text = encoder.robot_text(row["instruction"], card, (row["height"], row["width"]))
        latent = _first_latent(encoder, dataset, index, dict(row))
        found.append(policy_sample(text, latent, state, card, number, key=dataset.key(dict(row))))
    return found


def _first_latent(encoder: Encoder, dataset: PreparedDataset, index: int, row: dict[str, Any]) -> Tensor:
    if dataset.latent_cache is not None:
        return dataset.latent_cache.read(dataset.row_number("heldout", index))[:, :1]
    return encoder.encode_frames([dataset.frames(row, first_only=True)], dataset.embodiment)[0]


def _inverse_samples(
    encoder: Encoder, dataset: PreparedDataset, indexes: Sequence[int], rows: Sequence[Mapping[str, Any]]
) -> list[TokenSample]:
    cached, found = dataset.latent_cache is not None, []
    for number, index in enumerate(indexes):  # one at a time: whole clips are large
        leave_if_asked()
        one = dataset.sample("heldout", index, "inverse_dynamics", number, pixels=not cached, latents=cached)
        found += encoder.encode([one])
    return found


def _errors(deviations: np.ndarray, finish) -> Errors:
    """From [windows, chunk, width] squared or absolute deviations; `finish` is what is done to their mean."""
    channels = deviations.mean(axis=(0, 1))
    return Errors(overall=finish(channels.mean()), channels=[finish(value) for value in channels])
