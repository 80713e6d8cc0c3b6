"""The prepared row, how windows are cut from an episode, and which episodes never train. Pure functions.

A robot's window is chunk + 1 frames and the chunk actions between them; one of video without a robot is 4k + 1 frames
under one caption, and its episode is its clip. A window never leaves its episode and never straddles a gap in the
timestamps. Media is not copied: a row points at mp4s by path and time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Features, List, Value

from cosmos3_train.config import Clips, Embodiment, UserError
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.recorded import check_recorded, made_actions, made_states, recorded_columns
from cosmos3_train.data.sound import Track
from cosmos3_train.data.sources.clips import Clip, ClipRecord, Segment
from cosmos3_train.data.sources.log import EpisodeRecord, Log
from cosmos3_train.runtime import fold

SPLITS = ("train", "heldout")
GAP = "window across a gap in the timestamps"
SHORT_CLIP = "clip or caption window shorter than the least frames of a window"
REST = "frame at the end of a clip or caption window, too few for another window"
NO_TRACK = "window of a clip without a sound track"
BAD_TRACK = "window of a clip whose sound cannot be read"
BEYOND_TRACK = "window that its clip's sound does not reach"
PARTLY = "window that its clip's sound covers in part; the rest is silence"
LEAST_SOUND_SECONDS = 0.1
"""Of a window (or half of a shorter one) that its clip's sound must cover, for the window to have sound at all."""
ROUNDING_SECONDS = 0.05
"""By which sound and frames of a file may differ in length without a word: codecs work in blocks."""

FEATURES = Features(
    {
        "episode_index": Value("int64"),
        "start": Value("int64"),  # frame of the episode with which the window begins
        "split": Value("string"),
        "instruction": Value("string"),
        "fps": Value("float64"),
        "height": Value("int32"),  # of the composed views, in pixels
        "width": Value("int32"),
        "video": List(
            {
                "camera": Value("string"),
                "path": Value("string"),  # relative to the source
                "start_time": Value("float64"),  # seconds into the file, of the window's first frame
                "end_time": Value("float64"),  # and of its last
            }
        ),
        "timestamps": List(Value("float64")),  # of its frames, seconds into the episode
        "action": List(List(Value("float32"))),  # chunk rows, in the robot's own units, or null
        "state": List(Value("float32")),  # at the window's first frame, or null
        "sound": {"rate": Value("int32"), "channels": Value("int32")},  # Hz; of the window's sound track, or null
        "sound_caption": Value("string"),  # words of what is heard, "" where there are none; null without sound
    }
)
"""Columns of a prepared row."""


def assign_splits(dataset: str, episodes: Sequence[int], heldout_fraction: float, seed: int) -> dict[int, str]:
    """Episode → "train" or "heldout", by a hash of (seed, dataset, episode): adding episodes moves none of the others.

    With two episodes or more and a fraction above 0, at least one is held out, and at least one trains. An episode may
    be any number that a thing always has, such as a hash of a conversation.
    """
    score = {episode: fold(seed, "heldout", dataset, episode) / 2**63 for episode in episodes}
    heldout = {episode for episode in episodes if score[episode] < heldout_fraction}
    if heldout_fraction > 0 and len(episodes) >= 2:
        if not heldout:
            heldout = {min(episodes, key=score.__getitem__)}
        elif len(heldout) == len(episodes):
            heldout -= {max(episodes, key=score.__getitem__)}
    return {episode: "heldout" if episode in heldout else "train" for episode in episodes}


def split_clips(dataset: str, clips: Sequence[Clip], heldout_fraction: float, seed: int) -> dict[int, str]:
    """Clip → split, by a hash of its group's name: adding files moves none of the others."""
    groups = {clip.group: fold(0, clip.group) for clip in clips}
    sides = assign_splits(dataset, list(groups.values()), heldout_fraction, seed)
    return {clip.index: sides[groups[clip.group]] for clip in clips}


def window_starts(timestamps: np.ndarray, chunk: int, stride: int, fps: float) -> tuple[list[int], int]:
    """First frames of the windows of one episode, and how many windows were dropped for a gap in time.

    A gap is a step between two frames that differs from the frame period by more than half of it.
    """
    gaps = np.concatenate([[0], np.cumsum(_gaps(timestamps, fps))])
    starts = np.arange(0, len(timestamps) - chunk, stride)
    whole = gaps[starts + chunk] == gaps[starts]
    return [int(start) for start in starts[whole]], int((~whole).sum())


