"""The model half of `cosmos3 check`: what would train, and how long a sample gets, from configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from cosmos3_train.commands.check_data import CheckedData
from cosmos3_train.config import Experiment, Model, UserError, nearest
from cosmos3_train.model.base_identity import shard_files
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_parts, model_folder
from cosmos3_train.model.omni import Cosmos3PackedTransformer
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


def fetched(model: Model) -> Path | None:
    """The checkpoint's folder, None for a Hub id that is not on this disk. Never touches the network.

    Raises:
        UserError: neither a folder of the right kind nor a Hub id.
    """
    path = Path(model.path)
    if path.is_dir() or path.is_absolute() or model.path.startswith(".") or model.path.count("/") != 1:
        return model_folder(model)
    if path.parent.is_dir():
        beside = [str(folder) for folder in path.parent.iterdir() if folder.is_dir()]
        raise UserError(f"model.path is {model.path!r}: no such folder.{nearest(model.path, beside)}")
    try:
        folder = Path(snapshot_download(model.path, revision=model.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "transformer" / "config.json").is_file() else None


def check_model(folder: Path, experiment: Experiment) -> CheckedModel:
    """Build the backbone on the meta device and choose what trains, as a run does.

    Raises:
        UserError: a shard is missing, a pattern matches nothing, or a robot's slot would stay untrained.
    """
    stored = sum(file.stat().st_size for file in shard_files(folder / "transformer"))
    config = Cosmos3PackedTransformer.load_config(folder / "transformer")
    with torch.device("meta"):
        made = Cosmos3PackedTransformer.from_config(cast(Any, config))
    backbone = cast(Cosmos3PackedTransformer, made)
    total = sum(parameter.numel() for parameter in backbone.parameters())
    robots = list(experiment.embodiments.values())
    trainables = make_trainable(backbone, experiment.tuning, robots, experiment.training.seed)
    size = f"{total / 1e9:.1f} billion" if total >= 1e9 else f"{total / 1e6:.1f} million"
    rows = [("model", f"{experiment.model.path}: {size} parameters, {stored / 1e9:.2f} GB")]
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
