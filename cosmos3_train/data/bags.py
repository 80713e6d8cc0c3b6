"""MCAP files with ROS 2 messages: when they were stamped, their fields, and their pictures.

Times are integers, nanoseconds. A message has the time at which it was received, by which the file is indexed, and
where its type begins with a header, the sensor's own stamp, which is read without decoding the rest.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import zstandard
from mcap.exceptions import McapError
from mcap.reader import SeekingReader
from mcap.records import Message, Schema
from mcap_ros2.decoder import DecoderFactory
from torch import Tensor

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.image_bytes import decode_images
from cosmos3_train.data.kept import KeptFiles

SECOND = 1_000_000_000
LARGEST_RECORD = 2**30

RAW, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
CHANNELS = {"rgb8": (3, [0, 1, 2]), "bgr8": (3, [2, 1, 0]), "rgba8": (4, [0, 1, 2]), "bgra8": (4, [2, 1, 0])}
CHANNELS |= {"mono8": (1, [0, 0, 0]), "8UC1": (1, [0, 0, 0]), "8UC3": (3, [2, 1, 0])}  # OpenCV's own order is BGR
"""Encoding of a raw picture -> bytes a pixel, and which of them are red, green and blue."""

_BROKEN = (
    McapError, OSError, EOFError, struct.error, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
    AssertionError, MemoryError, OverflowError, zstandard.ZstdError,
)  # fmt: skip
"""What the library, and what it decompresses with, raise for damaged files."""


class Stamps(NamedTuple):
    """int64 [N] of a topic's messages in the order in which they were received: when that was, and their stamps."""

    received: np.ndarray
    stamped: np.ndarray


@dataclass(frozen=True)
class PicturePlace:
    """Where a camera's pictures stand in a bag; picture k is the one stamped nearest to origin + k / rate.

    origin: of the episode, on the recorder's clock;  shift: from the sensor's clock to that
    early, late: least and largest time from a message's stamp (on the recorder's clock) to its reception
    own_stamps: whether the sensor's own stamps count, or the times of reception
    """

    topic: str
    origin: int
    rate: float
    shift: int
    early: int
    late: int
    own_stamps: bool

    def text(self) -> str:
        """As it stands in a row."""
        numbers = (self.origin, self.rate, self.shift, self.early, self.late, int(self.own_stamps))
        return "|".join([self.topic, *map(repr, numbers)])

    @classmethod
    def parse(cls, text: str) -> PicturePlace:
        """The inverse of `text`."""
        topic, origin, rate, shift, early, late, own = text.split("|")
        return cls(topic, int(origin), float(rate), int(shift), int(early), int(late), own == "1")


def topics_of(path: Path) -> dict[str, Schema]:
    """Topic -> the type of its messages.

    Raises:
        UserError: no MCAP file, cut off, damaged, or without ROS 2 messages.
    """
    with _opened(path) as reader:
        summary = reader.get_summary()
        if summary is None or (summary.statistics and summary.statistics.message_count and not summary.chunk_indexes):
            raise UserError(f"{path}: has no index, as when recording was cut off; write one with `mcap recover`")
        found = {}
        for channel in summary.channels.values():
            schema = summary.schemas.get(channel.schema_id)
            if channel.message_encoding == "cdr" and schema is not None and schema.encoding == "ros2msg":
                found[channel.topic] = schema
    if not found:
        raise UserError(f"{path}: holds no ROS 2 messages (CDR, with their definitions); other encodings are not read")
    return found


def require_topic(path: Path, topics: Mapping[str, Schema], topic: str) -> Schema:
    """The topic's type, or a `UserError` with the nearest topic that there is."""
    if topic not in topics:
        raise UserError(f"{path}: no topic {topic!r} with ROS 2 messages.{nearest(topic, topics)}")
    return topics[topic]


def stamps_of(path: Path, topics: Mapping[str, Schema]) -> dict[str, Stamps]:
    """When the messages of topics were received and stamped. Reads the whole file, decodes nothing."""
    found: dict[str, list[tuple[int, int]]] = {topic: [] for topic in topics}
    headed = {topic: _has_header(schema) for topic, schema in topics.items()}
    with _opened(path) as reader:
        for _, channel, message in reader.iter_messages(topics=list(topics)):
            found[channel.topic].append((message.log_time, _stamp(message, headed[channel.topic])))
    columns = {topic: np.asarray(pairs, dtype=np.int64).reshape(-1, 2) for topic, pairs in found.items()}
    return {topic: Stamps(pairs[:, 0], pairs[:, 1]) for topic, pairs in columns.items()}


def messages_between(path: Path, topic: str, first: int, last: int) -> Iterator[Any]:
    """A topic's messages received from `first` to `last`, both included, decoded.

    Raises:
        UserError: the file is damaged, or a message is not of the type that the file says.
    """
    with _opened(path) as reader:
        decode: Callable[[bytes], Any] | None = None
        for schema, _, message in reader.iter_messages(topics=[topic], start_time=first, end_time=last + 1):
            if decode is None:
                decode = _decoder(schema)
            yield decode(message.data)


