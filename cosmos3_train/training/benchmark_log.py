"""The log that a benchmark trains on: made up, but in the form and geometry of a real one, and prepared as one is."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cosmos3_train.config import Benchmark, Dataset, Embodiment, Experiment, Loaded, UserError, to_plain
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.files import write_whole
from cosmos3_train.data.lerobot_writer import LeRobotWriter
from cosmos3_train.data.prepare import CARD_FILE, PreparedOtherwise, prepare, read_card
from cosmos3_train.flow.tasks import TASKS
from cosmos3_train.model.loading import load_parts
from cosmos3_train.model.prompts import canvas, robot_prompt, video_prompt

logger = logging.getLogger(__name__)

WORD, OTHER = " push", " turn"
"""Fill instructions up: one token of most tokenizers, Pico's among them. By where the other stands they differ."""
WINDOWS_AN_EPISODE = 32
CELL = 16
"""Side of the squares of the made-up pictures, pixels: flat enough to encode and decode as fast as real ones."""

CACHED_MODEL = "model.json"
"""In the prepared folder: whose latents, keys and values it has."""
MADE_OF = ("path", "revision", "random", "random_seed", "dtype", "vae_dtype")
"""Keys of a model that these depend on."""


def ensure_benchmark_data(loaded: Loaded) -> None:
    """Make the log of an experiment's one dataset and its prepared rows, unless they are there.

    Raises:
        UserError: the experiment has not one dataset with an embodiment, one task and no card of its own.
    """
    experiment = loaded.experiment
    entry = only_dataset(experiment)
    embodiment = experiment.embodiments[entry.embodiment or ""]
    prepared = loaded.root / entry.prepared
    _require_own(prepared)
    instructions = fill_instructions(loaded, embodiment, only_task(entry))
    log = prepared.with_name(f"{prepared.name}_log_{_content(experiment.benchmark, embodiment, instructions)}")
    if not log.is_dir():
        logger.info("making %s", log)
        write_log(log, experiment.benchmark, embodiment, instructions)
    make = partial(
        prepare,
        DatasetCard(name=prepared.name, format="lerobot_v3"),
        embodiment,
        log,
        prepared,
        window_stride=experiment.data.window_stride,
        heldout_fraction=experiment.data.heldout_fraction,
        workers=max(1, experiment.data.workers),
        progress=False,
    )
    # Prepared rows point at their log: those of another log, or of the same in another place, are made anew.
    moved = (prepared / CARD_FILE).is_file() and read_card(prepared)["source"] != str(log.resolve())
    try:
        make(fresh=moved)
    except PreparedOtherwise:
        make(fresh=True)


def forget_other_models(loaded: Loaded, device: torch.device) -> None:
    """Delete what a benchmark of another model has cached, instead of refusing it as a run does: the rows are its own.
    A model whose weights alone have changed is found by the caches' fingerprints."""
    prepared, known = loaded.root / only_dataset(loaded.experiment).prepared, to_plain(loaded.model)
    made_of = {key: known[key] for key in MADE_OF} | {"device": device.type}  # by which random weights are drawn
    content, file = (json.dumps(made_of, sort_keys=True) + "\n").encode(), prepared / CACHED_MODEL
    if not file.is_file() or file.read_bytes() != content:
        shutil.rmtree(prepared / "caches", ignore_errors=True)
        write_whole(file, content)


def _require_own(prepared: Path) -> None:
    """Raise `UserError` where the prepared folder holds rows of a log that no benchmark made: they would be lost."""
    if not is_own(prepared):
        log = read_card(prepared)["source"]
        raise UserError(
            f"{prepared}: holds the rows of {log}, and a benchmark would put its own in their place; name another "
            "prepared folder"
        )


def is_own(prepared: Path) -> bool:
    """Whether there is nothing in the prepared folder, or the rows of a log that a benchmark made."""
    if not (prepared / CARD_FILE).is_file():
        return True
    return Path(read_card(prepared)["source"]).name.startswith(f"{prepared.name}_log_")


def only_dataset(experiment: Experiment) -> Dataset:
    """The one dataset of a benchmark.

    Raises:
        UserError: there is none, there are several, or it is one of the user's.
    """
    datasets = experiment.data.datasets
    if len(datasets) != 1:
        raise UserError(f"data.datasets has {len(datasets)} entries; a benchmark has one, whose log it makes")
    name, entry = next(iter(datasets.items()))
    if entry.card is not None or entry.source is not None or entry.embodiment is None:
        raise UserError(
            f"data.datasets.{name}: a benchmark makes its own log; name an embodiment, and neither card nor source "
            "(see experiments/benchmark_policy256.yaml)"
        )
    return entry


