"""The video tokenizer on a CPU: which numbers it runs in, what its latents are known by, and whose kernels it takes."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile

from cosmos3_train.config import Model
from cosmos3_train.model import tokenizers
from cosmos3_train.model.loading import load_parts
from cosmos3_train.model.tokenizers import latents_dtype

CPU = torch.device("cpu")


def video_tokenizer(folder, dtype: str) -> AutoencoderKLWan:
    return load_parts(Model(path=str(folder), dtype="float32", vae_dtype=dtype), CPU).vae


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_cpu_without_bfloat16_runs_its_weights_in_float32_and_its_latents_are_known_by_bfloat16(
    folder, monkeypatch, has_bfloat16
):
    monkeypatch.setattr(tokenizers, "cpu_has_bfloat16", lambda: has_bfloat16)  # in place of another machine
    vae = video_tokenizer(folder, "bfloat16")
    assert vae.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert latents_dtype(vae) == torch.bfloat16
    assert all(torch.equal(weight, weight.bfloat16().to(weight.dtype)) for weight in vae.state_dict().values())


def test_one_in_float32_keeps_every_bit(folder):
    vae = video_tokenizer(folder, "float32")
    assert vae.dtype == latents_dtype(vae) == torch.float32
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in vae.state_dict().values())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_a_clip_alone_is_encoded_and_decoded_by_onednn_to_the_numbers_of_upstream(folder):
    ours = video_tokenizer(folder, "float32")
    upstream = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    pixels = torch.rand((1, 3, 5, 64, 96), generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, kernels = [], []
    with torch.no_grad():
        for vae in (ours, upstream):
            with profile(activities=[ProfilerActivity.CPU]) as told:
                latent = vae.encode(pixels).latent_dist.mode()
                found.append((latent, vae.decode(latent).sample))
            kernels.append({event.key for event in told.key_averages()})
    assert "aten::slow_conv3d" not in kernels[0] and "aten::mkldnn_convolution" in kernels[0]
    assert "aten::slow_conv3d" in kernels[1], "torch chooses better by itself: our choice can go"
    for ours_made, theirs in zip(*found, strict=True):
        assert float((ours_made - theirs).norm() / theirs.norm()) <= 1e-5
