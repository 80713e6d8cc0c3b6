"""A tiny sound tokenizer with the published contract: 48 kHz stereo in, 64 channels at 25 Hz out, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import Cosmos3AVAEAudioTokenizer

SIZES: dict[str, Any] = dict(dec_dim=2, dec_c_mults=(1, 1, 1, 1, 1), enc_dim=4, enc_c_mults=(1, 1, 1), enc_num_blocks=1)


def tiny_tokenizer(seed: int = 0, **changes: Any) -> Cosmos3AVAEAudioTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Cosmos3AVAEAudioTokenizer(**{**SIZES, **changes}).eval().requires_grad_(False)


def add_tokenizer(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write one into a model folder, and name it in its index, as a published folder has it."""
    tiny_tokenizer(seed, **changes).save_pretrained(folder / "sound_tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["sound_tokenizer"] = ["diffusers", "Cosmos3AVAEAudioTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
