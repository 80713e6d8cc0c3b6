"""Latents of every window, encoded once while preparing instead of at every step; of each a few variants, where frames
are augmented.

A cache is keyed by a fingerprint of what made it: the video tokenizer's weights and dtype, and the prepared folder.
One of another fingerprint is refused by name, never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cosmos3_train.config import Augment, UserError
from cosmos3_train.data.augment import augmented
from cosmos3_train.data.reader import LatentCache, PreparedDataset
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.runtime import fold, ignore_sigterm, is_first_rank

logger = logging.getLogger(__name__)

SHARD = 256
"""Windows a file: a policy window at the 256 tier is about 0.25 MB in bf16."""

BATCH = 64
"""Windows read at a time for a GPU, which encodes as many of them at once as it holds. On a CPU the loader's workers
encode one each: a core a clip, no waiting."""


@dataclass(frozen=True)
class Variant:
    """Number 0 is a window as it is; another one is changed by `augment`, alike for every run that caches it."""

    number: int = 0
    augment: Augment = field(default_factory=Augment)

    def change(self, row: int) -> Callable[[Tensor], Tensor] | None:
        """What the frames of a row go through."""
        if not self.number:
            return None
        return partial(augmented, settings=self.augment, key=fold(0, "variant", self.number, row))


def latent_fingerprint(vae: AutoencoderKLWan, dataset: PreparedDataset, variant: Variant) -> str:
    """Of everything that a latent depends on: weights, dtype, normalisation, the prepared rows, and their changes."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(dataset.fingerprint.encode())
    if variant.number:
        digest.update(repr(replace(variant, augment=replace(variant.augment, variants=0))).encode())
    config = cast(Any, vae.config)
    digest.update(json.dumps([str(vae.dtype), config.latents_mean, config.latents_std]).encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


CLIPS = 4
"""The same of video without a robot, whose windows are hundreds of megabytes each."""


class _Rows(Dataset[Tensor]):
    """Frames of every row, uint8 [T, 3, H, W], as they are or as a variant; their latents instead where an encoder is
    given."""

    def __init__(self, dataset: PreparedDataset, encoder: Encoder | None, variant: Variant) -> None:
        self.dataset, self.encoder, self.variant = dataset, encoder, variant

    def __len__(self) -> int:
        return self.dataset.rows

    def __getitem__(self, row: int) -> Tensor:
        frames = self.dataset.frames(self.dataset.row(row), change=self.variant.change(row))
        return frames if self.encoder is None else self.encoder.encode_frames([frames], self.dataset.contract)[0]


def ensure_latents(
    dataset: PreparedDataset,
    encoder: Encoder,
    workers: int = 0,
    progress: bool = True,
    variant: Variant = Variant(),
) -> None:
    """Write the latent cache of a prepared folder, or check that the one there is this model's.

    Finished shards stay after a kill and are not made again.

    Args:
        workers: processes that decode video.
        variant: which of the cached latents of each window.

    Raises:
        UserError: the folder has another model's latents, or the disk is full.
    """
    fingerprint = latent_fingerprint(encoder.parts.vae, dataset, variant)
    folder, cache = LatentCache.place(dataset.folder, variant.number), dataset.latents(variant.number)
    if cache is not None:
        if cache.fingerprint != fingerprint:
            changed = " or another augmentation" if variant.number else ""
            raise UserError(
                f"{folder}: these latents are of another video tokenizer or of other rows{changed}; delete the folder, "
                "or set cache_latents to false"
            )
        return
    partial_folder = folder.with_name(f"latents.partial-{fingerprint[:12]}")
    try:
        partial_folder.mkdir(parents=True, exist_ok=True)
        _write_shards(dataset, encoder, partial_folder, workers, progress and is_first_rank(), variant)
        card = {"fingerprint": fingerprint, "windows": dataset.rows, "shard": SHARD}
        (partial_folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for a full disk
        raise UserError(f"{partial_folder}: the latents could not be written ({error}); free some space") from error
    for stale in folder.parent.glob("latents.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _write_shards(
    dataset: PreparedDataset, encoder: Encoder, folder: Path, workers: int, progress: bool, variant: Variant
) -> None:
    vae = encoder.parts.vae
    on_cpu = vae.device.type == "cpu"
    batch = 1 if on_cpu else BATCH if dataset.has_robot else CLIPS
    with tqdm(total=dataset.rows, desc=f"encode {dataset.name}", unit="window", disable=not progress) as bar:
        missing: list[list[int]] = []
        for first in range(0, dataset.rows, SHARD):
            rows = list(range(first, min(first + SHARD, dataset.rows)))
            if (folder / f"{first // SHARD:05d}.safetensors").is_file():
                bar.update(len(rows))
            else:
                missing += [rows[place : place + batch] for place in range(0, len(rows), batch)]
        loader = DataLoader(
            _Rows(dataset, encoder if on_cpu else None, variant),
            batch_sampler=missing,
            num_workers=max(1, workers) if on_cpu else workers,
            collate_fn=list,
            worker_init_fn=ignore_sigterm,
        )
        tensors: dict[str, Tensor] = {}
        for rows, read in zip(missing, loader, strict=True):
            latents = read if on_cpu else _encode_by_size(encoder, read, dataset)
            tensors |= {str(row): x.to(vae.dtype).contiguous() for row, x in zip(rows, latents, strict=True)}
            bar.update(len(rows))
            if rows[-1] == dataset.rows - 1 or (rows[-1] + 1) % SHARD == 0:
                file = folder / f"{rows[-1] // SHARD:05d}.safetensors"
                beside = file.with_suffix(".partial")
                save_file(tensors, beside)
                beside.rename(file)
                tensors = {}


def _encode_by_size(encoder: Encoder, clips: Sequence[Tensor], dataset: PreparedDataset) -> list[Tensor]:
    """Latents of clips in their order; those of one size pass together."""
    found: dict[int, Tensor] = {}
    for shape in {tuple(clip.shape) for clip in clips}:
        places = [place for place, clip in enumerate(clips) if tuple(clip.shape) == shape]
        latents = encoder.encode_frames([clips[place] for place in places], dataset.contract)
        found.update(zip(places, latents, strict=True))
    return [found[place] for place in range(len(clips))]
