"""The dataset card: one YAML that says what a dataset is, where it lies and what is known to be wrong with it.

Only `name` and `format` are needed. The fields that no code reads (licence, size, layout, columns, known_faults,
how_made) are for people, but are checked for spelling like the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from cosmos3_train.config import Clips, Dataset, UserError, from_plain, nearest, read_yaml
from cosmos3_train.data.names import check_source

CLIP_FORMATS = ("jsonl_video", "webdataset")
"""Formats of captioned video without a robot."""
FORMATS = (*CLIP_FORMATS, "camera_tracks", "hdf5", "lerobot_v2", "lerobot_v3", "mcap", "rlds", "zarr", "conversations")


@dataclass(frozen=True)
class Filters:
    """What of a robot's log is left out when it is prepared, and counted.

    success:     column of the log; an episode in which it is never above 0 is left out
    keep_ranges: JSON file in the log's folder, {"EPISODE": [[START, STOP], ...]}: a window whose frames are not all in
                 one of its episode's ranges of rows is left out
    keep_key:    what stands for an episode in that file: words, and in braces what the log says of it (of LeRobot's
                 logs text columns of the table of episodes), such as "{episode_id}/trajectory.h5"; None: its number
    idle_rows:   a window that begins in a stretch of at least so many rows in which nothing moves is left out
    idle_below:  what is no move of a channel from row to row, in its own unit
    """

    success: str | None = None
    keep_ranges: str | None = None
    keep_key: str | None = None
    idle_rows: int | None = None
    idle_below: float = 1e-3

    def __post_init__(self) -> None:
        if self.keep_key is not None and self.keep_ranges is None:
            raise UserError(f"filters.keep_key is {self.keep_key!r}, but filters.keep_ranges names no file; name it")
        if self.idle_rows is not None and self.idle_rows < 1:
            raise UserError(f"filters.idle_rows is {self.idle_rows}; it is at least 1 (leave it out to keep all)")
        if not self.idle_below > 0:
            raise UserError(f"filters.idle_below is {self.idle_below}; it is above 0")


@dataclass(frozen=True)
class PictureOptions:
    """How the pictures of conversations are taken.

    least_pixels, most_pixels: area that an image is brought to, its sides whole tokens; None takes the model's own
    video_least_pixels, video_most_pixels: the same of a video, the area of all its frames together
    video_fps:    frames a second that are taken of a video
    video_frames: most of them, spread evenly over it
    """

    least_pixels: int | None = None
    most_pixels: int | None = None
    video_least_pixels: int | None = None
    video_most_pixels: int | None = None
    video_fps: float = 2.0
    video_frames: int = 32

    def __post_init__(self) -> None:
        for kind, (least, most) in {"": self.image_pixels, "video_": self.video_pixels}.items():
            for name, value in ((f"{kind}least_pixels", least), (f"{kind}most_pixels", most)):
                if value is not None and value < 1:
                    raise UserError(f"pictures.{name} is {value}; it is at least 1 (leave it out for the model's own)")
            if least is not None and most is not None and least > most:
                raise UserError(f"pictures.{kind}least_pixels is {least}, above {kind}most_pixels, {most}; lower it")
        if not self.video_fps > 0:
            raise UserError(f"pictures.video_fps is {self.video_fps}; it is above 0")
        if self.video_frames < 2:
            raise UserError(f"pictures.video_frames is {self.video_frames}; it is at least 2")

    @property
    def image_pixels(self) -> tuple[int | None, int | None]:
        return self.least_pixels, self.most_pixels

    @property
    def video_pixels(self) -> tuple[int | None, int | None]:
        return self.video_least_pixels, self.video_most_pixels


@dataclass(frozen=True)
class DatasetCard:
    """A dataset card.

    name:             of the dataset, in keys, statistics and messages
    format:           what reads it, one of `FORMATS`
    source:           folder (or .jsonl file), relative to the project's root, or absolute
    hub_id:           where it is published
    licence, size, layout, columns, known_faults, how_made: for the reader
    download:         what of it (all, subset) → the command that fetches it, told where nothing is at the source
    rate_hz:          frames and actions a second
    tasks:            rows of the mask table that it can feed
    embodiment:       the embodiment card that it was recorded with
    caption_column:   column of the log with the instruction; None takes LeRobot's own task
    constant_caption: one instruction for every window, above both
    captions:         where video without a robot, or a clip with a camera track, has its caption, in order of
                      preference: dotted keys of its caption window, row or JSON file. A value that is a mapping
                      becomes one line of JSON
    sound_captions:   where it has words of what is heard, as `captions`; they join the caption in tasks with sound
    caption_template: what to say where none of these is there: "{a} in {b.c}", dotted keys in braces
    frames, least_frames, stride, resolution_tier: how such video is cut and framed, see `config.Clips`
    filters:          what of a robot's log is left out, see `Filters`
    pictures:         how those of conversations are taken, see `PictureOptions`
    mapping:          for formats without names of their own for things (HDF5, Zarr, ...): what is what in the file, as
                      the source of that format says
    """

    name: str = MISSING
    format: str = MISSING
    source: str | None = None
    hub_id: str | None = None
    licence: str = ""
    size: Any = None
    layout: Any = None
    columns: Any = None
    rate_hz: float | None = None
    tasks: list[str] = field(default_factory=list)
    embodiment: str | None = None
    caption_column: str | None = None
    constant_caption: str | None = None
    captions: list[str] = field(default_factory=list)
    sound_captions: list[str] = field(default_factory=list)
    caption_template: str | None = None
    frames: int | None = None
    least_frames: int | None = None
    stride: int | None = None
    resolution_tier: int | None = None
    filters: Filters = field(default_factory=Filters)
    pictures: PictureOptions = field(default_factory=PictureOptions)
    mapping: dict[str, Any] = field(default_factory=dict)
    known_faults: Any = None
    download: Any = None
    how_made: Any = None

    def __post_init__(self) -> None:
        if self.format not in (*FORMATS, MISSING):
            raise UserError(f"dataset {self.name!r}: format is {self.format!r}.{nearest(self.format, FORMATS)}")
        if "/" in self.name:
            raise UserError(f"dataset {self.name!r}: name holds '/', which separates the parts of a sample's key")
        if self.format != "conversations" and self.pictures != PictureOptions():
            raise UserError(f"dataset {self.name!r}: pictures are of conversations; {self.format} has none")
        if self.shows_clips and self.filters != Filters():
            raise UserError(f"dataset {self.name!r}: filters are of robots' logs; {self.format} has no rows to filter")

    @property
    def shows_clips(self) -> bool:
        """Whether it is captioned video without a robot."""
        return self.format in CLIP_FORMATS

    def clips(self, entry: Dataset | None = None) -> Clips:
        """How its video is cut and framed: what the entry of an experiment says, else what this says, else the default.

        Raises:
            UserError: a value is out of range.
        """
        layers = [self] if entry is None else [entry, self]
        found: dict[str, int] = {}
        for key in ("frames", "least_frames", "stride", "resolution_tier"):
            given = [value for layer in layers if (value := getattr(layer, key)) is not None]
            if given:
                found[key] = given[0]
        try:
            return Clips(**found)
        except UserError as error:
            raise UserError(f"dataset {self.name!r}: {error}") from None

    def source_folder(self, root: Path) -> Path:
        """The source's path, seen from the project's root.

        Raises:
            UserError: the card names none.
        """
        if self.source is None:
            raise UserError(f"dataset {self.name!r}: the card names no source; give --source DIR")
        return root / self.source

    def check_fetched(self, source: Path) -> None:
        """Raise `UserError` where nothing is at its source, with the commands that fetch a published set or a part."""
        check_source(source)
        if source.exists() or not isinstance(self.download, Mapping):
            return
        commands = "; ".join(f"{what}: {command}" for what, command in self.download.items())
        raise UserError(f"{source}: not there; name its place with --source, or fetch it. {commands}")


def load_card(path: str | Path) -> DatasetCard:
    """Read a dataset card.

    Raises:
        UserError: the file is missing or is not YAML, a key is unknown or a value has the wrong type.
    """
    path = Path(path)
    content = read_yaml(path)
    for key in ("name", "format"):
        if not content.get(key):
            raise UserError(f"{path}: {key} has no value; a dataset card needs it")
    return from_plain(DatasetCard, content, str(path))
