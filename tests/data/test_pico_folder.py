"""Cosmos3-Pico's folder holds what a published Cosmos 3 folder holds: upstream's pipeline runs every action task.

Nothing here reads the quality of the weights; they may be random. Sizes are the repository's own limits.
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
from PIL import Image
from transformers import AutoTokenizer

from cosmos3_train.model.tokenizers import cpu_has_bfloat16

FOLDER = Path(__file__).parents[2] / "data" / "cosmos3_pico"
INSTRUCTION = "Push the T-shaped block onto the T-shaped target."
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@pytest.fixture(scope="module")
def pipeline() -> Cosmos3OmniPipeline:
    dtype = torch.bfloat16 if cpu_has_bfloat16() else torch.float32  # minutes in the other
    loaded = Cosmos3OmniPipeline.from_pretrained(FOLDER, enable_safety_checker=False, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "text_tokenizer")


def frames(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in noise]


def test_sizes_within_limits():
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 24_000_000
    assert max(sizes.values()) <= 12_000_000


def test_no_folder_of_the_builder_is_recorded():
    for path in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


@pytest.mark.parametrize("mode", ["policy", "forward_dynamics", "inverse_dynamics"])
def test_pipeline_runs_every_action_task(
    pipeline: Cosmos3OmniPipeline, mode: Literal["policy", "forward_dynamics", "inverse_dynamics"]
):
    condition = CosmosActionCondition(
        mode=mode,
        chunk_size=16,
        domain_name="pusht",
        resolution_tier=256,
        raw_actions=torch.linspace(-1, 1, 32).view(16, 2) if mode == "forward_dynamics" else None,
        view_point="third_person_view",
        image=None if mode == "inverse_dynamics" else frames(1)[0],
        video=frames(17) if mode == "inverse_dynamics" else None,
    )
    video, _, actions = pipeline(
        INSTRUCTION,
        action=condition,
        fps=10.0,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        output_type="np" if mode == "policy" else "latent",
    )
    assert np.isfinite(np.asarray(video)).all()
    assert tuple(video.shape) == ((17, 96, 96, 3) if mode == "policy" else (1, 48, 5, 6, 6))
    if mode == "forward_dynamics":
        assert actions is None
    else:
        (action,) = actions
        assert action.shape == (16, 2)
        assert torch.isfinite(action).all() and action.std() > 0


def test_transformer_has_every_head(pipeline: Cosmos3OmniPipeline):
    config = pipeline.transformer.config
    names = set(pipeline.transformer.state_dict())
    assert {"action_proj_in.fc.weight", "audio_proj_in.weight", "lm_head.weight", "proj_out.weight"} <= names
    assert (config.action_dim, config.num_embodiment_domains, config.sound_dim) == (64, 32, 64)
    assert config.vocab_size % 64 == 0 and config.vocab_size >= len(pipeline.text_tokenizer)
    assert sum(config.rope_axes_dim) * 2 == config.head_dim


def test_vae_contract(pipeline: Cosmos3OmniPipeline):
    clip = torch.rand((1, 3, 17, 96, 128), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        clip = clip.to(pipeline.vae.dtype)
        latent = pipeline.vae.encode(clip).latent_dist.mode()
        still = pipeline.vae.encode(clip[:, :, :1]).latent_dist.mode()
        decoded = pipeline.vae.decode(latent).sample
    assert latent.shape == (1, 48, 5, 6, 8)
    assert decoded.shape == clip.shape
    assert (latent[:, :, :1] - still).abs().max() <= 1e-4
    assert len(pipeline.vae.config.latents_mean) == len(pipeline.vae.config.latents_std) == 48
    assert min(pipeline.vae.config.latents_std) > 0


def test_scheduler_is_the_training_flow(pipeline: Cosmos3OmniPipeline):
    pipeline.scheduler.set_timesteps(10)
    sigmas = pipeline.scheduler.sigmas
    assert sigmas[0] > 0.99 and sigmas[-1] == 0
    assert torch.all(sigmas.diff() < 0)
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    "text",
    [INSTRUCTION, 'wörld — {"a": [1, 22, 333, 4444]}\n\n  end', "", "\t日本 🤖 a  b", "0:00-0:02 fps 12.5"],
)
def test_tokenizer_round_trip(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_single_ids(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    for token, index in zip(SPECIAL_TOKENS, ids, strict=True):
        assert tokenizer(token).input_ids == [index]
        assert token in tokenizer.all_special_tokens
    assert tokenizer.eos_token == "<|im_end|>"


def test_chat_template(tokenizer):
    def chat(content, **options) -> str:
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    assert chat("Go.", add_vision_id=False) == "<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n"
    picture = [{"type": "image"}, {"type": "text", "text": "Go."}]
    assert "<|vision_start|><|image_pad|><|vision_end|>Go." in chat(picture)
    assert "Picture 1: <|vision_start|>" in chat(picture, add_vision_id=True)


def test_policy_caption_is_short(tokenizer):
    caption = Cosmos3OmniPipeline._build_action_json_prompt(
        INSTRUCTION, view_point="third_person_view", num_frames=17, fps=10.0, height=256, width=256
    )
    assert json.loads(tokenizer.decode(tokenizer(caption).input_ids)) == json.loads(caption)
    assert len(tokenizer(caption).input_ids) <= 40
