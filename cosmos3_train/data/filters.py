"""Which windows of a robot's episode are kept, and why the others are not: gaps in time, and what a dataset card's
`filters` say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosmos3_train.config import Embodiment, UserError, nearest
from cosmos3_train.data.actions import still
from cosmos3_train.data.card import DatasetCard, Filters
from cosmos3_train.data.index import GAP, actions_of, usable_rows, window_starts
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, Log

FAILED = "episode without success"
IDLE = "window that begins where nothing moves"
NOT_KEPT = "window outside the ranges to keep"

Ranges = Mapping[int, Sequence[tuple[int, int]]]
"""Episode -> the rows [start, stop) to keep."""


@dataclass(frozen=True)
class Cut:
    """An episode's windows. starts: their first rows;  rows: int [n], whose actions count in the statistics;  left_out:
    reason → how many windows, or the one episode"""

    starts: list[int]
    rows: np.ndarray
    left_out: dict[str, int]


def cut_episode(
    record: EpisodeRecord, card: DatasetCard, embodiment: Embodiment, stride: int, keep: Ranges | None
) -> Cut:
    """The windows of an episode that pass the card's filters.

    Args:
        keep: of `read_keep_ranges`.

    Raises:
        UserError: the column of success holds words.
    """
    starts, gaps = window_starts(record.timestamps, embodiment.chunk, stride, embodiment.control_hz)
    left_out = {GAP: gaps} if gaps else {}
    rows = usable_rows(record, embodiment)
    if card.filters == Filters():
        return Cut(starts, rows, left_out)
    if card.filters.success and not _succeeds(record, card):
        return Cut([], rows[:0], {FAILED: 1})
    if not starts:  # there may be no row with an action
        return Cut([], rows[:0], left_out)
    if keep is not None:
        starts = _counted(starts, _kept(starts, embodiment, keep.get(record.index, ())), NOT_KEPT, left_out)
    if card.filters.idle_rows:
        idle = _idle(record, card.filters, embodiment, f"dataset {card.name!r}, episode {record.index}")
        starts = _counted(starts, [not idle[start] for start in starts], IDLE, left_out)
    covered = np.zeros(record.length, bool)
    for start in starts:
        covered[start : start + embodiment.chunk] = True
    return Cut(starts, rows[covered[rows]], left_out)


def read_keep_ranges(card: DatasetCard, log: Log) -> Ranges | None:
    """The file that the card names, of the log's episodes; None where it names none.

    Raises:
        UserError: it is missing, is not {"EPISODE": [[START, STOP], ...]}, or names no episode of the log.
    """
    if card.filters.keep_ranges is None:
        return None
    path = log.root / card.filters.keep_ranges
    try:
        content = json.loads(path.read_bytes())
        ranges = {key: [(int(a), int(b)) for a, b in pairs] for key, pairs in content.items()}
        by_number = {int(key): pairs for key, pairs in ranges.items()} if card.filters.keep_key is None else {}
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing, which filters.keep_ranges of {card.name!r} names") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        hint = "" if card.filters.keep_key else "; for keys that are no numbers, the card's filters.keep_key says what"
        raise UserError(f'{path}: not of the form {{"EPISODE": [[START, STOP], ...]}} ({error}){hint}') from None
    for key, pairs in ranges.items():
        for first, stop in pairs:
            if not 0 <= first < stop:
                raise UserError(f"{path}: episode {key}: [{first}, {stop}] holds no row; START is below STOP")
    if card.filters.keep_key is None:
        return by_number
    keys = {episode.index: _key(card.filters.keep_key, episode, log.root) for episode in log.episodes}
    found = {index: ranges[key] for index, key in keys.items() if key in ranges}
    if not found:
        ours, theirs = next(iter(keys.values()), ""), next(iter(ranges), "")
        raise UserError(
            f"{path}: names no episode of {log.root}, which filters.keep_key makes {ours!r} of; the file has such as "
            f"{theirs!r}"
        )
    return found


def _key(template: str, episode: Episode, root: Path) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in episode.said:
            raise UserError(
                f"{root}: filters.keep_key: the log says no {match[1]!r} of episode {episode.index}, only "
                f"{', '.join(episode.said) or 'nothing'}.{nearest(match[1], episode.said)}"
            )
        return episode.said[match[1]]

    return re.sub(r"\{([^{}]+)\}", value, template)


def _succeeds(record: EpisodeRecord, card: DatasetCard) -> bool:
    values = record.columns[str(card.filters.success)]
    if isinstance(values, list):
        raise UserError(f"dataset {card.name!r}: filters.success {card.filters.success!r} holds words, not numbers")
    return bool((values > 0).any())


def _kept(starts: Sequence[int], embodiment: Embodiment, ranges: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether all frames of each window lie in one range."""
    return [any(first <= start and start + embodiment.frames <= stop for first, stop in ranges) for start in starts]


def _idle(record: EpisodeRecord, filters: Filters, embodiment: Embodiment, where: str) -> np.ndarray:
    """bool [T]: rows of a stretch of at least `idle_rows` whose actions all stay where the one before them led."""
    action = actions_of(record, embodiment, where)
    before = np.concatenate([action[:1], action[:-1]])
    moved = np.stack([np.abs(now - still(embodiment, was)).max() for now, was in zip(action, before, strict=True)])
    stays = np.concatenate([moved < filters.idle_below, np.zeros(record.length - len(action), bool)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], stays, [False]]).astype(int)))
    idle = np.zeros(record.length, bool)
    for first, stop in edges.reshape(-1, 2):
        idle[first:stop] = stop - first >= filters.idle_rows
    return idle


def _counted(starts: Sequence[int], passes: Sequence[bool], reason: str, left_out: dict[str, int]) -> list[int]:
    kept = [start for start, passed in zip(starts, passes, strict=True) if passed]
    if len(kept) < len(starts):
        left_out[reason] = len(starts) - len(kept)
    return kept
