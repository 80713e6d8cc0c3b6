"""Rows of JSON that name an mp4 and say what it shows: the published fine-tuning row, and anyone's simpler one.

A row: `vision_path` relative to its file (or absolute), captions anywhere in it, as the dataset card says; optionally
`t2w_windows`, stretches of frames [start_frame, end_frame] with captions of their own, read every `temporal_interval`
frames; optionally `uuid`. Width, height and duration are taken from the video itself.

`mapping` of the dataset card: `rows`: the files (shell pattern, "*.jsonl"); `video`: the key of the path
("vision_path"); `group`: a key whose value rows share that are to be held out together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.archives import Member, place_of, read_place
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.json_lines import JsonLine, read_json_lines
from cosmos3_train.data.names import encodes, files_below
from cosmos3_train.data.sources.clips import Clip, ClipLog, look_up

MAPPING = ("rows", "video", "group")


class JsonlLog(ClipLog):
    """See the module. A clip's text is the place of its row."""

    def documents(self, clip: Clip) -> list[Mapping[str, Any]]:
        """See `ClipLog.documents`: the row."""
        return [json.loads(read_place(self.root, clip.text[0]))]

    def described_by(self) -> list[Path]:
        """See `ClipLog.described_by`: the files of rows."""
        return [self.root / file for file in sorted({clip.text[0].partition("#")[0] for clip in self.clips})]


def open_jsonl(card: DatasetCard, source: Path) -> JsonlLog:
    """Open a folder with files of rows, or one such file. Reads every row, and no video.

    Raises:
        UserError: there is none, a line is no JSON, or a row names no video; one line says which.
    """
    for key in card.mapping:
        if key not in MAPPING:
            raise UserError(f"dataset {card.name!r}: mapping.{key} is not known here.{nearest(key, MAPPING)}")
    root = source if source.is_dir() else source.parent
    pattern = card.mapping.get("rows", "*.jsonl")
    files = files_below(root, pattern, "rows") if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{source}: no file of rows ({pattern}) is there; fetch the set, or name one with --source")
    for file in files:
        if "#" in file.relative_to(root).as_posix():
            raise UserError(f"{file}: '#' in its name separates a file of rows from its lines here; rename it")
    clips: list[Clip] = []
    for file in files:
        clips += [_clip(card, root, file, line, len(clips) + place) for place, line in enumerate(read_json_lines(file))]
    if not clips:
        raise UserError(f"{files[0]}: the file has no row")
    return JsonlLog(card, root, clips)


def _clip(card: DatasetCard, root: Path, file: Path, line: JsonLine, index: int) -> Clip:
    key, row = card.mapping.get("video", "vision_path"), line.row
    if not isinstance(key, str):
        raise UserError(f"dataset {card.name!r}: mapping.video is {key!r}; the key of the video's path is expected")
    path = look_up(row, key)
    if not isinstance(path, str) or not path:
        raise UserError(f"{line.where}: no {key!r}, the path of its video.{nearest(key, map(str, row))}")
    place = path if Path(path).is_absolute() else (file.parent.relative_to(root) / path).as_posix()
    name = str(row.get("uuid") or f"{file.name} line {line.number}")
    if not encodes(place + name):
        raise UserError(f"{line.where}: the path of its video, or its uuid, is not valid Unicode")
    group = look_up(row, str(card.mapping["group"])) if "group" in card.mapping else None
    text = place_of(file.relative_to(root).as_posix(), Member(f"line {line.number}", line.offset, line.size))
    return Clip(index, name, place if group is None else str(group), place, (text,))
