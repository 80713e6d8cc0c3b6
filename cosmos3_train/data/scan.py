"""All of a log or a set of clips looked at, every number and every frame; what is wrong is told with its file and row.

Nothing is written. An episode or a clip that cannot be read is a finding, and the next one is looked at.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from cosmos3_train.config import Embodiment, UserError
from cosmos3_train.data import faults
from cosmos3_train.data.archives import range_of, split_place
from cosmos3_train.data.card import DatasetCard, PictureOptions
from cosmos3_train.data.faults import Fault, Place, Whole
from cosmos3_train.data.index import actions_of, columns_to_read, instructions, usable_rows
from cosmos3_train.data.sound import sound_fault
from cosmos3_train.data.sources.clips import ClipLog, ClipRecord
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, Log, left_out_of
from cosmos3_train.data.sources.talk_source import TalkSource
from cosmos3_train.data.talk import NoTalk, Reference
from cosmos3_train.data.talk_index import NO_TALK, talk_of
from cosmos3_train.data.talk_pictures import UNREADABLE, check_there, read_picture
from cosmos3_train.data.unusable import Unusable
from cosmos3_train.data.video import Decoded, decode_whole, frames_at, is_video

AT_ONCE = 64
"""Episodes or clips whose videos are decoded ahead; and pictures of one call."""


@dataclass(frozen=True)
class Finding:
    """kind: one of `faults`, or a reason of the source;  file: of the log, or its folder;  where: in it
    words: what is so
    """

    kind: str
    file: str
    where: str
    words: str


@dataclass
class Scan:
    """What a scan has seen so far: items (episodes or clips), frames, and captions, each with what is said of its sound
    ("": nothing), and its place."""

    items: int = 0
    frames: int = 0
    captions: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


Progress = Callable[[int], object]


def scan_log(
    log: Log,
    card: DatasetCard,
    embodiment: Embodiment,
    scan: Scan,
    threads: int = 1,
    progress: Progress = lambda _: None,
) -> Iterator[Finding]:
    """The findings of a robot's log whose cards fit it (`index.check_log`), as they are found.

    Args:
        scan: filled on the way.
        threads: that decode.
        progress: told of every episode that was looked at.
    """
    for reason, (count, example) in left_out_of(log).items():
        yield Finding(reason, str(log.root), "", f"{example}; {count:,} in all")
    whole, columns = Whole(embodiment), columns_to_read(card, embodiment)
    with ThreadPoolExecutor(threads) as pool:
        decoded: dict[str, Future[Decoded]] = {}
        for start in range(0, len(log.episodes), AT_ONCE):
            some = log.episodes[start : start + AT_ONCE]
            places = {episode.video[camera].path for episode in some for camera in embodiment.cameras}
            decoded = {  # what neighbours share is decoded once
                place: decoded.get(place) or pool.submit(decode_whole, *split_place(log.root, place))
                for place in sorted(places)
                if is_video(log.root, place)
            }
            for episode, record in _records(log, some, columns):
                if isinstance(record, UserError):
                    yield Finding(faults.UNREADABLE, episode.data_file, f"episode {episode.index}", str(record))
                elif record is not None:
                    yield from _numbers(record, episode, card, embodiment, whole, scan)
                    for camera in embodiment.cameras:
                        yield from _frames(log, record, camera, decoded, scan)
                scan.items += 1
                progress(1)
    for place, fault in whole.faults():
        yield _placed(place, fault)


def _records(
    log: Log, episodes: Sequence[Episode], columns: Sequence[str]
) -> Iterator[tuple[Episode, EpisodeRecord | UserError | None]]:
    """Episodes, those of one file read in one go; where that fails, one by one. None where an episode has no row."""
    for _, group in groupby(episodes, key=lambda episode: episode.data_file):
        some = list(group)
        try:
            found = {record.index: record for record in log.records(some, columns)}
        except UserError:
            found = {}
        for episode in some:
            try:
                yield episode, found.get(episode.index) or next(iter(log.records([episode], columns)), None)
            except UserError as error:
                yield episode, error


def _numbers(
    record: EpisodeRecord, episode: Episode, card: DatasetCard, robot: Embodiment, whole: Whole, scan: Scan
) -> Iterator[Finding]:
    """What is wrong with an episode's numbers; its words go to the scan."""
    tell = partial(_finding, episode.data_file, episode.index)
    for reason, (count, example) in record.faults.items():
        yield Finding(reason, episode.data_file, f"episode {episode.index}", f"{example}; {count:,} in all")
    for words in dict.fromkeys(instructions(record, card)):
        scan.captions.setdefault((words, ""), (episode.data_file, f"episode {episode.index}"))
    yield from map(tell, faults.wrong_times(record.timestamps, robot.control_hz))
    finite = True
    for name, values in record.columns.items():
        if isinstance(values, np.ndarray):
            named = name == robot.action_key and not robot.recorded and values.shape[1] == robot.width
            channels = [channel.name for channel in robot.action] if named else map(str, range(values.shape[1]))
            found = list(faults.not_finite(values, [f"{name}, {channel}" for channel in channels]))
            finite = finite and not found
            yield from map(tell, found)
    if not finite:
        return
    rows = usable_rows(record, robot)
    try:
        action = actions_of(record, robot, f"episode {episode.index}")[rows]
    except UserError as error:  # a recorded rotation that is none; its row stands in the message
        yield tell(Fault(faults.ROTATION, None, str(error)))
        return
    if action.shape[1] != robot.width:
        yield tell(
            Fault(faults.UNREADABLE, None, f"{action.shape[1]} numbers a row, the card has {robot.width} channels")
        )
        return
    whole_episode = len(rows) == 0 or len(rows) == rows[-1] + 1
    place = Place(episode.data_file, episode.index, range(len(rows)) if whole_episode else rows)
    for fault in (*faults.no_rotations(action, robot), *faults.outside_card(action, robot)):
        yield _placed(place, fault)
    if len(action) and (fault := whole.add(place, action)):
        yield _placed(place, fault)


