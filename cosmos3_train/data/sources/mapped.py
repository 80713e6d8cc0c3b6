"""What logs in files of named arrays (HDF5, Zarr) share: their names differ from lab to lab, so the `mapping` of the
dataset card says what is what.

Names in a mapping are paths inside an episode's group, or, with a leading '/', inside the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from omegaconf import MISSING

from cosmos3_train.config import UserError, check_keys, from_plain, nearest
from cosmos3_train.data.arrays import ArrayInfo, Arrays, View, check_pictures, missing, picture_array
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.pictures import READERS, place_inside
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, VideoPlace


@dataclass(frozen=True)
class Camera(View):
    """A camera of a mapping: the array with its pictures, and how these are stored."""

    path: str = MISSING


@dataclass(frozen=True)
class Instruction:
    """Where the instruction stands: one of the three.

    constant:  the words
    attribute: GROUP@NAME, such as "/data@problem_info"; "@NAME" for one of the episode itself
    array:     with one text for each row, for each episode of the file, or for all
    key:       dotted key, where attribute or array holds JSON
    """

    constant: str | None = None
    attribute: str | None = None
    array: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("constant", "attribute", "array") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"mapping.instruction: has {' and '.join(given) or 'none'} of constant, attribute and array"
            )
        if self.attribute is not None and "@" not in self.attribute:
            raise UserError(f"mapping.instruction.attribute is {self.attribute!r}; it is written GROUP@NAME")


@dataclass(frozen=True)
class ArrayMapping:
    """What is what in a log's files; None for an entry of `columns` or `cameras` takes it out of the preset.

    preset:      a mapping for a known layout, of which the rest here is changes
    files:       pattern of the files below the source, or several
    columns:     our name → array with a row a frame, or several, side by side
    cameras:     our name → array with its pictures, or a mapping (`Camera`)
    instruction: see `Instruction`
    """

    preset: str | None = None
    files: Any = MISSING
    columns: dict[str, Any] = field(default_factory=dict)
    cameras: dict[str, Any] = field(default_factory=dict)
    instruction: Instruction | None = None


Schema = TypeVar("Schema", bound=ArrayMapping)


def read_mapping(card: DatasetCard, schema: type[Schema], presets: Mapping[str, Mapping[str, Any]]) -> Schema:
    """The mapping of a dataset card, over its preset.

    Raises:
        UserError: an unknown key or preset, or a value of the wrong kind.
    """
    where = f"dataset {card.name!r}"
    given: dict[str, Any] = {"mapping": card.mapping}
    check_keys(_within(schema), given, where)
    name = card.mapping.get("preset")
    if name is not None and name not in presets:
        raise UserError(f"{where}: mapping.preset is {name!r}.{nearest(str(name), presets)}")
    merged = {**(presets[name] if name else {}), **card.mapping}
    for key in ("columns", "cameras"):
        both = {**(presets[name].get(key, {}) if name else {}), **(card.mapping.get(key) or {})}
        merged[key] = {ours: theirs for ours, theirs in both.items() if theirs is not None}
    try:
        mapping: Schema = from_plain(schema, merged, where)
        cameras = {ours: _camera(theirs, ours) for ours, theirs in mapping.cameras.items()}
        columns = {ours: _paths(theirs, f"mapping.columns.{ours}") for ours, theirs in mapping.columns.items()}
        both = sorted(set(cameras) & set(columns))
        if both:
            raise UserError(f"mapping: {both[0]!r} is a column and a camera; give one of them another name")
        return schema(**{**vars(mapping), "cameras": cameras, "columns": columns})
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def find_files(source: Path, mapping: ArrayMapping) -> list[Path]:
    """The files of a log, in natural order (episode_2 before episode_10).

    Raises:
        UserError: the source is no folder, or no file matches, or one is of a kind that is not read.
    """
    patterns = _paths(mapping.files, "mapping.files")
    if not source.exists():
        raise UserError(f"{source}: no such folder; give the one that holds the log's files")
    if not source.is_dir() or source.suffix in READERS:
        raise UserError(f"{source}: give the folder that holds it, {source.parent}, and mapping.files: {source.name}")
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(f"mapping.files is {pattern!r}; it is a pattern below the source")
    found = {path for pattern in patterns for path in source.glob(pattern)}
    for path in sorted(found):
        if path.suffix not in READERS:
            raise UserError(f"{path}: ends in {path.suffix!r}; files that end in {', '.join(READERS)} are read")
        if "#" in path.relative_to(source).as_posix():
            raise UserError(f"{path}: has '#' in its name, behind which rows name what is inside a file; rename it")
    if not found:
        beside = [path.name for path in source.iterdir()]
        raise UserError(f"{source}: no file matches {' or '.join(patterns)}.{nearest(patterns[0], beside)}")
    return sorted(found, key=lambda path: natural(path.relative_to(source).as_posix()))


def natural(name: str) -> list[Any]:
    """Key that sorts demo_2 before demo_10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def rate_of(card: DatasetCard) -> float:
    """The card's `rate_hz`: such files name none.

    Raises:
        UserError: it has none.
    """
    if card.rate_hz is None or not card.rate_hz > 0:
        raise UserError(
            f"dataset {card.name!r}: rate_hz is {card.rate_hz}; its files do not say their rate, so give it"
        )
    return float(card.rate_hz)


