"""The run's data: prepared where it is missing, opened, mixed, and loaded from the step where the run stands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from cosmos3_train import config
from cosmos3_train.config import Clips, Embodiment, Loaded, UserError
from cosmos3_train.data.card import DatasetCard, load_card
from cosmos3_train.data.conversations import ConversationDataset, open_conversations
from cosmos3_train.data.files import exclusive
from cosmos3_train.data.mixture import Mixture, StepDataset, check_entry, refuse_silence
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.statistics import Statistics
from cosmos3_train.evaluation.closed_loop import make_simulator
from cosmos3_train.flow.tasks import sound_task
from cosmos3_train.model.caches import ensure_latents, weights_digest
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.reasoner_cache import Reasoner, distinct, ensure_reasoner, prompts_of
from cosmos3_train.model.sight import Counter
from cosmos3_train.runtime import ignore_sigterm, is_first_rank, world_size
from cosmos3_train.training.batching import PackedStep, PackedSteps, Packer, SeenSteps
from cosmos3_train.training.strategy import data_rank

logger = logging.getLogger(__name__)

ENDLESS = 1 << 40
"""Steps in the loader's order; the run ends when the module has made its own."""

DATA = "data.json"
"""In a run's folder: the fingerprint of every dataset."""

Opened = dict[str, tuple[PreparedDataset | ConversationDataset, config.Dataset]]


class StepData(lightning.LightningDataModule):
    """Loads whole steps: one item is this rank's share of one optimizer step.

    With every latent cached the workers also pack, and the training process only moves tensors to the device.

    Args:
        expect: told the prompts, by their keys, of each packed step while the step before it is made.
    """

    def __init__(
        self,
        loaded: Loaded,
        opened: Opened,
        packer: Packer,
        device: torch.device,
        expect: Callable[[Iterable[str]], None] | None = None,
    ) -> None:
        super().__init__()
        self.expect = expect
        self.on_gpu = device.type == "cuda"
        self.packer = packer
        self.packs_in_workers = all(
            isinstance(dataset, ConversationDataset) or entry.cache_latents for dataset, entry in opened.values()
        )
        self.experiment = loaded.experiment
        self.mixture = Mixture(opened, self.experiment.training.seed)
        self.first_step = 0

    def train_dataloader(self) -> DataLoader:
        training, data = self.experiment.training, self.experiment.data
        place, places = data_rank(self.experiment.strategy)
        steps = StepDataset(self.mixture, training.samples_per_step, place, places, ENDLESS)
        return _Loader(
            self.expect if self.packs_in_workers else None,
            PackedSteps(steps, self.packer) if self.packs_in_workers else SeenSteps(steps, self.packer.encoder),
            batch_size=None,
            sampler=_StepsFrom(self.first_step),
            num_workers=data.workers,
            persistent_workers=data.workers > 0,
            pin_memory=self.packs_in_workers and data.workers > 0 and self.on_gpu,
            worker_init_fn=ignore_sigterm,
        )


class _Loader(DataLoader[Any]):
    """Where prompts are expected, one step ahead of what it is asked for, and tells them of the step that comes."""

    def __init__(self, expect: Callable[[Iterable[str]], None] | None, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.expect = expect

    def __iter__(self) -> Any:
        steps = super().__iter__()
        return steps if self.expect is None else self._ahead(steps, self.expect)

    @staticmethod
    def _ahead(steps: Iterator[PackedStep], expect: Callable[[Iterable[str]], None]) -> Iterator[PackedStep]:
        before = next(steps)
        expect(_prompts(before))
        while True:
            try:
                step = next(steps)
            except StopIteration:
                yield before
                return
            except Exception:  # of a step that the run may never ask for
                yield before
                raise
            expect(_prompts(step))
            yield before
            before = step


def _prompts(step: PackedStep) -> Iterator[str]:
    return (prompt for pack in step.packs for prompt in pack.prompts)


class _StepsFrom(Sampler[int]):
    """Steps first, first + 1, …"""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, ENDLESS))

    def __len__(self) -> int:
        return ENDLESS - self.first


def heard_task(experiment: config.Experiment) -> str | None:
    """The first task with sound that a dataset of the run names, None where there is none."""
    found = (sound_task(entry.tasks) for entry in experiment.data.datasets.values())
    return next((task for task in found if task is not None), None)


