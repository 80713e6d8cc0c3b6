"""The data half of `cosmos3 check`: is the log (or its prepared folder) what the embodiment card says?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cosmos3_train.config import Data, Dataset, Embodiment, Loaded, UserError
from cosmos3_train.data.actions import Normaliser, check_actions
from cosmos3_train.data.blocks import make_plan
from cosmos3_train.data.card import DatasetCard, load_card
from cosmos3_train.data.conversations import ConversationDataset
from cosmos3_train.data.index import actions_of, check_log, columns_to_read, instructions, usable_rows
from cosmos3_train.data.mixture import check_entry
from cosmos3_train.data.prepare import read_card
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_log
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, Log
from cosmos3_train.data.statistics import Statistics, compute_moments
from cosmos3_train.data.video import compose, frames_at
from cosmos3_train.flow.tasks import TASKS
from cosmos3_train.types import Sample

FAR = 1.5
"""Values beyond ±FAR after normalisation are counted: quantiles map to ±1, so there should be few."""
FAR_SHARE = 0.02
"""Share of a channel's values beyond ±FAR from which the table says to look at the channel."""
ROWS = 2000
FRAMES = 200_000
CONVERSATIONS = 2000
TEMPORAL, SPATIAL = 4, 16
"""Pixel frames of a latent frame after the first; pixels of a latent cell."""


@dataclass(frozen=True)
class CheckedData:
    """What was seen of one dataset.

    rows:    of the table;  windows: that it gives or would give
    latent:  (t, h, w) of a window, None for conversations;  cached: whether its latents are on disk
    longest: samples to count tokens of: the longest words, in every task
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    windows: int = 0
    latent: tuple[int, int, int] | None = None
    cached: bool = False
    longest: list[Sample] = field(default_factory=list)


def check_dataset(loaded: Loaded, name: str, entry: Dataset) -> CheckedData:
    """Look at one entry of the mixture.

    Raises:
        UserError: it cannot be read, or is not what its cards say.
    """
    where = f"data.datasets.{name}"
    card = load_card(loaded.root / entry.card) if entry.card else None
    check_entry(name, entry, talks=card is not None and card.format == "conversations")
    source = loaded.root / entry.source if entry.source else card.source_folder(loaded.root) if card else None
    if card is not None and card.format == "conversations":
        assert source is not None
        return _conversations(name, source, loaded.experiment.data.heldout_fraction)
    if entry.embodiment is None:
        raise UserError(f"{where}.embodiment has no value; a robot log needs its embodiment card")
    robot = loaded.experiment.embodiments[entry.embodiment]
    prepared = loaded.root / entry.prepared
    if prepared.exists():
        if card is not None:
            _check_settings(prepared, loaded.experiment.data)
        moved = loaded.root / entry.source if entry.source else None
        return _prepared(name, entry, PreparedDataset(prepared, robot, moved))
    if card is None or source is None:
        raise UserError(
            f"{where}.prepared is {entry.prepared!r}: not there; name a dataset card, or run cosmos3 prepare"
        )
    return _log(loaded, name, entry, card, robot, source)


def _check_settings(prepared: Path, data: Data) -> None:
    """Raise `UserError` where the folder was prepared with another stride or held-out share than the run asks for."""
    made = read_card(prepared)["settings"]
    for key, now in (("window_stride", data.window_stride), ("heldout_fraction", data.heldout_fraction)):
        if made[key] != now:
            raise UserError(
                f"{prepared}: prepared with {key} {made[key]}, but data.{key} is {now}; set it to {made[key]}, name "
                "another prepared folder, or prepare it again with --fresh"
            )


def _conversations(name: str, source: Path, heldout_fraction: float) -> CheckedData:
    dataset = ConversationDataset(source, heldout_fraction=heldout_fraction)
    train, heldout = dataset.count("train"), dataset.count("heldout")
    samples = [dataset.sample("train", index, "conversation", index) for index in range(min(train, CONVERSATIONS))]
    row = (f"data {name}", f"{train:,} conversations to train on, {heldout:,} held out: {dataset.path.name}")
    return CheckedData(rows=[row], windows=train + heldout, longest=samples)


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
    cached = dataset.latent_cache is not None
    table = [
        (f"data {name}", f"prepared: {train:,} windows to train on, {heldout:,} held out"),
        *_contract(dataset.embodiment, size),
        _ranges(name, dataset.normaliser, actions, dataset.embodiment),
    ]
    if entry.cache_latents:
        table.append((f"latents {name}", "cached" if cached else "not cached yet; the run encodes every window first"))
    return CheckedData(table, dataset.rows, latent, cached, _samples(entry, dataset.embodiment, words, size))


def _log(loaded: Loaded, name: str, entry: Dataset, card: DatasetCard, robot: Embodiment, source: Path) -> CheckedData:
    log = open_log(card, source)
    check_log(log, card, robot)
    _check_files(log, robot)
    data = loaded.experiment.data
    plan, short = make_plan(card, robot, log, source, source, data.window_stride, data.heldout_fraction, seed=0)
    records, windows = _some_records(log, card, robot, plan.splits), 0
    parts = []
    for record in records:
        where = f"dataset {card.name!r}, episode {record.index}"
        parts.append(actions_of(record, robot, where)[usable_rows(record, robot)])
        check_actions(parts[-1], robot, where)
    for episode in log.episodes:
        windows += max(0, -(-(episode.length - robot.chunk) // data.window_stride))
    size = _frame_size(log, records[0], robot)
    actions = np.concatenate(parts)
    statistics = Statistics(card.name, robot.name, "", compute_moments([actions], robot.width))
    words = max({word for record in records for word in instructions(record, card)}, key=len)
    counts = {split: sum(s == split for s in plan.splits.values()) for split in ("train", "heldout")}
    left_out = f", {short} too short" if short else ""
    table = [
        (f"data {name}", f"log readable, prepared at the first run: about {windows:,} windows"),
        (f"episodes {name}", f"{counts['train']:,} to train on, {counts['heldout']:,} held out{left_out}"),
        *_contract(robot, size),
        _ranges(name, Normaliser(robot, statistics), actions, robot),
    ]
    return CheckedData(table, windows, latent_shape(robot, size), False, _samples(entry, robot, words, size))


def _check_files(log: Log, robot: Embodiment) -> None:
    """Raise `UserError` for the first data or video file that is named and not there."""
    places = {episode.data_file for episode in log.episodes}
    places |= {episode.video[camera].path for episode in log.episodes for camera in robot.cameras}
    for place in sorted(places):
        file = log.root / place.partition("#")[0]
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


def _samples(entry: Dataset, robot: Embodiment, words: str, size: tuple[int, int]) -> list[Sample]:
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
