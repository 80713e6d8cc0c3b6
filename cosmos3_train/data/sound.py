"""The sound of a stretch of a video, at the rate and with the channels that a model's sound tokenizer wants.

As upstream's training pipeline lines it up: the samples of [start, start + length) on the time line that the frames'
own times are of. Where the track does not reach (it begins late, ends early) there is silence, never a shift. Mono is
repeated on every channel; of more channels than are wanted the first ones are taken.

A file is opened for every stretch and not kept: AAC puts noise in place of some bands, which goes on where the decoder
stands, and a sample must not depend on what was read before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from torch import Tensor

from cosmos3_train.config import UserError
from cosmos3_train.data.archives import split_place
from cosmos3_train.data.video import close, corrupt, named, open_anew, opened

MARGIN_SECONDS = 0.05
"""Of a track beyond both ends of a stretch that is resampled, so that the filter sees no edge there."""
PREROLL_SECONDS = 0.5
"""Decoded before that and thrown away: a codec's first block after a seek lacks what overlaps it."""
JUMP_SECONDS = 0.02
"""A block whose time differs by more from where the one before it ended is put at its time. Smaller differences are
those of containers that write milliseconds, and blocks follow each other without a gap."""

BLOCK_SECONDS = 0.1
"""By which a file's header may say more of its sound than is decoded: codecs fill their last block."""


@dataclass(frozen=True)
class SoundForm:
    """What a sound tokenizer takes. rate: Hz;  channels: 1 or 2"""

    rate: int
    channels: int

    def samples(self, frames: int, fps: float) -> int:
        """Samples of a channel that belong to so many frames, as upstream's pipeline counts them."""
        return int(frames / fps * self.rate)


class Track(NamedTuple):
    """A video's sound, by its file's header. rate: Hz;  start, end: seconds into the file"""

    rate: int
    channels: int
    start: float
    end: float

    def covers(self, start: float, end: float) -> float:
        """Seconds of a stretch that the track reaches."""
        return max(0.0, min(end, self.end) - max(start, self.start))


def track_of(root: Path, place: str) -> Track | None:
    """What a video's file says of its sound, None where it has none. Nothing is decoded.

    Args:
        place: as `video.frames_at` takes it.

    Raises:
        UserError: the file is missing or corrupt, or its sound is of a kind that FFmpeg does not know.
    """
    path, inside = split_place(root, place)
    container = opened(path, inside)
    stream = _stream(container)
    if stream is None:
        return None
    if cast(Any, stream.codec_context) is None or not stream.rate:
        raise UserError(f"{named(path, inside)}: the sound's codec is not known; copy the log again")
    unit = float(stream.time_base or 0)
    start = (stream.start_time or 0) * unit
    try:
        if stream.duration is not None:
            end = start + stream.duration * unit
        else:  # Matroska's header has none
            container.seek(0)
            shown = [(packet.pts, packet.duration or 0) for packet in container.demux(stream)]
            end = max(((pts + duration) * unit for pts, duration in shown if pts is not None), default=start)
    except (av.FFmpegError, OSError) as error:
        close(path)
        raise corrupt(path, inside, error) from None
    return Track(stream.rate, stream.channels, start, end)


def sound_at(root: Path, place: str, start: float, samples: int, form: SoundForm) -> Tensor:
    """The sound of a video from a time on.

    Args:
        place: as `video.frames_at` takes it.
        start: seconds into the file, on the time line of its frames.
        samples: of a channel.

    Returns:
        float32 [channels, samples], full scale ±1; silence where the track does not reach.

    Raises:
        UserError: the file is missing or corrupt, or has no sound anywhere in the stretch.
    """
    path, inside = split_place(root, place)
    stop, seek_to = start + samples / form.rate, start - MARGIN_SECONDS - PREROLL_SECONDS
    found = _decoded(path, inside, start, stop, seek_to)
    if seek_to > 0 and (found is None or found.first > start):  # it begins late, or seeks only to a later place
        found = _decoded(path, inside, start, stop, -PREROLL_SECONDS)
    if found is None:
        raise UserError(f"{named(path, inside)}: no sound from {start:.3f} to {stop:.3f} s; copy the log again")
    values = found.values[: form.channels]
    if found.rate != form.rate:
        values = _resampled(values, found.rate, form.rate)
    if len(values) < form.channels:
        values = np.repeat(values[:1], form.channels, axis=0)
    first = round((start - found.origin) * form.rate)
    wanted = np.zeros((form.channels, samples), np.float32)
    piece = values[:, first : first + samples]
    wanted[:, : piece.shape[1]] = piece
    return torch.from_numpy(wanted)


