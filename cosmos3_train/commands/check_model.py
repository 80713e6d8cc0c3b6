"""The model half of `cosmos3 check`: what would train, and how long a sample gets, from configuration files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cosmos3_train.commands.check_data import CheckedData
from cosmos3_train.config import Experiment, Loaded
from cosmos3_train.data.prepare import CARD_FILE
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.flow.tasks import CONVERSATION
from cosmos3_train.model.base_identity import check_shards
from cosmos3_train.model.context import refuse_heads
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.fp8 import describe_fp8, require_fp8
from cosmos3_train.model.loading import DTYPES, forget_understanding, load_parts, make_backbone
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.reasoner_cache import Reasoner, missing_prompts, size_in_words
from cosmos3_train.model.sight import open_sight
from cosmos3_train.model.trainable import make_trainable
from cosmos3_train.training.batching import split_into_packs
from cosmos3_train.training.datamodule import run_prompts


@dataclass(frozen=True)
class CheckedModel:
    """rows of the table; trained: parameters that train; stored_bytes: of the transformer's files; its layout"""

    rows: list[tuple[str, str]]
    trained: int
    stored_bytes: int
    layout: Layout


def check_model(folder: Path, experiment: Experiment, *, reasoner_cached: bool = False) -> CheckedModel:
    """Build the backbone on the meta device and choose what trains, as a run does.

    Args:
        reasoner_cached: the run has no understanding tower.

    Raises:
        UserError: a file is missing or damaged, a pattern matches nothing, or a robot's slot would stay untrained.
    """
    drawn = bool(experiment.model.random)
    stored = 0 if drawn else check_shards(folder / "transformer")
    check_shards(folder / "vae")
    with torch.device("meta"):
        backbone = make_backbone(folder / "transformer", experiment.model)
    refuse_heads(backbone.config, experiment.strategy.context_parallel)
    total = sum(parameter.numel() for parameter in backbone.parameters())
    if reasoner_cached:
        forget_understanding(backbone)
    loaded = sum(parameter.numel() for parameter in backbone.parameters())
    robots = list(experiment.embodiments.values())
    trainables = make_trainable(backbone, experiment.tuning, robots, experiment.training.seed)
    name = "random weights" if drawn else experiment.model.path
    rows = [("model", f"{name}: {_count(total)} parameters, {stored / 1e9:.2f} GB on disk")]
    if experiment.model.base_precision == "fp8":
        if _uses_gpu(experiment):
            require_fp8(torch.device("cuda"), DTYPES[experiment.model.dtype])
        rows.append(("frozen weights", describe_fp8(experiment.model.fp8_copies)))
    if reasoner_cached:
        rows.append(("loaded", f"{_count(loaded)} parameters: the understanding tower's keys and values are cached"))
    first, *others = trainables.description.splitlines()
    rows += [("trains", first.removeprefix("trains ")), *(("", line.strip()) for line in others)]
    for pattern, factor in experiment.tuning.learning_rate_multipliers.items():
        count = sum(trainables.factors[name] == factor for name in trainables.parameters)
        rows.append(("learning rate", f"× {factor:g} for {pattern} ({count} parameters)"))
    trained = sum(parameter.numel() for parameter in trainables.parameters.values())
    return CheckedModel(rows, trained, stored, Layout.of(backbone.config))


def _count(numbers: int) -> str:
    return f"{numbers / 1e9:.1f} billion" if numbers >= 1e9 else f"{numbers / 1e6:.1f} million"


def _uses_gpu(experiment: Experiment) -> bool:
    """Whether a run started here would."""
    return experiment.strategy.accelerator != "cpu" and torch.cuda.is_available()


@dataclass(frozen=True)
class ReasonerPrompts:
    """A dataset's distinct prompts: how many, and of how many its reasoner cache has no keys and values.

    bytes: of those that are missing
    """

    count: int
    missing: int
    bytes: int


def reasoner_prompts(
    folder: Path, loaded: Loaded, names: Iterable[str], encoder: Encoder
) -> dict[str, ReasonerPrompts | None]:
    """What the reasoner caches of datasets hold and lack, None of one that is not prepared.

    Raises:
        UserError: a cache is another model's, or cannot be read.
    """
    experiment, model = loaded.experiment, replace(loaded.model, path=str(folder))
    # random weights depend on the kind of device
    reasoner = Reasoner(model, torch.device("cuda" if _uses_gpu(experiment) else "cpu"))
    found: dict[str, ReasonerPrompts | None] = {}
    for name in names:
        entry = experiment.data.datasets[name]
        prepared = loaded.root / entry.prepared
        if not (prepared / CARD_FILE).is_file():
            found[name] = None
            continue
        dataset = PreparedDataset(
            prepared,
            experiment.embodiments[entry.embodiment] if entry.embodiment else None,
            loaded.root / entry.source if entry.source else None,
        )
        prompts = run_prompts(loaded, dataset, entry, encoder)
        missing = missing_prompts(prepared, prompts, reasoner)
        size = sum(prompt.numel() for prompt in missing) * reasoner.bytes_a_token
        found[name] = ReasonerPrompts(len(prompts), len(missing), size)
    return found


def reasoner_rows(folder: Path, loaded: Loaded, names: Iterable[str]) -> tuple[list[tuple[str, str]], int]:
    """Of each dataset what its reasoner cache holds and lacks, in words, and the bytes that are lacking in all.

    Raises:
        UserError: as `reasoner_prompts`.
    """
    model = replace(loaded.model, path=str(folder))
    encoder = Encoder(load_parts(model, torch.device("cpu"), vae_weights=False), loaded.experiment.embodiments)
    rows, needed = [], 0
    for name, prompts in reasoner_prompts(folder, loaded, names, encoder).items():
        if prompts is None:
            rows.append((f"reasoner {name}", "not cached yet; the run computes it once the log is prepared"))
            continue
        needed += prompts.bytes
        there, missing = prompts.count - prompts.missing, prompts.missing
        words = f"; the run computes {missing:,} first, {size_in_words(prompts.bytes)}" if missing else ""
        rows.append((f"reasoner {name}", f"{there:,} of {prompts.count:,} prompts cached{words}"))
    return rows, needed


def longest_sample(folder: Path, layout: Layout, experiment: Experiment, data: Mapping[str, CheckedData]) -> str:
    """How many tokens the longest sample has, in words.

    Raises:
        UserError: the tokenizer cannot be read, or the sample is larger than the budget.
    """
    model = replace(experiment.model, path=str(folder))
    encoder = Encoder(load_parts(model, torch.device("cpu"), vae_weights=False), experiment.embodiments)
    for name, checked in data.items():
        if any(sample.pictures for sample in checked.longest):
            encoder.sight = open_sight(model, encoder.parts, f"data.datasets.{name}")
    named = [
        replace(sample, key=f"{name}: {sample.key}") for name, checked in data.items() for sample in checked.longest
    ]
    samples = encoder.encode(named)
    if not samples:
        return "no data to count"
    budget = experiment.training.tokens_per_micro_batch
    # Conversations over the budget are left out and counted when they are prepared.
    fitting = [s for s in samples if s.task != CONVERSATION or layout.tokens(s) <= budget]
    longest = max(fitting or samples, key=layout.tokens)
    tokens = layout.tokens(longest)
    split_into_packs([longest], layout, budget)  # refuses one that is larger than the budget
    several = f"{budget // tokens} of them fit" if budget // tokens > 1 else "one fits"
    return f"{tokens:,} tokens ({longest.key}); {several} in training.tokens_per_micro_batch = {budget:,}"