def caches_reasoner(loaded: Loaded) -> bool:
    """Whether the run recalls its prompts' keys and values instead of loading the understanding tower.

    Raises:
        UserError: some datasets ask for it and others need the tower, or the tower trains.
    """
    datasets = loaded.experiment.data.datasets
    first = next((name for name, entry in datasets.items() if entry.cache_reasoner), None)
    if first is None:
        return False
    chosen, obstacle = f"data.datasets.{first}.cache_reasoner is true", reasoner_is_needed(loaded)
    if obstacle:
        raise UserError(f"{chosen}, but {obstacle}; set it to false for every dataset")
    for name, entry in datasets.items():
        if not entry.cache_reasoner:
            raise UserError(
                f"{chosen}, but that of {name} is false, so the understanding tower would be loaded all the same; set "
                "it for all datasets or for none"
            )
    return True


def reasoner_is_needed(loaded: Loaded) -> str | None:
    """Why no cache can take the understanding tower's place in such a run, or None."""
    tuning = loaded.experiment.tuning
    if tuning.trains_understanding:
        what = "tuning.method 'full'" if tuning.method == "full" else "tuning.towers with 'understanding'"
        return f"{what} trains the tower whose keys would be cached"
    for name, entry in loaded.experiment.data.datasets.items():
        if entry.card and load_card(loaded.root / entry.card).format == "conversations":
            return f"{name} holds conversations, which are learnt from the understanding tower itself"
    return None


def without_reasoner_cache(loaded: Loaded) -> Loaded:
    """The same run with its understanding tower loaded, for prompts that no cache holds."""
    experiment = loaded.experiment
    datasets = {name: replace(entry, cache_reasoner=False) for name, entry in experiment.data.datasets.items()}
    return replace(loaded, experiment=replace(experiment, data=replace(experiment.data, datasets=datasets)))


def run_prompts(loaded: Loaded, dataset: PreparedDataset, entry: config.Dataset, encoder: Encoder) -> list[Tensor]:
    """The distinct prompts, int64 [L] each, of a dataset in a run: its windows' and its closed loop's."""
    tasks = [task for task, weight in entry.tasks.items() if weight]
    found = prompts_of(dataset.folder, dataset.contract, tasks, encoder)
    card = dataset.contract
    if isinstance(card, Embodiment) and card.simulator and loaded.experiment.evaluation.closed_loop_episodes:
        height, width, _ = make_simulator(card.simulator, card).reset(0).image.shape
        found.append(encoder.robot_text(dataset.row(0)["instruction"], card, (height, width)))
    return distinct(found)


def open_datasets(loaded: Loaded, encoder: Encoder | None, reasoner: Reasoner | None = None) -> Opened:
    """Prepare what is not prepared yet, and open every dataset of the mixture.

    Args:
        encoder: encodes the latents of datasets that cache them, says in which form sound is read, and counts the
            tokens of conversations; where they show pictures, it is given what reads those.
        reasoner: makes the keys and values of datasets that cache them; None skips that.
    """
    opened: Opened = {
        name: (open_dataset(loaded, name, entry, encoder, reasoner), entry)
        for name, entry in loaded.experiment.data.datasets.items()
    }
    for dataset, entry in opened.values():
        if isinstance(dataset, ConversationDataset):
            dataset.check_trains()
        if entry.statistics is not None:
            other = opened[entry.statistics][0]
            assert isinstance(dataset, PreparedDataset) and isinstance(other, PreparedDataset)
            dataset.use_statistics(other.statistics)
    robots = {
        name: (dataset.embodiment.name, entry, dataset.statistics)
        for name, (dataset, entry) in opened.items()
        if isinstance(dataset, PreparedDataset) and dataset.has_robot
    }
    refuse_two_scales(robots)
    return opened


def refuse_two_scales(robots: Mapping[str, tuple[str, config.Dataset, Statistics]]) -> None:
    """Raise `UserError` where two logs of one robot would train on two scales: when deployed it has one.

    Args:
        robots: by entry of the mixture, the robot's name, the entry, and the statistics that normalise it.
    """
    seen: dict[str, tuple[str, Statistics]] = {}
    for name, (robot, entry, statistics) in robots.items():
        first, other = seen.setdefault(robot, (entry.statistics or name, statistics))
        if other.action != statistics.action:
            raise UserError(
                f"data.datasets.{first} and {name} share embodiment {robot!r}, but each is normalised by its own "
                f"statistics, and a deployed robot has one; set data.datasets.{name}.statistics to {first}, or give "
                "one a card of its own (shares_domain)"
            )


