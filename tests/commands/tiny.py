"""A project folder of its own, and a published folder of two layers, for commands that are run from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import Cosmos3OmniTransformer

from cosmos3_train.evaluation.pictures import read_metrics
from tests.evaluation.tiny import tiny_parts
from tests.parity.avae import add_tokenizer
from tests.parity.upstream import TINY, randomise

ROOT = Path(__file__).parents[2]
PICO = ROOT / "data" / "cosmos3_pico"

QUICK = (
    "model.dtype=float32",
    "model.vae_dtype=float32",
    "model.checkpoint_activations=false",
    "data.workers=0",
    "data.window_stride=40",
    "training.steps=2",
    "training.samples_per_step=2",
    "training.log_every_n_steps=1",
    "evaluation.heldout_samples=2",
    "evaluation.action_samples=1",
    "evaluation.solver_steps=2",
    "evaluation.closed_loop_episodes=0",
    "strategy.accelerator=cpu",
)
"""What makes any experiment a matter of seconds on a CPU."""


def make_project(root: Path) -> Path:
    """A folder with this repository's configs, experiments and data, whose runs/ and prepared/ are its own."""
    shutil.copytree(ROOT / "configs", root / "configs")
    shutil.copytree(ROOT / "experiments", root / "experiments", ignore=shutil.ignore_patterns("pico"))
    (root / "data").symlink_to(ROOT / "data")
    return root


def make_model(folder: Path, layers: int = 2) -> Path:
    """A Cosmos 3 folder in the published layout: Pico's tokenizer and scheduler, two narrow layers, a narrow VAE, a
    narrow sound tokenizer. `tests.parity.eyes.add_eyes` gives it a narrow vision encoder."""
    for name in ("text_tokenizer", "scheduler"):
        shutil.copytree(PICO / name, folder / name)
    shutil.copy(PICO / "model_index.json", folder)
    parts = tiny_parts()
    parts.vae.save_pretrained(folder / "vae")
    made = Cosmos3OmniTransformer(**{**TINY, "num_hidden_layers": layers, "vocab_size": len(parts.text_tokenizer)})
    randomise(made)
    made.save_pretrained(folder / "transformer")
    return add_tokenizer(folder)


def quick_data(experiment) -> list[str]:
    """Overrides that encode online (a whole log's latents would take longer than two steps), rows in a folder apart."""
    found = []
    for name, entry in experiment.data.datasets.items():
        found += [f"data.datasets.{name}.cache_latents=false"]
        found += [f"data.datasets.{name}.prepared=prepared/quick_{entry.embodiment or name}"]
    return found


def numbers_of_two_steps(run: Path) -> dict[str, Any]:
    """What a finished run of two steps reports, once it is sure that both were made and that they changed the loss."""
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert read_metrics(run / "metrics.csv")["loss"][0] == [1, 2]
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["heldout_loss_before"] != numbers["heldout_loss_after"]
    return numbers
