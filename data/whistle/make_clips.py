"""Makes clips whose sound follows from what is seen: a disc that whistles, the higher it is the higher the pitch.

    python data/whistle/make_clips.py --clips 16 --output data/whistle/clips

A clip is 61 frames of 256×256 at 24 a second (H.264) with 48 kHz stereo (AAC): a disc goes up and down while it crosses
the picture. Its pitch is 200 Hz at the bottom and three octaves more at the top, and it is heard from where it is, left
or right. `clips.jsonl` has a row a clip: what is seen under `caption`, what is heard under `caption_audio`. Clip n is a
function of its number alone.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

FRAMES, FPS, SIDE, RATE = 61, 24, 256, 48000
LOWEST_HZ, OCTAVES = 200.0, 3.0
RADIUS, MARGIN = 20.0, 0.15
COLOURS = {"red": (220, 50, 40), "green": (60, 180, 70), "blue": (60, 90, 220), "yellow": (230, 200, 40)}
FIELD = (38, 40, 46)


class Flight(NamedTuple):
    """A disc's way. Places are shares of the picture, 0 to 1, height from below, at `times` in shares of the clip."""

    colour: str
    heights: tuple[float, float, float]
    rightward: bool

    def height(self, times: np.ndarray) -> np.ndarray:
        first, middle, last = self.heights
        return (1 - times) ** 2 * first + 2 * times * (1 - times) * middle + times**2 * last

    def across(self, times: np.ndarray) -> np.ndarray:
        way = MARGIN + (1 - 2 * MARGIN) * times
        return way if self.rightward else 1 - way

    def words(self) -> tuple[str, str]:
        """What is seen, and what is heard."""
        height = self.height(np.linspace(0, 1, FRAMES))
        turns = np.sign(np.diff(height))
        begins, ends = ("rises" if turn > 0 else "falls" for turn in (turns[0], turns[-1]))
        moves = begins if begins == ends else f"{begins}, then {ends}"
        here, there = ("left", "right") if self.rightward else ("right", "left")
        return (
            f"A {self.colour} disc {moves} on a dark field while it crosses from {here} to {there}.",
            f"A clear whistle whose pitch {moves}, going over from the {here} ear to the {there}.",
        )


def flight(number: int) -> Flight:
    """The way of the disc in clip `number`."""
    draw = np.random.default_rng(number)
    heights = draw.uniform(MARGIN, 1 - MARGIN, 3)
    return Flight(str(draw.choice(list(COLOURS))), (heights[0], heights[1], heights[2]), bool(draw.integers(2)))


def pictures(way: Flight) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    times = np.linspace(0, 1, FRAMES)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    x, y = way.across(times) * SIDE, (1 - way.height(times)) * SIDE
    apart = np.hypot(columns - x[:, None, None], rows - y[:, None, None])
    inside = np.clip(RADIUS + 0.5 - apart, 0, 1)[..., None]
    return np.rint(inside * COLOURS[way.colour] + (1 - inside) * FIELD).astype(np.uint8)


def whistle(way: Flight) -> np.ndarray:
    """float32 [2, n] at `RATE`."""
    times = np.arange(round(FRAMES / FPS * RATE)) / (FRAMES / FPS * RATE)
    hertz = LOWEST_HZ * 2 ** (OCTAVES * way.height(times))
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    tone = 0.5 * np.sin(phase) + 0.1 * np.sin(2 * phase)
    side = way.across(times) * np.pi / 2
    return np.stack([tone * np.cos(side), tone * np.sin(side)]).astype(np.float32)


def write_clip(path: Path, way: Flight) -> None:
    """One mp4 with both."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        video.options = {"crf": "23", "preset": "slow", "threads": "1"}
        audio = container.add_stream("aac", rate=RATE, layout="stereo")
        audio.bit_rate = 96_000
        for picture in pictures(way):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        sound = whistle(way)
        for first in range(0, sound.shape[1], 1024):
            block = np.ascontiguousarray(sound[:, first : first + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = RATE, first
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def main() -> None:
    """Write the clips and their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="of the first clip")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(options.first, options.first + options.clips):
        way = flight(number)
        name, (seen, heard) = f"{number:05d}", way.words()
        write_clip(options.output / f"{name}.mp4", way)
        rows.append({"uuid": name, "vision_path": f"{name}.mp4", "caption": seen, "caption_audio": heard})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (options.output / "clips.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
