"""RLDS logs as TensorFlow Datasets lays them out, read without TensorFlow: one `tf.train.Example` an episode.

    NAME/VERSION/{dataset_info.json, features.json, NAME-train.tfrecord-00000-of-00005, ...}

Columns and cameras have their path inside a step (`action`, `observation/state`), as `features.json` has it. There are
no time stamps: step i stands at i / rate_hz of the dataset card. Opening goes from record to record and counts steps;
it touches no picture. The last step's action says nothing in RLDS; no window uses the last row's. `mapping` of the
dataset card may say:

    split:   which files, or a list; "train" where it says nothing
    task:    the column with the instruction, where it is not called as in `TASKS`
    columns: further columns made of others side by side, such as {action: [action/world_vector, action/gripper]}
    partial: true where only some of a split's files were copied
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.pictures import place_inside
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, VideoPlace
from cosmos3_train.data.tfrecord import SHARD, Example, NotAnExample, check_payload, record_places

STEPS = "steps/"
TASKS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "observation/language_instruction",
    "natural_language_instruction",
    "episode_metadata/language_instruction",
)
"""Columns that hold the instruction, the first that is there."""
MAPPING = ("split", "task", "columns", "partial")


@dataclass(frozen=True)
class Feature:
    """What `features.json` says of one key of the examples.

    key:   in the example
    kind:  "image", "number", "text", or why it cannot be read
    dtype, shape, encoding: of one step's value; shape is None where it is open
    """

    key: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] | None = None
    encoding: str = "none"

    @property
    def in_steps(self) -> bool:
        """Whether it has a value at every step, and not one for the episode."""
        return self.key.startswith(STEPS)

    @property
    def width(self) -> int | None:
        """Numbers a step."""
        return None if self.shape is None else int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class RldsLog:
    """A `Log`. `features`: column or camera → what it is; `joined`: column → the columns that it is made of;
    `task`: the column with the instruction."""

    root: Path
    fps: float
    features: dict[str, Feature]
    joined: dict[str, tuple[str, ...]]
    task: str | None
    episodes: tuple[Episode, ...]
    described: tuple[Path, ...]

    @property
    def cameras(self) -> tuple[str, ...]:
        """The features that are pictures of 8 bits."""
        return tuple(name for name, feature in self.features.items() if _is_camera(feature))

    @property
    def columns(self) -> tuple[str, ...]:
        """The features that are numbers or words, and the joined columns."""
        plain = [name for name, feature in self.features.items() if feature.kind in ("number", "text")]
        return tuple(dict.fromkeys([*self.joined, *plain]))

    def check_camera(self, name: str) -> None:
        """Raise `UserError` unless `name` is a camera of the log whose frames can be read."""
        if name in self.cameras:
            return
        if name in self.features:
            feature = self.features[name]
            raise UserError(f"{self.root}: {name!r} is {feature.dtype} ({feature.kind}), no picture of 8 bits")
        raise UserError(f"{self.root}: no camera {name!r} in features.json.{nearest(name, self.cameras)}")

    def check_column(self, name: str) -> None:
        """Raise `UserError` unless `name` is a column of the log that can be read."""
        if name in self.columns:
            return
        if name in self.features:
            raise UserError(f"{self.root}: column {name!r} cannot be read: it is {self.features[name].kind}")
        below = [column for column in self.columns if column.startswith(f"{name}/")]
        if below:
            raise UserError(
                f"{self.root}: {name!r} holds several columns; name one of them, or join them in the dataset card: "
                f"mapping.columns: {{{name}: [{', '.join(below)}]}}"
            )
        raise UserError(f"{self.root}: no column {name!r} in features.json.{nearest(name, self.columns)}")

    def width(self, column: str) -> int | None:
        """How many numbers a row of the column holds, as `features.json` declares it."""
        widths = [self.features[name].width for name in self.joined.get(column, (column,))]
        return None if None in widths else sum(width for width in widths if width is not None)

    def described_by(self) -> tuple[Path, ...]:
        """See `Log.described_by`."""
        return self.described

    def records(self, episodes: Sequence[Episode], columns: Sequence[str]) -> Iterator[EpisodeRecord]:
        """Read episodes in the order given. The checksum of every record is verified.

        Raises:
            UserError: a file is missing, or a record is damaged or does not hold what features.json says.
        """
        checked: tuple[str, str] | None = None
        for episode in episodes:
            shard, _, inside = episode.data_file.partition("#")
            start, _, first = inside.partition("/")
            path = self.root / shard
            where = f"{path}: episode {episode.index} (record at byte {start})"
            try:
                if checked != (shard, start):  # the episodes of one record share its checksum
                    check_payload(path, int(start))
                    checked = (shard, start)
                example = Example(path, int(start))
                rows = slice(int(first), int(first) + episode.length)
                steps = _count_steps(example, self.features)
                values = {name: self._column(example, name, steps, rows) for name in columns}
                tasks = [""] * episode.length
                if self.task is not None:
                    tasks = self._column(example, self.task, steps, rows)
            except NotAnExample as error:
                raise UserError(f"{where}: {error}") from None
            yield EpisodeRecord(
                index=episode.index,
                length=episode.length,
                timestamps=np.arange(episode.length) / self.fps,
                tasks=tuple(tasks),
                columns=values,
                video=episode.video,
            )

    def _column(self, example: Example, name: str, steps: int, rows: slice) -> Any:
        """float32 [T, W], or T words, of the rows asked for."""
        if name in self.joined:
            parts = [self._column(example, part, steps, rows) for part in self.joined[name]]
            return np.concatenate(parts, axis=1)
        feature = self.features[name]
        if feature.key not in example.values:
            raise NotAnExample(f"{feature.key!r} is not there, though features.json declares it")
        if feature.kind == "text":
            words = example.texts(feature.key)
            if not feature.in_steps:
                return [" ".join(words)] * (rows.stop - rows.start)
            _check_count(feature.key, len(words), steps)
            return words[rows]
        if feature.encoding == "none":
            numbers = example.numbers(feature.key)
        else:
            numbers = _decoded(example.bytes(feature.key), feature)
        if not feature.in_steps:
            return np.tile(numbers.astype(np.float32), (rows.stop - rows.start, 1))
        if feature.width is not None:
            _check_count(feature.key, len(numbers), steps * feature.width)
        elif len(numbers) % steps:
            raise NotAnExample(f"{feature.key!r} has {len(numbers)} values at {steps} steps")
        return numbers.reshape(steps, -1)[rows].astype(np.float32)


def open_rlds(card: DatasetCard, source: str | Path) -> RldsLog:
    """Open a log. Reads its JSON files, the lengths of its records and the flags of their steps.

    Args:
        source: the folder with `features.json`, or the one above it where there is one version.

    Raises:
        UserError: not such a folder, a file is missing, cut off or damaged, or the card has no `rate_hz`.
    """
    root = Path(source)
    if card.rate_hz is None:
        raise UserError(f"dataset {card.name!r}: RLDS has no time stamps; set rate_hz in the dataset card")
    if not card.rate_hz > 0:
        raise UserError(f"dataset {card.name!r}: rate_hz is {card.rate_hz}; a log's rate is above 0")
    folder = _version_folder(root)
    features = _read_features(folder / "features.json")
    splits, partial = _split_settings(card)
    info = _read_info(folder / "dataset_info.json")
    joined = _joined(card, features)
    episodes: list[Episode] = []
    for split in splits:
        episodes += _open_split(root, folder, split, partial, info, features, card.rate_hz, len(episodes))
    described = [path for name in ("dataset_info.json", "features.json") if (path := folder / name).is_file()]
    return RldsLog(
        root=root,
        fps=float(card.rate_hz),
        features=features,
        joined=joined,
        task=_task_column(card, features),
        episodes=tuple(episodes),
        described=tuple(described),
    )


# ------------------------------------------------------------------------------------------------ the JSON files


def _version_folder(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the dataset's folder (the one that holds features.json)")
    if (root / "features.json").is_file():
        return root
    found = sorted(path.parent for path in root.glob("*/features.json"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{root}: holds {len(found)} versions; name one as source, such as {found[-1]}")
    raise UserError(f"{root}: not an RLDS log, for features.json is missing")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({' '.join(str(error).split())[:160]}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; a mapping is expected")
    return content


def _read_features(path: Path) -> dict[str, Feature]:
    """Column → feature. A column's name is its key without `steps/`."""
    found: dict[str, Feature] = {}

    def walk(node: Any, key: str) -> None:
        children = _inner(node, "featuresDict", "features")
        if children is not None:
            for name, child in children.items():
                walk(child, f"{key}/{name}" if key else name)
        elif key + "/" == STEPS and _inner(node, "sequence", "feature") is not None:
            walk(node["sequence"]["feature"], key)
        else:
            found[key.removeprefix(STEPS)] = _feature(node, key)

    walk(_read_json(path), "")
    if not any(feature.in_steps for feature in found.values()):
        raise UserError(f"{path}: declares no steps; an RLDS log has them")
    return found