def _frames(
    log: Log, record: EpisodeRecord, camera: str, decoded: Mapping[str, Future[Decoded]], scan: Scan
) -> Iterator[Finding]:
    """What is wrong with an episode's frames of one camera."""
    place = record.video[camera]
    times = place.from_timestamp + record.timestamps
    where = f"episode {record.index}, camera {camera!r}"
    if place.path not in decoded:
        yield from _pictures(log.root, place.path, times, where, scan)
        return
    video = decoded[place.path].result()
    scan.frames += len(times)
    if abs(video.fps - log.fps) > 0.01 * log.fps and video.fps:
        words = f"the video has {video.fps:.4g} frames a second, the log {log.fps:g}"
        yield Finding(faults.RATE, place.path, where, words)
    period = 1.0 / log.fps
    here = [fault for fault in video.faults if not times[0] - period > fault[0] and not fault[0] > times[-1] + period]
    if here:
        time, words = here[0]
        row = "" if math.isnan(time) else f", row {int(np.argmin(np.abs(times - time)))}"
        more = f"; {len(here) - 1:,} more" if len(here) > 1 else ""
        yield Finding(faults.VIDEO, place.path, where + row, words + more)
    lacking = faults.without_frame(times, video.times, log.fps)
    if lacking.any():
        row = int(np.argmax(lacking))
        words = f"no frame at {times[row]:.4f} s; {int(lacking.sum()):,} of {len(times):,} rows have none"
        yield Finding(faults.MISSING, place.path, f"{where}, row {row}", words)


def _pictures(root: Path, place: str, times: np.ndarray, where: str, scan: Scan) -> Iterator[Finding]:
    """The same of pictures that are stored one by one; the first of each call that cannot be read."""
    for start in range(0, len(times), AT_ONCE):
        try:
            scan.frames += len(frames_at(root, place, times[start : start + AT_ONCE]))
        except UserError as error:
            yield Finding(faults.VIDEO, place.partition("#")[0], f"{where}, rows from {start}", str(error))


def _placed(place: Place, fault: Fault) -> Finding:
    """A fault of some rows of an episode, by the episode's own numbers."""
    row = None if fault.row is None else int(place.rows[fault.row])
    return _finding(place.file, place.episode, fault._replace(row=row))


def _finding(file: str, episode: int, fault: Fault) -> Finding:
    where = f"episode {episode}" if fault.row is None else f"episode {episode}, row {fault.row}"
    return Finding(fault.kind, file, where, fault.words)


# ------------------------------------------------------------------------------------------------ clips


def scan_clips(log: ClipLog, scan: Scan, threads: int = 1, progress: Progress = lambda _: None) -> Iterator[Finding]:
    """The same of captioned video without a robot."""
    seen: dict[bytes, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(log.clips), AT_ONCE):
            records = list(log.records(log.clips[start : start + AT_ONCE]))
            places = {record.clip.place for record in records if record.video is not None}
            decoded = {place: pool.submit(decode_whole, *split_place(log.root, place)) for place in sorted(places)}
            sounds = {
                record.clip.place: pool.submit(sound_fault, log.root, record.clip.place, record.sound)
                for record in records
                if record.sound is not None
            }
            digests = {place: pool.submit(_digest, log.root, place) for place in decoded}
            for record in records:
                for reason, (count, example) in record.faults.items():
                    yield Finding(
                        reason, record.clip.place, "", f"{example}; {count:,} in all" if count > 1 else example
                    )
                heard = sounds.get(record.clip.place)
                if silence := record.silence or (heard.result() if heard else ""):
                    yield Finding(faults.SOUND, record.clip.place, "", silence)
                if (place := record.clip.place) in decoded:
                    video = decoded[place].result()
                    scan.frames += len(video.times)
                    yield from _clip(log, record, video)
                    earlier = seen.setdefault(digests[place].result(), place)
                    if earlier != place:
                        yield Finding(faults.DUPLICATE, place, "", f"the same bytes as {earlier}")
                    for segment in record.segments:
                        where = f"frames {segment.first} to {segment.last}"
                        said = (segment.caption, segment.sound_caption)
                        scan.captions.setdefault(said, (record.clip.place, where))
                scan.items += 1
                progress(1)


