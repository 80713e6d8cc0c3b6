"""Videos and caption files that belong together by their names: in tar shards (WebDataset), in loose folders, or both.

A member's key is what its name has in common with its captions': by default its folder and its base name up to the
first dot, so that "run.ceiling_00.rgb.mp4" and "run.meta.json" share "run". A clip's captions are the files of its key
in its own shard, else in any other: published shards of captions are numbered otherwise than those of videos.

`mapping` of the dataset card, each one shell pattern or a list of them, unless said otherwise:

    videos:    files with videos: shards, or loose videos ("**/*.tar")
    captions:  files with captions ("videos", that is the same shards)
    video:     names of videos inside a shard ("*.mp4")
    text:      names of caption files inside a shard, in order of preference ("*.json")
    key:       a regular expression whose groups, joined by "/", are the key
    group:     a regular expression whose groups are what of a key is held out together (the whole key)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.archives import SUFFIX, list_members, place_of, read_place, split_place
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.names import encodes, files_below
from cosmos3_train.data.sources.clips import BAD_TEXT, Clip, ClipLog, parse_document
from cosmos3_train.data.unusable import Unusable

MAPPING = ("videos", "captions", "video", "text", "key", "group")
KEY = r"((?:.*/)?[^/.]+)"


class _Found(NamedTuple):
    """A member of a shard or a loose file: the file, the name by which it is matched, and its place."""

    file: str
    name: str
    place: str


class ShardLog(ClipLog):
    """See the module. A clip's text are the places of its caption files."""

    def documents(self, clip: Clip) -> list[Mapping[str, Any]]:
        """See `ClipLog.documents`: its caption files, the preferred first."""
        read: dict[str, Mapping[str, Any]] = {}
        for place in clip.text:
            name = _name(self.root, place)
            try:
                found = parse_document(read_place(self.root, place), name)
            except UserError as error:
                raise Unusable(BAD_TEXT, str(error)) from None
            if read.setdefault(name, found) != found:
                raise Unusable(BAD_TEXT, f"two archives have a {name}, and they differ")
        return list(read.values())

    def facts(self, clip: Clip) -> Mapping[str, Any]:
        """See `ClipLog.facts`: also the folder that its file lies in."""
        return {**super().facts(clip), "folder": split_place(self.root, clip.place)[0].parent.name}


def open_webdataset(card: DatasetCard, source: Path) -> ShardLog:
    """Open a folder of shards or loose files. Reads the archives' headers alone.

    Raises:
        UserError: no such file is there, an archive is damaged, or a pattern fits nothing.
    """
    where = f"dataset {card.name!r}"
    for key in card.mapping:
        if key not in MAPPING:
            raise UserError(f"{where}: mapping.{key} is not known here.{nearest(key, MAPPING)}")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; fetch the set, or name its place with --source")
    videos, texts = _patterns(card, "videos", f"**/*{SUFFIX}"), _patterns(card, "text", "*.json")
    key, group = _by_expression(card, "key", KEY), _by_expression(card, "group", "(.*)")
    found = list(_members(source, "videos", videos, _patterns(card, "video", "*.mp4")))
    if not found:
        raise UserError(
            f"{source}: no video by mapping.videos {', '.join(videos)} and mapping.video "
            f"{', '.join(_patterns(card, 'video', '*.mp4'))}; correct them, or fetch the set"
        )
    keys = [key(member.name) for member in found]
    wanted, words = set(keys), dict[str, list[tuple[int, _Found]]]()
    for member in _members(source, "captions", _patterns(card, "captions", *videos), texts, loose=texts):
        if (owner := key(member.name)) in wanted:
            rank = next(place for place, pattern in enumerate(texts) if fnmatchcase(member.name, pattern))
            words.setdefault(owner, []).append((rank, member))
    clips = []
    for member, owner in zip(found, keys, strict=True):
        mine = words.get(owner, [])
        near = [pair for pair in mine if pair[1].file == member.file] or mine
        text = tuple(said.place for _, said in sorted(near))
        name = member.name if member.file == member.name else f"{member.file}#{member.name}"
        clips.append(Clip(len(clips), name, group(owner), member.place, text))
    return ShardLog(card, source, clips)


def _patterns(card: DatasetCard, key: str, *default: str) -> list[str]:
    given = card.mapping.get(key, default)
    if not isinstance(given, str | list | tuple):
        raise UserError(f"dataset {card.name!r}: mapping.{key} is {given!r}; a pattern, or a list of them, is expected")
    return [given] if isinstance(given, str) else [str(pattern) for pattern in given]


def _by_expression(card: DatasetCard, key: str, default: str) -> Callable[[str], str]:
    """A function from a name to its groups, joined; where the expression does not fit it is the name itself."""
    try:
        expression = re.compile(str(card.mapping.get(key, default)))
    except re.error as error:
        raise UserError(f"dataset {card.name!r}: mapping.{key} is not a regular expression ({error})") from None
    if not expression.groups:
        raise UserError(f"dataset {card.name!r}: mapping.{key} has no group; put what is wanted in parentheses")

    def apply(name: str) -> str:
        match = expression.match(name)
        return name if match is None else "/".join(part for part in match.groups() if part is not None)

    return apply


def _members(
    root: Path, key: str, files: Sequence[str], names: Sequence[str], loose: Sequence[str] | None = None
) -> Iterator[_Found]:
    """What of the files fits: of a shard the members of these names; a loose file as it is, or of the names `loose`."""
    for path in sorted({path for pattern in files for path in files_below(root, pattern, key) if path.is_file()}):
        file = path.relative_to(root).as_posix()
        if "#" in file and path.suffix == SUFFIX:
            raise UserError(f"{path}: '#' in an archive's name separates it from its member here; rename it")
        if path.suffix == SUFFIX:
            for member in list_members(path):
                if any(fnmatchcase(member.name, pattern) for pattern in names):
                    _check_name(path, member.name)
                    yield _Found(file, member.name, place_of(file, member))
        elif loose is None or any(fnmatchcase(file, pattern) for pattern in loose):
            _check_name(root, file)
            yield _Found(file, file, file)


def _check_name(where: Path, name: str) -> None:
    if not encodes(name):
        raise UserError(f"{where}: the name {name!a} in it is not valid UTF-8; rename it")


def _name(root: Path, place: str) -> str:
    _, inside = split_place(root, place)
    return inside.rpartition("@")[0] if inside else place