@dataclass(frozen=True)
class Stretch:
    """Where an episode lies: in the group of a file, "" for its root, rows [first, first + length) of the arrays there.

    number, episodes: which of the file's episodes it is
    """

    file: Path
    group: str
    first: int
    length: int
    number: int
    episodes: int

    @property
    def where(self) -> str:
        """For messages."""
        inside = self.group or (f"episode {self.number}" if self.episodes > 1 else "")
        return f"{self.file}, {inside}" if inside else str(self.file)

    def array(self, path: str) -> str:
        """The array's name in the file that a path of the mapping stands for."""
        return path.strip("/") if path.startswith("/") or not self.group else f"{self.group}/{path}"


class ArrayLog:
    """A `Log` in files of named arrays, by a mapping."""

    def __init__(
        self,
        card: DatasetCard,
        root: Path,
        mapping: ArrayMapping,
        open_file: Callable[[Path], Arrays],
        stretches: Sequence[Stretch],
        described: Sequence[Path] = (),
    ) -> None:
        """Over episodes in the log's order. Nothing is read.

        Raises:
            UserError: the card names no rate, or nothing says the instruction.
        """
        if mapping.instruction is None and card.constant_caption is None and card.caption_column is None:
            raise UserError(
                f"dataset {card.name!r}: nothing says the instruction; give constant_caption, or mapping.instruction"
            )
        self.root, self.fps = root, rate_of(card)
        self._mapping, self._open, self._described = mapping, open_file, tuple(described)
        self._stretches = dict(enumerate(stretches))
        self.episodes = tuple(self._episode(index, stretch) for index, stretch in self._stretches.items())

    @property
    def cameras(self) -> tuple[str, ...]:
        """Those of the mapping that the first episode has."""
        return tuple(name for name, camera in self._mapping.cameras.items() if self._info(camera.path) is not None)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the mapping whose every array the first episode has."""
        return tuple(name for name, paths in self._mapping.columns.items() if all(map(self._info, paths)))

    def check_camera(self, name: str) -> None:
        """See `Log.check_camera`."""
        if name not in self._mapping.cameras:
            raise UserError(f"{self.root}: no camera {name!r} in the mapping.{nearest(name, self._mapping.cameras)}")
        path = self._mapping.cameras[name].path
        check_pictures(self._required(path), f"{self._first.where}: {path}")

    def check_column(self, name: str) -> None:
        """See `Log.check_column`."""
        if name not in self._mapping.columns:
            raise UserError(f"{self.root}: no column {name!r} in the mapping.{nearest(name, self._mapping.columns)}")
        for path in self._mapping.columns[name]:
            if self._required(path).kind not in "biufSUO":
                raise UserError(f"{self._first.where}: {path!r} holds neither numbers nor words")

    def width(self, column: str) -> int | None:
        """See `Log.width`."""
        found = [self._required(path) for path in self._mapping.columns[column]]
        if any(info.kind not in "biuf" for info in found):
            return None
        return sum(int(np.prod(info.shape[1:])) for info in found)

    def described_by(self) -> Sequence[Path]:
        """See `Log.described_by`."""
        return self._described

    def records(self, episodes: Sequence[Episode], columns: Sequence[str]) -> Iterator[EpisodeRecord]:
        """See `Log.records`."""
        for episode in episodes:
            stretch = self._stretches[episode.index]
            file = self._open(stretch.file)
            yield EpisodeRecord(
                index=episode.index,
                length=episode.length,
                timestamps=np.arange(episode.length) / self.fps,
                tasks=self._words(file, stretch),
                columns={name: self._column(file, stretch, name) for name in columns},
                video=episode.video,
            )

    @property
    def _first(self) -> Stretch:
        return self._stretches[0]

    def _info(self, path: str) -> ArrayInfo | None:
        return self._open(self._first.file).info(self._first.array(path))

    def _required(self, path: str) -> ArrayInfo:
        info = self._info(path)
        if info is None:
            raise missing(self._open(self._first.file), self._first.array(path), self._first.group)
        return info

    def _episode(self, index: int, stretch: Stretch) -> Episode:
        file = stretch.file.relative_to(self.root).as_posix()
        video = {}
        for name, camera in self._mapping.cameras.items():
            inside = picture_array(stretch.array(camera.path), camera)
            video[name] = VideoPlace(place_inside(file, inside, self.fps), stretch.first / self.fps)
        return Episode(index, stretch.length, (), file, video)

    def _column(self, file: Arrays, stretch: Stretch, name: str) -> Any:
        """float32 [T, W], or T strings."""
        rows = slice(stretch.first, stretch.first + stretch.length)
        parts = [file.read(stretch.array(path), rows) for path in self._mapping.columns[name]]
        for path, part in zip(self._mapping.columns[name], parts, strict=True):
            if len(part) != stretch.length:
                raise UserError(f"{stretch.where}: {path!r} has {len(part)} rows of {stretch.length}")
        if parts[0].dtype.kind in "SUO":
            return [text_of(value, f"{stretch.where}: {name}") for value in parts[0]]
        if any(part.dtype.kind not in "biuf" for part in parts):
            raise UserError(f"{stretch.where}: column {name!r} is made of arrays that hold no numbers")
        return np.concatenate([part.reshape(stretch.length, -1).astype(np.float32) for part in parts], axis=1)

    def _words(self, file: Arrays, stretch: Stretch) -> tuple[str, ...]:
        """The instruction at each row."""
        source = self._mapping.instruction
        if source is None:
            return ("",) * stretch.length
        if source.constant is not None:
            return (source.constant,) * stretch.length
        if source.attribute is not None:
            path, _, name = source.attribute.rpartition("@")
            group = stretch.array(path) if path else stretch.group
            value = file.attribute(group, name)
            if value is None:
                known = nearest(name, file.attributes(group))
                raise UserError(f"{stretch.file}, {group or 'root'}: no attribute {name!r}.{known}")
            where = f"{stretch.file}, {group or 'root'}, attribute {name!r}"
            return (_instruction(value, source.key, where),) * stretch.length
        assert source.array is not None
        array = stretch.array(source.array)
        info, where = file.info(array), f"{stretch.where}: {source.array}"
        if info is None:
            raise missing(file, array, stretch.group)
        shared = source.array.startswith("/") or not stretch.group  # the file's, not the episode's own
        rows, count = slice(stretch.first, stretch.first + stretch.length), stretch.length
        if math.prod(info.shape) == 1:
            rows, count = None, 1
        elif shared and info.shape[0] == stretch.episodes > 1:
            rows, count = slice(stretch.number, stretch.number + 1), 1
        texts = np.atleast_1d(file.read(array, rows)).reshape(-1)
        if len(texts) != count:
            raise UserError(
                f"{where}: has shape {list(info.shape)}; one text for all, one an episode ({stretch.episodes}), or "
                "one a row are expected"
            )
        found = tuple(_instruction(value, source.key, where) for value in texts)
        return found * (stretch.length // count)


def text_of(value: Any, where: str) -> str:
    """Words that a file holds as a string or as UTF-8 bytes.

    Raises:
        UserError: it holds something else.
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    try:
        if isinstance(value, bytes):
            value = value.decode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: holds bytes that are no UTF-8 text") from None
    if not isinstance(value, str):
        raise UserError(f"{where}: holds a {type(value).__name__}; words are expected")
    return str(value)


