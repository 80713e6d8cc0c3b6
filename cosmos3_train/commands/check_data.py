"""The data half of `cosmos3 check`: is the log (or its prepared folder) what the embodiment card says?"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos3_train.config import Clips, Data, Dataset, Embodiment, Loaded, UserError, to_plain
from cosmos3_train.data.actions import Normaliser, check_actions
from cosmos3_train.data.archives import split_place
from cosmos3_train.data.blocks import made_of_clips, make_plan
from cosmos3_train.data.card import DatasetCard, load_card
from cosmos3_train.data.conversations import open_conversations
from cosmos3_train.data.filters import cut_episode
from cosmos3_train.data.index import actions_of, check_log, columns_to_read, instructions
from cosmos3_train.data.mixture import check_entry, refuse_silence
from cosmos3_train.data.prepare import read_card
from cosmos3_train.data.reader import SOUND_LATENTS, PreparedDataset, latents_place
from cosmos3_train.data.sources import open_clips, open_log
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, Log
from cosmos3_train.data.statistics import Statistics, compute_moments
from cosmos3_train.data.video import compose, frames_at
from cosmos3_train.flow.tasks import TASKS, sound_task
from cosmos3_train.model.prompts import canvas
from cosmos3_train.training.datamodule import contract_of
from cosmos3_train.types import SOUND_CHANNELS, SOUND_HZ, SPATIAL, TEMPORAL, Sample

FAR = 1.5
"""Values beyond ±FAR after normalisation are counted: quantiles map to ±1, so there should be few."""
FAR_SHARE = 0.02
"""Share of a channel's values beyond ±FAR from which the table says to look at the channel."""
ROWS = 2000
FRAMES = 200_000
CONVERSATIONS = 2000
PICTURED = 24
"""Conversations with pictures that are decoded, evenly over a set."""
CLIPS = 100
"""Clips of a set that are opened, evenly over it."""


