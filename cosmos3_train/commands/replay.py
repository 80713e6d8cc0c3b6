"""cosmos3 replay RUN: make the steps again that the run left out, and say which of their samples did it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cosmos3_train.commands.console import FINISHED, say, say_table
from cosmos3_train.commands.runs import find_run
from cosmos3_train.config import UserError
from cosmos3_train.flow.velocity_loss import sample_losses
from cosmos3_train.objectives import flow_matching, next_token
from cosmos3_train.runtime import fold
from cosmos3_train.training.batching import TEXT, PackedStep
from cosmos3_train.training.checkpoints import list_checkpoints
from cosmos3_train.training.module import PostTraining
from cosmos3_train.training.optimizer import clip_gradients
from cosmos3_train.training.run import CHECKPOINTS, build
from cosmos3_train.training.skipped import list_skipped, read_shares
from cosmos3_train.types import IGNORED_LABEL, PackedSequence, Velocities

SHOWN = 8
"""Samples of a step that are told, the worst first."""


@dataclass(frozen=True)
class Replayed:
    """A sample of a step that was made again: its noise level where it has one, and its mean losses by modality."""

    key: str
    level: float | None
    losses: dict[str, float]

    @property
    def badness(self) -> float:
        """To sort by: what is no number is worst."""
        return max((loss if math.isfinite(loss) else math.inf for loss in self.losses.values()), default=0.0)


def run(name_or_path: str, draw: int | None) -> int:
    """Make the kept steps again with the weights of the run's newest checkpoint, changing nothing.

    Args:
        draw: which of them, by the number in its file's name; None takes all.

    Raises:
        UserError: no such run, no such step, or a file is damaged.
    """
    loaded = find_run(name_or_path)
    found = list_skipped(loaded.run_folder)
    if not found:
        raise UserError(f"{loaded.run_folder}: no skipped step is kept there: the run has left none out")
    if draw is not None and draw not in found:
        raise UserError(f"--draw {draw}: not kept; there are {', '.join(map(str, found))}")
    wanted = list(found) if draw is None else [draw]
    steps = {number: read_shares(found[number]) for number in wanted}
    module = build(loaded, "replay").module
    newest = list_checkpoints(loaded.run_folder / CHECKPOINTS)
    say(f"{loaded.experiment.name}: with the weights of {newest[-1].name if newest else 'the start'}")
    for number, (shares, was) in steps.items():
        _tell(number, shares, was, module, found[number][0])
    return FINISHED


def _tell(number: int, shares: Sequence[PackedStep], was: float, module: PostTraining, file: Path) -> None:
    samples, norm = replay(shares, module)
    say()
    say(f"draw {number} ({file.parent.name}/{file.name}): its gradient's norm was {was:.4g} and is {norm:.4g}")
    worst = sorted(samples, key=lambda sample: -sample.badness)
    names = sorted({name for sample in samples for name in sample.losses})
    say_table(
        [
            ("  sample", "noise level", *names),
            *(
                (
                    f"  {sample.key}",
                    "-" if sample.level is None else f"{sample.level:.3f}",
                    *(f"{sample.losses[name]:.4g}" if name in sample.losses else "-" for name in names),
                )
                for sample in worst[:SHOWN]
            ),
        ]
    )
    if len(worst) > SHOWN:
        say(f"  and {len(worst) - SHOWN} more, whose losses are lower")


def replay(shares: Sequence[PackedStep], module: PostTraining) -> tuple[list[Replayed], float]:
    """The samples of a step, as its ranks had them in order, and the norm of the whole step's gradient. Weights and
    optimizer stay as they are."""
    counts = torch.stack([module.step_counts(step) for step in shares]).sum(0).to(module.device)
    samples = []
    for place, step in enumerate(shares):
        torch.manual_seed(fold(module.experiment.training.seed, "dropout", step.step, place))
        for pack, keys in zip(step.packs, step.keys, strict=True):
            moved = pack.to(module.device)
            velocities = module.backbone(moved)
            module.weighted(module.losses_of(velocities, moved), counts).backward()
            samples += _by_sample(velocities, moved, keys, module)
    parameters = list(module.trainables.parameters.values())
    norm = float(clip_gradients(parameters, 0.0))
    for parameter in parameters:
        parameter.grad = None
    return samples, norm


@torch.no_grad()
def _by_sample(
    velocities: Velocities, pack: PackedSequence, keys: Sequence[str], module: PostTraining
) -> list[Replayed]:
    found: list[dict[str, float]] = [{} for _ in keys]
    levels: list[float | None] = [None] * len(keys)
    for name in flow_matching.MODALITIES:
        target = getattr(pack, f"{name}_target")
        if target is None:
            continue
        losses = sample_losses(getattr(velocities, name), target).tolist()
        for row, level in zip(target.sample.tolist(), target.levels.tolist(), strict=True):
            if row < len(keys):  # the last may be padding
                found[row][name], levels[row] = losses[row], level
    place = torch.bucketize(pack.text_out, pack.text_spans.offsets[1:], right=True)
    for row in set(place[pack.labels != IGNORED_LABEL].tolist()):
        own = torch.where(place == row, pack.labels, IGNORED_LABEL)
        chunk = module.experiment.objective.logits_chunk
        total = next_token.loss(velocities, replace(pack, labels=own), module.backbone.lm_head, chunk)
        found[row][TEXT] = float(total) / int((own != IGNORED_LABEL).sum())
    return [Replayed(*one) for one in zip(keys, levels, found, strict=True)]
