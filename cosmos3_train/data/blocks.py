"""The work of `prepare`: episodes in blocks, each of which becomes one file of rows, in this process or in several.

A block's borders depend on the log alone, and its files are written whole or not at all, its report last: that file
says that the block is done. So killed work goes on where it was, and the rows are the same bytes for any worker count.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm

from cosmos3_train.config import Embodiment, UserError
from cosmos3_train.data.actions import check_actions, check_finite
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.files import write_whole
from cosmos3_train.data.index import (
    FEATURES,
    SPLITS,
    actions_of,
    assign_splits,
    columns_to_read,
    episode_rows,
    states_of,
    usable_rows,
    window_starts,
)
from cosmos3_train.data.sources import open_log
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, Log
from cosmos3_train.data.video import compose, frames_at

BLOCK_FRAMES = 4000


@dataclass(frozen=True)
class Plan:
    """What a block depends on, sent to every worker. `splits` maps an episode to its split."""

    card: DatasetCard
    embodiment: Embodiment
    source: Path
    work: Path
    window_stride: int
    splits: dict[int, str]
    blocks: tuple[tuple[int, int], ...]  # places [from, to) in log.episodes


def make_plan(
    card: DatasetCard, embodiment: Embodiment, log: Log, source: Path, work: Path, stride: int,
    heldout_fraction: float, seed: int,
) -> tuple[Plan, int]:  # fmt: skip
    """The blocks and the splits, and how many episodes are too short for a window."""
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
    plan = Plan(card, embodiment, source, work, stride, splits, tuple(blocks))
    return plan, len(log.episodes) - len(long_enough)


def open_work_folder(work: Path, fingerprint: str) -> None:
    """A folder with the finished blocks of an earlier run of the same settings, or an empty one."""
    marker = work / "fingerprint"
    if work.exists() and (not marker.is_file() or marker.read_text() != fingerprint):
        shutil.rmtree(work)
    (work / "finished").mkdir(parents=True, exist_ok=True)
    (work / "blocks").mkdir(exist_ok=True)
    write_whole(marker, fingerprint.encode())


def run_blocks(plan: Plan, log: Log, workers: int, progress: bool) -> None:
    """Do the blocks that are not done. Returns when all are."""
    disable_progress_bars()  # of `datasets`, one a file, which would break ours
    todo = [number for number in range(len(plan.blocks)) if not report_path(plan, number).exists()]
    bar = tqdm(
        total=len(log.episodes), desc=f"preparing {plan.card.name}", unit="episode", disable=not progress,
        initial=sum(stop - first for n, (first, stop) in enumerate(plan.blocks) if n not in set(todo)),
    )  # fmt: skip
    with bar:
        if workers == 1 or len(todo) <= 1:
            for number in todo:
                _do_block(plan, log, number)
                bar.update(plan.blocks[number][1] - plan.blocks[number][0])
            return
        # From a server that has only imported, not forked from here: torch and Arrow may hold threads in this process,
        # and a fork would leave their locks taken. The server imports once for all workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
            futures = {pool.submit(_do_block_in_worker, plan, number): number for number in todo}
            try:
                for future in as_completed(futures):
                    future.result()
                    first, stop = plan.blocks[futures[future]]
                    bar.update(stop - first)
            except BaseException:
                # Waiting for the blocks at hand could take longer than a batch system waits after its signal; they
                # are written whole or not at all, so a worker may be stopped anywhere.
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
            finally:
                pool.shutdown(cancel_futures=True)


def _do_block_in_worker(plan: Plan, number: int) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    _do_block(plan, _opened_once(plan), number)


def _opened_once(plan: Plan) -> Log:
    if not _opened:  # only in a worker, which lives as long as one `prepare`
        _opened.append(open_log(plan.card, plan.source))
    return _opened[0]


_opened: list[Log] = []


def _do_block(plan: Plan, log: Log, number: int) -> None:
    """Write a block's rows, its values of the train split, and last its report, which says that it is done."""
    first, stop = plan.blocks[number]
    episodes: list[Episode] = [e for e in log.episodes[first:stop] if e.index in plan.splits]
    embodiment, where = plan.embodiment, f"dataset {plan.card.name!r}"
    rows: list[dict[str, Any]] = []
    values: list[np.ndarray] = []
    report = {"windows": dict.fromkeys(SPLITS, 0), "episodes": dict.fromkeys(SPLITS, 0), "gaps": 0}
    for record in log.records(episodes, columns_to_read(plan.card, embodiment)):
        used = _checked_values(record, embodiment, f"{where}, episode {record.index}")
        size = _view_size(plan, record)
        starts, gaps = window_starts(record.timestamps, embodiment.chunk, plan.window_stride, embodiment.control_hz)
        split = plan.splits[record.index]
        rows += episode_rows(record, starts, plan.card, embodiment, split, size)
        report["gaps"] += gaps
        report["windows"][split] += len(starts)
        report["episodes"][split] += bool(starts)
        if split == "train" and starts:
            values.append(used)
    if rows:
        parquet = io.BytesIO()
        Dataset.from_list(rows, features=FEATURES).to_parquet(parquet)
        write_whole(plan.work / "finished" / f"windows-{number:05d}.parquet", parquet.getvalue())
    if values:
        array = io.BytesIO()
        np.save(array, np.concatenate(values), allow_pickle=False)
        write_whole(values_path(plan, number), array.getvalue())
    write_whole(report_path(plan, number), json.dumps(report).encode())


def _checked_values(record: EpisodeRecord, embodiment: Embodiment, where: str) -> np.ndarray:
    """float32 [T, action width + state width] of an episode's usable rows, every value checked."""
    rows = usable_rows(record, embodiment)
    action, state = actions_of(record, embodiment, where)[rows], states_of(record, embodiment, where)
    check_actions(action, embodiment, where)
    if state is None:
        return action
    key = embodiment.state_key or "recorded"
    check_finite(state, [str(index) for index in range(state.shape[1])], key, where)
    if embodiment.state_row and state.shape[1] != embodiment.width:
        raise UserError(
            f"{where}: the state row is in the action's units, but {key!r} has {state.shape[1]} "
            f"numbers and the embodiment has {embodiment.width} channels; set state_row to false"
        )
    return np.concatenate([action, state[rows]], axis=1)


def _view_size(plan: Plan, record: EpisodeRecord) -> tuple[int, int]:
    """(height, width) of the composed views. Decodes the first and last frame: a broken video is found here."""
    ends = record.timestamps[[0, -1]]
    views = []
    for camera in plan.embodiment.cameras:
        place = record.video[camera]
        views.append(frames_at(plan.source, place.path, ends + place.from_timestamp))
    _, _, height, width = compose(views, plan.embodiment.layout).shape
    return height, width


def report_path(plan: Plan, number: int) -> Path:
    return plan.work / "blocks" / f"{number:05d}.json"


def values_path(plan: Plan, number: int) -> Path:
    return plan.work / "blocks" / f"{number:05d}.npy"
