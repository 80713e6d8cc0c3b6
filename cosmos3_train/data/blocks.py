"""The work of `prepare`: episodes in blocks, each of which becomes one file of rows, in this process or in several.

A block's borders depend on the log alone, and its files are written whole or not at all, its report last: that file
says that the block is done. So killed work goes on where it was, and the rows are the same bytes for any worker count.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm

from cosmos3_train.config import Clips, Embodiment, UserError
from cosmos3_train.data.actions import check_actions, check_finite
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.files import write_whole
from cosmos3_train.data.filters import Ranges, cut_episode, read_keep_ranges
from cosmos3_train.data.index import (
    FEATURES,
    LEAST_SOUND_SECONDS,
    SPLITS,
    actions_of,
    assign_splits,
    clip_rows,
    columns_to_read,
    episode_rows,
    note_sound,
    split_clips,
    states_of,
)
from cosmos3_train.data.output import is_work_folder
from cosmos3_train.data.sound import SoundForm, sound_at
from cosmos3_train.data.sources import open_clips, open_log
from cosmos3_train.data.sources.clips import UNREADABLE, Clip, ClipLog, ClipRecord
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, Log
from cosmos3_train.data.video import compose, frames_at, reading_size
from cosmos3_train.data.workers import run_in_workers

BLOCK_FRAMES = 4000
BLOCK_CLIPS = 64


@dataclass(frozen=True)
class Plan:
    """What a block depends on, sent to every worker. `splits` maps an episode or clip to its split; `keep` are the
    ranges that the card's filters name."""

    card: DatasetCard
    contract: Embodiment | Clips
    source: Path
    work: Path
    window_stride: int
    splits: dict[int, str]
    blocks: tuple[tuple[int, int], ...]  # places [from, to) in log.episodes or log.clips
    keep: Ranges | None = None