@dataclass(frozen=True)
class CheckedData:
    """What was seen of one dataset.

    rows:    of the table;  windows: that it gives or would give
    latent:  (t, h, w) of a window, None for conversations
    longest: samples to count tokens of: the longest words, in every task
    sound:   (mean and deviation, channels, S) of the sound of a window, None where it is not asked for
    statistics: with which a robot's prepared rows are normalised, None where nothing is prepared or there is no robot
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    windows: int = 0
    latent: tuple[int, int, int] | None = None
    longest: list[Sample] = field(default_factory=list)
    sound: tuple[int, int, int] | None = None
    statistics: Statistics | None = None


def check_dataset(loaded: Loaded, name: str, entry: Dataset) -> CheckedData:
    """Look at one entry of the mixture.

    Raises:
        UserError: it cannot be read, or is not what its cards say.
    """
    where = f"data.datasets.{name}"
    card = load_card(loaded.root / entry.card) if entry.card else None
    talks, shows = card is not None and card.format == "conversations", card is not None and card.shows_clips
    prepared = loaded.root / entry.prepared
    if card is None and prepared.exists():
        shows = "clips" in read_card(prepared)
    check_entry(name, entry, talks=talks, robot=not shows)
    source = loaded.root / entry.source if entry.source else card.source_folder(loaded.root) if card else None
    if talks:
        assert source is not None
        assert card is not None
        return _conversations(loaded, name, card, source, prepared)
    contract = contract_of(loaded, name, entry, card) if card is not None else None
    if entry.embodiment is None and not shows:
        raise UserError(f"{where}.embodiment has no value; a robot log needs its embodiment card")
    robot = loaded.experiment.embodiments[entry.embodiment] if entry.embodiment else None
    if prepared.exists():
        if card is not None:
            _check_settings(prepared, loaded.experiment.data, contract)
        moved = loaded.root / entry.source if entry.source else None
        dataset = PreparedDataset(prepared, robot, moved)
        other = loaded.experiment.data.datasets[entry.statistics].prepared if entry.statistics else None
        if other and robot and (loaded.root / other).exists():  # else it is said of that one that it is not prepared
            dataset.use_statistics(Statistics.load(loaded.root / other, embodiment=robot.name))
        return _prepared(name, entry, dataset) if dataset.has_robot else _prepared_clips(name, entry, dataset)
    if card is None or source is None:
        raise UserError(
            f"{where}.prepared is {entry.prepared!r}: not there; name a dataset card, or run cosmos3 prepare"
        )
    if isinstance(contract, Clips):
        return _clips(loaded, name, entry, card, contract, source)
    assert robot is not None
    return _log(loaded, name, entry, card, robot, source)


def _check_settings(prepared: Path, data: Data, contract: Embodiment | Clips | None) -> None:
    """Raise `UserError` where the folder was prepared with another stride or held-out share than the run asks for."""
    made = read_card(prepared)["settings"]
    now = {"window_stride": data.window_stride, "heldout_fraction": data.heldout_fraction}
    keys = {key: f"data.{key}" for key in now}
    if isinstance(contract, Clips):
        now |= {"window_stride": contract.step} | {f"clips.{key}": value for key, value in to_plain(contract).items()}
        keys |= {"window_stride": "its stride"} | {f"clips.{key}": f"its {key}" for key in to_plain(contract)}
        made = made | {f"clips.{key}": value for key, value in made.get("clips", {}).items()}
    for key, value in now.items():
        if made.get(key) != value:
            raise UserError(
                f"{prepared}: prepared with {key} {made.get(key)}, but {keys[key]} is {value}; set it to "
                f"{made.get(key)}, name another prepared folder, or prepare it again with --fresh"
            )


def _conversations(loaded: Loaded, name: str, card: DatasetCard, source: Path, prepared: Path) -> CheckedData:
    """Of a set that is not prepared its first rows are looked at."""
    data, budget = loaded.experiment.data, loaded.experiment.training.tokens_per_micro_batch
    dataset = open_conversations(
        card, source, prepared, heldout_fraction=data.heldout_fraction, most_tokens=budget, most_rows=CONVERSATIONS
    )
    dataset.check_trains()
    train, heldout = dataset.count("train"), dataset.count("heldout")
    places = range(train)[:: max(1, -(-train // PICTURED))] if dataset.shows_pictures else range(train)[:CONVERSATIONS]
    samples = [dataset.sample("train", index, "conversation", index) for index in places]
    index = dataset.index
    seen = f"; of {index.total:,} rows the first {index.seen:,} were looked at" if index.seen < index.total else ""
    row = (f"data {name}", f"{train:,} conversations to train on, {heldout:,} held out: {source.name}{seen}")
    left = dict(index.dropped) | ({f"of more than {budget:,} tokens": dataset.left_out} if dataset.left_out else {})
    rows = [row, *((f"left out {name}", f"{count:,} × {reason}") for reason, count in left.items())]
    return CheckedData(rows=rows, windows=train + heldout, longest=samples)


def _prepared(name: str, entry: Dataset, dataset: PreparedDataset) -> CheckedData:
    train, heldout = dataset.count("train"), dataset.count("heldout")
    places = np.unique(np.linspace(0, dataset.rows - 1, min(ROWS, dataset.rows)).astype(int))
    rows = [dataset.row(int(place)) for place in places]
    actions = np.concatenate([np.asarray(row["action"], dtype=np.float32) for row in rows])
    check_actions(actions, dataset.embodiment, f"dataset {dataset.name!r}, prepared rows")
    words = max({row["instruction"] for row in rows}, key=len)
    size = (rows[0]["height"], rows[0]["width"])
    dataset.frames(rows[0], first_only=True)  # the log's media is readable
    latent = latent_shape(dataset.embodiment, size)
    table = [
        (f"data {name}", f"prepared: {train:,} windows to train on, {heldout:,} held out"),
        *_contract(dataset.embodiment, size),
        _ranges(name, dataset.normaliser, actions, dataset.embodiment),
        *_caches(name, entry, dataset),
    ]
    samples = robot_samples(entry, dataset.embodiment, words, size)
    return CheckedData(table, dataset.rows, latent, samples, statistics=dataset.statistics)


def _caches(name: str, entry: Dataset, dataset: PreparedDataset) -> list[tuple[str, str]]:
    if not entry.cache_latents:
        return []
    missing = ", ".join(place.name for place in missing_caches(dataset.folder, entry))
    there = "cached; the run compares them with its tokenizer when it begins"
    words = f"not cached yet ({missing}); the run encodes every window first" if missing else there
    return [(f"latents {name}", words)]


def missing_caches(prepared: Path, entry: Dataset) -> list[Path]:
    """Places, in its prepared folder, of the caches of latents that an entry asks for and that are not there."""
    if not entry.cache_latents:
        return []
    places = [latents_place(variant) for variant in range(max(1, entry.augment.variants))]
    if sound_task(entry.tasks) is not None:
        places.append(SOUND_LATENTS)
    return [place for place in places if not (prepared / place).is_dir()]


def _prepared_clips(name: str, entry: Dataset, dataset: PreparedDataset) -> CheckedData:
    places = np.unique(np.linspace(0, dataset.rows - 1, min(ROWS, dataset.rows)).astype(int))
    rows = [dataset.row(int(place)) for place in places]
    dataset.frames(rows[0], first_only=True)  # the set's media is readable
    heard = sound_task(entry.tasks)
    counts = f"{dataset.count('train'):,} windows to train on, {dataset.count('heldout'):,} held out"
    table = [(f"data {name}", f"prepared: {counts}")]
    if heard is not None:
        train, heldout = (len(dataset.sounding(split)) for split in ("train", "heldout"))
        if not train:
            refuse_silence(name, heard, dataset, "train")
        words = f"{train:,} of the windows to train on have it, {heldout:,} of those held out; the others are left out"
        table.append((f"sound {name}", words))
    table += _caches(name, entry, dataset)
    return _checked_clips(name, entry, dataset.contract.resolution_tier, table, rows, dataset.rows)


def _clips(loaded: Loaded, name: str, entry: Dataset, card: DatasetCard, clips: Clips, source: Path) -> CheckedData:
    log = open_clips(card, source)
    some = log.clips[:: max(1, len(log.clips) // CLIPS)]
    made = made_of_clips(log, clips, some, dict.fromkeys((clip.index for clip in some), "train"))
    left_out = [f"{count} × {reason} ({made.examples[reason]})" for reason, count in made.dropped.items()]
    if not made.rows:
        raise UserError(
            f"data.datasets.{name}: none of {len(some)} clips that were looked at gives a window; left out: "
            f"{'; '.join(left_out)}"
        )
    heard, sounding = sound_task(entry.tasks), sum(row["sound"] is not None for row in made.rows)
    silent = [f"{count} × {reason} ({made.examples[reason]})" for reason, count in made.silent.items()]
    if heard is not None and not sounding and len(some) == len(log.clips):
        raise UserError(f"data.datasets.{name}.tasks: {heard!r} needs sound, but there is only {'; '.join(silent)}")
    windows = round(len(made.rows) / len(some) * len(log.clips))
    table = [
        (f"data {name}", f"clips readable, prepared at the first run: about {windows:,} windows"),
        (f"clips {name}", f"{len(log.clips):,}, of which {len(some):,} were looked at"),
        *((f"left out {name}", words) for words in left_out),
    ]
    if heard is not None:
        counted = f"{sounding} of {len(made.rows)} windows that were looked at have it; the others are left out"
        table += [(f"sound {name}", counted), *((f"sound {name}", words) for words in silent)]
    return _checked_clips(name, entry, clips.resolution_tier, table, made.rows, windows)


def _checked_clips(
    name: str, entry: Dataset, tier: int, table: list[tuple[str, str]], rows: list[dict[str, Any]], windows: int
) -> CheckedData:
    """What rows of video without a robot show: their canvases, and a sample of each task with the longest caption on
    the largest."""
    sizes = {canvas((row["height"], row["width"]), tier) for row in rows}
    frames = max(len(row["timestamps"]) for row in rows)
    shown = ", ".join(f"{width}×{height}" for height, width in sorted(sizes))
    rates = sorted({round(row["fps"], 3) for row in rows})
    rate = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    words = max((row["instruction"] for row in rows), key=len)
    table = [*table, (f"frames {name}", f"up to {frames} at {rate} a second, tier {tier}: canvas {shown}")]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    latent = (1 + (frames - 1) // TEMPORAL, height // SPATIAL, width // SPATIAL)
    seconds = max(len(row["timestamps"]) / row["fps"] for row in rows)
    sound = (2, SOUND_CHANNELS, math.ceil(seconds * SOUND_HZ))
    samples = [
        Sample(
            key=f"{task} with the longest caption",
            number=0,
            task=task,
            caption=words,
            sound_caption=max((row["sound_caption"] or "" for row in rows), key=len),
            sound=None if TASKS[task].sound == "absent" else torch.zeros(sound),
            fps=rates[0],
            latent=torch.zeros((48, 1 if TASKS[task].image else latent[0], *latent[1:])),
            size=(height, width),
            tier=tier,
        )
        for task in entry.tasks
    ]
    return CheckedData(table, windows, latent, samples, sound if sound_task(entry.tasks) else None)


def _log(loaded: Loaded, name: str, entry: Dataset, card: DatasetCard, robot: Embodiment, source: Path) -> CheckedData:
    log = open_log(card, source)
    check_log(log, card, robot)
    _check_files(log, robot)
    data, stride = loaded.experiment.data, loaded.experiment.data.window_stride
    plan, short = make_plan(card, robot, log, source, source, stride, data.heldout_fraction, seed=0)
    records, starts, parts = _some_records(log, card, robot, plan.splits), 0, []
    left_out: Counter[str] = Counter()
    for record in records:
        where = f"dataset {card.name!r}, episode {record.index}"
        cut = cut_episode(record, card, robot, stride, plan.keep)
        parts.append(actions_of(record, robot, where)[cut.rows])
        check_actions(parts[-1], robot, where)
        starts += len(cut.starts)
        left_out.update(cut.left_out)
    trained = sum(split == "train" for split in plan.splits.values())
    if not starts:
        seen = f"no window in {len(records):,} of {trained:,} episodes to train on"
        if len(records) == trained:
            reasons = "; ".join(f"{count:,} × {reason}" for reason, count in left_out.items())
            raise UserError(f"dataset {card.name!r}: {seen}; left out: {reasons}")
        ranges = (f"ranges {name}", f"{seen} that were looked at; `cosmos3 prepare` looks at all of them")
    else:
        actions = np.concatenate(parts)
        statistics = Statistics(card.name, robot.name, "", compute_moments([actions], robot.width))
        ranges = _ranges(name, Normaliser(robot, statistics), actions, robot)
    possible, total = (
        sum(max(0, -(-(length - robot.chunk) // stride)) for length in lengths)
        for lengths in ([record.length for record in records], [episode.length for episode in log.episodes])
    )
    windows = round(total * starts / possible)
    about = f": about {windows:,} windows" if starts else ""
    size = _frame_size(log, records[0], robot)
    words = max({word for record in records for word in instructions(record, card)}, key=len)
    too_short = f", {short} too short" if short else ""
    table = [
        (f"data {name}", f"log readable, prepared at the first run{about}"),
        (f"episodes {name}", f"{trained:,} to train on, {len(plan.splits) - trained:,} held out{too_short}"),
        *_contract(robot, size),
        ranges,
        *(
            (f"left out {name}", f"{count:,} × {reason}, of {len(records):,} episodes")
            for reason, count in left_out.items()
        ),
    ]
    return CheckedData(table, windows, latent_shape(robot, size), robot_samples(entry, robot, words, size))


def _check_files(log: Log, robot: Embodiment) -> None:
    """Raise `UserError` for the first data or video file that is named and not there."""
    places = {episode.data_file for episode in log.episodes}
    places |= {episode.video[camera].path for episode in log.episodes for camera in robot.cameras}
    for place in sorted(places):
        file, _ = split_place(log.root, place)
        if not file.exists():
            raise UserError(f"{file}: the file is missing, though the log names it; copy the log again")


def _some_records(log: Log, card: DatasetCard, robot: Embodiment, splits: dict[int, str]) -> list[EpisodeRecord]:
    """Episodes read whole, evenly over the log, up to about `FRAMES` frames."""
    usable: list[Episode] = [episode for episode in log.episodes if splits.get(episode.index) == "train"]
    total = sum(episode.length for episode in usable)
    step = max(1, -(-total // FRAMES))
    return list(log.records(usable[::step], columns_to_read(card, robot)))


def _frame_size(log: Log, record: EpisodeRecord, robot: Embodiment) -> tuple[int, int]:
    """(H, W) of the composed views, of the first frame of an episode."""
    views = []
    for camera in robot.cameras:
        path, start = record.video[camera]
        views.append(frames_at(log.root, path, [start + record.timestamps[0]]))
    shape = compose(views, robot.layout).shape
    return shape[-2], shape[-1]


def _contract(robot: Embodiment, size: tuple[int, int]) -> list[tuple[str, str]]:
    channels = ", ".join(f"{channel.name} [{channel.unit or '-'}]" for channel in robot.action)
    words = f"domain {robot.domain_id}, {robot.control_hz:g} Hz, chunk {robot.chunk}, {channels}"
    return [(f"embodiment {robot.name}", f"as the log: {words}; frames {size[1]}×{size[0]}")]


def _ranges(name: str, normaliser: Normaliser, actions: np.ndarray, robot: Embodiment) -> tuple[str, str]:
    """Which channels have values far from [-1, 1] after normalisation."""
    far = (normaliser.normalise(torch.from_numpy(actions)).abs() > FAR).double().mean(dim=0).tolist()
    parts = [
        f"{channel.name} {share:.1%}{' (look at its histogram and its outliers)' if share > FAR_SHARE else ''}"
        for channel, share in zip(robot.action, far, strict=True)
        if share > 0
    ]
    found = ", ".join(parts) if parts else "none"
    return f"ranges {name}", f"values outside [-{FAR}, {FAR}] after '{robot.normaliser}' normalisation: {found}"


def latent_shape(robot: Embodiment, size: tuple[int, int]) -> tuple[int, int, int]:
    """(t, h, w) of a window's latent, cropped to its content."""
    return 1 + robot.chunk // TEMPORAL, max(1, size[0] // SPATIAL), max(1, size[1] // SPATIAL)


def robot_samples(entry: Dataset, robot: Embodiment, words: str, size: tuple[int, int]) -> list[Sample]:
    """One sample of each task with the longest instruction, its latent all zero: enough to count tokens."""
    t, h, w = latent_shape(robot, size)
    found = []
    for task in entry.tasks:
        rules = TASKS[task]
        found.append(
            Sample(
                key=f"{task} with the longest instruction",
                number=0,
                task=task,
                caption=words,
                fps=robot.control_hz,
                latent=torch.zeros((48, 1 if rules.image else t, h, w)),
                size=size,
                action=torch.zeros((robot.chunk, robot.width)) if rules.has_robot else None,
                state=torch.zeros(robot.width) if rules.has_robot and robot.state_row else None,
                embodiment=robot.name,
            )
        )
    return found
