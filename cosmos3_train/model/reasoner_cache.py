"""Keys and values of prompts, computed once instead of at every step, so that training needs no understanding tower.

Text never attends to the generation stream: what the tower leaves behind of a prompt is a function of its token ids
alone. A cache keeps it once for each distinct prompt of a prepared folder, in the run's dtype. It grows by shards that
are whole or not there, so whatever a kill or a new task leaves missing is added later. It is keyed by a fingerprint of
the understanding tower; one of another fingerprint is refused by name, never used.

The tower that makes it runs once and then leaves the device, so nothing of it is ever rounded (`model.base_precision`):
runs on an exact and on a rounded base share a cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from cosmos3_train.config import Clips, Embodiment, Model, UserError, first_line
from cosmos3_train.data.files import write_whole
from cosmos3_train.data.texts import distinct_texts
from cosmos3_train.flow.tasks import CONVERSATION, TASKS
from cosmos3_train.model.base_identity import digest_rows, identify_base
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import DTYPES, load_backbone, make_backbone, model_folder
from cosmos3_train.model.omni import Cosmos3PackedTransformer, Understood, is_understanding
from cosmos3_train.model.packing import Layout, Values, pack, prompt_key
from cosmos3_train.runtime import is_first_rank
from cosmos3_train.types import NoiseLevels, PackedSequence, TokenSample

logger = logging.getLogger(__name__)

FOLDER = Path("caches") / "reasoner"
CARD = "card.json"
EMBEDDING = "embedding"
"""Of a shard's metadata: digests of the token embedding's rows that its prompts read."""
FORMAT = 1

ABANDONED_SECONDS = 24 * 3600
"""Age from which a half-written shard has no writer any more."""

TOKENS_A_SHARD = 2048
"""Text tokens of one forward while writing, which fill one file: 0.3 GB of Nano's keys and values, 0.5 GB of Super's.
A longer prompt comes alone."""

DEVICE_BYTES = 1 << 30
"""Entries that are kept on the device between steps: about 40 of Nano's prompts of 180 tokens. A pack's own entries are
there while it runs, however many they are."""


class Reasoner:
    """A model's understanding tower as far as its keys and values go: their fingerprint, their size, and, loaded when
    they are first asked for, they themselves."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model, self.device = replace(model, base_precision="dtype"), device
        self._tower: Cosmos3PackedTransformer | None = None
        self._rows: dict[int, str] = {}  # a run asks twice for each dataset

    @property
    def name(self) -> str:
        """Of the model, for a card and for whoever reads it."""
        if not self.model.random:
            return self.model.path
        sizes = ", ".join(f"{key} {value}" for key, value in self.model.random.items())
        return f"random weights ({sizes}; random_seed {self.model.random_seed}, {self.device.type})"

    @cached_property
    def fingerprint(self) -> str:
        """Of what they depend on: the tower's weights, the configuration and the dtype; and `embedding_rows`."""
        if self.model.random:  # drawn on the device, by its kind's own generator
            weights: Any = [dict(self.model.random), self.model.random_seed, self.device.type]
        else:
            found = identify_base(model_folder(self.model), only=_makes_keys)
            weights = [found.config, found.weights]
        content = json.dumps([FORMAT, self.model.dtype, weights], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def embedding_rows(self, tokens: Iterable[int]) -> dict[str, str]:
        """A digest of the embedding's row of each token. The fingerprint looks at few of them, and training may change
        some alone; random weights change with their seed, which it knows."""
        if self.model.random:
            return {}
        wanted = set(tokens)
        new = wanted - self._rows.keys()
        self._rows |= digest_rows(model_folder(self.model), "embed_tokens.weight", new) if new else {}
        return {str(token): self._rows[token] for token in wanted}

    @cached_property
    def bytes_a_token(self) -> int:
        """layers × 2 × key heads × head width, in the dtype."""
        with init_empty_weights():
            config: Any = make_backbone(model_folder(self.model) / "transformer", self.model).config
        numbers = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        return numbers * DTYPES[self.model.dtype].itemsize

    @torch.no_grad()
    def keys_values(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """[layers, 2, L, key heads, head width] on the CPU of each prompt int64 [L], of one forward.

        Raises:
            UserError: the checkpoint's files are missing or damaged.
        """
        if self._tower is None:
            plain = replace(self.model, compile=False, checkpoint_activations=False)
            self._tower = load_backbone(plain, self.device, text_logits=False, towers="understanding").eval()
        samples = [TokenSample("", place, CONVERSATION, text) for place, text in enumerate(prompts)]
        still = [NoiseLevels(0.0, 0.0, 0.0)] * len(samples)
        packed = pack(samples, [Values()] * len(samples), still, Layout.of(self._tower.config))
        understood = self._tower.understand(packed.to(self.device))
        together = torch.stack([torch.stack(pair) for pair in understood.keys_values])
        return [part.cpu().contiguous() for part in together.split(packed.text_spans.lengths, dim=2)]

    def release(self) -> None:
        """Give the tower's memory back."""
        self._tower = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _makes_keys(name: str) -> bool:
    return (is_understanding(name) and not name.startswith("lm_head.")) or "k_norm_und_for_gen" in name


# ------------------------------------------------------------------------------------------------ on disk


@dataclass(frozen=True)
class ReasonerCache:
    """A prepared folder's cache: `card.json` and shards, in each a tensor [layers, 2, L, key heads, head width] for a
    prompt, by its key.

    places: prompt key → shard
    """

    folder: Path
    fingerprint: str
    places: dict[str, Path]

    @staticmethod
    def open(prepared: Path, reasoner: Reasoner) -> ReasonerCache | None:
        """The cache of a prepared folder, None where there is none.

        Raises:
            UserError: it is another model's, or its card or a shard cannot be read.
        """
        folder = prepared / FOLDER
        if not (folder / CARD).exists() and not any(folder.glob("*.safetensors")):
            return None  # nothing, or what a kill left of the first card
        fingerprint, made_of = _read_card(folder)
        if fingerprint != reasoner.fingerprint:
            raise UserError(
                f"{folder}: these keys and values are of {made_of} (fingerprint {fingerprint[:12]}), not of "
                f"{_in_words(reasoner.name, reasoner.model.dtype)} ({reasoner.fingerprint[:12]}); delete the folder, "
                f"or set cache_reasoner to false"
            )
        places: dict[str, Path] = {}
        embedding: set[tuple[str, str]] = set()
        for shard in sorted(folder.glob("*.safetensors")):
            with _opened(shard) as file:
                told = file.metadata() or {}
                if told.get("fingerprint") != fingerprint:
                    raise UserError(f"{shard}: of another model than {folder / CARD} says; delete {folder}")
                embedding.update(json.loads(told.get(EMBEDDING, "{}")).items())
                places.update(dict.fromkeys(file.keys(), shard))
        changed = embedding - reasoner.embedding_rows(int(token) for token, _ in embedding).items()
        if changed:
            raise UserError(
                f"{folder}: since these keys and values were made of {made_of}, {len(changed)} of its token "
                "embedding's rows have changed; delete the folder, or set cache_reasoner to false"
            )
        return ReasonerCache(folder, fingerprint, places)

    def read(self, key: str) -> Tensor:
        """[layers, 2, L, key heads, head width] on the CPU.

        Raises:
            UserError: the shard is missing or corrupt.
        """
        with _opened(self.places[key]) as file:
            return file.get_tensor(key)


def _read_card(folder: Path) -> tuple[str, str]:
    """(fingerprint, of what in words)."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        return str(card["fingerprint"]), _in_words(card["model"], card["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD}: not a card of cached keys and values ({error!r}); delete {folder}") from None


def _in_words(name: str, dtype: str) -> str:
    return f"{name!r} in {dtype}"


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{shard}: cached keys and values are missing or corrupt ({reason}); delete the file") from None


def prompts_of(prepared: Path, contract: Embodiment | Clips, tasks: Iterable[str], encoder: Encoder) -> list[Tensor]:
    """The distinct prompts, int64 [L] each, that the windows of a prepared folder have in these tasks, and the one that
    stands for a dropped caption."""
    found = [encoder.dropped_text()]
    for text in distinct_texts(prepared):
        for task in tasks:
            frames = 1 if TASKS[task].image else text.frames
            found.append(
                encoder.text(task, text.instruction, contract, text.size, frames, text.fps, text.sound_caption)
            )
    return distinct(found)


def distinct(prompts: Iterable[Tensor]) -> list[Tensor]:
    """Each of the prompts once, in their order."""
    return list({prompt_key(prompt): prompt for prompt in prompts}.values())


def missing_prompts(prepared: Path, prompts: Sequence[Tensor], reasoner: Reasoner) -> list[Tensor]:
    """Those of the prompts that the folder's cache does not hold.

    Raises:
        UserError: as `ReasonerCache.open`.
    """
    cache = ReasonerCache.open(prepared, reasoner)
    return [prompt for prompt in prompts if cache is None or prompt_key(prompt) not in cache.places]


def ensure_reasoner(prepared: Path, prompts: Sequence[Tensor], reasoner: Reasoner, progress: bool = True) -> None:
    """Add to a prepared folder's cache what it lacks of the prompts. Finished shards stay after a kill.

    Raises:
        UserError: the folder has another model's cache, or the disk does not hold it.
    """
    missing = missing_prompts(prepared, prompts, reasoner)
    if not missing:
        return
    folder = prepared / FOLDER
    tokens = sum(prompt.numel() for prompt in missing)
    needed, free = tokens * reasoner.bytes_a_token, shutil.disk_usage(prepared).free
    words = f"keys and values of {len(missing):,} prompts, {tokens:,} tokens of {reasoner.bytes_a_token / 1024:.4g} KiB"
    if needed > free:
        raise UserError(
            f"{folder}: {words} need {size_in_words(needed)} and {size_in_words(free)} are free; free some space, or "
            "set cache_reasoner to false"
        )
    logger.info("%s: %s, %s", folder, words, size_in_words(needed))
    description = {"fingerprint": reasoner.fingerprint, "model": reasoner.name, "dtype": reasoner.model.dtype}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CARD, (json.dumps(description, indent=2) + "\n").encode())
        show = progress and is_first_rank()
        with tqdm(total=len(missing), desc=f"understand {prepared.name}", unit="prompt", disable=not show) as bar:
            for few in _in_shards(missing):
                keys = [prompt_key(prompt) for prompt in few]
                tensors = dict(zip(keys, reasoner.keys_values(few), strict=True))
                name = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
                beside = folder / f"{name}.{os.getpid()}.partial"
                rows = reasoner.embedding_rows(torch.cat(few).unique().tolist())
                save_file(tensors, beside, {"fingerprint": reasoner.fingerprint, EMBEDDING: json.dumps(rows)})
                beside.rename(folder / f"{name}.safetensors")
                bar.update(len(few))
        for stale in folder.glob("*.partial"):  # a killed writer's; another's that is at work is left alone
            if time.time() - stale.stat().st_mtime > ABANDONED_SECONDS:
                stale.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for a full disk
        raise UserError(f"{folder}: the keys and values could not be written ({error}); free some space") from error


def _in_shards(prompts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    few: list[Tensor] = []
    for prompt in prompts:
        if few and sum(p.numel() for p in few) + prompt.numel() > TOKENS_A_SHARD:
            yield few
            few = []
        few.append(prompt)
    if few:
        yield few


def size_in_words(count: float) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------------------ in the step


class CachedPrompts:
    """A backbone's `recall`: what the understanding tower left behind of a pack's text, from caches on disk.

    Prompts that are alike stand once among the keys, and the joint order says whose they are. So a pack of one
    instruction copies nothing: its entry stays on the device, among those used last. Where instructions are many, a
    step of Nano reads 0.4 GB that the device does not hold, on a thread that is told of them while the step before it
    is made.

    Args:
        caches: of the run's prepared folders.
        hidden_size: of the backbone;  dtype: that it computes in.
        device_bytes: of entries that are kept on the device between packs.
    """

    def __init__(
        self,
        caches: Sequence[ReasonerCache],
        hidden_size: int,
        dtype: torch.dtype,
        device_bytes: int = DEVICE_BYTES,
    ) -> None:
        self.caches, self.hidden_size, self.dtype, self.device_bytes = caches, hidden_size, dtype, device_bytes
        self._kept: OrderedDict[tuple[str, torch.device], Tensor] = OrderedDict()
        self._coming: dict[tuple[str, torch.device], Future[Tensor]] = {}
        self._wanted: set[tuple[str, torch.device]] = set()
        self._reader = ThreadPoolExecutor(1, "reasoner-cache")

    def __call__(self, pack: PackedSequence) -> Understood:
        """Keys and values of the pack's prompts on its device.

        Raises:
            UserError: a prompt is in no cache; says how many tokens it has, and the remedy.
        """
        assert not pack.text_out.numel(), "text that is learnt needs the understanding tower"
        device, lengths = pack.text_ids.device, dict(zip(pack.prompts, pack.text_spans.lengths, strict=True))
        entries = [self._entry(key, length, device) for key, length in lengths.items()]
        joined = entries[0] if len(entries) == 1 else torch.cat(entries, dim=2)
        return Understood(
            keys_values=[(pair[0], pair[1]) for pair in joined.unbind()],
            text_hidden=torch.zeros((0, self.hidden_size), dtype=self.dtype, device=device),
            joint_order=None if len(entries) == pack.samples else _joint_order(pack, lengths),
        )

    def expect(self, prompts: Iterable[str], device: torch.device) -> None:
        """Begin to read the entries of prompts, by their keys, that the next step will ask for on a device; those that
        are there stay."""
        self._wanted = {(key, device) for key in prompts}
        for place in self._wanted - self._kept.keys():
            key, cache = place[0], self._cache_of(place[0])
            if place not in self._coming and cache is not None:
                self._coming[place] = self._reader.submit(_read, cache, key, device)

    def _entry(self, key: str, length: int, device: torch.device) -> Tensor:
        place = (key, device)
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        cache, coming = self._cache_of(key), self._coming.pop(place, None)
        if cache is None:
            folders = ", ".join(str(cache.folder) for cache in self.caches)
            raise UserError(
                f"a prompt of {length} tokens is in no reasoner cache ({folders}), and "
                "the understanding tower is not loaded; set cache_reasoner to false for every dataset"
            )
        entry = _read(cache, key, device) if coming is None else coming.result()
        entry = self._kept[place] = entry.to(device, non_blocking=True)
        total = sum(kept.nbytes for kept in self._kept.values())
        for old in [kept for kept in self._kept if kept not in self._wanted and kept != place]:
            if total <= self.device_bytes:
                break
            total -= self._kept.pop(old).nbytes
        return entry

    def _cache_of(self, key: str) -> ReasonerCache | None:
        return next((cache for cache in self.caches if key in cache.places), None)


def _read(cache: ReasonerCache, key: str, device: torch.device) -> Tensor:
    """An entry on the CPU. Its way to a GPU is from page-locked memory: from any other it would be waited for, and all
    that is queued before it."""
    entry = cache.read(key)
    if device.type != "cuda":
        return entry
    with torch.cuda.device(device):
        return entry.pin_memory()


def _joint_order(pack: PackedSequence, lengths: dict[str, int]) -> Tensor:
    """The pack's joint order for keys in which each distinct prompt stands once, in the order of `lengths`."""
    starts, total = {}, 0
    for key, length in lengths.items():
        starts[key] = total
        total += length
    rows = torch.cat([torch.arange(starts[key], starts[key] + lengths[key]) for key in pack.prompts])
    text, order = rows.numel(), pack.joint_order
    shared = rows.to(order.device, non_blocking=True).index_select(0, order.clamp(max=text - 1))
    return torch.where(order < text, shared, order - (text - total))


def remember(backbone: Cosmos3PackedTransformer, caches: Sequence[ReasonerCache]) -> None:
    """Let a backbone without its understanding tower recall what the tower would say from caches."""
    config = cast(Any, backbone.config)
    backbone.recall = CachedPrompts(caches, config.hidden_size, backbone.compute_dtype)
    backbone.understanding_trains = False