def _gaps(timestamps: np.ndarray, fps: float) -> np.ndarray:
    """bool [T - 1]: whether the step from a frame to the next is a gap."""
    return np.abs(np.diff(timestamps) - 1.0 / fps) > 0.5 / fps


def actions_of(record: EpisodeRecord, embodiment: Embodiment, where: str) -> np.ndarray:
    """float32 [T, width]: the action at each row of an episode; [T - 1, width] where it is made from recorded poses.

    Args:
        where: dataset and episode, for the message.
    """
    if not embodiment.recorded:
        return record.columns[embodiment.action_key]
    return made_actions(record.columns, embodiment, where)


def states_of(record: EpisodeRecord, embodiment: Embodiment, where: str) -> np.ndarray | None:
    """float32 [T, n]: the state at each row of an episode, None where the embodiment names none."""
    if embodiment.makes_state:
        return made_states(record.columns, embodiment, where)
    return None if embodiment.state_key is None else record.columns[embodiment.state_key]


def usable_rows(record: EpisodeRecord, embodiment: Embodiment) -> np.ndarray:
    """Rows of an episode whose action means something: all, or where it is made of two rows, those before no gap."""
    if not embodiment.recorded:
        return np.arange(record.length)
    return np.flatnonzero(~_gaps(record.timestamps, embodiment.control_hz))


def instructions(record: EpisodeRecord, card: DatasetCard) -> Sequence[str]:
    """The instruction at each row of an episode: the card's constant, its caption column, or the log's task."""
    if card.constant_caption is not None:
        return (card.constant_caption,) * record.length
    if card.caption_column is None:
        return record.tasks
    words = record.columns[card.caption_column]
    if not isinstance(words, list):
        raise UserError(f"dataset {card.name!r}: caption_column {card.caption_column!r} holds numbers, not words")
    return [word or "" for word in words]


def columns_to_read(card: DatasetCard, embodiment: Embodiment) -> list[str]:
    """The columns of a log that preparing needs."""
    action = recorded_columns(embodiment) if embodiment.recorded else [embodiment.action_key]
    named = (
        *action,
        None if embodiment.makes_state else embodiment.state_key,
        card.caption_column,
        card.filters.success,
    )
    return list(dict.fromkeys(name for name in named if name is not None))


def check_log(log: Log, card: DatasetCard, embodiment: Embodiment) -> None:
    """Everything that an opened log alone can show to be wrong.

    Raises:
        UserError: a camera or column that the log has not, another width, another rate.
    """
    for camera in embodiment.cameras:
        log.check_camera(camera)
    for name in columns_to_read(card, embodiment):
        log.check_column(name)
    widths = {name: log.width(name) for name in recorded_columns(embodiment)}
    check_recorded(embodiment, widths, f"dataset {card.name!r}")
    width = None if embodiment.recorded else log.width(embodiment.action_key)
    if width is not None and width != embodiment.width:
        raise UserError(
            f"dataset {card.name!r}: column {embodiment.action_key!r} has {width} numbers a row, embodiment "
            f"{embodiment.name!r} has {embodiment.width} channels; correct the card's action or action_key"
        )
    if abs(log.fps - embodiment.control_hz) > 0.01 * embodiment.control_hz:
        raise UserError(
            f"dataset {card.name!r}: the log has {log.fps:g} frames a second, embodiment {embodiment.name!r} has "
            f"control_hz {embodiment.control_hz:g}; set control_hz to the log's rate or resample the log"
        )


