"""A whole small project for the tests of training: a checkpoint folder of two narrow layers, a log, conversations.

Everything is real and goes through the doors that a user's files go through: the folder is in the published layout,
the log is LeRobot v3.0, the experiment is a YAML file. Only the sizes are small.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer

from cosmos3_train.config import Embodiment, Loaded, load_experiment, to_plain
from tests.data.logs import CAMERA, embodiment, make_log
from tests.parity.upstream import TINY, randomise

PICO = Path(__file__).resolve().parents[2] / "data" / "cosmos3_pico"
NANO_WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1152,
    "action_gen": True,
    "action_dim": 64,
}
"""Sizes of a transformer as wide as Nano's, with Pico's words; how deep, a test says."""
FRESH = 24
"""A slot of the action heads that upstream gives no robot."""

NARROW_VAE = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 0,
    "latents_mean": [0.0] * 48,
    "latents_std": [0.3] * 48,
}
TALK = [
    [("user", "which way?"), ("assistant", "to the left.")],
    [("system", "be brief"), ("user", "where is the block?"), ("assistant", "on the table, near the edge.")],
    [("user", "stop?"), ("assistant", "yes."), ("user", "now?"), ("assistant", "now, and wait until it is at rest.")],
]


def write_model(folder: Path) -> Path:
    """A checkpoint folder: Pico's tokenizer and scheduler, two random layers 64 wide, a narrow random VAE."""
    for part in ("text_tokenizer", "scheduler", "model_index.json"):
        (shutil.copytree if (PICO / part).is_dir() else shutil.copy)(PICO / part, folder / part)
    words = json.loads((PICO / "transformer" / "config.json").read_text())["vocab_size"]
    transformer = Cosmos3OmniTransformer(**{**TINY, "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": words})
    randomise(transformer)
    transformer.save_pretrained(folder / "transformer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan.from_config({**AutoencoderKLWan.load_config(PICO, subfolder="vae"), **NARROW_VAE})
    vae.save_pretrained(folder / "vae")
    return folder


def robot(**changes) -> Embodiment:
    """A two-channel robot on a fresh slot, whose rows start from upstream's domain 4."""
    return embodiment(**{"domain_id": FRESH, "initialise_from": 4, "normaliser": "minmax", **changes})


def write_project(root: Path) -> Path:
    """The project's folder: `model/`, `log/`, `talk.jsonl`, cards, and `experiments/small.yaml`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "model").mkdir()
    write_model(root / "model")
    make_log(root / "log", [14, 13, 12, 14, 13], cameras={CAMERA: (32, 48)})
    lines = [{"messages": [{"role": role, "content": words} for role, words in turns]} for turns in TALK]
    (root / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(root / "configs" / "embodiment" / "mover.yaml", to_plain(robot()))
    write(root / "cards" / "moves.yaml", {"name": "moves", "format": "lerobot_v3", "source": "log"})
    write(root / "cards" / "talk.yaml", {"name": "talk", "format": "conversations", "source": "talk.jsonl"})
    write(root / "experiments" / "small.yaml", experiment(root))
    return root


def experiment(root: Path) -> dict:
    """A mixed run of four steps: three robot tasks and conversations, hybrid tuning, small packs, an average."""
    moves = {
        "card": "cards/moves.yaml",
        "prepared": "prepared/moves",
        "embodiment": "mover",
        "tasks": {"policy": 1, "forward_dynamics": 1, "inverse_dynamics": 1},
        "cache_latents": True,
        "weight": 3,
    }
    talk = {"card": "cards/talk.yaml", "prepared": "prepared/talk", "weight": 1}
    return {
        "name": "small",
        "model": {
            "path": str(root / "model"),
            "dtype": "float32",
            "vae_dtype": "float32",
            "checkpoint_activations": False,
        },
        "data": {
            "datasets": {"moves": moves, "talk": talk},
            "workers": 0,
            "window_stride": 4,
            "heldout_fraction": 0.2,
        },
        "tuning": {"method": "hybrid", "rank": 4, "towers": ["generation", "understanding"]},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 1, "weight_decay": 0.1},
        "training": {
            "steps": 4,
            "samples_per_step": 4,
            "tokens_per_micro_batch": 150,
            "ema_decay": 0.9,
            "log_every_n_steps": 1,
            "checkpoint_every_n_steps": 2,
            "evaluate_every_n_steps": 2,
            "keep_checkpoints": 9,
        },
        "strategy": {"accelerator": "cpu"},
        "export": "none",
    }


def write(path: Path, content: dict) -> Path:
    """A YAML file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def load(root: Path, *overrides: str) -> Loaded:
    """The small experiment with differences."""
    return load_experiment(root / "experiments" / "small.yaml", overrides)
