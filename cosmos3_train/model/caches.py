"""Latents of every window and of its sound, encoded once while preparing instead of at every step; where frames are
augmented, of several variants of each window.

A cache is keyed by a fingerprint of what made it: the tokenizer's weights and dtype, and the prepared folder. One of
another fingerprint is refused by name, never used. Sound has a cache of its own, of the windows that have it, one for
all variants; what is kept of a sound is its latent's mean and standard deviation, from which every sample draws anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cosmos3_train.config import Augment, UserError
from cosmos3_train.data.augment import augmented
from cosmos3_train.data.reader import SOUND_LATENTS, LatentCache, PreparedDataset, latents_place
from cosmos3_train.model.encoders import PIXELS_AT_ONCE, Encoder
from cosmos3_train.model.tokenizers import latents_dtype
from cosmos3_train.runtime import fold, ignore_sigterm, is_first_rank

logger = logging.getLogger(__name__)

SHARD = 256
"""Windows a file: a policy window at the 256 tier is about 0.25 MB in bf16."""

READ_AT_ONCE = 8 * PIXELS_AT_ONCE
"""Bytes of frames that a worker reads at a time for a GPU: 64 policy windows of the 256 tier, or one clip of the 720.
On a CPU the loader's workers encode a window each: a core a clip, no waiting."""

UNCHANGED = Augment()


def latent_fingerprint(vae: AutoencoderKLWan, dataset: PreparedDataset, variant: int, augment: Augment) -> str:
    """Of everything that a latent depends on: weights, dtype, normalisation, the prepared rows, and their changes."""
    config = cast(Any, vae.config)
    settings = [str(latents_dtype(vae)), config.latents_mean, config.latents_std]
    if variant:
        settings += [variant, asdict(augment) | {"variants": None}]  # how many there are changes none of them
    return _fingerprint(dataset, settings, vae)


def sound_fingerprint(tokenizer: Cosmos3AVAEAudioTokenizer, dataset: PreparedDataset) -> str:
    """The same of the latent of a sound: the encoder's weights, the configuration, and the prepared rows."""
    settings = [str(latents_dtype(tokenizer)), {key: value for key, value in tokenizer.config.items() if key[0] != "_"}]
    return _fingerprint(dataset, settings, cast(nn.Module, tokenizer.encoder))