def _feature(node: Any, key: str) -> Feature:
    for kind in ("image", "tensor"):
        inner = node.get(kind) if isinstance(node, dict) else None
        if not isinstance(inner, dict):
            continue
        dtype, shape = str(inner.get("dtype", "uint8" if kind == "image" else "")), _shape(inner.get("shape"))
        if kind == "image":
            return Feature(key, "image", dtype, shape)
        if dtype in ("string", "object"):
            return Feature(key, "text", dtype, shape) if shape == () else Feature(key, "several words a step")
        return Feature(key, "number", dtype, shape, str(inner.get("encoding", "none")).lower())
    if isinstance(node, dict) and "text" in node:
        return Feature(key, "text", "string", ())
    if isinstance(node, dict) and "classLabel" in node:
        return Feature(key, "number", "int64", ())
    said = [name for name in node if name not in ("pythonClassName", "description")] if isinstance(node, dict) else []
    return Feature(key, f"of a kind that is not read ({', '.join(said) or 'nothing'})")


def _inner(node: Any, *names: str) -> dict[str, Any] | None:
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _shape(declared: Any) -> tuple[int, ...] | None:
    """None where a dimension is open (-1)."""
    dimensions = declared.get("dimensions", []) if isinstance(declared, dict) else []
    try:
        shape = tuple(int(size) for size in dimensions)
    except (TypeError, ValueError):
        return None
    return None if any(size < 0 for size in shape) else shape


