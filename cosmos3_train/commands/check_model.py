"""The model half of `cosmos3 check`: what would train, and how long a sample gets, from configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cosmos3_train.commands.check_data import CheckedData
from cosmos3_train.config import Experiment, Model
from cosmos3_train.model.base_identity import check_shards
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_parts, make_backbone
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.trainable import make_trainable
from cosmos3_train.training.batching import split_into_packs


@dataclass(frozen=True)
class CheckedModel:
    """rows of the table; trained: parameters that train; stored_bytes: of the transformer's files; its layout"""

    rows: list[tuple[str, str]]
    trained: int
    stored_bytes: int
    layout: Layout


def check_model(folder: Path, experiment: Experiment) -> CheckedModel:
    """Build the backbone on the meta device and choose what trains, as a run does.

    Raises:
        UserError: a file is missing or damaged, a pattern matches nothing, or a robot's slot would stay untrained.
    """
    drawn = bool(experiment.model.random)
    stored = 0 if drawn else check_shards(folder / "transformer")
    check_shards(folder / "vae")
    with torch.device("meta"):
        backbone = make_backbone(folder / "transformer", experiment.model)
    total = sum(parameter.numel() for parameter in backbone.parameters())
    robots = list(experiment.embodiments.values())
    trainables = make_trainable(backbone, experiment.tuning, robots, experiment.training.seed)
    size = f"{total / 1e9:.1f} billion" if total >= 1e9 else f"{total / 1e6:.1f} million"
    name = "random weights" if drawn else experiment.model.path
    rows = [("model", f"{name}: {size} parameters, {stored / 1e9:.2f} GB on disk")]
    first, *others = trainables.description.splitlines()
    rows += [("trains", first.removeprefix("trains ")), *(("", line.strip()) for line in others)]
    for pattern, factor in experiment.tuning.learning_rate_multipliers.items():
        count = sum(trainables.factors[name] == factor for name in trainables.parameters)
        rows.append(("learning rate", f"× {factor:g} for {pattern} ({count} parameters)"))
    trained = sum(parameter.numel() for parameter in trainables.parameters.values())
    return CheckedModel(rows, trained, stored, Layout.of(backbone.config))


def longest_sample(folder: Path, layout: Layout, experiment: Experiment, data: Mapping[str, CheckedData]) -> str:
    """How many tokens the longest sample has, in words.

    Raises:
        UserError: the tokenizer cannot be read, or the sample is larger than the budget.
    """
    parts = load_parts(Model(path=str(folder)), torch.device("cpu"), vae_weights=False)
    encoder = Encoder(parts, experiment.embodiments)
    samples = encoder.encode([sample for checked in data.values() for sample in checked.longest])
    if not samples:
        return "no data to count"
    longest = max(samples, key=layout.tokens)
    budget, tokens = experiment.training.tokens_per_micro_batch, layout.tokens(longest)
    split_into_packs([longest], layout, budget)  # refuses one that is larger than the budget
    several = f"{budget // tokens} of them fit" if budget // tokens > 1 else "one fits"
    return f"{tokens:,} tokens ({longest.key}); {several} in training.tokens_per_micro_batch = {budget:,}"
