"""N packed samples give what N upstream forwards give: velocities, and LoRA gradients of both towers."""

from __future__ import annotations

import pytest
import torch
from diffusers import Cosmos3OmniTransformer

from cosmos3_train.flow.velocity_loss import sample_losses
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import pack, unpatchify
from tests.parity.upstream import (
    EDGE,
    TINY,
    add_random_lora,
    layout_of,
    make_sample,
    noise_it,
    randomise,
    upstream_velocities,
)

TASKS = [
    "text_to_image",
    "text_to_video",
    "image_to_video",
    "video_to_video",
    "forward_dynamics",
    "inverse_dynamics",
    "policy",
    "text_to_video_sound",
    "image_to_video_sound",
    "video_to_sound",
    "sound_to_video",
]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def models(config: dict) -> tuple[Cosmos3PackedTransformer, Cosmos3OmniTransformer]:
    theirs = Cosmos3OmniTransformer(**config)
    randomise(theirs)
    ours = Cosmos3PackedTransformer(**config)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def packed_velocities(ours, samples, sigmas):
    parts = [noise_it(s, sigma) for s, sigma in zip(samples, sigmas, strict=True)]
    packed = pack(samples, [p[1] for p in parts], [p[2] for p in parts], layout_of(ours), [p[0] for p in parts])
    return packed, parts, ours(packed)


def unpacked(samples, packed, velocities):
    """Per sample (video, sound, action) with zeros at given tokens, cut out of the packed velocities."""
    results = []
    for place, sample in enumerate(samples):
        video = torch.zeros(sample.video.shape)
        generated = ~sample.video_given
        if packed.video_target is not None and generated.any():
            shape = (48, int(generated.sum()), *sample.video.shape[2:])
            rows = velocities.video[packed.video_target.sample == place].float()
            video[:, generated] = unpatchify(rows, shape, 2)
        sound = action = None
        if sample.sound is not None:
            sound = torch.zeros(sample.sound.shape)
            sound[~sample.sound_given] = velocities.sound[packed.sound_target.sample == place].float()
        if sample.action is not None:
            action = torch.zeros(sample.action.shape)
            action[~sample.action_given] = velocities.action[packed.action_target.sample == place].float()
        results.append((video, sound, action))
    return results


@pytest.mark.parametrize("config", [TINY, EDGE], ids=["qwen", "edge"])
@pytest.mark.parametrize("tasks", [[t] for t in TASKS] + [TASKS, ["policy", "inverse_dynamics", "text_to_video"]])
def test_velocities_equal_upstreams(config, tasks):
    ours, theirs = models(config)
    samples = [make_sample(task, number) for number, task in enumerate(tasks)]
    sigmas = [0.1 + 0.8 * place / len(samples) for place in range(len(samples))]
    with torch.no_grad():
        packed, parts, velocities = packed_velocities(ours, samples, sigmas)
        for sample, part, mine in zip(samples, parts, unpacked(samples, packed, velocities), strict=True):
            reference = upstream_velocities(theirs, sample, part[1], part[2])
            for our, their in zip(mine, reference, strict=True):
                if their is not None and bool(their.abs().sum() > 0):
                    assert difference(our, their) <= 1e-5, sample.task


