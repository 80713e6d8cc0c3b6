"""On a CUDA device: the sound tokenizer's encoder in its published size, and a run that reads and caches sound."""

from __future__ import annotations

import time

import pytest
import torch
from diffusers import Cosmos3OmniPipeline

from cosmos3_train import cli
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.evaluation.pictures import read_metrics
from cosmos3_train.model.encoders import Encoder
from tests.commands.tiny import QUICK, make_model, make_project
from tests.data.sounds import wave
from tests.evaluation.tiny import tiny_parts
from tests.gpu.test_on_a_gpu import difference
from tests.parity.avae import tiny_tokenizer

pytestmark = pytest.mark.gpu
PUBLISHED = {"enc_dim": 192, "enc_c_mults": (1, 2, 4), "enc_num_blocks": 2}


def encoder(device: str, dtype: torch.dtype) -> Encoder:
    parts, tokenizer = tiny_parts(), tiny_tokenizer(**PUBLISHED).to(device, dtype)
    made = Cosmos3OmniPipeline(
        None, parts.text_tokenizer, parts.vae, parts.scheduler, tokenizer, enable_safety_checker=False
    )
    return Encoder(made, {})


def test_the_encoder_gives_on_a_gpu_what_it_gives_on_a_cpu():
    waveform = torch.from_numpy(wave(0.5, 48000, 2))
    reference = encoder("cpu", torch.float32).encode_sound(waveform)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    assert difference(encoder("cuda", torch.float32).encode_sound(waveform), reference) < 1e-4
    rounded = difference(encoder("cpu", torch.bfloat16).encode_sound(waveform), reference)
    found = encoder("cuda", torch.bfloat16)
    assert difference(found.encode_sound(waveform), reference) < 1.5 * rounded
    clip = torch.from_numpy(wave(61 / 24, 48000, 2))
    found.encode_sound(clip)
    began = time.monotonic()
    for _ in range(20):
        found.encode_sound(clip)
    print(f"\nsound of 61 frames at 24 a second, bf16: {(time.monotonic() - began) / 20 * 1000:.1f} ms")


@pytest.mark.parametrize("cached", ["true", "false"])
def test_two_steps_on_the_clips_that_ship(cached, tmp_path, monkeypatch):
    project, model = make_project(tmp_path / "project"), make_model(tmp_path / "model")
    monkeypatch.chdir(project)
    key = "data.datasets.whistle.cache_latents"
    settings = [*QUICK, "strategy.accelerator=gpu", f"model.path={model}", f"{key}={cached}", "export=none"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "experiments/nano_sound_lora.yaml", *settings, "model.compile=false"])
    assert ended.value.code == 0
    assert len(read_metrics(project / "runs" / "nano_sound_lora" / "metrics.csv")["loss/sound"][1]) == 2
    dataset = PreparedDataset(project / "prepared" / "whistle", None)
    assert (dataset.sound_cache is not None) == (cached == "true")
