"""Samples that both models are asked about, and the arguments that upstream's `forward` takes for them.

Upstream's own segment builders make its arguments, as its pipeline does. They fix the first action row between frames
0 and 1 and take all sound as generated; where a sample differs (a state row, given sound) the difference is put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import Cosmos3OmniPipeline
from torch import Tensor

from cosmos3_train.model.omni import TIMESTEPS, Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout, Values, draw_noise, noisy_values
from cosmos3_train.runtime import draw
from cosmos3_train.types import NoiseLevels, TokenSample

SUBSTITUTE_LATENT = (2, 4, 4)
"""Latent frames, height and width of the clip that stands in where a sample (a conversation) generates nothing."""

LARGEST_SIDE = 8
"""Latent cells along height and width to which clips are cropped: every weight takes part, and a large model on a CPU
has minutes of work, not hours."""


@dataclass(frozen=True)
class Probe:
    """A sample at a noise level, what both models are asked about."""

    sample: TokenSample
    values: Values
    levels: NoiseLevels


def make_probes(samples: Sequence[TokenSample], layout: Layout, seed: int = 0) -> list[Probe]:
    """Each sample, its clip cropped, with noise of its own, at σ spread evenly over (0, 1), and hidden states asked of
    all its text. Conversations get a random clip to generate, which sees what the adapter does to the text."""
    probes = []
    for place, sample in enumerate(samples):
        if sample.pictures is not None:  # upstream's transformer has no eyes: of the words alone
            words = torch.ones(sample.text.numel(), dtype=torch.bool).index_fill(0, sample.pictures.places, False)
            sample = replace(sample, text=sample.text[words], positions=None, pictures=None)
        if sample.video is None:
            shape = (layout.channels, *SUBSTITUTE_LATENT)
            video = torch.randn(shape, generator=draw(seed, "export clip", sample.number))
            given = torch.zeros(SUBSTITUTE_LATENT[0], dtype=torch.bool)
            sample = replace(sample, video=video, video_given=given)
        assert sample.video is not None
        sample = replace(sample, video=sample.video[:, :, :LARGEST_SIDE, :LARGEST_SIDE].contiguous())
        sigma = (place + 0.5) / len(samples)
        levels = NoiseLevels(sigma, sigma, sigma)
        sample = replace(sample, labels=torch.zeros_like(sample.text))
        noise = draw_noise(sample, draw(seed, "export noise", sample.number))
        probes.append(Probe(sample, noisy_values(sample, noise, levels), levels))
    return probes


def upstream_arguments(backbone: Cosmos3PackedTransformer, probe: Probe, layout: Layout) -> dict[str, Any]:
    """The arguments of `Cosmos3OmniTransformer.forward` for a probe: tensors, lists of tensors, numbers."""
    sample, values = probe.sample, probe.values
    assert values.video is not None and sample.video_given is not None
    # The builders are methods of the pipeline that read only these two attributes of it.
    pipe = cast(Any, SimpleNamespace(transformer=backbone, vae_scale_factor_temporal=layout.temporal))
    text = Cosmos3OmniPipeline._prepare_text_segment(pipe, sample.text.tolist(), "cpu")
    offset, place = text["vision_start_temporal_offset"], text["und_len"]
    video = Cosmos3OmniPipeline._prepare_vision_segment(
        pipe, values.video[None], False, offset, sample.fps, place, "cpu", _indexes(sample.video_given)
    )
    place += video["num_vision_tokens"]
    positions = [text["text_mrope_ids"], video["vision_mrope_ids"]]
    arguments: dict[str, Any] = {
        "input_ids": text["input_ids"],
        "text_indexes": text["text_indexes"],
        "und_len": text["und_len"],
        "vision_tokens": [values.video[None]],
        "vision_token_shapes": video["vision_token_shapes"],
        "vision_sequence_indexes": video["vision_sequence_indexes"],
        "vision_mse_loss_indexes": video["vision_mse_loss_indexes"],
        "vision_noisy_frame_indexes": video["vision_noisy_frame_indexes"],
        "vision_timesteps": _timesteps(video["num_noisy_vision_tokens"], probe.levels.video),
    }
    if values.sound is not None:
        more, ids = _sound_arguments(pipe, probe, layout, offset, place)
        arguments |= more
        positions.append(ids)
        place += ids.shape[1]
    if values.action is not None:
        more, ids = _action_arguments(pipe, probe, offset, place)
        arguments |= more
        positions.append(ids)
        place += ids.shape[1]
    arguments["position_ids"] = torch.cat([ids.float() for ids in positions], dim=1)
    arguments["sequence_length"] = place
    return arguments


def _sound_arguments(pipe: Any, probe: Probe, layout: Layout, offset: float, place: int) -> tuple[dict, Tensor]:
    values, given = probe.values.sound, probe.sample.sound_given
    assert values is not None and given is not None
    built = Cosmos3OmniPipeline._prepare_sound_segment(pipe, values.T, offset, layout.sound_fps, place, "cpu")
    generated = torch.nonzero(~given).flatten()
    return {
        "sound_tokens": [values.T],
        "sound_token_shapes": built["sound_token_shapes"],
        "sound_sequence_indexes": built["sound_sequence_indexes"],
        "sound_mse_loss_indexes": built["sound_sequence_indexes"][generated],
        "sound_noisy_frame_indexes": [generated],
        "sound_timesteps": _timesteps(generated.numel(), probe.levels.sound),
    }, built["sound_mrope_ids"]


def _action_arguments(pipe: Any, probe: Probe, offset: float, place: int) -> tuple[dict, Tensor]:
    sample, values, given = probe.sample, probe.values.action, probe.sample.action_given
    assert values is not None and given is not None
    built = Cosmos3OmniPipeline._prepare_action_segment(pipe, values, _indexes(given), offset, sample.fps, place, "cpu")
    ids = built["action_mrope_ids"].float()
    if sample.action_start == 0:
        # One row earlier in time: the state stands at the first frame, and action i where it stood without a state.
        first = torch.tensor([[float(offset)]])
        ids = torch.cat([torch.cat([first, ids[:1, :-1]], dim=1), ids[1:]])
    return {
        "action_tokens": [values],
        "action_token_shapes": built["action_token_shapes"],
        "action_sequence_indexes": built["action_sequence_indexes"],
        "action_mse_loss_indexes": built["action_mse_loss_indexes"],
        "action_noisy_frame_indexes": built["action_noisy_frame_indexes"],
        "action_timesteps": _timesteps(built["num_noisy_action_tokens"], probe.levels.action),
        "action_domain_ids": [torch.tensor([sample.domain])],
    }, ids


def _timesteps(count: int, sigma: float) -> Tensor:
    return torch.full((count,), sigma * TIMESTEPS)


def _indexes(given: Tensor) -> list[int]:
    return torch.nonzero(given).flatten().tolist()
