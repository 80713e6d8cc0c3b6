"""Clips whose camera moves on a recorded track, as a robot's log: the camera is the robot, and a clip an episode.

Videos and JSON files are found as `webdataset` finds them, in tar shards or loose; the `mapping` of the dataset card
has the same keys, and says how a clip's JSON holds its track:

    track: dotted key of the list with an entry a frame
    pose:  dotted key of the pose in each entry, where an entry is a mapping
    world_to_camera: true where poses take the world's points to the camera's frame; else they are the camera's places
    transposed: true where translations stand in the last row, as in USD; else in the last column

A pose is 16 numbers, or 12 without the row 0 0 0 1, nested or not. The column `camera_to_world` has it as 4×4, by
rows, for `recorded` of the embodiment card (`form: transform`; its `tool` and `metres` turn and scale); the camera
`video` has the frames. Opening reads every track once, for its length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data import poses
from cosmos3_train.data.archives import split_place
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.sources.clips import Clip, look_up
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, VideoPlace
from cosmos3_train.data.sources.webdataset import MAPPING, ShardLog, open_webdataset
from cosmos3_train.data.unusable import Unusable
from cosmos3_train.data.video import video_times

CAMERA, COLUMN = "video", "camera_to_world"
OWN = ("track", "pose", "world_to_camera", "transposed")

NO_TRACK = "clip without a camera track"
UNEVEN = "row of a clip that has more poses than frames, or fewer"


@dataclass(frozen=True)
class TrackLog:
    """A `Log`. left_out: of clips, see `left_out_of`."""

    card: DatasetCard
    clips: ShardLog
    episodes: tuple[Episode, ...]
    left_out: dict[str, tuple[int, str]]

    cameras = (CAMERA,)
    columns = (COLUMN,)

    @property
    def root(self) -> Path:
        return self.clips.root

    @property
    def fps(self) -> float:
        assert self.card.rate_hz is not None
        return self.card.rate_hz

    @property
    def besides(self) -> list[str]:
        """See `read_besides`: of a clip's files with captions and track, `data_file` is only the first."""
        return [place for episode in self.episodes for place in self.clips.clips[episode.index].text]

    def check_camera(self, name: str) -> None:
        """Raise `UserError` unless `name` is the one camera."""
        if name != CAMERA:
            raise UserError(f"{self.root}: no camera {name!r} in the log.{nearest(name, self.cameras)}")

    def check_column(self, name: str) -> None:
        """Raise `UserError` unless `name` is the one column."""
        if name != COLUMN:
            raise UserError(f"{self.root}: no column {name!r} in the log.{nearest(name, self.columns)}")

    def width(self, column: str) -> int | None:
        """Sixteen numbers."""
        return 16

    def described_by(self) -> Iterable[Path]:
        """See `Log.described_by`: nothing beside the files that hold the clips."""
        return ()

    def records(self, episodes: Sequence[Episode], columns: Sequence[str]) -> Iterator[EpisodeRecord]:
        """Read episodes in the order given.

        Raises:
            UserError: a track is damaged, or a video cannot be read.
        """
        for episode in episodes:
            clip = self.clips.clips[episode.index]
            try:
                documents = self.clips.documents(clip)
                words = _caption(self.clips, clip, documents)
            except Unusable as fault:
                raise UserError(f"{self.root / clip.place}: {fault.example}") from None
            track = _poses(_track(documents, self.card), self.card, f"{self.root / clip.place}: camera track")
            times, _ = video_times(*split_place(self.root, clip.place))
            length = min(len(track), len(times))
            faults = {}
            if len(track) != len(times):
                example = f"{clip.name}: {len(track)} poses, {len(times)} frames"
                faults[UNEVEN] = (max(len(track), len(times)) - length, example)
            yield EpisodeRecord(
                index=episode.index,
                length=length,
                timestamps=times[:length] - times[0],
                tasks=(words,) * length,
                columns={COLUMN: track[:length].reshape(length, 16).astype(np.float32)},
                video={CAMERA: VideoPlace(clip.place, float(times[0]))},
                faults=faults,
            )


