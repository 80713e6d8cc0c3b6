"""ROS 2 bags in MCAP files, by the `mapping` of the dataset card: topics become columns and cameras at one rate.

Every topic has messages of its own at times of its own. Rows stand 1 / rate_hz apart on the recorder's clock, in step
with the first camera; a row takes of each topic the message stamped nearest to it, and is left out where one topic has
none within half a period. What is left out is counted by topic, and windows do not reach over it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import MISSING

from cosmos3_train.config import UserError, from_plain, nearest
from cosmos3_train.data.bags import (
    COMPRESSED,
    RAW,
    SECOND,
    PicturePlace,
    Stamps,
    messages_between,
    require_topic,
    stamps_of,
    topics_of,
)
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.pictures import place_inside
from cosmos3_train.data.sources.log import Episode, EpisodeRecord, VideoPlace
from cosmos3_train.data.sources.mapped import natural, rate_of

INCOMPLETE = "row of a bag that lacks a message within half a period"
REPEATED = "message of a bag with the stamp of an earlier one"
SHIFTED = "topic of a bag whose clock was set to the recorder's"
ENDS = "row of a bag before a topic begins or after one ends"

EARLIEST, LATEST = -SECOND // 100, SECOND // 2
"""A stamp is this much before its reception where the sensor's clock is the recorder's; else the clock is set."""


@dataclass(frozen=True)
class Field:
    """Numbers or words of a topic's messages.

    topic, field: the field's path, such as "pose.position"; a message inside a message is all of its numbers, in order
    names:        of a JointState's joints: their order differs from message to message and from robot to robot
    hold:         a row takes the latest message before it, for what is sent when it changes; words always do
    """

    topic: str = MISSING
    field: str = MISSING
    names: list[str] = dataclasses.field(default_factory=list)
    hold: bool = False


@dataclass(frozen=True)
class BagMapping:
    """What is what in a bag. A field is written TOPIC:FIELD, or as a mapping (`Field`).

    files:       pattern of the bags below the source; every file has episodes of its own
    columns:     our name → field, or several, side by side
    cameras:     our name → topic with Image or CompressedImage
    instruction: field with the words
    split_gap:   seconds without a picture (or message) after which another episode begins
    split_topic: field that changes with every episode; where it is false, 0 or empty there is none
    clock:       stamp: sensors' own stamps, where messages have them;  receive: when the recorder received them
    """

    files: str = "**/*.mcap"
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    cameras: dict[str, str] = dataclasses.field(default_factory=dict)
    instruction: Any = None
    split_gap: float | None = None
    split_topic: Any = None
    clock: Literal["stamp", "receive"] = "stamp"


@dataclass(frozen=True)
class _Topic:
    """A topic's messages by rising stamp on the recorder's clock, without repeated ones.

    stamps:   int64 [N];  received: int64 [N], of the same messages;  all_received: of all, in their own order
    shift:    that its clock was set by;  early, late: least and largest time from stamp to reception
    repeated: messages left out
    """

    stamps: np.ndarray
    received: np.ndarray
    all_received: np.ndarray
    places: np.ndarray
    shift: int
    repeated: int

    @property
    def early(self) -> int:
        return int((self.received - self.stamps).min())

    @property
    def late(self) -> int:
        return int((self.received - self.stamps).max())

    def nearest(self, times: np.ndarray) -> np.ndarray:
        """Which message is stamped nearest to each time; the earlier of two."""
        after = np.clip(np.searchsorted(self.stamps, times), 1, max(1, len(self.stamps) - 1))
        before = after - 1
        after = np.minimum(after, len(self.stamps) - 1)
        return np.where(times - self.stamps[before] <= self.stamps[after] - times, before, after)

    def latest(self, times: np.ndarray) -> np.ndarray:
        """Which message is the latest at each time; the first one before there is any."""
        return np.maximum(np.searchsorted(self.stamps, times, side="right") - 1, 0)


@dataclass(frozen=True)
class _Bag:
    """A file: its topics, and when their messages were stamped."""

    path: Path
    topics: dict[str, _Topic]


@dataclass(frozen=True)
class _Span:
    """An episode: a bag, the times of its rows on the recorder's clock, their numbers on the grid, and its faults."""

    bag: _Bag
    times: np.ndarray
    numbers: np.ndarray
    faults: dict[str, tuple[int, str]]