def _read_info(path: Path) -> dict[str, Any]:
    """`dataset_info.json`, empty where it is missing: the files say the same."""
    if not path.is_file():
        return {}
    info = _read_json(path)
    stored = info.get("fileFormat", "tfrecord")
    if stored != "tfrecord":
        raise UserError(f"{path}: fileFormat is {stored!r}; tfrecord is read")
    return info


def _is_camera(feature: Feature) -> bool:
    return feature.kind == "image" and feature.dtype == "uint8" and feature.in_steps


# ------------------------------------------------------------------------------------------------ the card's mapping


def _split_settings(card: DatasetCard) -> tuple[list[str], bool]:
    for key in card.mapping:
        if key not in MAPPING:
            raise UserError(f"dataset {card.name!r}: unknown key mapping.{key}.{nearest(key, MAPPING)}")
    split = card.mapping.get("split", "train")
    splits = split if isinstance(split, list) else [split]
    partial = card.mapping.get("partial", False)
    if not splits or not all(isinstance(name, str) for name in splits):
        raise UserError(f"dataset {card.name!r}: mapping.split is {split!r}; a name or a list of names is expected")
    if not isinstance(partial, bool):
        raise UserError(f"dataset {card.name!r}: mapping.partial is {partial!r}; true or false is expected")
    return list(dict.fromkeys(splits)), partial


def _task_column(card: DatasetCard, features: dict[str, Feature]) -> str | None:
    named = card.mapping.get("task")
    words = [name for name, feature in features.items() if feature.kind == "text"]
    if named is None:
        return next((name for name in TASKS if name in words), None)
    if named not in words:
        raise UserError(
            f"dataset {card.name!r}: mapping.task: no words {named!r} in the log.{nearest(str(named), words)}"
        )
    return named


def _joined(card: DatasetCard, features: dict[str, Feature]) -> dict[str, tuple[str, ...]]:
    columns = card.mapping.get("columns", {})
    if not isinstance(columns, dict):
        raise UserError(f"dataset {card.name!r}: mapping.columns is {columns!r}; name: [columns] is expected")
    numbers = [name for name, feature in features.items() if feature.kind == "number"]
    for name, parts in columns.items():
        where = f"dataset {card.name!r}: mapping.columns.{name}"
        if not isinstance(parts, list) or not parts:
            raise UserError(f"{where} is {parts!r}; a list of columns is expected")
        for part in parts:
            if part not in numbers:
                raise UserError(f"{where}: no numbers {part!r} in the log.{nearest(str(part), numbers)}")
    return {name: tuple(parts) for name, parts in columns.items()}


# ------------------------------------------------------------------------------------------------ the records


