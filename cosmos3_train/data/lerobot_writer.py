"""Writes a robot log in LeRobot v3.0 form: Parquet tables, many-episode H.264 files, meta with statistics.

Everything is written into a temporary folder beside the target and renamed on `close`, so a folder under the
target's name is whole. Video goes through PyAV's libx264 with a key frame every `gop` frames, so a reader can
seek anywhere cheaply. Statistics of the columns are exact; those of the cameras are taken over a fixed
subsample of the frames, per colour channel, in [0, 1], as LeRobot does.
"""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.container
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

CODEBASE_VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
CHUNK_FILES = 1000
_DEFAULT_COLUMNS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_STATISTICS_FRAMES = 20
"""Frames of an episode that the camera statistics look at."""


@dataclass
class _VideoFile:
    """An open mp4 of one camera: where it lies, and how many frames it holds."""

    container: av.container.OutputContainer
    stream: av.VideoStream
    frames: int = 0

    def add(self, frames: np.ndarray) -> None:
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(_yuv420(picture), format="yuv420p")
            frame.pts = self.frames
            self.frames += 1
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        self.container.mux(self.stream.encode(None))
        self.container.close()


# BT.601, limited range (what a decoder assumes of an untagged stream this small), in 1/65536.
_YUV_BITS = 16
_YUV = np.rint(
    np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) * (2**_YUV_BITS / 255)
).astype(np.int32)