def _clip(log: ClipLog, record: ClipRecord, video: Decoded) -> Iterator[Finding]:
    place = record.clip.place
    for _, words in video.faults[:1]:
        yield Finding(faults.VIDEO, place, "", words)
    if video.fps:
        for fault in faults.wrong_times(video.times, video.fps):
            where = "" if fault.row is None else f"frame {fault.row}"
            yield Finding(fault.kind, place, where, fault.words)
    try:
        documents = log.documents(record.clip)
    except Unusable:
        return  # told already
    said = {key: value for document in reversed(documents) for key, value in document.items()}
    for frames in _numbers_of(said, "nb_frames"):
        if frames > len(video.times):
            words = f"{len(video.times):,} frames can be decoded, {frames:g} are said to be there"
            yield Finding(faults.MISSING, place, f"frame {len(video.times)}", words)
    for rate in _numbers_of(said, "framerate", "fps"):
        if video.fps and abs(rate - video.fps) > 0.01 * rate:
            yield Finding(faults.RATE, place, "", f"the video has {video.fps:.4g} frames a second, {rate:g} are said")
    for number, window in enumerate(said.get("t2w_windows") or []):
        for last in _numbers_of(window if isinstance(window, Mapping) else {}, "end_frame"):
            if last >= len(video.times):
                words = f"t2w_windows[{number}] ends at frame {last:g}, but {len(video.times):,} can be decoded"
                yield Finding(faults.MISSING, place, f"frame {len(video.times)}", words)


def _numbers_of(document: Mapping[str, Any], *keys: str) -> list[float]:
    found = [document.get(key) for key in keys]
    return [float(value) for value in found if isinstance(value, int | float) and value > 0]


def _digest(root: Path, place: str) -> bytes:
    """Of a video's bytes."""
    path, inside = split_place(root, place)
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as content:
        offset, left = range_of(inside) if inside else (0, path.stat().st_size)
        content.seek(offset)
        while left > 0 and (part := content.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
    return digest.digest()


# ------------------------------------------------------------------------------------------------ conversations


def scan_talks(
    talks: TalkSource, options: PictureOptions, scan: Scan, threads: int = 1, progress: Progress = lambda _: None
) -> Iterator[Finding]:
    """The same of conversations: every row, and every picture of them, videos whole."""
    with ThreadPoolExecutor(threads) as pool:
        for file in talks.files:
            places = talks.places(file)
            for start in range(0, len(places), AT_ONCE):
                some = places[start : start + AT_ONCE]
                looked: list[tuple[int, list[Future[Unusable | None]]]] = []
                try:
                    rows = list(talks.rows(file, some[:, 1].tolist()))
                except UserError as error:
                    yield Finding(NO_TALK, str(talks.root / file), f"rows from {some[0, 0]}", str(error))
                    continue
                for (number, _), row in zip(some.tolist(), rows, strict=True):
                    try:
                        talk = talk_of(row)
                    except NoTalk as error:
                        yield Finding(NO_TALK, talks.where(file, number), "", str(error))
                        continue
                    except Unusable as error:
                        yield Finding(error.reason, talks.where(file, number), "", error.example)
                        continue
                    folder = talks.pictures(file)
                    faults_of = [pool.submit(_picture_fault, folder, part, options) for part in talk.pictures]
                    looked.append((number, faults_of))
                for number, wrong in looked:
                    scan.frames += len(wrong)
                    for fault in (future.result() for future in wrong):
                        if fault is not None:
                            yield Finding(fault.reason, talks.where(file, number), "", fault.example)
                scan.items += len(some)
                progress(len(some))


def _picture_fault(folder: Path, reference: Reference, options: PictureOptions) -> Unusable | None:
    """What is wrong with a picture. From any thread, so a video is opened for itself alone."""
    try:
        check_there(folder, reference)
        if reference.kind == "image" or reference.content is not None:
            read_picture(folder, reference, options)
            return None
    except Unusable as error:
        return error
    video = decode_whole(folder / reference.path)
    if video.faults:
        return Unusable(UNREADABLE, f"{reference.path}: {video.faults[0][1]}")
    return None if len(video.times) > 1 else Unusable(UNREADABLE, f"{reference.path}: the video has one frame")