def test_state_row_equals_upstream_with_the_state_at_the_first_frame():
    ours, theirs = models(TINY)
    samples = [make_sample("policy", 0, state_row=True), make_sample("policy", 1)]
    with torch.no_grad():
        packed, parts, velocities = packed_velocities(ours, samples, [0.4, 0.7])
        for sample, part, mine in zip(samples, parts, unpacked(samples, packed, velocities), strict=True):
            reference = upstream_velocities(theirs, sample, part[1], part[2])
            assert difference(mine[0], reference[0]) <= 1e-5
            assert difference(mine[2], reference[2]) <= 1e-5


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", [TINY, EDGE], ids=["qwen", "edge"])
def test_lora_gradients_of_both_towers_equal_upstreams(config, checkpointed):
    ours, theirs = models(config)
    targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "up_proj",
        "down_proj",
    ]
    for model in (ours, theirs):
        add_random_lora(model, targets)
    if checkpointed:
        ours.enable_gradient_checkpointing()
    samples = [make_sample(task, number) for number, task in enumerate(TASKS)]
    sigmas = [0.2 + 0.05 * place for place in range(len(samples))]
    packed, parts, velocities = packed_velocities(ours, samples, sigmas)
    total = sum(
        sample_losses(predicted, target).sum()
        for predicted, target in (
            (velocities.video, packed.video_target),
            (velocities.sound, packed.sound_target),
            (velocities.action, packed.action_target),
        )
    )
    total.backward()

    expected = torch.zeros(())
    for sample, (noise, values, levels) in zip(samples, parts, strict=True):
        video, sound, action = upstream_velocities(theirs, sample, values, levels)
        keep = (~sample.video_given).view(1, -1, 1, 1)
        expected = expected + ((video - (noise.video - sample.video)).square() * keep).mean()
        if sound is not None:
            keep = ~sample.sound_given[:, None]
            expected = expected + ((sound - (noise.sound - sample.sound)).square() * keep).mean()
        if action is not None:
            width = sample.action_width
            error = (action - (noise.action - sample.action))[:, :width].square()
            expected = expected + (error * ~sample.action_given[:, None]).mean()
    expected.backward()

    assert difference(total.detach(), expected.detach()) <= 1e-5
    checked = 0
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        their = theirs_by_name[name].grad
        if "lora_" not in name or their is None:
            continue
        mine = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        assert difference(mine, their) <= 1e-5, name
        checked += bool(their.norm() > 0)
    # The last layer's understanding output feeds nothing (only its keys and values do), so a few have no gradient.
    assert checked >= 2 * 3 * 8


def test_frozen_understanding_tower_runs_without_gradient_or_recomputation():
    ours, _ = models(TINY)
    ours.requires_grad_(False)
    ours.layers[0].self_attn.add_q_proj.weight.requires_grad_(True)
    ours.enable_gradient_checkpointing()
    ours.understanding_trains = False
    calls = []
    for layer in ours.layers:
        layer.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0]))
    _, _, velocities = packed_velocities(ours, [make_sample("policy", 0), make_sample("text_to_video", 1)], [0.3, 0.6])
    velocities.video.square().mean().backward()
    assert calls.count("understanding") == 3
    assert calls.count("generation") == 6  # forward, and once more in backward


def test_positions_and_levels_below_float32_are_refused():
    ours, _ = models(TINY)
    samples = [make_sample("policy", 0)]
    from dataclasses import replace

    packed, _, _ = packed_velocities(ours, samples, [0.5])
    with pytest.raises(AssertionError, match="positions were cast"):
        ours(replace(packed, positions=packed.positions.bfloat16()))
    with pytest.raises(AssertionError, match="noise levels were cast"):
        ours(replace(packed, levels=packed.levels.bfloat16()))
    assert float(torch.tensor(15001.0).bfloat16()) == 14976.0


@pytest.mark.parametrize("config", [TINY, EDGE], ids=["qwen", "edge"])
def test_bf16_error_is_at_most_a_fifth_above_upstreams(config):
    ours, theirs = models(config)
    samples = [make_sample(task, number) for number, task in enumerate(TASKS)]
    sigmas = [0.2 + 0.05 * place for place in range(len(samples))]
    parts = [noise_it(s, sigma) for s, sigma in zip(samples, sigmas, strict=True)]
    with torch.no_grad():
        exact = [upstream_velocities(theirs, s, p[1], p[2]) for s, p in zip(samples, parts, strict=True)]
        for model in (ours, theirs):
            in_bf16(model)
        ours.compute_dtype = torch.bfloat16
        packed, _, velocities = packed_velocities(ours, samples, sigmas)
        mine = unpacked(samples, packed, velocities)
        rounded = [upstream_velocities(theirs, s, halved(p[1]), p[2]) for s, p in zip(samples, parts, strict=True)]
    for place, name in enumerate(("video", "sound", "action")):
        assert error_of(mine, exact, place) <= 1.2 * error_of(rounded, exact, place), name


def in_bf16(model: torch.nn.Module) -> None:
    """As a checkpoint is loaded in bf16: the timestep embedder and the rotary frequencies stay float32."""
    for name, parameter in model.named_parameters():
        if not name.startswith("time_embedder."):
            parameter.data = parameter.data.bfloat16()


def halved(values):
    return type(values)(*(None if x is None else x.bfloat16() for x in vars(values).values()))


def error_of(velocities, exact, place: int) -> float:
    """‖ours − exact‖ / ‖exact‖ over all samples that have the modality."""
    pairs = [(v[place].float(), e[place]) for v, e in zip(velocities, exact, strict=True) if e[place] is not None]
    return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt())
