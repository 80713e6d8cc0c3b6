"""A window over the token budget ends a run before its first step, by its name, and not when its turn comes.

Conversations are not looked at: those over the budget are left out and counted when they are opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from cosmos3_train import config
from cosmos3_train.config import Embodiment, UserError
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.flow.tasks import TASKS
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.prompts import canvas
from cosmos3_train.training.datamodule import Opened
from cosmos3_train.types import SOUND_CHANNELS, SOUND_HZ, SPATIAL, TEMPORAL, TokenSample

SPARE = 64
"""Tokens by which a prompt may be longer than its template and its words together: signs between them."""
ESCAPED = 6
"""ASCII characters of a byte of a robot's instruction, at the most: its prompt is JSON."""
MOST = 10_000
"""Windows of one shape and task whose words are read, the wordiest first: half a minute. Any other that is over the
budget is refused, by its name too, when its turn comes."""


def refuse_over_budget(opened: Opened, encoder: Encoder, layout: Layout, budget: int) -> None:
    """Look at every window of the prepared datasets, held-out ones too, in each of its tasks.

    A prompt has at most a token a byte, so only words with more bytes than their window leaves room for are read, and
    of these `MOST`.

    Raises:
        UserError: a window has more tokens than `budget`; names the longest of its dataset.
    """
    plain = encoder.plain()
    for name, (dataset, entry) in opened.items():
        if not isinstance(dataset, PreparedDataset):
            continue
        found = list(_over(dataset, entry, plain, layout, budget))
        if found:
            tokens, key, task = max(found)
            count = len({window for _, window, _ in found})
            raise UserError(
                f"data.datasets.{name}: sample {key!r} ({task}) has {tokens} tokens, over "
                f"training.tokens_per_micro_batch = {budget}; raise it to at least {tokens}, or shorten the captions "
                f"of the windows over it ({count:,} were found)"
            )


def _over(
    dataset: PreparedDataset, entry: config.Dataset, encoder: Encoder, layout: Layout, budget: int
) -> Iterator[tuple[int, str, str]]:
    """(tokens, key, task) of each window over the budget."""
    contract, rows = dataset.contract, dataset.sizes()
    shapes = {name: rows[name] for name in ("height", "width", "fps", "frames")}
    for shape in pa.table(shapes).group_by(list(shapes)).aggregate([]).sort_by("height").to_pylist():
        mine = np.flatnonzero(np.logical_and.reduce([shapes[name] == value for name, value in shape.items()]))
        size, fps = (shape["height"], shape["width"]), shape["fps"]
        for task in entry.tasks:
            frames, heard = 1 if TASKS[task].image else shape["frames"], TASKS[task].sound != "absent"
            bare = encoder.text(task, "", contract, size, frames, fps).numel()
            shown = layout.tokens(_without_words(dataset, task, size, frames, fps))
            room = (budget - shown - bare - SPARE) / (ESCAPED if TASKS[task].has_robot else 1)
            counted: dict[tuple[str, str], int] = {}
            wordy = mine[rows["words"][mine] > room]
            for number in wordy[np.argsort(-rows["words"][wordy], kind="stable")][:MOST].tolist():
                if heard and not dataset.has_sound(number):
                    continue
                row = dataset.row(number)
                words = row["instruction"], row["sound_caption"] or ""
                if words not in counted:
                    text = encoder.text(task, words[0], contract, size, frames, fps, words[1])
                    counted[words] = shown + text.numel()
                if counted[words] > budget:
                    yield counted[words], dataset.key(row), task


def _without_words(dataset: PreparedDataset, task: str, size: tuple[int, int], frames: int, fps: float) -> TokenSample:
    """A window's part of the generation stream, of shapes alone."""
    contract, rules = dataset.contract, TASKS[task]
    height, width = size if isinstance(contract, Embodiment) else canvas(size, contract.resolution_tier)
    shape = (48, 1 + (frames - 1) // TEMPORAL, max(1, height // SPATIAL), max(1, width // SPATIAL))
    action = sound = None
    if rules.has_robot:
        assert isinstance(contract, Embodiment)
        action = torch.empty(contract.chunk + contract.state_row, 64, device="meta")
    if rules.sound != "absent":
        sound = torch.empty(math.ceil(frames / fps * SOUND_HZ), SOUND_CHANNELS, device="meta")
    none, video = torch.empty(0, device="meta"), torch.empty(shape, device="meta")
    return TokenSample("", 0, task, none, video=video, action=action, sound=sound)