def only_task(entry: Dataset) -> str:
    """The one task of a benchmark: its samples have all the same length."""
    tasks = [task for task, weight in entry.tasks.items() if weight]
    if len(tasks) != 1:
        raise UserError(f"a benchmark's dataset has one task, this has {len(tasks)}: {', '.join(tasks)}")
    return tasks[0]


def fill_instructions(loaded: Loaded, embodiment: Embodiment, task: str) -> list[str]:
    """The benchmark's instructions, whose prompts have its number of tokens, or those their template needs.

    Raises:
        UserError: so many do not differ in so few words.
    """
    parts = load_parts(loaded.model, torch.device("cpu"), vae_weights=False)
    benchmark = loaded.experiment.benchmark
    size = (benchmark.height, benchmark.width)

    def tokens(words: int) -> int:
        text = (WORD * words).strip()
        if TASKS[task].has_robot:
            return robot_prompt(parts, text, embodiment, size).numel()
        place = canvas(size, embodiment.resolution_tier)
        return video_prompt(parts, text, embodiment.frames, place, embodiment.control_hz).numel()

    more = _words(tokens, benchmark.text_tokens) - 1  # the first has no space before it, and stays
    if benchmark.instructions > 2**more:
        raise UserError(
            f"benchmark.instructions is {benchmark.instructions}, but of prompts of {benchmark.text_tokens} tokens "
            f"(benchmark.text_tokens) {more} are words that may differ; ask for at most {2**more}"
        )
    return [
        "".join((WORD, *(OTHER if number >> place & 1 else WORD for place in range(more)))).strip()
        for number in range(benchmark.instructions)
    ]


def _words(tokens: Callable[[int], int], wanted: int) -> int:
    """The fewest words, at least one, of which `tokens` makes as many as are wanted."""
    words = max(1, wanted - tokens(1))
    while words > 1 and tokens(words) > wanted:
        words -= 1
    while tokens(words) < wanted:
        words += 1
    return words


def write_log(folder: Path, benchmark: Benchmark, embodiment: Embodiment, instructions: Sequence[str]) -> None:
    """A LeRobot log with the benchmark's number of windows: squares that slide, actions between -1 and 1, and an
    instruction after the other."""
    cameras = {camera: (benchmark.height, benchmark.width) for camera in embodiment.cameras}
    columns = {embodiment.action_key: [channel.name for channel in embodiment.action]}
    if embodiment.state_key is not None:
        columns[embodiment.state_key] = columns[embodiment.action_key]
    episodes = max(math.ceil(benchmark.windows / WINDOWS_AN_EPISODE), len(instructions))
    with LeRobotWriter(
        folder, fps=embodiment.control_hz, cameras=cameras, columns=columns, robot_type=embodiment.name
    ) as writer:
        for episode in range(episodes):
            windows = benchmark.windows * (episode + 1) // episodes - benchmark.windows * episode // episodes
            length = embodiment.chunk + windows
            random = np.random.default_rng(episode)
            values = random.uniform(-1, 1, (length, embodiment.width)).astype(np.float32)
            writer.add_episode(
                {camera: _pictures(random, length, size) for camera, size in cameras.items()},
                dict.fromkeys(columns, values),
                instructions[episode % len(instructions)],
            )


def _pictures(random: np.random.Generator, length: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    height, width = size
    cells = random.integers(0, 256, (math.ceil(height / CELL), math.ceil(width / CELL), 3), dtype=np.uint8)
    still = cells.repeat(CELL, 0).repeat(CELL, 1)[:height, :width]
    return np.stack([np.roll(still, 2 * frame, axis=1) for frame in range(length)])


def _content(benchmark: Benchmark, embodiment: Embodiment, instructions: Sequence[str]) -> str:
    """What a log holds, in a name: sizes in words, and a digest of the rest."""
    size = f"{embodiment.frames}x{benchmark.height}x{benchmark.width}"
    rest = json.dumps([to_plain(embodiment), instructions], sort_keys=True).encode()
    return f"{size}_{benchmark.windows}windows_{hashlib.sha256(rest).hexdigest()[:12]}"