def make_plan(
    card: DatasetCard, contract: Embodiment | Clips, log: Log | ClipLog, source: Path, work: Path, stride: int,
    heldout_fraction: float, seed: int,
) -> tuple[Plan, int]:  # fmt: skip
    """The blocks and the splits, and how many episodes are too short for a window (0 for clips, not opened yet)."""
    if isinstance(contract, Clips):
        assert isinstance(log, ClipLog)
        splits = split_clips(card.name, log.clips, heldout_fraction, seed)
        size = max(BLOCK_CLIPS, len(log.clips) // 256)
        blocks = tuple((first, min(first + size, len(log.clips))) for first in range(0, len(log.clips), size))
        return Plan(card, contract, source, work, stride, splits, blocks), 0
    assert not isinstance(log, ClipLog)
    embodiment = contract
    long_enough = [episode.index for episode in log.episodes if episode.length >= embodiment.frames]
    if not long_enough:
        longest = max((episode.length for episode in log.episodes), default=0)
        raise UserError(
            f"dataset {card.name!r}: none of {len(log.episodes)} episodes has the {embodiment.frames} frames of a "
            f"window (chunk + 1); the longest has {longest}. Make the embodiment's chunk smaller"
        )
    wanted = max(BLOCK_FRAMES, sum(episode.length for episode in log.episodes) // 256)
    blocks, first, frames = [], 0, 0
    for place, episode in enumerate(log.episodes):
        frames += episode.length
        if frames >= wanted:
            blocks.append((first, place + 1))
            first, frames = place + 1, 0
    if first < len(log.episodes):
        blocks.append((first, len(log.episodes)))
    splits = assign_splits(card.name, long_enough, heldout_fraction, seed)
    keep = read_keep_ranges(card, log)
    plan = Plan(card, embodiment, source, work, stride, splits, tuple(blocks), keep)
    return plan, len(log.episodes) - len(long_enough)


def hold_one_out(plan: Plan, log: ClipLog, heldout_fraction: float, seed: int) -> tuple[int, int]:
    """Where every group of clips that was to be held out gave no window, hold out one that did.

    Which clips can be used is known only when all were read. The rows are written again, the same ones each time.

    Returns:
        How many windows, of how many clips, are held out now.
    """
    paths = sorted((plan.work / "finished").glob("windows-*.parquet"))
    used = {number for path in paths for number in pq.read_table(path, columns=["episode_index"])[0].to_pylist()}
    splits = split_clips(plan.card.name, [clip for clip in log.clips if clip.index in used], heldout_fraction, seed)
    heldout = {number for number, split in splits.items() if split == "heldout"}
    windows = 0
    for path in paths:
        table = pq.read_table(path)
        numbers = table["episode_index"].to_pylist()
        if heldout.isdisjoint(numbers):
            continue
        sides = [splits[number] for number in numbers]
        windows += sides.count("heldout")
        place = table.column_names.index("split")
        written = io.BytesIO()
        pq.write_table(table.set_column(place, table.schema.field(place), pa.array(sides)), written)
        write_whole(path, written.getvalue())
    return windows, len(heldout)


def count_sounding(folder: Path) -> dict[str, int]:
    """Split → windows with sound among the rows of a folder."""
    found: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for path in folder.glob("windows-*.parquet"):
        table = pq.read_table(path, columns=["split", "sound"])
        for split in table.filter(table["sound"].is_valid())["split"].to_pylist():
            found[split] += 1
    return found


def open_work_folder(work: Path, fingerprint: str, *, fresh: bool = False) -> None:
    """A folder with the finished blocks of an earlier run of the same settings, unless `fresh`, or an empty one.

    Raises:
        UserError: something else is there, which is not thrown away.
    """
    marker = work / "fingerprint"
    if os.path.lexists(work) and not is_work_folder(work):
        raise UserError(f"{work}: blocks are kept there while they are made; move it away, or choose another output")
    if work.exists() and (fresh or not marker.is_file() or marker.read_text() != fingerprint):
        shutil.rmtree(work)
    (work / "finished").mkdir(parents=True, exist_ok=True)
    (work / "blocks").mkdir(exist_ok=True)
    write_whole(marker, fingerprint.encode())


def run_blocks(plan: Plan, log: Log | ClipLog, workers: int, progress: bool) -> None:
    """Do the blocks that are not done. Returns when all are."""
    disable_progress_bars()  # of `datasets`, one a file, which would break ours
    todo = [number for number in range(len(plan.blocks)) if not report_path(plan, number).exists()]
    sizes = [stop - first for first, stop in plan.blocks]
    bar = tqdm(
        total=sum(sizes), desc=f"preparing {plan.card.name}", disable=not progress,
        unit="clip" if isinstance(plan.contract, Clips) else "episode",
        initial=sum(sizes) - sum(sizes[number] for number in todo),
    )  # fmt: skip
    with bar:
        if workers == 1 or len(todo) <= 1:
            for number in todo:
                _do_block(plan, log, number)
                bar.update(sizes[number])
            return
        tasks = {number: (plan, number) for number in todo}
        run_in_workers(_do_block_in_worker, tasks, lambda number: bar.update(sizes[number]), workers)


def _do_block_in_worker(plan: Plan, number: int) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    _do_block(plan, _opened_once(plan), number)


def _opened_once(plan: Plan) -> Log | ClipLog:
    if not _opened:  # only in a worker, which lives as long as one `prepare`
        open_source = open_clips if isinstance(plan.contract, Clips) else open_log
        _opened.append(open_source(plan.card, plan.source))
    return _opened[0]


_opened: list[Log | ClipLog] = []


@dataclass
class Made:
    """A block's rows, its values of the train split, and its report.

    dropped: reason → how many;  silent: the same of windows without sound, or with silence for a part of it
    examples: reason → the first of them
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    windows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    episodes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, int] = field(default_factory=dict)
    silent: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, rows: list[dict[str, Any]], split: str) -> None:
        self.rows += rows
        self.windows[split] += len(rows)
        self.episodes[split] += bool(rows)

    def drop(self, reason: str, count: int, example: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.examples.setdefault(reason, example)

    def mute(self, reason: str, count: int, example: str) -> None:
        self.silent[reason] = self.silent.get(reason, 0) + count
        self.examples.setdefault(reason, example)


def _do_block(plan: Plan, log: Log | ClipLog, number: int) -> None:
    """Write a block's rows, its values of the train split, and last its report, which says that it is done."""
    if isinstance(log, ClipLog):
        assert isinstance(plan.contract, Clips)
        made = made_of_clips(log, plan.contract, log.clips[slice(*plan.blocks[number])], plan.splits)
    else:
        made = _of_episodes(plan, log, number)
    if made.rows:
        parquet = io.BytesIO()
        Dataset.from_list(made.rows, features=FEATURES).to_parquet(parquet)
        write_whole(plan.work / "finished" / f"windows-{number:05d}.parquet", parquet.getvalue())
    if made.values:
        array = io.BytesIO()
        np.save(array, np.concatenate(made.values), allow_pickle=False)
        write_whole(values_path(plan, number), array.getvalue())
    report = {key: getattr(made, key) for key in ("windows", "episodes", "dropped", "silent", "examples")}
    write_whole(report_path(plan, number), json.dumps(report).encode())


def made_of_clips(log: ClipLog, clips: Clips, some: Sequence[Clip], splits: Mapping[int, str]) -> Made:
    """The rows of some clips of a set, and what was left out. Opens every video, decodes two of its frames and a moment
    of its sound."""
    made = Made()
    for record in log.records(some):
        for reason, (count, example) in record.faults.items():
            made.drop(reason, count, example)
        if record.video is None:
            continue
        split, name = splits[record.clip.index], record.clip.name
        rows, left_out = clip_rows(record, clips, split, (0, 0))
        for reason, count in left_out.items():
            made.drop(reason, count, f"{name}: {len(record.video.times)} frames")
        if rows:
            ends = [rows[0]["video"][0]["start_time"], max(row["video"][0]["end_time"] for row in rows)]
            try:  # decodes the first and the last frame that are used: most broken videos are found here
                # One by one: between the two of one call everything would be decoded.
                first, *_ = [frames_at(log.root, record.clip.place, [time]) for time in sorted(set(ends))]
                height, width = first.shape[2:]
            except UserError as error:
                made.drop(UNREADABLE, 1, f"{name}: {error}")
                continue
            for reason, (count, example) in _note_sound(log, record, rows).items():
                made.mute(reason, count, f"{name}: {example}" if example else name)
            size = reading_size((height, width), clips.resolution_tier)
            made.add([row | {"height": size[0], "width": size[1]} for row in rows], split)
    return made


def _note_sound(log: ClipLog, record: ClipRecord, rows: list[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """`index.note_sound` of a clip's rows, a moment of whose sound is decoded first; with words for what is wrong."""
    silence, track = record.silence, record.sound
    found = note_sound(rows, track, silence)
    heard = next((row["video"][0] for row in rows if row["sound"]), None)
    if heard is not None and track is not None:
        moment, form = max(heard["start_time"], track.start), SoundForm(track.rate, 1)
        try:
            sound_at(log.root, record.clip.place, moment, int(LEAST_SOUND_SECONDS * track.rate), form)
        except UserError as error:
            silence = str(error)
            found = note_sound(rows, track, silence)
    return {reason: (count, silence) for reason, count in found.items()}


def _of_episodes(plan: Plan, log: Log, number: int) -> Made:
    episodes: list[Episode] = [e for e in log.episodes[slice(*plan.blocks[number])] if e.index in plan.splits]
    embodiment, where, made = plan.contract, f"dataset {plan.card.name!r}", Made()
    assert isinstance(embodiment, Embodiment)
    for record in log.records(episodes, columns_to_read(plan.card, embodiment)):
        cut = cut_episode(record, plan.card, embodiment, plan.window_stride, plan.keep)
        for reason, (count, example) in record.faults.items():
            made.drop(reason, count, example)
        for reason, count in cut.left_out.items():
            made.drop(reason, count, f"episode {record.index}")
        if not len(cut.rows):
            continue
        used = _checked_values(record, embodiment, cut.rows, f"{where}, episode {record.index}")
        size, split = _view_size(plan, record, embodiment), plan.splits[record.index]
        made.add(episode_rows(record, cut.starts, plan.card, embodiment, split, size), split)
        if split == "train" and cut.starts:
            made.values.append(used)
    return made


def _checked_values(record: EpisodeRecord, embodiment: Embodiment, rows: np.ndarray, where: str) -> np.ndarray:
    """float32 [n, action width + state width] of some rows of an episode, every value checked."""
    action, state = actions_of(record, embodiment, where)[rows], states_of(record, embodiment, where)
    check_actions(action, embodiment, where)
    if state is None:
        return action
    key = embodiment.state_key or "recorded"
    check_finite(state[rows], [str(index) for index in range(state.shape[1])], key, where)
    if embodiment.state_row and state.shape[1] != embodiment.width:
        raise UserError(
            f"{where}: the state row is in the action's units, but {key!r} has {state.shape[1]} "
            f"numbers and the embodiment has {embodiment.width} channels; set state_row to false"
        )
    return np.concatenate([action, state[rows]], axis=1)


def _view_size(plan: Plan, record: EpisodeRecord, embodiment: Embodiment) -> tuple[int, int]:
    """(height, width) of the composed views. Decodes the first and last frame: a broken video is found here."""
    ends = record.timestamps[[0, -1]]
    views = []
    for camera in embodiment.cameras:
        place = record.video[camera]
        # One by one: between the two of one call everything would be decoded.
        times = ends + place.from_timestamp
        views.append(torch.cat([frames_at(plan.source, place.path, [time]) for time in times]))
    _, _, height, width = compose(views, embodiment.layout).shape
    return height, width


def report_path(plan: Plan, number: int) -> Path:
    return plan.work / "blocks" / f"{number:05d}.json"


def values_path(plan: Plan, number: int) -> Path:
    return plan.work / "blocks" / f"{number:05d}.npy"