def open_dataset(
    loaded: Loaded, name: str, entry: config.Dataset, encoder: Encoder | None, reasoner: Reasoner | None = None
) -> PreparedDataset | ConversationDataset:
    """One dataset of the mixture, prepared first if it has a card and no prepared folder.

    Args:
        encoder: as of `open_datasets`; None neither encodes nor reads sound.
    """
    data = loaded.experiment.data
    card = load_card(loaded.root / entry.card) if entry.card else None
    if card is not None and card.format == "conversations":
        return _open_conversations(loaded, name, entry, card, encoder)
    embodiment = loaded.experiment.embodiments[entry.embodiment] if entry.embodiment else None
    prepared = loaded.root / entry.prepared
    contract = None if card is None else contract_of(loaded, name, entry, card)
    if entry.cache_latents and encoder is not None:
        weights_digest(encoder.parts.vae)  # by all ranks at once, and not by one after the other behind the lock
    with exclusive(prepared):
        if card is not None:
            assert contract is not None
            prepare(
                card,
                contract,
                _source(loaded, card, entry),
                prepared,
                window_stride=data.window_stride,
                heldout_fraction=data.heldout_fraction,
                workers=max(1, data.workers),
                progress=is_first_rank(),
            )
        source, form = loaded.root / entry.source if entry.source else None, encoder.sound_form if encoder else None
        # Without its caches, which may be another model's until `ensure_latents` has compared them.
        dataset = PreparedDataset(prepared, embodiment, source, form, latents=False)
        heard = sound_task(entry.tasks)
        if heard is not None:
            _tell_silence(name, dataset, entry, heard)
        if entry.cache_latents:
            if encoder is not None:
                ensure_latents(dataset, encoder, data.workers, augment=entry.augment, sound=heard is not None)
            dataset = PreparedDataset(prepared, embodiment, source, form)
        if entry.cache_reasoner and encoder is not None and reasoner is not None:
            ensure_reasoner(prepared, run_prompts(loaded, dataset, entry, encoder), reasoner)
    return dataset


def _open_conversations(
    loaded: Loaded, name: str, entry: config.Dataset, card: DatasetCard, encoder: Encoder | None
) -> ConversationDataset:
    """A set of conversations, those over the token budget left out and counted.

    An index is not made again for pictures that have come where ranks could see other ones, or a run is under way.
    """
    experiment, prepared = loaded.experiment, loaded.root / entry.prepared
    what = f"data.datasets.{name}"
    counter = None if encoder is None else Counter.of(loaded.model, encoder.parts, what)
    with exclusive(prepared):
        dataset = open_conversations(
            card,
            _source(loaded, card, entry),
            prepared,
            heldout_fraction=experiment.data.heldout_fraction,
            measure=counter,
            most_tokens=experiment.training.tokens_per_micro_batch,
            workers=max(1, experiment.data.workers),
            progress=is_first_rank(),
            settled=world_size() > 1 or (loaded.run_folder / DATA).is_file(),
        )
    if encoder is not None and counter is not None and dataset.shows_pictures:
        encoder.sight = counter.needed()
    return dataset


def pictures_in(opened: Opened) -> str | None:
    """The first dataset that shows pictures, in words; None where none does."""
    shown = (
        n for n, (dataset, _) in opened.items() if isinstance(dataset, ConversationDataset) and dataset.shows_pictures
    )
    return next((f"data.datasets.{name}" for name in shown), None)


def _tell_silence(name: str, dataset: PreparedDataset, entry: config.Dataset, heard: str) -> None:
    """Refuse a dataset of which no window has the sound that a task needs, before anything is encoded; and say how many
    windows are left out for want of it."""
    check_entry(name, entry, talks=False, robot=dataset.has_robot)
    windows, usable = dataset.count("train"), len(dataset.sounding("train"))
    if not usable:
        refuse_silence(name, heard, dataset, "train")
    if usable < windows:
        words = "data.datasets.%s: %s of %s training windows have no sound and are left out, since %r needs it"
        logger.info(words, name, f"{windows - usable:,}", f"{windows:,}", heard)


def contract_of(loaded: Loaded, name: str, entry: config.Dataset, card: DatasetCard) -> Embodiment | Clips:
    """What an entry's rows are cut by: the robot's embodiment card, or how video without a robot is cut and framed.

    Raises:
        UserError: a robot's log without its card, video with one, or a value out of range.
    """
    where = f"data.datasets.{name}"
    if card.shows_clips:
        if entry.embodiment:
            raise UserError(f"{where}.embodiment is {entry.embodiment!r}, but {card.format} has no robot; leave it out")
        return card.clips(entry)
    for key in ("frames", "least_frames", "stride", "resolution_tier"):
        if getattr(entry, key) is not None:
            raise UserError(
                f"{where}.{key} is {getattr(entry, key)}, but it is of video without a robot; a robot's embodiment "
                "card says it (chunk, resolution_tier), and data.window_stride"
            )
    if entry.embodiment is None:
        raise UserError(f"{where}.embodiment has no value; a robot log needs its embodiment card")
    return loaded.experiment.embodiments[entry.embodiment]


def _source(loaded: Loaded, card: DatasetCard, entry: config.Dataset) -> Path:
    return loaded.root / entry.source if entry.source else card.source_folder(loaded.root)
