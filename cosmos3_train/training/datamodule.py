"""The run's data: prepared where it is missing, opened, mixed, and loaded from the step where the run stands."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning
from torch.utils.data import DataLoader, Sampler

from cosmos3_train import config
from cosmos3_train.config import Loaded, UserError
from cosmos3_train.data.card import DatasetCard, load_card
from cosmos3_train.data.conversations import ConversationDataset
from cosmos3_train.data.mixture import Mixture, StepDataset
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.model.caches import ensure_latents
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.runtime import ignore_sigterm, is_first_rank, rank, world_size
from cosmos3_train.training.batching import PackedSteps, Packer

logger = logging.getLogger(__name__)

ENDLESS = 1 << 40
"""Steps in the loader's order; the run ends when the module has made its own."""

Opened = dict[str, tuple[PreparedDataset | ConversationDataset, config.Dataset]]


class StepData(lightning.LightningDataModule):
    """Loads whole steps: one item is this rank's share of one optimizer step.

    With every latent cached the workers also pack, and the training process only moves tensors to the device.
    """

    def __init__(self, loaded: Loaded, opened: Opened, packer: Packer) -> None:
        super().__init__()
        self.packer = packer
        self.packs_in_workers = all(
            isinstance(dataset, ConversationDataset) or entry.cache_latents for dataset, entry in opened.values()
        )
        self.experiment = loaded.experiment
        self.mixture = Mixture(opened, self.experiment.training.seed)
        self.first_step = 0

    def train_dataloader(self) -> DataLoader:
        training, data = self.experiment.training, self.experiment.data
        steps = StepDataset(self.mixture, training.samples_per_step, rank(), world_size(), ENDLESS)
        return DataLoader(
            PackedSteps(steps, self.packer) if self.packs_in_workers else steps,
            batch_size=None,
            sampler=_StepsFrom(self.first_step),
            num_workers=data.workers,
            persistent_workers=data.workers > 0,
            worker_init_fn=ignore_sigterm,
        )


class _StepsFrom(Sampler[int]):
    """Steps first, first + 1, …"""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, ENDLESS))

    def __len__(self) -> int:
        return ENDLESS - self.first


def open_datasets(loaded: Loaded, encoder: Encoder | None) -> Opened:
    """Prepare what is not prepared yet, and open every dataset of the mixture.

    Args:
        encoder: encodes the latents of datasets that cache them; None skips that (`cosmos3 check`).
    """
    opened: Opened = {
        name: (open_dataset(loaded, name, entry, encoder), entry)
        for name, entry in loaded.experiment.data.datasets.items()
    }
    _refuse_two_scales(opened)
    return opened


def _refuse_two_scales(opened: Opened) -> None:
    """A deployed robot's actions are de-normalised by one file; two logs of it would train on two scales."""
    seen: dict[str, tuple[str, PreparedDataset]] = {}
    for name, (dataset, _) in opened.items():
        if isinstance(dataset, PreparedDataset):
            first, other = seen.setdefault(dataset.embodiment.name, (name, dataset))
            if other.statistics.action != dataset.statistics.action:
                raise UserError(
                    f"data.datasets.{first} and {name} share embodiment {dataset.embodiment.name!r}, but each is "
                    f"normalised by its own statistics, and a deployed robot has one; give one a card of its own "
                    f"(shares_domain), or prepare both logs as one"
                )


def open_dataset(
    loaded: Loaded, name: str, entry: config.Dataset, encoder: Encoder | None
) -> PreparedDataset | ConversationDataset:
    """One dataset of the mixture, prepared first if it has a card and no prepared folder."""
    data = loaded.experiment.data
    card = load_card(loaded.root / entry.card) if entry.card else None
    if card is not None and card.format == "conversations":
        return ConversationDataset(_source(loaded, card, entry), heldout_fraction=data.heldout_fraction)
    embodiment = loaded.experiment.embodiments[entry.embodiment] if entry.embodiment else None
    prepared = loaded.root / entry.prepared
    with _exclusive(prepared):
        if card is not None:
            if embodiment is None:
                raise UserError(f"data.datasets.{name}.embodiment has no value; a robot log needs its embodiment card")
            prepare(
                card,
                embodiment,
                _source(loaded, card, entry),
                prepared,
                window_stride=data.window_stride,
                heldout_fraction=data.heldout_fraction,
                workers=max(1, data.workers),
                progress=is_first_rank(),
            )
        dataset = PreparedDataset(prepared, embodiment, loaded.root / entry.source if entry.source else None)
        if entry.cache_latents and encoder is not None:
            ensure_latents(dataset, encoder, data.workers)
            dataset = PreparedDataset(prepared, embodiment, loaded.root / entry.source if entry.source else None)
    return dataset


def _source(loaded: Loaded, card: DatasetCard, entry: config.Dataset) -> Path:
    return loaded.root / entry.source if entry.source else card.source_folder(loaded.root)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process of this machine prepares a folder at a time; the others find it done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
