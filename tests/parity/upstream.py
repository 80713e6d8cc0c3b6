"""Upstream run one sample at a time, the reference of the parity tests: its own classes, its own position builders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer
from peft import LoraConfig
from torch import Tensor

from cosmos3_train.model.packing import Layout, Values, draw_noise, noisy_values
from cosmos3_train.runtime import draw
from cosmos3_train.types import NoiseLevels, TokenSample

TINY = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=80,
    vocab_size=97,
    rope_axes_dim=[4, 2, 2],
    rope_theta=5e6,
    action_gen=True,
    action_dim=64,
    num_embodiment_domains=32,
    sound_gen=True,
    sound_dim=64,
)
EDGE = {**TINY, "hidden_act": "relu2", "qk_norm_for_text": False, "use_und_k_norm_for_gen": True, "rms_norm_eps": 1e-5}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter random, norms and biases too, so that no term can hide behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.dim() == 1))


def add_random_lora(model: Any, targets: list[str], exclude: str | None = None) -> None:
    """Freeze a model and give it an adapter by PEFT's own door, A and B random, the same in every model."""
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=targets, exclude_modules=exclude))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def make_sample(task: str, number: int, **shape) -> TokenSample:
    """A random token sample of a task; latent sides are odd now and then."""
    from cosmos3_train.flow.tasks import TASKS, action_given, sound_given, video_given

    row, generator = TASKS[task], draw(7, "sample", number)
    t, h, w = shape.get("latent", (1 if row.image else 3, 3 + number % 2, 4))
    text = torch.randint(0, 97, (shape.get("text", 5 + number),), generator=generator)
    fields: dict = dict(
        video=torch.randn((48, t, h, w), generator=generator), video_given=video_given(row, t), fps=7.3 + number
    )
    if row.has_robot:
        state_row = shape.get("state_row", False)
        rows = 4 * (t - 1) + int(state_row)
        width = shape.get("width", 5)
        action = torch.zeros((rows, 64))
        action[:, :width] = torch.randn((rows, width), generator=generator)
        fields.update(
            action=action,
            action_given=action_given(row, rows, state_row),
            action_width=width,
            action_start=0 if state_row else 1,
            domain=shape.get("domain", number % 3 + 4),
        )
    if row.sound != "absent":
        fields.update(sound=torch.randn((6, 64), generator=generator), sound_given=sound_given(row, 6))
    return TokenSample(key=f"{task}/{number}", number=number, task=task, text=text, **fields)


def noise_it(sample: TokenSample, sigma: float) -> tuple[Values, Values, NoiseLevels]:
    """(ε, x_σ, levels) of a sample."""
    levels = NoiseLevels(sigma, sigma, sigma)
    noise = draw_noise(sample, draw(11, "noise", sample.number))
    return noise, noisy_values(sample, noise, levels), levels


def upstream_velocities(
    model: Cosmos3OmniTransformer, sample: TokenSample, values: Values, levels: NoiseLevels
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(video [C, t, h, w], sound [S, 64], action [N, A]) velocities, zero at given tokens, by upstream's forward."""
    pipe = SimpleNamespace(transformer=model, vae_scale_factor_temporal=4)
    prepare = Cosmos3OmniPipeline
    text = prepare._prepare_text_segment(pipe, sample.text.tolist(), "cpu")
    offset, place = text["vision_start_temporal_offset"], text["und_len"]
    assert values.video is not None and sample.video_given is not None
    vision = prepare._prepare_vision_segment(
        pipe, values.video[None], False, offset, sample.fps, place, "cpu", _indexes(sample.video_given)
    )
    place += vision["num_vision_tokens"]
    arguments, positions = {}, [text["text_mrope_ids"], vision["vision_mrope_ids"]]
    if values.sound is not None:
        sound = prepare._prepare_sound_segment(pipe, values.sound.T, offset, 25.0, place, "cpu")
        place += sound.pop("sound_len")
        positions.append(sound.pop("sound_mrope_ids"))
        generated = torch.nonzero(~sample.sound_given).flatten()
        sound["sound_noisy_frame_indexes"] = [generated]
        sound["sound_mse_loss_indexes"] = sound["sound_sequence_indexes"][generated]
        arguments |= sound | {
            "sound_tokens": [values.sound.T],
            "sound_timesteps": torch.full((generated.numel(),), levels.sound * 1000),
        }
    if values.action is not None:
        # Upstream's builder fixes the start at 1; a state row starts at 0, so its position builder is called directly.
        assert sample.action_given is not None
        action = prepare._prepare_action_segment(
            pipe, values.action, _indexes(sample.action_given), offset, sample.fps, place, "cpu"
        )
        ids = action.pop("action_mrope_ids")
        if sample.action_start == 0:
            ids = torch.cat([torch.cat([torch.tensor([[float(offset)]]), ids[:1, :-1]], 1), ids[1:]])
        place += action.pop("action_len")
        noisy = action.pop("num_noisy_action_tokens")
        positions.append(ids)
        arguments |= action | {
            "action_tokens": [values.action],
            "action_timesteps": torch.full((noisy,), levels.action * 1000),
            "action_domain_ids": [torch.tensor([sample.domain])],
        }
    noisy_vision = vision["num_noisy_vision_tokens"]
    out = model(
        input_ids=text["input_ids"],
        text_indexes=text["text_indexes"],
        position_ids=torch.cat([p.float() for p in positions], dim=1),
        und_len=text["und_len"],
        sequence_length=place,
        vision_tokens=[values.video[None]],
        vision_timesteps=torch.full((noisy_vision,), levels.video * 1000),
        **{k: v for k, v in vision.items() if k.startswith("vision_") and k != "vision_mrope_ids"},
        **arguments,
    )
    return (
        out.sample[0][0],
        out.sound[0].T if out.sound is not None else None,
        out.action[0] if out.action is not None else None,
    )


def layout_of(model: Cosmos3OmniTransformer) -> Layout:
    return Layout.of(model.config)


def _indexes(given: Tensor) -> list[int]:
    return torch.nonzero(given).flatten().tolist()
