"""Prepared rows, read: the one reader that training and evaluation have.

A row becomes a `Sample`: frames decoded and composed, sound decoded, actions normalised, or the cached latents. Rows
are memory-mapped by `datasets`, whose cache lies inside the prepared folder and is made at the first reading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, disable_progress_bars
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos3_train.config import Clips, Embodiment, UserError, from_plain
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.data.files import disk_is_the_users
from cosmos3_train.data.index import FEATURES, SPLITS
from cosmos3_train.data.kept import KeptFiles
from cosmos3_train.data.prepare import embodiment_settings, first_difference, read_card
from cosmos3_train.data.sound import SoundForm, sound_at
from cosmos3_train.data.statistics import Statistics
from cosmos3_train.data.video import compose, frames_at
from cosmos3_train.flow.tasks import TASKS
from cosmos3_train.types import Sample

LATENTS = Path("caches") / "latents"
SOUND_LATENTS = Path("caches") / "sound"
OPEN_SHARDS = 256
BATCH_ROWS = 10_000
"""Rows of a batch of the memory-mapped table: opening one takes time by its batches."""


def latents_place(variant: int) -> Path:
    """In a prepared folder: of the latents of the windows as they are (0), or of a changed variant of them."""
    return LATENTS.with_name(f"{LATENTS.name}_variant_{variant}") if variant else LATENTS


class PreparedDataset:
    """A prepared folder.

    Attributes:
        name:        of the dataset
        folder, source: the prepared folder, and the log that its rows point into
        fingerprint: of everything that made it
        contract:    the embodiment card (the given one, or the one that it was prepared with), or how video without a
                     robot is cut and framed
        statistics, normaliser: of a robot's train split, or what `use_statistics` was given; video without a robot has
                     neither
        rows:        windows of all splits; row numbers run over the whole table
        latent_cache, sound_cache: what is cached of them, None where nothing is
        notes_sound: whether rows say if they have sound (not those prepared before rows did)
    """

    def __init__(
        self,
        folder: str | Path,
        embodiment: Embodiment | None,
        source: str | Path | None = None,
        sound: SoundForm | None = None,
        *,
        latents: bool = True,
    ) -> None:
        """Open the folder.

        Args:
            embodiment: the run's embodiment card, checked against the one that the folder was prepared with.
            source: the log, where it has moved since; None takes the place that it was prepared from.
            sound: at which rate and with how many channels sound is read; None where it is not.
            latents: open what is cached of them; whether a cache is this model's, `model.caches` finds out.

        Raises:
            UserError: not prepared, prepared for another embodiment card, or the log is not there.
        """
        self.folder = Path(folder)
        content = read_card(self.folder)
        where = f"{self.folder}/card.json"
        self.contract: Embodiment | Clips
        if "clips" in content:
            if embodiment is not None:
                raise UserError(
                    f"{self.folder}: holds video without a robot, so embodiment {embodiment.name!r} says nothing of "
                    "it; leave the dataset's embodiment out"
                )
            self.contract = from_plain(Clips, content["clips"], where)
        else:
            prepared_for = from_plain(Embodiment, content["embodiment"], where)
            if embodiment is not None:
                _check_same(self.folder, prepared_for, embodiment)
            self.contract = embodiment or prepared_for
        self.name: str = content["dataset"]["name"]
        self.fingerprint: str = content["fingerprint"]
        self.source = Path(content["source"] if source is None else source)
        if self.source.is_file() and not self.has_robot:
            self.source = self.source.parent  # a file of rows, whose videos' places are relative to it
        if not self.source.is_dir():
            raise UserError(f"{self.folder}: its log {self.source} is not there; set the dataset's source to its place")
        if self.has_robot:
            self.use_statistics(Statistics.load(self.folder, embodiment=self.embodiment.name, dataset=self.name))
        self._table = _open_rows(self.folder)
        self.rows: int = len(self._table)
        splits = self._table.data.column("split")
        # Compared by Arrow: as Python's words, ten million of them take seconds and half a gigabyte.
        self._places = {split: np.flatnonzero(cast(Any, pc).equal(splits, split).to_numpy()) for split in SPLITS}
        self._sounds = self._table.data.column("sound").is_valid().to_numpy()
        self.sound_form, self.notes_sound = sound, "sounding" in content
        self._opens_latents, self._latents = latents, dict[int, LatentCache | None]()
        self.sound_cache = self._open_latents(SOUND_LATENTS)
        self.latents(0)

    @property
    def has_robot(self) -> bool:
        """Whether it is a robot's log, and not video without one."""
        return isinstance(self.contract, Embodiment)

    @property
    def embodiment(self) -> Embodiment:
        """The embodiment card of a robot's log; ask `has_robot` first."""
        assert isinstance(self.contract, Embodiment), f"{self.name} has no robot"
        return self.contract

    def use_statistics(self, statistics: Statistics) -> None:
        """Normalise by these from now on: the robot's own of another log, or those that a model was trained with."""
        self.statistics = statistics
        self.normaliser = Normaliser(self.embodiment, statistics)

    @property
    def latent_cache(self) -> LatentCache | None:
        """Cached latents of the windows as they are."""
        return self._latents[0]

    def latents(self, variant: int) -> LatentCache | None:
        """Cached latents of the windows as they are (0), or of a changed variant of them."""
        if variant not in self._latents:
            self._latents[variant] = self._open_latents(latents_place(variant))
        return self._latents[variant]

    def _open_latents(self, place: Path) -> LatentCache | None:
        return LatentCache.open(self.folder, self.rows, place) if self._opens_latents else None

    def count(self, split: str) -> int:
        """Windows of "train" or "heldout"."""
        return len(self._places[split])

    def sounding(self, split: str) -> np.ndarray:
        """int64 [n]: the windows of a split that have sound, rising."""
        return np.flatnonzero(self._sounds[self._places[split]])

    def has_sound(self, number: int) -> bool:
        """Whether a row has sound, by its number in the whole table."""
        return bool(self._sounds[number])

    def row_number(self, split: str, index: int) -> int:
        """The row of the whole table that window `index` of a split is; keys of the latent cache are row numbers."""
        return int(self._places[split][index])

    def window(self, split: str, index: int) -> dict[str, Any]:
        """The prepared row of a window (columns of `index.FEATURES`), actions in the robot's own units."""
        return self.row(self.row_number(split, index))

    def row(self, number: int) -> dict[str, Any]:
        """A prepared row by its number in the whole table."""
        # As Arrow has it: `datasets` goes through a row once more, cell by cell, though none of ours is decoded.
        return cast(Any, self._table.data).fast_slice(number, 1).to_pylist()[0]

    def sizes(self) -> dict[str, np.ndarray]:
        """How large every row is, without reading a word of it: its height, width, fps, frames, and the UTF-8 bytes of
        its words, of those of what is heard too."""
        table, arrow = cast(Any, self._table.data), cast(Any, pc)
        found = {name: table.column(name).to_numpy() for name in ("height", "width", "fps")}
        found["frames"] = arrow.list_value_length(table.column("timestamps")).to_numpy()
        lengths = (arrow.binary_length(table.column(name)) for name in ("instruction", "sound_caption"))
        first, other = (arrow.fill_null(length, 0).to_numpy().astype(np.int64) for length in lengths)
        return found | {"words": first + other}

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """Every prepared row in order, as a writer of caches needs them."""
        return (self.row(number) for number in range(self.rows))

    def key(self, row: dict[str, Any]) -> str:
        """dataset/episode_000012/000034: unique in the dataset."""
        return f"{self.name}/episode_{row['episode_index']:06d}/{row['start']:06d}"

    def frames(
        self, row: dict[str, Any], first_only: bool = False, change: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """uint8 [T, 3, H, W]: a row's frames (all, or its first), views composed; H and W are the row's.

        Args:
            change: what each view goes through before they are composed.

        Raises:
            UserError: a video is missing or corrupt, or has no frame at one of the times.
        """
        offsets = np.asarray(row["timestamps"]) - row["timestamps"][0]
        if first_only:
            offsets = offsets[:1]
        size = None if self.has_robot else (row["height"], row["width"])
        views = [frames_at(self.source, v["path"], v["start_time"] + offsets, size) for v in row["video"]]
        views = views if change is None else [change(view) for view in views]
        return compose(views, self.embodiment.layout if self.has_robot else "single")

    def waveform(self, row: dict[str, Any]) -> Tensor:
        """float32 [channels, n]: the sound of a row's frames, each as long as it is shown, in the form of `sound`.

        Raises:
            UserError: the video is missing or corrupt, or has no sound there.
        """
        assert self.sound_form is not None, f"{self.name} was opened without a form of sound"
        (video,) = row["video"]
        samples = self.sound_form.samples(len(row["timestamps"]), row["fps"])
        return sound_at(self.source, video["path"], video["start_time"], samples, self.sound_form)

    def sample(
        self,
        split: str,
        index: int,
        task: str,
        number: int,
        *,
        pixels: bool = True,
        latents: bool = False,
        change: Callable[[Tensor], Tensor] | None = None,
        variant: int = 0,
    ) -> Sample:
        """A window as a sample of a task.

        The mask table decides what it holds: actions only where the task has a robot, the state only where besides
        the embodiment has a state row, one frame for an image, sound only where the task has it.

        Args:
            number: the sample's place in the run's global order.
            pixels: decode frames, and sound.
            latents: read the cached latents.
            change: of the frames, see `frames`; sound stays as it is.
            variant: of the frames' cached latents; 0 is the window as it is.

        Raises:
            UserError: an unreadable video, or no cached latent.
        """
        rules = TASKS[task]
        place = self.row_number(split, index)
        row = self.row(place)
        latent = None
        if latents:
            cache = self.latents(variant)
            if cache is None:
                raise UserError(f"{self.folder}: no latents are cached; set cache_latents to false or prepare again")
            latent = cache.read(place)
            latent = latent[:, :1] if rules.image else latent  # causal encoder: latent frame 0 is frame 0 alone
        sound = waveform = None
        if rules.sound != "absent" and latents:
            if self.sound_cache is None:
                raise UserError(f"{self.folder}: no sound is cached; set cache_latents to false or prepare again")
            sound = self.sound_cache.read(place)
        elif rules.sound != "absent" and pixels:
            waveform = self.waveform(row)
        with_state = rules.has_robot and self.embodiment.state_row
        return Sample(
            key=self.key(row),
            number=number,
            task=task,
            caption=row["instruction"],
            fps=row["fps"],
            frames=self.frames(row, rules.image, change) if pixels else None,
            latent=latent,
            size=(row["height"], row["width"]),
            action=self.normaliser.normalise(torch.tensor(row["action"])) if rules.has_robot else None,
            state=self.normaliser.normalise(torch.tensor(row["state"])) if with_state else None,
            waveform=waveform,
            sound=sound,
            sound_caption=row["sound_caption"] or "",
            embodiment=self.embodiment.name if self.has_robot else None,
            tier=self.contract.resolution_tier,
        )


@dataclass(frozen=True)
class LatentCache:
    """Cached latents of every row (of sound: of each that has it): `card.json` and shards `00000.safetensors`, keys the
    row numbers.

    fingerprint: of whatever made them, for the writer to compare
    windows:     rows of the table that they were made for;  shard: rows a file
    made_by:     tokenizer and dtype in words; empty of an older cache
    """

    folder: Path
    fingerprint: str
    windows: int
    shard: int
    made_by: str = ""

    @staticmethod
    def open(prepared: str | Path, rows: int, place: Path = LATENTS) -> LatentCache | None:
        """The cache of a prepared folder, None where there is none.

        Args:
            place: in the folder: `latents_place` of its frames, `SOUND_LATENTS` of its sound.

        Raises:
            UserError: it was made for another number of rows, or its card cannot be read.
        """
        folder = Path(prepared) / place
        path = folder / "card.json"
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cache = LatentCache(
                folder,
                fingerprint=str(content["fingerprint"]),
                windows=int(content["windows"]),
                shard=int(content["shard"]),
                made_by=str(content.get("made_by", "")),
            )
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a card of cached latents ({error!r}); delete {folder}") from None
        if cache.windows != rows:
            raise UserError(f"{path}: latents of {cache.windows} windows, but there are {rows}; delete {folder}")
        return cache

    @staticmethod
    def shard_file(folder: Path, shard: int) -> Path:
        """The file of rows [shard · rows a shard, (shard + 1) · rows a shard), each under its number."""
        return folder / f"{shard:05d}.safetensors"

    def write_card(self) -> None:
        """Say what the folder holds, which `open` reads."""
        card = {key: value for key, value in asdict(self).items() if key != "folder"}
        (self.folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")

    def read(self, row: int) -> Tensor:
        """float32 [C, t, h, w] of a row of the whole table; of sound [2, C, S].

        Raises:
            UserError: the shard is missing or corrupt.
        """
        path = self.shard_file(self.folder, row // self.shard)
        try:
            return _shards.get(path).get_tensor(str(row)).float()
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(f"{path}: cached latents are missing or corrupt ({error}); delete {self.folder}") from None


_shards = KeptFiles[Any](lambda path, _: safe_open(str(path), framework="pt"), most=OPEN_SHARDS)


def _open_rows(folder: Path) -> Dataset:
    files = sorted(str(path) for path in folder.glob("windows-*.parquet"))
    if not files:
        raise UserError(f"{folder}: the rows (windows-*.parquet) are missing; run `cosmos3 prepare --fresh`")
    disable_progress_bars()  # a second's work, and its bar would break the run's
    cache = folder / "caches" / "rows"  # never the home folder's
    with disk_is_the_users(folder):
        kept = {"features": FEATURES, "cache_dir": str(cache), "writer_batch_size": BATCH_ROWS}
        return cast(Dataset, Dataset.from_parquet(cast(Any, files), **kept))


def _check_same(folder: Path, before: Embodiment, now: Embodiment) -> None:
    difference = first_difference(embodiment_settings(before), embodiment_settings(now))
    if difference is not None:
        key, old, new = difference
        raise UserError(
            f"{folder}: prepared for embodiment {before.name!r} with {key} {old!r}, the run has {key} {new!r}; "
            "prepare it again with --fresh"
        )
