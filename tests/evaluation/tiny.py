"""Parts and backbones small enough for many tests: Pico's tokenizer and scheduler, narrow random networks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline

from cosmos3_train.config import Model
from cosmos3_train.model.loading import load_parts
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from tests.parity.upstream import TINY, randomise

PICO = str(Path(__file__).resolve().parents[2] / "data" / "cosmos3_pico")


@cache
def tiny_parts() -> Cosmos3OmniPipeline:
    """Pico's tokenizer and scheduler with a narrow random VAE of the same contract, which is quick. Shared by tests."""
    parts = load_parts(Model(path=PICO, dtype="float32"), torch.device("cpu"), vae_weights=False)
    narrow = {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 0}
    plain = {"latents_mean": [0.0] * 48, "latents_std": [0.3] * 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan.from_config({**parts.vae.config, **narrow, **plain})
    vae.requires_grad_(False).eval()
    return Cosmos3OmniPipeline(None, parts.text_tokenizer, vae, parts.scheduler, enable_safety_checker=False)


def tiny_backbone(**changes) -> Cosmos3PackedTransformer:
    """A random packed transformer with a word for every token of Pico's tokenizer; nothing in it trains."""
    made = Cosmos3PackedTransformer(**{**TINY, "vocab_size": len(tiny_parts().text_tokenizer), **changes})
    randomise(made)
    return made.requires_grad_(False)