def open_camera_tracks(card: DatasetCard, source: Path) -> TrackLog:
    """Open a folder of clips with camera tracks.

    Raises:
        UserError: the card says no rate or no track, no clip is there, or none can be used.
    """
    where = f"dataset {card.name!r}"
    for key in card.mapping:
        if key not in (*MAPPING, *OWN):
            raise UserError(f"{where}: mapping.{key} is not known here.{nearest(key, (*MAPPING, *OWN))}")
    if not card.rate_hz:
        raise UserError(f"{where}: rate_hz has no value; say how many frames a second the clips have")
    if not card.mapping.get("track"):
        raise UserError(f"{where}: mapping.track has no value; it is the key of the list with a pose a frame")
    shards = replace(card, mapping={key: value for key, value in card.mapping.items() if key in MAPPING})
    clips = open_webdataset(shards, source)
    episodes, lost, examples = [], Counter[str](), {}
    for clip in clips.clips:
        try:
            documents = clips.documents(clip)
            length = _length(documents, card)
            _caption(clips, clip, documents)
        except Unusable as fault:
            lost[fault.reason] += 1
            examples.setdefault(fault.reason, f"{clip.name}: {fault.example}")
            continue
        place = {CAMERA: VideoPlace(clip.place, 0.0)}
        episodes.append(Episode(clip.index, length, (), clip.text[0], place))
    left_out = {reason: (count, examples[reason]) for reason, count in lost.items()}
    if not episodes:
        why = "; ".join(f"{count:,} × {reason} ({example})" for reason, (count, example) in left_out.items())
        raise UserError(f"{where}: none of {len(clips.clips)} clips can be used: {why}")
    return TrackLog(card, clips, tuple(episodes), left_out)


def _length(documents: Sequence[Mapping[str, Any]], card: DatasetCard) -> int:
    """How many poses a clip has.

    Raises:
        Unusable: none.
    """
    found = _track(documents, card)
    if isinstance(found, list) and found:
        return len(found)
    keys = list(dict.fromkeys(key for document in documents for key in document))
    hint = nearest(str(card.mapping["track"]), keys) if keys else ""
    raise Unusable(NO_TRACK, f"no list {card.mapping['track']!r} in {', '.join(keys) or 'no JSON at all'}.{hint}")


def _track(documents: Sequence[Mapping[str, Any]], card: DatasetCard) -> Any:
    """The list with an entry a frame, of the first document that has one."""
    found = (look_up(document, str(card.mapping["track"])) for document in documents)
    return next((value for value in found if value is not None), None)


def _poses(entries: Sequence[Any], card: DatasetCard, where: str) -> np.ndarray:
    """float64 [T, 4, 4]: where the camera is, in the world's frame."""
    key, rows = card.mapping.get("pose"), []
    for number, entry in enumerate(entries):
        value = look_up(entry, str(key)) if key else entry
        try:
            numbers = np.asarray(value, dtype=np.float64).ravel()
        except (TypeError, ValueError):
            numbers = np.zeros(0)
        if len(numbers) not in (12, 16):
            hint = nearest(str(key), map(str, entry)) if key and isinstance(entry, Mapping) else ""
            raise UserError(f"{where}, frame {number}: no pose of 12 or 16 numbers under {key or 'the entry'!r}.{hint}")
        rows.append(numbers)
    if len({len(numbers) for numbers in rows}) != 1:
        raise UserError(f"{where}: some poses have 12 numbers, others 16")
    transposed = bool(card.mapping.get("transposed"))
    places = np.tile(np.eye(4), (len(rows), 1, 1))
    given = np.stack(rows)
    if given.shape[1] == 16:
        places = given.reshape(-1, 4, 4).swapaxes(1, 2) if transposed else given.reshape(-1, 4, 4)
    else:
        places[:, :3] = given.reshape(-1, 4, 3).swapaxes(1, 2) if transposed else given.reshape(-1, 3, 4)
    return poses.inverse(places) if card.mapping.get("world_to_camera") else places


def _caption(clips: ShardLog, clip: Clip, documents: Sequence[Mapping[str, Any]]) -> str:
    """Its words, "" where the dataset card asks for none: dynamics can be learnt without.

    Raises:
        Unusable: the card asks for some, and there are none.
    """
    card = clips.card
    asked = card.constant_caption is not None or card.captions or card.caption_template is not None
    return clips.caption(clip, documents) if asked else ""