def _instruction(value: Any, key: str | None, where: str) -> str:
    """The instruction in a value, which is JSON where there is a key."""
    if key is not None:
        if not isinstance(value, dict):
            try:
                value = json.loads(text_of(value, where))
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON ({error})") from None
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                known = nearest(part, value) if isinstance(value, dict) else ""
                raise UserError(f"{where}: no key {part!r} in its JSON.{known}")
            value = value[part]
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        value = ("" if all(len(word) == 1 for word in value) else " ").join(value)  # letters, or words
    text = text_of(value, where).strip()
    if not text:
        raise UserError(f"{where}: the instruction is empty; give constant_caption")
    return text


def _within(schema: type) -> type:
    """A schema with `mapping` of the given one, so that errors name keys as the card has them."""
    return type("Card", (), {"__annotations__": {"mapping": schema}})


def _camera(value: Any, name: str) -> Camera:
    if isinstance(value, str):
        return Camera(path=value)
    where = f"mapping.cameras.{name}"
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; a path, or a mapping with path, is expected")
    camera = from_plain(Camera, value, where)
    if not camera.white > 0:
        raise UserError(f"{where}.white is {camera.white}; it is what floats call white, 255 or 1")
    return camera


def _paths(value: Any, where: str) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise UserError(f"{where} is {value!r}; a path, or a list of paths, is expected")
    return list(paths)