def _yuv420(picture: np.ndarray) -> np.ndarray:
    """Planes uint8 [3H/2, W] of a picture uint8 [H, W, 3]; chroma is the mean of its four pixels.

    In integers, so that it is the same everywhere; FFmpeg's default conversion costs 0.25 dB more at 96×96.
    """
    height, width, _ = picture.shape
    red, green, blue = np.moveaxis(picture.astype(np.int32), -1, 0)
    luma, cb, cr = (a * red + b * green + c * blue for a, b, c in _YUV)
    planes = [_scaled(luma, _YUV_BITS, 16)]
    for chroma in (cb, cr):
        summed = chroma.reshape(height // 2, 2, width // 2, 2).sum((1, 3))
        planes.append(_scaled(summed, _YUV_BITS + 2, 128))
    return np.concatenate(planes).astype(np.uint8).reshape(height * 3 // 2, width)


def _scaled(values: np.ndarray, bits: int, offset: int) -> np.ndarray:
    """`values` / 2**bits rounded, plus `offset`, flat."""
    return (((values + (1 << (bits - 1))) >> bits) + offset).ravel()


def column_statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics over the first axis of `values` [T, ...]: min max mean std q01 q10 q50 q90 q99, and count [1]."""
    wide = values.astype(np.float64)
    found = {"min": wide.min(0), "max": wide.max(0), "mean": wide.mean(0), "std": wide.std(0)}
    found |= {name: np.quantile(wide, q, axis=0) for name, q in _QUANTILES.items()}
    return {name: np.atleast_1d(value) for name, value in found.items()} | {"count": np.array([len(values)])}


def _some(pictures: np.ndarray, most: int = 256) -> np.ndarray:
    """At most `most` of the pictures, evenly: quantiles in float64 of all of a large log would take tens of GB."""
    return pictures[np.unique(np.linspace(0, len(pictures) - 1, most).round().astype(int))]


def _camera_statistics(frames: np.ndarray) -> dict[str, np.ndarray]:
    """The same of pictures uint8 [T, H, W, 3] per channel, shape [3, 1, 1], in [0, 1]; count is of pictures.

    From how often each of the 256 values occurs, which is exact and does not sort millions of pixels.
    """
    levels = np.arange(256) / 255.0
    per_channel = []
    for channel in range(3):
        seen = np.bincount(frames[..., channel].ravel(), minlength=256)
        total, reached = seen.sum(), np.cumsum(seen)
        present = levels[seen > 0]
        mean = float(seen @ levels) / total
        found = {"min": present[0], "max": present[-1], "mean": mean}
        found["std"] = np.sqrt(max(0.0, float(seen @ (levels - mean) ** 2) / total))
        for name, q in _QUANTILES.items():
            place = q * (total - 1)  # between two pixels of the sorted row, as numpy's quantile has it
            below, above = (levels[np.searchsorted(reached, k, side="right")] for k in (int(place), math.ceil(place)))
            found[name] = below + (above - below) * (place - int(place))
        per_channel.append(found)
    stacked = {name: np.array([found[name] for found in per_channel]).reshape(3, 1, 1) for name in per_channel[0]}
    return stacked | {"count": np.array([len(frames)])}


class LeRobotWriter:
    """Writes one LeRobot v3.0 folder, episode by episode.

    Args:
        root: the folder to make; refused where it exists.
        fps: frames a second of every camera and row.
        cameras: camera key (such as "observation.images.top") -> (height, width); both even, for yuv420p.
        columns: column name (such as "action") -> names of its channels.
        robot_type: what info.json calls the robot.
        crf: libx264's constant rate factor; higher is smaller and worse.
        gop: frames from one key frame to the next.
        max_episodes_per_file: episodes after which the next Parquet and mp4 files begin; None means one file.

    Used as a context manager it closes on success and leaves nothing behind on an error.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float,
        cameras: dict[str, tuple[int, int]],
        columns: dict[str, list[str]],
        robot_type: str,
        crf: int = 23,
        gop: int = 2,
        max_episodes_per_file: int | None = None,
    ) -> None:
        self._root = Path(root)
        if self._root.exists():
            raise ValueError(f"root {self._root} exists; name a new folder or remove that one")
        if not fps > 0:
            raise ValueError(f"fps is {fps}; give frames a second above 0")
        odd = {key: size for key, size in cameras.items() if size[0] % 2 or size[1] % 2}
        if odd:
            raise ValueError(f"cameras has odd sizes {odd}; H.264 in yuv420p needs even height and width")
        if max_episodes_per_file is not None and max_episodes_per_file < 1:
            raise ValueError(f"max_episodes_per_file is {max_episodes_per_file}; give 1 or more, or None")
        self._fps, self._cameras, self._columns = fps, dict(cameras), {k: list(v) for k, v in columns.items()}
        self._robot_type, self._crf, self._gop = robot_type, crf, gop
        self._per_file = max_episodes_per_file
        self._root.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self._root.name}.", dir=self._root.parent))
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, object]] = []
        self._rows: list[pa.Table] = []
        self._videos: dict[str, _VideoFile] = {}
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in [*self._columns, *_DEFAULT_COLUMNS]}
        self._pictures: dict[str, list[np.ndarray]] = {key: [] for key in self._cameras}
        self._total_frames = 0
        self._closed = False

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add_episode(self, frames: dict[str, np.ndarray], columns: dict[str, np.ndarray], task: str) -> None:
        """Append an episode of T rows.

        Args:
            frames: camera key -> uint8 [T, H, W, 3], RGB.
            columns: column name -> [T, width], stored as float32.
            task: the instruction, in words.

        Raises ValueError where a key, shape or dtype is not what the writer was made for, or T is 0.
        """
        assert not self._closed, "add_episode after close"
        length = self._checked_length(frames, columns)
        episode = len(self._episodes)
        if self._per_file is not None and episode and episode % self._per_file == 0:
            self._finish_files()
        task_index = self._tasks.setdefault(task, len(self._tasks))
        index = np.arange(length, dtype=np.int64)
        values: dict[str, np.ndarray] = {n: np.asarray(columns[n], np.float32) for n in self._columns}
        values |= {
            "timestamp": (index / self._fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(length, episode, np.int64),
            "index": index + self._total_frames,
            "task_index": np.full(length, task_index, np.int64),
        }
        row = self._episode_row(episode, length, task)
        for name, column in values.items():
            self._values[name].append(column)
            row |= {f"stats/{name}/{k}": v.tolist() for k, v in column_statistics(column).items()}
        for key, pictures in frames.items():
            video = self._video(key)
            start = video.frames
            video.add(pictures)
            row |= {
                f"videos/{key}/chunk_index": self._file[0],
                f"videos/{key}/file_index": self._file[1],
                f"videos/{key}/from_timestamp": start / self._fps,
                f"videos/{key}/to_timestamp": video.frames / self._fps,
            }
            looked_at = pictures[np.unique(np.linspace(0, length - 1, _STATISTICS_FRAMES).round().astype(int))]
            self._pictures[key].append(looked_at)
            row |= {f"stats/{key}/{k}": v.tolist() for k, v in _camera_statistics(looked_at).items()}
        self._rows.append(self._table(values))
        self._episodes.append(row)
        self._total_frames += length

    def close(self) -> None:
        """Write what is left and the meta folder, then give the folder its name. ValueError with no episode."""
        assert not self._closed, "close twice"
        if not self._episodes:
            self.discard()
            raise ValueError(f"no episode was added to {self._root}; a log needs at least one")
        self._finish_files()
        meta = self._folder / "meta"
        episodes = self._folder / EPISODES_PATH.format(chunk_index=0, file_index=0)
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes, compression="zstd")
        tasks = pd.DataFrame({"task_index": list(self._tasks.values())}, index=pd.Index(self._tasks, name="task"))
        tasks.to_parquet(meta / "tasks.parquet")
        statistics = {name: column_statistics(np.concatenate(v)) for name, v in self._values.items()}
        statistics |= {key: _camera_statistics(_some(np.concatenate(v))) for key, v in self._pictures.items()}
        plain = {name: {k: v.tolist() for k, v in found.items()} for name, found in statistics.items()}
        (meta / "stats.json").write_text(json.dumps(plain, indent=1))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=1))
        self._folder.chmod(0o755)  # mkdtemp makes it private
        self._folder.rename(self._root)
        self._closed = True

    def discard(self) -> None:
        """Remove everything written so far."""
        for video in self._videos.values():
            video.container.close()
        self._videos = {}
        shutil.rmtree(self._folder, ignore_errors=True)
        self._closed = True

    @property
    def _file(self) -> tuple[int, int]:
        """Chunk and file index of the files being written."""
        done = 0 if self._per_file is None else len(self._episodes) // self._per_file
        return done // CHUNK_FILES, done % CHUNK_FILES

    def _checked_length(self, frames: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> int:
        for what, given, wanted in (("frames", frames, self._cameras), ("columns", columns, self._columns)):
            if set(given) != set(wanted):
                raise ValueError(f"{what} has keys {sorted(given)}; this log has {sorted(wanted)}: give exactly those")
        lengths = {key: len(value) for key, value in (frames | columns).items()}
        length = next(iter(lengths.values()))
        if set(lengths.values()) != {length} or length == 0:
            raise ValueError(f"episode lengths are {lengths}; give the same number of rows, at least 1, everywhere")
        for key, pictures in frames.items():
            wanted_shape = (length, *self._cameras[key], 3)
            if pictures.shape != wanted_shape or pictures.dtype != np.uint8:
                raise ValueError(
                    f"frames[{key}] is {pictures.dtype} {pictures.shape}; this log takes uint8 {wanted_shape}"
                )
        for name, column in columns.items():
            if column.shape != (length, len(self._columns[name])):
                wanted_width = len(self._columns[name])
                raise ValueError(f"columns[{name}] is {column.shape}; this log takes {(length, wanted_width)}")
        return length

    def _episode_row(self, episode: int, length: int, task: str) -> dict[str, object]:
        chunk, file = self._file
        return {
            "episode_index": episode,
            "tasks": [task],
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": self._total_frames,
            "dataset_to_index": self._total_frames + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }

    def _table(self, values: dict[str, np.ndarray]) -> pa.Table:
        arrays: dict[str, pa.Array] = {}
        for name, value in values.items():
            if value.ndim == 1:
                arrays[name] = pa.array(value)
            else:
                arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), value.shape[1])
        return pa.table(arrays)

    def _video(self, key: str) -> _VideoFile:
        if key not in self._videos:
            chunk, file = self._file
            path = self._folder / VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            container = av.open(str(path), "w")
            rate = _as_fraction(self._fps)
            # Look-ahead gains nothing between close key frames, and with it x264's bytes differ from run to run.
            x264 = "mbtree=0:weightp=0"
            options = {"crf": str(self._crf), "g": str(self._gop), "preset": "slow", "x264-params": x264}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.height, stream.width = self._cameras[key]
            stream.pix_fmt = "yuv420p"
            # Without B-frames a frame decodes after its key frame alone, and the container starts at 0.
            stream.codec_context.max_b_frames = 0
            stream.codec_context.time_base = 1 / rate
            stream.codec_context.thread_count = 1  # the same bytes on every machine
            self._videos[key] = _VideoFile(container, stream)
        return self._videos[key]

    def _finish_files(self) -> None:
        """Close the open video files and write the rows gathered for the current Parquet file."""
        for video in self._videos.values():
            video.close()
        self._videos = {}
        first = int(self._rows[0]["episode_index"][0].as_py())
        done = 0 if self._per_file is None else first // self._per_file
        path = self._folder / DATA_PATH.format(chunk_index=done // CHUNK_FILES, file_index=done % CHUNK_FILES)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(self._rows), path, compression="zstd")
        self._rows = []

    def _info(self) -> dict[str, object]:
        features: dict[str, object] = {}
        for name, channels in self._columns.items():
            features[name] = {"dtype": "float32", "shape": [len(channels)], "names": channels}
        for key, (height, width) in self._cameras.items():
            details = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": self._fps,
                "video.channels": 3,
                "has_audio": False,
            }
            shape, names = [height, width, 3], ["height", "width", "channels"]
            features[key] = {"dtype": "video", "shape": shape, "names": names, "info": details}
        for name, dtype in _DEFAULT_COLUMNS.items():
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self._robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._total_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": int(self._fps) if float(self._fps).is_integer() else self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }


def _as_fraction(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)