def _open_split(
    root: Path, folder: Path, split: str, partial: bool, info: dict[str, Any], features: dict[str, Feature],
    rate: float, index: int,
) -> list[Episode]:  # fmt: skip
    """Episodes of a split, numbered from `index` on."""
    shards, of = _shards(folder, split)
    missing = [number for number in range(of) if number not in shards]
    if missing and not partial:
        raise UserError(
            f"{folder}: {len(missing)} of {of} files of split {split!r} are missing, the first is number {missing[0]}; "
            "copy them, or set mapping.partial: true in the dataset card"
        )
    lengths = _shard_lengths(info, split, of)
    cameras = {name: feature.key for name, feature in features.items() if _is_camera(feature)}
    episodes: list[Episode] = []
    for number in range(of):
        if number not in shards:  # so that the others have the numbers, and the splits, that they have in a whole copy
            index += lengths[number] if lengths else 0
            continue
        path = shards[number]
        name = path.relative_to(root).as_posix()
        places = record_places(path)
        if lengths and len(places) != lengths[number]:
            raise UserError(
                f"{path}: holds {len(places)} records, but dataset_info.json says {lengths[number]}; copy it again"
            )
        for start, _ in places:
            try:
                borders = _episode_borders(Example(path, start), features)
            except NotAnExample as error:
                raise UserError(f"{path}: record at byte {start} is not an episode ({error})") from None
            for first, stop in pairwise(borders):
                video = {
                    camera: VideoPlace(place_inside(name, f"{start}/{key}", rate), first / rate)
                    for camera, key in cameras.items()
                }
                episodes.append(Episode(index, stop - first, (), f"{name}#{start}/{first}", video))
                index += 1
    return episodes


def _shards(folder: Path, split: str) -> tuple[dict[int, Path], int]:
    """Number → file, and how many there should be."""
    named = [(match, path) for path in sorted(folder.iterdir()) if (match := SHARD.fullmatch(path.name))]
    found = [(match, path) for match, path in named if match["split"] == split]
    if not found:
        others = sorted({match["split"] for match, _ in named})
        raise UserError(
            f"{folder}: no file NAME-{split}.tfrecord-00000-of-N; "
            + (f"there are splits {', '.join(others)}: name one in mapping.split" if others else "copy the log again")
        )
    sets = {(match["name"], int(match["shards"])) for match, _ in found}
    if len(sets) != 1:
        raise UserError(f"{folder}: the files of split {split!r} are of {len(sets)} sets; keep one of them")
    return {int(match["shard"]): path for match, path in found}, sets.pop()[1]


def _shard_lengths(info: dict[str, Any], split: str, shards: int) -> list[int]:
    """Records of each file of a split, as `dataset_info.json` has them; empty where it does not."""
    splits = info.get("splits")
    for entry in splits if isinstance(splits, list) else []:
        if isinstance(entry, dict) and entry.get("name") == split:
            try:
                lengths = [int(length) for length in entry.get("shardLengths", [])]
            except (TypeError, ValueError):
                return []
            return lengths if len(lengths) == shards else []
    return []


def _episode_borders(example: Example, features: dict[str, Feature]) -> list[int]:
    """Steps at which the episodes of a record begin, and the number of steps: a record is one episode, unless its
    steps say that another begins (`is_first`) or one ends (`is_last`) among them."""
    steps = _count_steps(example, features)
    if steps == 0:
        return [0, 0]  # an episode all the same, to be counted as too short
    borders = {0, steps}
    for name, behind in (("is_first", 0), ("is_last", 1)):
        feature = features.get(name)
        if feature is None or feature.key not in example.values:
            continue
        flags = example.numbers(feature.key)
        _check_count(feature.key, len(flags), steps)
        borders |= {int(step) + behind for step in np.flatnonzero(flags)}
    return sorted(borders)


def _count_steps(example: Example, features: dict[str, Feature]) -> int:
    """Steps of a record, by whatever is quickest to count."""
    present = [feature for feature in features.values() if feature.in_steps and feature.key in example.values]
    plain = [
        feature for feature in present if feature.kind == "number" and feature.encoding == "none" and feature.width
    ]
    listed = [feature for feature in present if feature.kind in ("text", "image")]
    for feature in (*sorted(plain, key=lambda feature: feature.width or 0), *listed):
        count, width = example.count(feature.key), (feature.width or 1) if feature.kind == "number" else 1
        if count % width:
            raise NotAnExample(f"{feature.key!r} has {count} values, {width} a step")
        if count:
            return count // width
    if not present:
        raise NotAnExample("it has none of the steps that features.json declares")
    return 0


def _check_count(key: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise NotAnExample(f"{key!r} has {found} values, its steps need {wanted}")


def _decoded(encoded: list[bytes], feature: Feature) -> np.ndarray:
    """The numbers of a tensor that is stored as the bytes of an array, compressed by zlib or not."""
    try:
        plain = [zlib.decompress(part) if feature.encoding == "zlib" else part for part in encoded]
        return np.concatenate([np.frombuffer(part, np.dtype(feature.dtype)) for part in plain])
    except (zlib.error, ValueError, TypeError) as error:
        raise NotAnExample(f"{feature.key!r} is not {feature.encoding} of {feature.dtype} ({error})") from None
