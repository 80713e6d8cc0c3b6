"""Our sampler and encoder against `Cosmos3OmniPipeline`, one sample at a time, on Pico's tokenizer and scheduler."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
from PIL import Image

from cosmos3_train.config import Channel, Embodiment, Model
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.data.statistics import Moments, Statistics
from cosmos3_train.evaluation.sampling import RobotSampler, sample
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_backbone
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout, Values, draw_noise, pack
from cosmos3_train.model.prompts import dropped_prompt
from cosmos3_train.runtime import draw
from cosmos3_train.types import NoiseLevels, Sample
from tests.evaluation.tiny import PICO, tiny_parts
from tests.parity.upstream import TINY, randomise

STEPS = 4
INSTRUCTION = "Push the T-shaped block onto the T-shaped target."
SHIPPED = {"use_karras_sigmas": True, "use_flow_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.147}
"""How the released checkpoints' scheduler differs from Pico's."""


def robot(name="pusht", domain=4, width=2, **changes) -> Embodiment:
    fields = dict(
        name=name,
        domain_id=domain,
        control_hz=10.0,
        chunk=16,
        action=[Channel(name=f"c{i}") for i in range(width)],
        cameras=["camera"],
        view_point="third_person_view",
    )
    return Embodiment(**{**fields, **changes})


CARD = robot()


@pytest.fixture(scope="module")
def pipe() -> Cosmos3OmniPipeline:
    """Upstream's pipeline with a random transformer whose velocities are far from zero."""
    parts = tiny_parts()
    theirs = Cosmos3OmniTransformer(**{**TINY, "vocab_size": len(parts.text_tokenizer), "sound_gen": False})
    randomise(theirs)
    with torch.no_grad():
        theirs.action_proj_out.fc.weight.mul_(4)
    made = Cosmos3OmniPipeline(theirs, parts.text_tokenizer, parts.vae, parts.scheduler, enable_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def ours(pipe) -> Cosmos3PackedTransformer:
    made = Cosmos3PackedTransformer(**{**TINY, "vocab_size": len(pipe.text_tokenizer), "sound_gen": False})
    made.load_state_dict(pipe.transformer.state_dict())
    return made.requires_grad_(False)


def clip(size, frames=17, seed=0) -> torch.Tensor:
    """uint8 [T, 3, H, W]: a smooth random picture that drifts."""
    generator = draw(seed, "clip", *size)
    low = torch.rand((1, 3, 9, 9), generator=generator)
    big = torch.nn.functional.interpolate(low, size=(size[0], size[1] + frames), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([(big[..., t : t + size[1]] * 255).round().byte() for t in range(frames)])


def pictures(frames: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]


def robot_sample(task, card, number, size=(96, 96)) -> Sample:
    action = torch.randn((16, card.width), generator=draw(3, "action", number))
    return Sample(
        key=str(number),
        number=number,
        task=task,
        caption=INSTRUCTION if number % 2 == 0 else "Stop",
        fps=card.control_hz,
        frames=clip(size, seed=number),
        size=size,
        action=action,
        embodiment=card.name,
    )


def condition(one: Sample, card: Embodiment) -> CosmosActionCondition:
    frames = pictures(one.frames)
    return CosmosActionCondition(
        mode=one.task,
        chunk_size=16,
        domain_name=card.name,
        resolution_tier=card.resolution_tier,
        raw_actions=one.action if one.task == "forward_dynamics" else None,
        image=None if one.task == "inverse_dynamics" else frames[0],
        video=frames if one.task == "inverse_dynamics" else None,
        view_point=card.view_point,
    )


def run_upstream(pipe, one, card, noise: Values, token, guidance=1.0):
    """(latent [C, t, h, w], action [N, width] or None) with our noise."""
    given = token.video_given.view(1, -1, 1, 1)
    action = torch.where(token.action_given[:, None], token.action, noise.action)
    action[:, card.width :] = 0
    # The pipeline repeats the first picture; only the given frame of its latent matters, and that is the clip's.
    out = pipe(
        prompt=one.caption,
        fps=card.control_hz,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=torch.where(given, token.video, noise.video)[None],
        action_latents=action,
        action=condition(one, card),
        output_type="latent",
        use_system_prompt=False,
    )
    return out.video[0], None if out.action is None else out.action[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compare(pipe, ours, samples, cards, guidance=1.0, least=0.1) -> float:
    """The worst difference of a pack from the pipeline; the solver must have moved the actions by `least`."""
    encoder = Encoder(pipe, cards)
    tokens = encoder.encode(samples)
    noise = [draw_noise(t, draw(5, "noise", t.number)) for t in tokens]
    found = sample(ours, pipe, tokens, steps=STEPS, noise=noise, guidance=guidance)
    worst = 0.0
    for one, token, eps, value in zip(samples, tokens, noise, found, strict=True):
        card = cards[one.embodiment]
        latent, action = run_upstream(pipe, one, card, eps, token, guidance)
        worst = max(worst, difference(value.video, latent))
        if action is not None:
            assert difference(action, eps.action[:, : card.width]) > least
            worst = max(worst, difference(value.action[:, : card.width], action))
        given = token.video_given
        assert torch.equal(value.video[:, given], token.video[:, given])
        assert torch.equal(value.action[token.action_given], token.action[token.action_given])
        assert not value.action[:, card.width :].any()
    return worst


@pytest.mark.parametrize(
    ("tasks", "scheduler"),
    [(["policy"], {}), (["forward_dynamics"], {}), (["inverse_dynamics"], {}), (None, {}), (["policy"], SHIPPED)],
    ids=["policy", "forward_dynamics", "inverse_dynamics", "mixed", "released_scheduler"],
)
def test_a_pack_samples_what_the_pipeline_samples_one_by_one(pipe, ours, tasks, scheduler):
    before = pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler.from_config({**before.config, **scheduler})
    cards = {"pusht": CARD, "umi": robot("umi", 6, 10)}
    try:
        if tasks:
            samples = [robot_sample(tasks[0], CARD, number) for number in range(2)]
        else:  # one pack of everything: tasks, robots and picture sizes mixed
            rows = [
                ("policy", "umi", (96, 96)),
                ("inverse_dynamics", "pusht", (96, 96)),
                ("policy", "pusht", (64, 112)),
                ("forward_dynamics", "umi", (96, 96)),
                ("policy", "pusht", (96, 96)),
            ]
            samples = [robot_sample(task, cards[name], n, size) for n, (task, name, size) in enumerate(rows)]
        assert compare(pipe, ours, samples, cards) <= 1e-5
    finally:
        pipe.scheduler = before


def test_guidance_equals_the_pipelines(pipe, ours):
    assert compare(pipe, ours, [robot_sample("policy", CARD, 0)], {"pusht": CARD}, 2.5) <= 1e-5


def test_native_flow_schedule_equals_the_pipelines(pipe, ours):
    native = Cosmos3OmniPipeline(
        pipe.transformer,
        pipe.text_tokenizer,
        pipe.vae,
        copy.deepcopy(pipe.scheduler),
        enable_safety_checker=False,
        use_native_flow_schedule=True,
    )
    native.set_progress_bar_config(disable=True)
    assert compare(native, ours, [robot_sample("policy", CARD, 0)], {"pusht": CARD}) <= 1e-5


def test_the_shipped_folder_samples_alike_in_both():
    """Pico as it is: loaded by our loader and by upstream's `from_pretrained`."""
    model = Model(path=PICO, dtype="float32")
    backbone = load_backbone(model, torch.device("cpu"), text_logits=False)
    theirs = Cosmos3OmniPipeline.from_pretrained(PICO, enable_safety_checker=False, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    assert compare(theirs, backbone, [robot_sample("policy", CARD, 0)], {"pusht": CARD}, least=1e-3) <= 1e-5


@pytest.mark.parametrize("state_row", [False, True])
def test_the_robots_sampler_equals_the_pipeline_and_knows_its_units(pipe, ours, state_row):
    """Encoding one picture, and repeating the instruction's keys and values, changes nothing."""
    card = robot(state_row=state_row, state_key="state" if state_row else None)
    moments = Moments(
        count=2,
        mean=[0.0, 0.0],
        std=[1.0, 1.0],
        min=[0.0, -2.0],
        max=[512.0, 6.0],
        q01=[0.0, -2.0],
        q10=[0.0, 0.0],
        q50=[0.0, 0.0],
        q90=[0.0, 0.0],
        q99=[512.0, 6.0],
    )
    normaliser = Normaliser(card, Statistics("d", "pusht", "f", moments))
    policy = RobotSampler(ours, Encoder(pipe, {"pusht": card}), card, normaliser, STEPS)
    samples = [replace(robot_sample("policy", card, 2 * n), state=torch.tensor([0.1, -0.3])) for n in range(3)]
    images = [s.frames[0].permute(1, 2, 0).numpy() for s in samples]
    states = [normaliser.denormalise(s.state).numpy() for s in samples]
    acts = policy.act(images, states, INSTRUCTION, seed=9, numbers=[4, 5, 6])
    again = policy.act(images[1:], states[1:], INSTRUCTION, seed=9, numbers=[5, 6])
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-2) for a, b in zip(acts[1:], again, strict=True))
    for place, one in enumerate(samples):
        token = Encoder(pipe, {"pusht": card}).encode([one])[0]
        noise = draw_noise(token, draw(9, "act", 4 + place))
        assert acts[place].shape == (16, 2) and acts[place].dtype == np.float32
        if state_row:  # upstream's pipeline cannot serve a state row; our general sampler can
            rows = sample(ours, pipe, [token], steps=STEPS, noise=[noise])[0].action[1:, :2]
            assert torch.equal(token.action[0, :2], one.state)
        else:
            rows = run_upstream(pipe, one, card, noise, token)[1]
        # The normaliser maps [-1, 1] to [0, 512] and [-2, 6].
        expected = rows * torch.tensor([256.0, 4.0]) + torch.tensor([256.0, 2.0])
        assert difference(torch.from_numpy(acts[place]), expected) <= 1e-5


@pytest.mark.parametrize("size", [(96, 96), (128, 96), (256, 256), (300, 400)])
def test_one_picture_has_the_latent_of_the_pipelines_first_frame(pipe, size):
    encoder = Encoder(pipe, {})
    frames = clip(size)
    alone = encoder.encode_frames([frames[:1]], CARD)[0]
    theirs = pipe.prepare_latents(
        action=condition(replace(robot_sample("policy", CARD, 0), frames=frames), CARD),
        device="cpu",
        dtype=torch.float32,
    )
    assert alone.shape[1] == 1
    assert difference(alone, theirs[0][0, :, :1]) <= 1e-5


@pytest.mark.parametrize(
    ("size", "tier", "tokens"),
    [((96, 96), 256, 9), ((128, 96), 256, 12), ((64, 112), 256, 8), ((300, 400), 256, None), ((540, 640), 480, 340)],
)
def test_clips_have_the_latents_of_the_pipeline(pipe, ours, size, tier, tokens):
    """Canvas, padding, encoding and the crop to the content."""
    card, frames = robot(resolution_tier=tier), clip(size, frames=5)
    latent = Encoder(pipe, {}).encode_frames([frames], card)[0]
    action = replace_chunk(condition(replace(robot_sample("inverse_dynamics", card, 0), frames=frames), card), 4)
    theirs = pipe.prepare_latents(action=action, device="cpu", dtype=torch.float32)
    assert latent.shape == theirs[0][0].shape
    assert difference(latent, theirs[0][0]) <= 1e-5
    if tokens is not None:
        _, h, w = Layout.of(ours.config).grid(latent)
        assert h * w == tokens


def replace_chunk(action: CosmosActionCondition, chunk: int) -> CosmosActionCondition:
    action.chunk_size = chunk
    return action


@pytest.mark.parametrize("size", [(96, 96), (64, 112), (540, 640)])
def test_token_ids_and_captions_equal_the_pipelines(pipe, size, monkeypatch):
    card = robot(resolution_tier=480 if size[0] > 300 else 256)
    captions, ids = [], []
    build, tokenize = Cosmos3OmniPipeline._build_action_json_prompt, Cosmos3OmniPipeline.tokenize_prompt

    def seen_caption(*arguments, **named):
        captions.append(build(*arguments, **named))
        return captions[-1]

    def seen_ids(self, *arguments, **named):
        ids.append(tokenize(self, *arguments, **named))
        return ids[-1]

    monkeypatch.setattr(Cosmos3OmniPipeline, "_build_action_json_prompt", staticmethod(seen_caption))
    monkeypatch.setattr(Cosmos3OmniPipeline, "tokenize_prompt", seen_ids)
    text = Encoder(pipe, {}).robot_text("Stop", card, size)
    stopped = RuntimeError("enough")

    def stop(*_, **__):
        raise stopped

    monkeypatch.setattr(Cosmos3OmniPipeline, "prepare_latents", stop)
    one = replace(robot_sample("policy", card, 1, size), frames=clip(size, 1))
    with pytest.raises(RuntimeError, match="enough"):
        pipe(prompt="Stop", fps=10.0, action=condition(one, card), use_system_prompt=False)
    assert captions[0] == captions[1] and json.loads(captions[0])["actions"][0]["description"] == "Stop."
    assert text.tolist() == ids[0][0] == ids[-1][0]
    assert dropped_prompt(pipe).tolist() == ids[1][1]


@pytest.mark.parametrize("task", ["policy", "forward_dynamics", "inverse_dynamics"])
def test_position_ids_equal_the_pipelines(pipe, ours, task):
    """What the pipeline hands its transformer, and what the pack holds."""
    seen = {}

    def note(module, arguments, named):
        seen.update(position_ids=named["position_ids"], ids=named["input_ids"])

    one = robot_sample(task, CARD, 0)
    token = Encoder(pipe, {"pusht": CARD}).encode([one])[0]
    noise = draw_noise(token, draw(5, "noise", 0))
    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    run_upstream(pipe, one, CARD, noise, token)
    handle.remove()
    packed = pack([token], [Values(token.video, None, token.action)], [NoiseLevels(1, 1, 1)], Layout.of(ours.config))
    assert torch.equal(packed.text_ids, seen["ids"])
    assert torch.equal(torch.cat([packed.text_positions, packed.positions], dim=1), seen["position_ids"].float())