def _fingerprint(dataset: PreparedDataset, settings: Sequence[Any], weights: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(dataset.fingerprint.encode())
    digest.update(json.dumps(settings).encode())
    digest.update(weights_digest(weights))
    return digest.hexdigest()


_digests: weakref.WeakKeyDictionary[nn.Module, bytes] = weakref.WeakKeyDictionary()


def weights_digest(module: nn.Module) -> bytes:
    """Of all weights of a tokenizer, which nobody changes while a process lasts: of a large one it takes seconds, so it
    is computed once."""
    if module not in _digests:
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
        _digests[module] = digest.digest()
    return _digests[module]


@dataclass(frozen=True)
class _Kind:
    """What one cache is made of.

    place:  in the prepared folder;  what: for messages and the bar;  source: what made it;  made_by: the one that does
    rows:   that have it, rising
    read:   of a row, what is encoded;  encode: several of these, in their order
    batch:  rows that a worker reads at a time for a GPU
    """

    place: Path
    what: str
    source: str
    made_by: str
    fingerprint: str
    dtype: torch.dtype
    on_cpu: bool
    rows: Sequence[int]
    read: Callable[[int], Tensor]
    encode: Callable[[Sequence[Tensor]], list[Tensor]]
    batch: int


class _Rows(Dataset[Tensor]):
    """What is read of every row; its latent instead where `encodes`."""

    def __init__(self, kind: _Kind, count: int, encodes: bool) -> None:
        self.kind, self.count, self.encodes = kind, count, encodes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Tensor:
        read = self.kind.read(row)
        return self.kind.encode([read])[0] if self.encodes else read


def ensure_latents(
    dataset: PreparedDataset,
    encoder: Encoder,
    workers: int = 0,
    progress: bool = True,
    *,
    augment: Augment = UNCHANGED,
    sound: bool = False,
) -> None:
    """Write the latent caches of a prepared folder, or check that those there are this model's.

    Finished shards stay after a kill and are not made again.

    Args:
        workers: processes that decode video.
        augment: makes its `variants`; with none there are the latents of the windows as they are.
        sound: also the latents of their sound.

    Raises:
        UserError: the folder has latents of another model or augmentation, or the disk is full.
    """
    for variant in range(max(1, augment.variants)):
        _ensure(dataset, _of_frames(dataset, encoder, variant, augment), workers, progress)
    if sound:
        _ensure(dataset, _of_sound(dataset, encoder), workers, progress)


def _of_frames(dataset: PreparedDataset, encoder: Encoder, variant: int, augment: Augment) -> _Kind:
    """Variant 0 is a window as it is; another one is changed by `augment`, alike for every run that caches it."""
    vae = encoder.parts.vae

    def read(row: int) -> Tensor:
        change = partial(augmented, settings=augment, key=fold(0, "variant", variant, row)) if variant else None
        return dataset.frames(dataset.row(row), change=change)

    return _Kind(
        place=latents_place(variant),
        what=f"latents (variant {variant})" if variant else "latents",
        source="video tokenizer, another augmentation" if variant else "video tokenizer",
        made_by=_in_words(vae),
        fingerprint=latent_fingerprint(vae, dataset, variant, augment),
        dtype=latents_dtype(vae),
        on_cpu=vae.device.type == "cpu",
        rows=range(dataset.rows),
        read=read,
        encode=lambda clips: _encode_by_size(encoder, clips, dataset),
        batch=max(1, READ_AT_ONCE // _largest_window(dataset)),
    )


def _largest_window(dataset: PreparedDataset) -> int:
    """Bytes of a window's frames, by the first row: sizes of one log are alike, and of clips those of one tier."""
    row = dataset.row(0)
    return dataset.contract.frames * 3 * row["height"] * row["width"]


def _of_sound(dataset: PreparedDataset, encoder: Encoder) -> _Kind:
    tokenizer = encoder.parts.sound_tokenizer
    assert tokenizer is not None, "the parts have no sound tokenizer"
    return _Kind(
        place=SOUND_LATENTS,
        what="latents (sound)",
        source="sound tokenizer",
        made_by=_in_words(tokenizer),
        fingerprint=sound_fingerprint(tokenizer, dataset),
        dtype=latents_dtype(tokenizer),
        on_cpu=tokenizer.device.type == "cpu",
        rows=[row for row in range(dataset.rows) if dataset.has_sound(row)],
        read=lambda row: dataset.waveform(dataset.row(row)),
        encode=lambda waveforms: [encoder.encode_sound(waveform) for waveform in waveforms],
        batch=1,
    )


def _ensure(dataset: PreparedDataset, kind: _Kind, workers: int, progress: bool) -> None:
    there = LatentCache.open(dataset.folder, dataset.rows, kind.place)
    if there is not None and there.fingerprint != kind.fingerprint:
        names = f" ({there.made_by}, not {kind.made_by})" if there.made_by not in ("", kind.made_by) else ""
        raise UserError(
            f"{there.folder}: these {kind.what} are of another {kind.source}{names} or of other rows; delete the "
            "folder, or set cache_latents to false"
        )
    folder = dataset.folder / kind.place
    begun = folder if there is not None else folder.with_name(f"{folder.name}.partial-{kind.fingerprint[:12]}")
    missing = _missing_shards(kind, begun)
    if there is not None and not missing:
        return
    try:
        begun.mkdir(parents=True, exist_ok=True)
        _write_shards(dataset, kind, missing, begun, workers, progress and is_first_rank())
        if there is None:
            LatentCache(begun, kind.fingerprint, dataset.rows, SHARD, kind.made_by).write_card()
            shutil.rmtree(folder, ignore_errors=True)
            begun.rename(folder)
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for a full disk
        raise UserError(f"{begun}: the latents could not be written ({error}); free some space") from error
    for stale in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _in_words(tokenizer: AutoencoderKLWan | Cosmos3AVAEAudioTokenizer) -> str:
    name = str(tokenizer.config.get("_name_or_path", "")) or type(tokenizer).__name__
    return f"{name!r} in {str(latents_dtype(tokenizer)).removeprefix('torch.')}"


def _missing_shards(kind: _Kind, folder: Path) -> dict[int, list[int]]:
    """Shards that a folder lacks, and the rows that go into them."""
    present = {file.name for file in folder.glob("*.safetensors")}  # one look, however many there are
    shards: dict[int, list[int]] = {}
    for row in kind.rows:
        shards.setdefault(row // SHARD, []).append(row)
    return {shard: rows for shard, rows in shards.items() if LatentCache.shard_file(folder, shard).name not in present}


def _write_shards(
    dataset: PreparedDataset,
    kind: _Kind,
    shards: Mapping[int, list[int]],
    folder: Path,
    workers: int,
    progress: bool,
) -> None:
    batch, total = 1 if kind.on_cpu else kind.batch, len(kind.rows)
    done, words = total - sum(map(len, shards.values())), f"{kind.what} of {dataset.name}"
    with tqdm(total=total, initial=done, desc=words, unit="window", disable=not progress) as bar:
        few = [rows[place : place + batch] for rows in shards.values() for place in range(0, len(rows), batch)]
        loader = DataLoader(
            _Rows(kind, dataset.rows, encodes=kind.on_cpu),
            batch_sampler=few,
            num_workers=max(1, workers) if kind.on_cpu else workers,
            collate_fn=list,
            worker_init_fn=ignore_sigterm,
        )
        tensors: dict[str, Tensor] = {}
        for rows, read in zip(few, loader, strict=True):
            latents = read if kind.on_cpu else kind.encode(read)
            tensors |= {str(row): x.to(kind.dtype).contiguous() for row, x in zip(rows, latents, strict=True)}
            bar.update(len(rows))
            shard = rows[-1] // SHARD
            if rows[-1] == shards[shard][-1]:
                file = LatentCache.shard_file(folder, shard)
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
