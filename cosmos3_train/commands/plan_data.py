"""The data half of `cosmos3 plan`: how many tokens the samples of each dataset and task have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cosmos3_train.commands.check_data import check_dataset, robot_samples
from cosmos3_train.config import Clips, Dataset, Embodiment, Loaded, UserError
from cosmos3_train.data.card import load_card
from cosmos3_train.data.mixture import check_entry
from cosmos3_train.flow.tasks import CONVERSATION, TASKS
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.prompts import canvas
from cosmos3_train.model.sight import open_sight
from cosmos3_train.training.benchmark_log import is_own
from cosmos3_train.training.datamodule import contract_of
from cosmos3_train.training.plan_time import Kind
from cosmos3_train.types import IGNORED_LABEL, SOUND_CHANNELS, SOUND_HZ, SPATIAL, TEMPORAL, Sample

WIDE = (720, 1280)
"""(H, W) that frames are taken to have where there is none to look at."""
FRAMES_PER_SECOND = 24.0
CONVERSATIONS = 100
"""How many are looked at; a kind's length is their mean."""


@dataclass(frozen=True)
class PlannedData:
    """kinds: of the mixture;  one_prompt: all samples have the same;  rows: of the table"""

    kinds: list[Kind]
    one_prompt: bool
    rows: list[tuple[str, str]]


def read_kinds(loaded: Loaded, layout: Layout, encoder: Encoder | None) -> PlannedData:
    """The samples of the mixture: a robot's and clips' as long as the dataset's longest, conversations as their mean.

    Args:
        encoder: counts the words of prompts; None takes `benchmark.text_tokens` for each.

    Raises:
        UserError: there is no dataset, or one cannot be read or has tasks or a weight that a run would refuse.
    """
    datasets = loaded.experiment.data.datasets
    if not datasets:
        raise UserError("data.datasets is empty; name at least one dataset")
    kinds, rows, total = [], [], sum(entry.weight for entry in datasets.values())
    for name, entry in datasets.items():
        samples, seen = _samples(loaded, name, entry)
        counts = encoder if seen == SEEN else None
        if counts is not None and counts.sight is None and any(sample.pictures for sample in samples):
            counts.sight = open_sight(loaded.model, counts.parts, f"data.datasets.{name}")
        for task, share, alike in _by_task(entry, samples):
            text, labelled = _text(loaded, task, alike, counts)
            generation = sum(_generation(loaded, layout, sample) for sample in alike) // len(alike)
            kinds.append(Kind(share * entry.weight / total, text, generation, labelled))
            words = "the mean" if task == CONVERSATION and counts else seen
            rows.append((f"data {name}", f"{task}: {generation:,} generation and {text:,} text tokens ({words})"))
    own = len(datasets) == 1 and all(_benchmarks(loaded, entry) for entry in datasets.values())
    return PlannedData(kinds, own and loaded.experiment.benchmark.instructions == 1, rows)


SEEN, MADE, NOT_HERE = "its longest", "a benchmark's own", "not on this disk: frames of 16:9"
TO_MAKE = "not on this disk: as cosmos3 benchmark would make it"


def _samples(loaded: Loaded, name: str, entry: Dataset) -> tuple[Sequence[Sample], str]:
    """Samples of a dataset's tasks, and where their sizes are from."""
    benchmark = loaded.experiment.benchmark
    card = load_card(loaded.root / entry.card) if entry.card else None
    here = (loaded.root / entry.prepared).exists()
    if _benchmarks(loaded, entry):
        check_entry(name, entry, talks=False)
        robot = loaded.experiment.embodiments[entry.embodiment or ""]
        return robot_samples(entry, robot, "", (benchmark.height, benchmark.width)), MADE if here else TO_MAKE
    source = loaded.root / entry.source if entry.source else card.source_folder(loaded.root) if card else None
    if card is None or here or (source is not None and source.exists()):
        return check_dataset(loaded, name, entry).longest, SEEN
    check_entry(name, entry, talks=card.format == "conversations", robot=not card.shows_clips)
    if card.format == "conversations":
        return [Sample("", 0, CONVERSATION)], NOT_HERE
    contract = contract_of(loaded, name, entry, card)
    if isinstance(contract, Embodiment):
        return robot_samples(entry, contract, "", canvas(WIDE, contract.resolution_tier)), NOT_HERE
    return _clips(entry, contract), NOT_HERE


def _benchmarks(loaded: Loaded, entry: Dataset) -> bool:
    """Whether the entry's log is one that `cosmos3 benchmark` makes."""
    own = entry.card is None and entry.source is None and entry.embodiment is not None
    return own and is_own(loaded.root / entry.prepared)


def _clips(entry: Dataset, clips: Clips) -> list[Sample]:
    height, width = canvas(WIDE, clips.resolution_tier)
    latent = (1 + (clips.frames - 1) // TEMPORAL, height // SPATIAL, width // SPATIAL)
    sound = torch.zeros((2, SOUND_CHANNELS, math.ceil(clips.frames / FRAMES_PER_SECOND * SOUND_HZ)))
    return [
        Sample(
            key=task,
            number=0,
            task=task,
            latent=torch.zeros((1, 1 if TASKS[task].image else latent[0], *latent[1:])),
            sound=None if TASKS[task].sound == "absent" else sound,
        )
        for task in entry.tasks
    ]


def _by_task(entry: Dataset, samples: Sequence[Sample]) -> list[tuple[str, float, list[Sample]]]:
    """(task, share of the entry's samples, samples of it)."""
    talk = [sample for sample in samples if sample.task == CONVERSATION][:CONVERSATIONS]
    if talk:
        return [(CONVERSATION, 1.0, talk)]
    total = sum(entry.tasks.values())
    return [
        (task, weight / total, [sample for sample in samples if sample.task == task])
        for task, weight in entry.tasks.items()
        if weight
    ]


def _text(loaded: Loaded, task: str, samples: list[Sample], encoder: Encoder | None) -> tuple[int, int]:
    """(text tokens, how many of them are predicted), the mean of the samples."""
    if encoder is None:
        text = loaded.experiment.benchmark.text_tokens
        return text, text if task == CONVERSATION else 0
    found = encoder.encode(samples)
    predicted = sum(int((s.labels != IGNORED_LABEL).sum()) for s in found if s.labels is not None)
    return sum(s.text.numel() for s in found) // len(found), -(-predicted // len(found))


def _generation(loaded: Loaded, layout: Layout, sample: Sample) -> int:
    """Tokens of its generation stream."""
    if sample.latent is None:
        return 0
    found = math.prod(layout.grid(sample.latent))
    if TASKS[sample.task].has_robot:
        found += loaded.experiment.embodiments[sample.embodiment or ""].rows
    return found + (0 if sample.sound is None else sample.sound.shape[-1])