class BagLog:
    """A `Log` in MCAP files. Opening reads every stamp, and so every file once.

    left_out: what is told of whole bags, or of rows outside every episode, see `left_out_of`
    """

    def __init__(self, card: DatasetCard, root: Path, mapping: BagMapping) -> None:
        """Open every bag and lay out its rows.

        Raises:
            UserError: a topic or field is not there, a file is damaged, or nothing says the instruction.
        """
        if mapping.instruction is None and card.constant_caption is None and card.caption_column is None:
            raise UserError(
                f"dataset {card.name!r}: nothing says the instruction; give constant_caption, or mapping.instruction"
            )
        self.root, self.fps, self._mapping = root, rate_of(card), mapping
        self._columns = {name: _fields(value, f"mapping.columns.{name}") for name, value in mapping.columns.items()}
        self._words = None if mapping.instruction is None else _field(mapping.instruction, "mapping.instruction")
        self._split = None if mapping.split_topic is None else _field(mapping.split_topic, "mapping.split_topic")
        if not self._columns and not mapping.cameras:
            raise UserError(f"dataset {card.name!r}: mapping names neither columns nor cameras")
        self._text: set[str] = set()
        self._widths: dict[str, int] = {}
        self._kinds: dict[str, str] = {}
        self.left_out: dict[str, tuple[int, str]] = {}
        spans: list[_Span] = []
        for path in _files(root, mapping.files):
            spans += self._spans(path)
        self._by_index = dict(enumerate(spans))
        self.episodes = tuple(self._episode(index, span) for index, span in self._by_index.items())

    @property
    def cameras(self) -> tuple[str, ...]:
        """Those of the mapping."""
        return tuple(self._mapping.cameras)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the mapping."""
        return tuple(self._columns)

    def check_camera(self, name: str) -> None:
        """See `Log.check_camera`."""
        if name not in self._mapping.cameras:
            raise UserError(f"{self.root}: no camera {name!r} in the mapping.{nearest(name, self._mapping.cameras)}")
        topic = self._mapping.cameras[name]
        if self._kinds[topic] not in (RAW, COMPRESSED):
            raise UserError(
                f"{self.root}: {topic} holds {self._kinds[topic]}; {RAW} and {COMPRESSED} are read as cameras"
            )

    def check_column(self, name: str) -> None:
        """See `Log.check_column`."""
        if name not in self._columns:
            raise UserError(f"{self.root}: no column {name!r} in the mapping.{nearest(name, self._columns)}")

    def width(self, column: str) -> int | None:
        """See `Log.width`."""
        return self._widths.get(column)

    def described_by(self) -> Sequence[Path]:
        """See `Log.described_by`: a bag's own end tells its every topic, and what is in it."""
        return ()

    def records(self, episodes: Sequence[Episode], columns: Sequence[str]) -> Iterator[EpisodeRecord]:
        """See `Log.records`."""
        for episode in episodes:
            span = self._by_index[episode.index]
            words = [""] * episode.length if self._words is None else self._values(span, self._words)
            yield EpisodeRecord(
                index=episode.index,
                length=episode.length,
                timestamps=span.numbers / self.fps,
                tasks=tuple(str(word) for word in words),
                columns={name: self._column(span, name) for name in columns},
                video=episode.video,
                faults=span.faults,
            )

    # -------------------------------------------------------------------------------------------- opening

    def _spans(self, path: Path) -> list[_Span]:
        present = topics_of(path)
        fields = [each for fields in self._columns.values() for each in fields]
        fields += [each for each in (self._words, self._split) if each is not None]
        names = [*self._mapping.cameras.values(), *(each.topic for each in fields)]
        schemas = {topic: require_topic(path, present, topic) for topic in dict.fromkeys(names)}
        self._kinds |= {topic: schema.name for topic, schema in schemas.items()}
        bag = _Bag(path, {})
        for topic, stamps in stamps_of(path, schemas).items():
            if not len(stamps.received):
                raise UserError(f"{path}: no message on {topic}; take the bag away, or the topic out of the mapping")
            bag.topics[topic] = _sorted(stamps, self._mapping.clock == "stamp")
        self._measure(bag)
        for reason, (count, example) in _faults_of(bag).items():
            self._leave_out(reason, count, example)
        return [self._laid_out(bag, *limits) for limits in self._limits(bag)]

    def _leave_out(self, reason: str, count: int, example: str) -> None:
        earlier, first = self.left_out.get(reason, (0, example))
        self.left_out[reason] = earlier + count, first

    def _measure(self, bag: _Bag) -> None:
        """Which columns hold words, and how wide the others are, by the first message of each topic."""
        for name, fields in self._columns.items():
            first = []
            for each in fields:
                received = int(bag.topics[each.topic].all_received[0])
                message = next(iter(messages_between(bag.path, each.topic, received, received)))
                first.append(_value(message, each, f"{bag.path}: {each.topic}"))
            words = [isinstance(value, str) for value in first]
            if any(words) and len(first) > 1:
                raise UserError(f"{bag.path}: column {name!r} puts words beside others; name them alone")
            if any(words):
                self._text.add(name)
            else:
                self._widths[name] = sum(len(value) for value in first)

    def _limits(self, bag: _Bag) -> list[tuple[float, float]]:
        """(from, to) of the bag's episodes, on the recorder's clock."""
        if self._split is not None:
            topic = bag.topics[self._split.topic]
            values = self._read(bag, self._split, np.arange(len(topic.stamps)))
            plain = [value if isinstance(value, str) else tuple(value.tolist()) for value in values]
            changes = [i for i in range(len(plain)) if i == 0 or plain[i] != plain[i - 1]]
            ends = [float(topic.stamps[i] - 1) for i in changes[1:]] + [np.inf]
            limits = zip(changes, ends, strict=True)
            return [(float(topic.stamps[i]), end) for i, end in limits if _means_something(plain[i])]
        if self._mapping.split_gap is None:
            return [(-np.inf, np.inf)]
        stamps = bag.topics[self._leading].stamps
        breaks = np.flatnonzero(np.diff(stamps) > self._mapping.split_gap * SECOND)
        starts, ends = [0, *(breaks + 1)], [*breaks, len(stamps) - 1]
        return [(float(stamps[first]), float(stamps[last])) for first, last in zip(starts, ends, strict=True)]

    @property
    def _leading(self) -> str:
        """The topic with which rows are in step."""
        for topic in self._mapping.cameras.values():
            return topic
        return next(iter(self._columns.values()))[0].topic

    def _sampled(self) -> list[str]:
        """Topics of which every row needs a message near it."""
        fields = [each for name, fields in self._columns.items() if name not in self._text for each in fields]
        names = [*self._mapping.cameras.values(), *(each.topic for each in fields if not each.hold)]
        return list(dict.fromkeys(names))

    def _laid_out(self, bag: _Bag, first: float, last: float) -> _Span:
        period, sampled = SECOND / self.fps, self._sampled()
        begin, end = self._shared(bag, first, last, sampled)
        leading = bag.topics[self._leading].stamps
        inside = leading[(leading >= begin - period / 2) & (leading <= end + period / 2)]
        if not len(inside):
            return _Span(bag, np.zeros(0, np.int64), np.zeros(0, np.int64), {})
        # In step with the middle of the leading topic's jitter, not with its first message's share of it.
        phase = (inside - inside[0] + period / 2) % period - period / 2
        origin = int(inside[0] + np.median(phase))
        count = int((end + period / 2 - origin) // period) + 1
        times = origin + np.round(np.arange(max(0, count)) * period).astype(np.int64)
        whole, faults = np.ones(len(times), bool), {}
        lacking = []
        for topic in sampled:
            found = bag.topics[topic]
            near = np.abs(found.stamps[found.nearest(times)] - times) <= period / 2
            if not near.all():
                row = int(np.flatnonzero(~near)[0])
                lacking.append(f"{topic} {int((~near).sum())} rows, the first {row / self.fps:.3f} s into it")
            whole &= near
        if lacking:
            faults[INCOMPLETE] = (int((~whole).sum()), f"{bag.path.name}: {'; '.join(lacking)}")
        kept = np.flatnonzero(whole)
        # Rows count from the first that is whole, so that an episode's times begin at 0.
        return _Span(bag, times[kept], kept - kept[0] if len(kept) else kept, faults)

    def _shared(self, bag: _Bag, first: float, last: float, topics: Sequence[str]) -> tuple[float, float]:
        """From when to when all topics have messages inside an episode's limits; rows outside of that are counted."""
        inside = {topic: bag.topics[topic].stamps for topic in topics}
        inside = {topic: stamps[(stamps >= first) & (stamps <= last)] for topic, stamps in inside.items()}
        there = {topic: (float(stamps[0]), float(stamps[-1])) for topic, stamps in inside.items() if len(stamps)}
        if not there:
            return (first, last) if not topics else (np.inf, -np.inf)
        opening, closing = min(start for start, _ in there.values()), max(end for _, end in there.values())
        silent = [topic for topic in topics if topic not in there]
        if silent:
            rows = int((closing - opening) * self.fps // SECOND) + 1
            self._leave_out(ENDS, rows, f"{bag.path.name}: {silent[0]} has no message in an episode")
            return np.inf, -np.inf
        late, early = max(there, key=lambda topic: there[topic][0]), min(there, key=lambda topic: there[topic][1])
        begin, end = there[late][0], there[early][1]
        for words, lost in ((f"{late} begins {{:.3f}} s late", begin - opening),
                            (f"{early} ends {{:.3f}} s early", closing - end)):  # fmt: skip
            if rows := int(lost * self.fps // SECOND):
                self._leave_out(ENDS, rows, f"{bag.path.name}: {words.format(lost / SECOND)}")
        return begin, end

    def _episode(self, index: int, span: _Span) -> Episode:
        file, video = span.bag.path.relative_to(self.root).as_posix(), {}
        for name, topic in self._mapping.cameras.items():
            found = span.bag.topics[topic]
            origin = int(span.times[0]) if len(span.times) else 0
            own = self._mapping.clock == "stamp"
            place = PicturePlace(topic, origin, self.fps, found.shift, found.early, found.late, own)
            video[name] = VideoPlace(place_inside(file, place.text(), self.fps), 0.0)
        return Episode(index, len(span.times), (), file, video)

    # -------------------------------------------------------------------------------------------- reading

    def _column(self, span: _Span, name: str) -> Any:
        """float32 [T, W], or T strings."""
        if name in self._text:
            return self._values(span, self._columns[name][0])
        parts = [np.stack(self._values(span, each)) for each in self._columns[name]]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _values(self, span: _Span, each: Field) -> list[Any]:
        """A field's value at every row."""
        topic = span.bag.topics[each.topic]
        numeric = each.topic in self._sampled() and not each.hold and each is not self._words
        return self._read(span.bag, each, topic.nearest(span.times) if numeric else topic.latest(span.times))

    def _read(self, bag: _Bag, each: Field, chosen: np.ndarray) -> list[Any]:
        """A field's value in chosen messages of its topic, which are numbered by their stamps."""
        if not len(chosen):
            return []
        topic = bag.topics[each.topic]
        wanted, back = np.unique(topic.places[chosen], return_inverse=True)  # numbers by reception
        first, last = int(topic.all_received[wanted[0]]), int(topic.all_received[wanted[-1]])
        number = int(np.searchsorted(topic.all_received, first))
        needed, values = set(wanted.tolist()), {}
        where = f"{bag.path}: {each.topic}"
        for message in messages_between(bag.path, each.topic, first, last):
            if number in needed:
                values[number] = _value(message, each, where)
            number += 1
        found = [values[place] for place in wanted.tolist()]
        widths = {-1 if isinstance(value, str) else len(value) for value in found}
        if len(widths) != 1:
            raise UserError(f"{where}: {each.field!r} changes how many numbers it has; name its `names`, or drop it")
        return [found[place] for place in back.tolist()]


def open_mcap(card: DatasetCard, source: Path) -> BagLog:
    """Open the bags of a dataset card.

    Raises:
        UserError: the mapping does not fit, a file is missing or damaged, or there is none.
    """
    mapping: BagMapping = from_plain(BagMapping, card.mapping, f"dataset {card.name!r}: mapping")
    return BagLog(card, source, mapping)


def _files(source: Path, pattern: str) -> list[Path]:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the one that holds the bags (*.mcap)")
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise UserError(f"mapping.files is {pattern!r}; it is a pattern below the source")
    found = sorted(source.glob(pattern), key=lambda path: natural(path.relative_to(source).as_posix()))
    if not found:
        raise UserError(f"{source}: no file matches {pattern}; ROS 2 bags in other storage are converted to MCAP first")
    for path in found:
        if path.suffix != ".mcap" or "#" in path.relative_to(source).as_posix():
            raise UserError(f"{path}: a bag's name ends in .mcap and has no '#'; correct mapping.files or the name")
    return found


def _sorted(stamps: Stamps, own_stamps: bool) -> _Topic:
    """Messages by their stamps, on the recorder's clock."""
    received = stamps.received
    stamped = stamps.stamped if own_stamps else received
    delay = int(np.median(received - stamped))
    shift = 0 if EARLIEST <= delay <= LATEST else delay
    order = np.argsort(stamped, kind="stable")
    first = np.concatenate([[True], np.diff(stamped[order]) > 0])
    kept = order[first]
    return _Topic(stamped[kept] + shift, received[kept], received, kept, shift, int((~first).sum()))


def _faults_of(bag: _Bag) -> dict[str, tuple[int, str]]:
    faults = {}
    repeated = {name: topic.repeated for name, topic in bag.topics.items() if topic.repeated}
    if repeated:
        faults[REPEATED] = (sum(repeated.values()), f"{bag.path.name}: {', '.join(repeated)}")
    shifted = [f"{name} by {topic.shift / SECOND:+.3f} s" for name, topic in bag.topics.items() if topic.shift]
    if shifted:
        faults[SHIFTED] = (len(shifted), f"{bag.path.name}: {', '.join(shifted)}")
    return faults


def _means_something(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else any(value)


# ------------------------------------------------------------------------------------------------ fields


def _fields(value: Any, where: str) -> list[Field]:
    given = value if isinstance(value, list) else [value]
    if not given:
        raise UserError(f"{where} is empty; a field (TOPIC:FIELD), or several, are expected")
    return [_field(each, where) for each in given]


def _field(value: Any, where: str) -> Field:
    if isinstance(value, Mapping):
        return from_plain(Field, value, where)
    topic, _, path = str(value).partition(":")
    if not topic or not path:
        raise UserError(f"{where} is {value!r}; a field is written TOPIC:FIELD, such as /joint_states:position")
    return Field(topic, path)


def _value(message: Any, each: Field, where: str) -> Any:
    """float64 [n], or words, of a field of a message."""
    inside = message
    for part in each.field.split("."):
        if part not in _names(inside):
            raise UserError(
                f"{where}: its messages have no {part!r} (of {each.field!r}).{nearest(part, _names(inside))}"
            )
        inside = getattr(inside, part)
    if isinstance(inside, str):
        return inside
    numbers = np.asarray(_numbers(inside, f"{where}: {each.field!r}"), dtype=np.float64)
    if not each.names:
        return numbers
    order = list(getattr(message, "name", []))
    for name in each.names:
        if name not in order or order.index(name) >= len(numbers):
            raise UserError(f"{where}: a message has no joint {name!r}.{nearest(name, order)}")
    return numbers[[order.index(name) for name in each.names]]


def _names(value: Any) -> list[str]:
    """The fields of a decoded message, in its definition's order; none of anything else."""
    return list(getattr(type(value), "__slots__", [])) if hasattr(value, "_full_text") else []


def _numbers(value: Any, where: str) -> list[float]:
    """The numbers of a value, those of messages inside it in their order."""
    if isinstance(value, bool | int | float):
        return [float(value)]
    if isinstance(value, bytes | bytearray | memoryview):
        return [float(number) for number in bytes(value)]
    if _names(value):
        return [number for name in _names(value) for number in _numbers(getattr(value, name), where)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [number for inner in value for number in _numbers(inner, where)]
    try:
        return [float(number) for number in value]
    except (TypeError, ValueError):
        raise UserError(f"{where}: holds a {type(value).__name__}; numbers are expected") from None