def sound_fault(root: Path, place: str, track: Track) -> str:
    """What is wrong with a video's sound, all of it decoded: "" where nothing is. From any thread.

    Args:
        place: as `video.frames_at` takes it;  track: what its file says of it.
    """
    path, inside = split_place(root, place)
    reached, form = track.start, None
    try:
        with open_anew(path, inside) as container:
            for frame in container.decode(cast(AudioStream, _stream(container))):
                time = reached if frame.time is None else frame.time
                if frame.is_corrupt:
                    return f"the sound at {time:.3f} s is damaged"
                if form not in (None, (frame.sample_rate, frame.layout.nb_channels)):
                    return f"the sound's rate or channels change at {time:.3f} s"
                form = frame.sample_rate, frame.layout.nb_channels
                reached = time + frame.samples / frame.sample_rate
    except UserError as error:
        return str(error)
    except (av.FFmpegError, OSError) as error:
        return f"no sound can be decoded after {reached:.3f} s ({' '.join(str(error).split())})"
    if reached < track.end - BLOCK_SECONDS:
        return f"the sound can be decoded to {reached:.3f} s, the file says {track.end:.3f} s"
    return ""


class _Decoded(NamedTuple):
    """A stretch of a track with its margins. values: float32 [channels, n] at `rate` Hz, the first of them at `origin`
    seconds, silence where nothing was decoded; first: seconds at which the first decoded block begins"""

    values: np.ndarray
    rate: int
    origin: float
    first: float


def _decoded(path: Path, inside: str, start: float, stop: float, seek_to: float) -> _Decoded | None:
    """From `seek_to` on; None where no block reaches into the stretch.

    Before 0 lies what primes a codec, so a file sought to 0 is not decoded like one that is read from its beginning.
    """
    with open_anew(path, inside) as container:
        stream = _stream(container)
        if stream is None:
            return None
        try:
            return _read(container, stream, start, stop, seek_to)
        except (av.FFmpegError, OSError) as error:
            raise corrupt(path, inside, error) from None


def _read(container: InputContainer, stream: AudioStream, start: float, stop: float, seek_to: float) -> _Decoded | None:
    assert stream.time_base is not None
    unit = float(stream.time_base)
    container.seek(int(seek_to / unit), stream=stream, backward=True)
    values, reached = np.zeros((0, 0), np.float32), False
    rate = origin = place = 0
    first = math.inf
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        block, time = _floats(frame), frame.pts * unit
        if first == math.inf:
            # The frame's rate, not the header's: that of HE-AAC may be half of what is decoded.
            rate, first = frame.sample_rate, time
            origin = math.floor((start - MARGIN_SECONDS) * rate)
            values = np.zeros((len(block), math.ceil((stop + MARGIN_SECONDS) * rate) - origin), np.float32)
            place = round(time * rate) - origin
        elif abs(time * rate - origin - place) > JUMP_SECONDS * rate:
            place = round(time * rate) - origin
        if (len(block), frame.sample_rate) != (len(values), rate):
            raise OSError(f"the sound's rate or channels change at {time:.3f} s")
        low, high = max(place, 0), min(place + block.shape[1], values.shape[1])
        if high > low:
            values[:, low:high] = block[:, low - place : high - place]
        reached |= place + origin < stop * rate and place + block.shape[1] + origin > start * rate
        place += block.shape[1]
        if place >= values.shape[1]:
            break
    return _Decoded(values, rate, origin / rate, first) if reached else None


def _floats(frame: AudioFrame) -> np.ndarray:
    """float32 [channels, n] of a frame, whole numbers brought to ±1."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    half = 2 ** (8 * values.dtype.itemsize - 1)
    return ((values.astype(np.float64) - (half if values.dtype.kind == "u" else 0)) / half).astype(np.float32)


def _resampled(values: np.ndarray, before: int, after: int) -> np.ndarray:
    """[channels, n] at another rate; the first sample keeps its time."""
    layout = "mono" if len(values) == 1 else "stereo"
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(values), format="fltp", layout=layout)
    frame.sample_rate = before
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=after)
    pieces = [piece.to_ndarray() for part in (frame, None) for piece in resampler.resample(part)]
    return np.concatenate(pieces, axis=1)


def _stream(container: InputContainer) -> AudioStream | None:
    return cast("AudioStream | None", container.streams.best("audio"))