def read_bag_pictures(path: Path, inside: str, numbers: Sequence[int]) -> Tensor:
    """Pictures uint8 [T, 3, H, W], RGB, of a place in a bag (`PicturePlace`), by their rising numbers.

    Raises:
        UserError: there is none within half a period of a number's time, or it cannot be decoded.
    """
    place = PicturePlace.parse(inside)
    schema = require_topic(path, topics_of(path), place.topic)
    wanted = [place.origin + round(number * SECOND / place.rate) for number in numbers]
    half = round(SECOND / place.rate / 2)
    first, last = wanted[0] - half + place.early, wanted[-1] + half + place.late
    headed = place.own_stamps and _has_header(schema)
    best: list[tuple[int, int, Message] | None] = [None] * len(wanted)
    with _opened(path) as reader:
        for _, _, message in reader.iter_messages(topics=[place.topic], start_time=first, end_time=last + 1):
            stamp = _stamp(message, headed) + place.shift
            for index, time in enumerate(wanted):
                found, far = best[index], abs(stamp - time)
                if far <= half and (found is None or (far, stamp) < found[:2]):
                    best[index] = (far, stamp, message)
        decode, pictures = _decoder(schema), []
        for number, found in zip(numbers, best, strict=True):
            if found is None:
                raise UserError(f"{path}: no picture on {place.topic} within half a period of row {number}")
            where = f"{path}: {place.topic}, row {number}"
            pictures.append(_picture(decode(found[2].data), schema.name, where))
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1:
        raise UserError(f"{path}: pictures on {place.topic} change their size")
    return torch.from_numpy(np.stack(pictures))


def _picture(message: Any, kind: str, where: str) -> np.ndarray:
    """uint8 [3, H, W] of an image message."""
    if kind == COMPRESSED:
        if "compressedDepth" in message.format:
            raise UserError(f"{where}: is a compressed depth image; name a topic with colour")
        return decode_images([bytes(message.data)], where)[0].numpy()
    if kind != RAW:
        raise UserError(f"{where}: holds {kind}; {RAW} and {COMPRESSED} are read as cameras")
    if message.encoding not in CHANNELS:
        raise UserError(f"{where}: encoding {message.encoding!r} is not read; {', '.join(CHANNELS)} are")
    depth, order = CHANNELS[message.encoding]
    content = np.frombuffer(bytes(message.data), dtype=np.uint8)
    height, width, step = message.height, message.width, message.step
    if not height or not width or step < width * depth or len(content) != height * step:
        raise UserError(f"{where}: {len(content)} bytes are no picture of {width}x{height} with rows of {step}")
    rows = content.reshape(height, step)[:, : width * depth].reshape(height, width, depth)
    return np.ascontiguousarray(rows[:, :, order].transpose(2, 0, 1))


def _stamp(message: Message, headed: bool) -> int:
    """The header's stamp; the time of reception where there is none, or it was left at 0."""
    if not headed or len(message.data) < 12:
        return message.log_time
    seconds, nanoseconds = struct.unpack_from("<iI" if message.data[1] & 1 else ">iI", message.data, 4)
    return seconds * SECOND + nanoseconds if seconds or nanoseconds else message.log_time


def _has_header(schema: Schema) -> bool:
    """Whether the message's first field is a std_msgs header."""
    for line in schema.data.decode(errors="replace").splitlines():
        words = line.partition("#")[0].split()
        if words and "=" not in line.partition("#")[0]:
            return re.fullmatch(r"(std_msgs/(msg/)?)?Header", words[0]) is not None
    return False


def _decoder(schema: Schema | None) -> Callable[[bytes], Any]:
    try:
        decode = DecoderFactory().decoder_for("cdr", schema)
    except Exception as error:  # the parser of definitions has a dozen of its own, in no common class
        raise McapError(f"a definition of messages that is none ({error})") from error
    if decode is None:
        raise McapError(f"no definition of the messages ({schema and schema.name})")
    return decode


class _Bag(NamedTuple):
    file: BinaryIO
    reader: SeekingReader


def _open(path: Path, inside: str) -> _Bag:
    file = path.open("rb")
    return _Bag(file, SeekingReader(file, validate_crcs=True, record_size_limit=LARGEST_RECORD))


_bags = KeptFiles(_open, lambda bag: bag.file.close())


@contextmanager
def _opened(path: Path) -> Iterator[SeekingReader]:
    try:
        yield _bags.get(path).reader
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; copy the log again") from None
    except _BROKEN as error:
        _bags.close(path)
        problem = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path}: not a readable MCAP file ({problem}); copy it again, or `mcap recover` it") from None
