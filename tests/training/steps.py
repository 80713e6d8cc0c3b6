"""One step of a small module, made by the real Trainer on samples that need no video, and the gradient that it saw."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cosmos3_train.config import Experiment, Model, Objective, Optimizer, Strategy, Training, Tuning
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_backbone, load_parts
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.trainable import make_trainable
from cosmos3_train.runtime import draw
from cosmos3_train.training.batching import Packer
from cosmos3_train.training.loop import RunLoop
from cosmos3_train.training.module import PostTraining
from cosmos3_train.training.run import make_trainer
from cosmos3_train.types import Sample, StepBatch
from tests.training.project import PICO, TALK, robot

CPU = torch.device("cpu")
HYBRID = Tuning(method="hybrid", rank=4, towers=["generation", "understanding"])


@cache
def parts():
    return load_parts(Model(path=str(PICO), dtype="float32"), CPU, vae_weights=False)


def mixed_samples() -> list[Sample]:
    """Six samples of one step: uneven text, latents of odd sides, given and generated actions, conversations."""
    found = []
    words = ["push", "push the block to the left edge of the table and wait", "", "turn it", "stop there now", "go"]
    tasks = ["policy", "conversation", "forward_dynamics", "inverse_dynamics", "conversation", "image_to_video"]
    for number, (task, caption) in enumerate(zip(tasks, words, strict=True)):
        generator = draw(5, number)
        if task == "conversation":
            messages = [{"role": role, "content": text} for role, text in TALK[number % 3]]
            found.append(Sample(f"talk/{number}", number, task, messages=messages))
            continue
        latent = torch.randn((48, 2, 2 + number % 2, 3), generator=generator)
        found.append(
            Sample(
                f"moves/{number}",
                number,
                task,
                caption=caption,
                fps=10.0,
                latent=latent,
                size=(latent.shape[2] * 16, 48),
                action=None if task == "image_to_video" else torch.rand((4, 2), generator=generator) * 2 - 1,
                embodiment=None if task == "image_to_video" else "mover",
            )
        )
    return found


def make_module(model: Path, *, tuning: Tuning = HYBRID, budget: int = 100_000, **changes) -> PostTraining:
    """A module over the small checkpoint; `perturb` moves its trainables away from their start.

    changes: fields of `Model`, `Objective` or `Optimizer`, by their names.
    """

    def of(schema, **fixed):
        own = {key: value for key, value in changes.items() if key in schema.__dataclass_fields__}
        return schema(**{**fixed, **own})

    mover = robot()
    experiment = Experiment(
        name="steps",
        model=of(Model, path=str(model), dtype="float32", checkpoint_activations=False),
        embodiments={"mover": mover},
        objective=of(Objective),
        tuning=tuning,
        optimizer=of(Optimizer, clip=0.0, warmup_steps=0),
        training=Training(steps=1, samples_per_step=6, tokens_per_micro_batch=budget),
        strategy=Strategy(accelerator="cpu"),
    )
    backbone = load_backbone(experiment.model, CPU)
    trainables = make_trainable(backbone, tuning, [mover] if tuning.method == "hybrid" else [], seed=0)
    packer = Packer(
        Encoder(parts(), experiment.embodiments), Layout.of(backbone.config), experiment.objective, budget, seed=0
    )
    return PostTraining(experiment, backbone.train(), trainables, packer)


def perturb(module: PostTraining) -> PostTraining:
    """Every trainable moved at random, so that both LoRA factors are random and no gradient is zero by the start."""
    with torch.no_grad():
        for name, parameter in module.trainables.parameters.items():
            parameter += torch.randn(parameter.shape, generator=draw(0, "perturb", name)) * 0.1
    return module


def make_steps(module: PostTraining, batches: list[StepBatch], folder: Path) -> PostTraining:
    """Run the batches through the Trainer that a run uses."""
    training = replace(module.experiment.training, steps=len(batches), checkpoint_every_n_steps=0)
    module.experiment = replace(module.experiment, training=training)
    trainer = make_trainer(module.experiment, CPU, RunLoop(module, folder))
    trainer.fit(module, DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]
    return module


def gradients(module: PostTraining) -> dict[str, Tensor]:
    """The gradient of a module's first step, from AdamW's first moment; zero where the step did not reach."""
    beta = module.experiment.optimizer.betas[0]
    state = module.optimizer.state
    return {name: state[p]["exp_avg"] / (1 - beta) for name, p in module.trainables.parameters.items()}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