def episode_rows(
    record: EpisodeRecord, starts: Sequence[int], card: DatasetCard, embodiment: Embodiment, split: str, size: Any
) -> list[dict[str, Any]]:
    """The prepared rows (as `FEATURES`) of one episode's windows. `size` is (height, width) of the composed views."""
    where = f"dataset {card.name!r}, episode {record.index}"
    action, state = actions_of(record, embodiment, where), states_of(record, embodiment, where)
    words = instructions(record, card)
    rows = []
    for start in starts:
        times = record.timestamps[start : start + embodiment.chunk + 1]
        places = [(camera, *record.video[camera]) for camera in embodiment.cameras]
        rows.append(
            {
                "episode_index": record.index,
                "start": start,
                "split": split,
                "instruction": words[start],
                "fps": embodiment.control_hz,
                "height": size[0],
                "width": size[1],
                "video": [
                    {"camera": camera, "path": path, "start_time": first + times[0], "end_time": first + times[-1]}
                    for camera, path, first in places
                ],
                "timestamps": times.tolist(),
                "action": action[start : start + embodiment.chunk].tolist(),
                "state": None if state is None else state[start].tolist(),
                "sound": None,
                "sound_caption": None,
            }
        )
    return rows


def clip_windows(segment: Segment, clips: Clips) -> list[tuple[int, int]]:
    """(first frame, frames) of the windows of a stretch of a clip. A rest shorter than a window gives one of the
    largest 4k + 1 frames that it has, where these are enough."""
    total, found, start = 1 + (segment.last - segment.first) // segment.interval, [], 0
    while start < total:
        frames = min(clips.frames, total - start)
        frames -= (frames - 1) % 4
        if frames < clips.least:
            break
        found.append((segment.first + start * segment.interval, frames))
        if start + clips.frames >= total:
            break
        start += clips.step
    return found


def clip_rows(
    record: ClipRecord, clips: Clips, split: str, size: tuple[int, int]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The prepared rows (as `FEATURES`) of one clip's windows, and how many were left out for which reason.

    Args:
        size: (height, width) at which its frames are read.
    """
    assert record.video is not None
    times, rate = record.video
    gaps = np.concatenate([[0], np.cumsum(np.abs(np.diff(times) - 1.0 / rate) > 0.5 / rate)])
    rows, left_out = [], {SHORT_CLIP: 0, REST: 0, GAP: 0}
    for segment in record.segments:
        windows = clip_windows(segment, clips)
        if not windows:
            left_out[SHORT_CLIP] += 1
            continue
        reached = windows[-1][0] + windows[-1][1] * segment.interval
        left_out[REST] += max(0, (segment.last - reached) // segment.interval + 1)
        for first, frames in windows:
            places = np.arange(frames) * segment.interval + first
            if gaps[places[-1]] != gaps[first]:
                left_out[GAP] += 1
                continue
            shown = times[places]
            rows.append(
                {
                    "episode_index": record.clip.index,
                    "start": first,
                    "split": split,
                    "instruction": segment.caption,
                    "fps": rate / segment.interval,
                    "height": size[0],
                    "width": size[1],
                    "video": [
                        {
                            "camera": "video",
                            "path": record.clip.place,
                            "start_time": float(shown[0]),
                            "end_time": float(shown[-1]),
                        }
                    ],
                    "timestamps": (shown - times[0]).tolist(),
                    "action": None,
                    "state": None,
                    "sound": None,
                    "sound_caption": segment.sound_caption,
                }
            )
    return rows, {reason: count for reason, count in left_out.items() if count}


def note_sound(rows: Sequence[dict[str, Any]], track: Track | None, silence: str) -> dict[str, int]:
    """Write into a clip's rows whether they have sound.

    Args:
        track: what the clip's file says of it, None where it has none;  silence: why that cannot be read, "" if it can.

    Returns:
        Reason → windows without sound, or with silence for a part of it.
    """
    found = {NO_TRACK: 0, BAD_TRACK: 0, BEYOND_TRACK: 0, PARTLY: 0}
    for row in rows:
        start, length = row["video"][0]["start_time"], len(row["timestamps"]) / row["fps"]
        covered = track.covers(start, start + length) if track and not silence else 0.0
        if track and covered >= min(LEAST_SOUND_SECONDS, length / 2):
            row["sound"] = {"rate": track.rate, "channels": track.channels}
            found[PARTLY] += covered < length - ROUNDING_SECONDS
            continue
        row["sound"] = row["sound_caption"] = None
        found[BAD_TRACK if silence else BEYOND_TRACK if track else NO_TRACK] += 1
    return {reason: count for reason, count in found.items() if count}
