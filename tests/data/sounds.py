"""Small clips with sound for the tests: real mp4s with real AAC, whose tone changes every second."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np

from tests.data.clips import SIZE
from tests.data.logs import numbered_frame

TONES = (400.0, 700.0, 1100.0, 1600.0)
"""Hz of the first channel in each second; the second channel is half as loud and 50 Hz higher."""


def wave(seconds: float, rate: int, channels: int, tones: Sequence[float] = TONES) -> np.ndarray:
    """float32 [channels, n]: sines, one a second, phases starting anew."""
    times = np.arange(round(seconds * rate)) / rate
    hertz = np.asarray(tones)[np.minimum(times.astype(int), len(tones) - 1)]
    rows = [0.5 / (1 + c) * np.sin(2 * np.pi * (hertz + 50 * c) * (times % 1)) for c in range(channels)]
    return np.stack(rows).astype(np.float32)


def sounding(
    frames: int,
    *,
    fps: int = 24,
    rate: int = 48000,
    layout: str = "stereo",
    seconds: float | None = None,
    late: float = 0.0,
    codec: str = "aac",
    form: str = "mp4",
    size: tuple[int, int] = SIZE,
) -> bytes:
    """A video whose frame i shows the number i, with `wave` as its sound.

    Args:
        seconds: of sound, None as long as the frames;  late: seconds at which it begins, saying its first second.
    """
    file, length = io.BytesIO(), frames / fps if seconds is None else seconds
    with av.open(file, "w", format=form) as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width = size
        video.pix_fmt = "yuv420p"
        video.options = {"g": "8", "crf": "20", "preset": "ultrafast"}
        video.codec_context.thread_count = 1
        audio = container.add_stream(codec, rate=rate, layout=layout)
        if codec == "aac":
            audio.bit_rate = 160_000
        values = wave(length, rate, audio.codec_context.layout.nb_channels)
        kind = audio.codec_context.format.name
        for number in range(frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")))
        container.mux(video.encode())
        for first in range(0, values.shape[1], 1024):
            block = np.ascontiguousarray(values[:, first : first + 1024])
            if kind == "s16":
                block = np.ascontiguousarray((block * 32767).astype(np.int16).T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(block, format=kind, layout=layout)
            frame.sample_rate, frame.pts = rate, first + round(late * rate)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return file.getvalue()


def pitch(values: np.ndarray, rate: int) -> float:
    """Hz of the strongest tone in float [n]."""
    spectrum = np.abs(np.fft.rfft(values * np.hanning(len(values)), 1 << 18))
    return float(np.argmax(spectrum) * rate / (1 << 18))
