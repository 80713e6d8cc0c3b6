"""How many windows a second one process of the loader delivers: from cached latents, and decoding video.

The log is a benchmark's own (`benchmark_log`), read in the order of training; its latents are drawn at random, for
reading them costs the same. Everything runs on one thread, as in the loader's workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors.torch import save_file

from cosmos3_train.config import Augment, Loaded
from cosmos3_train.data.mixture import Mixture
from cosmos3_train.data.reader import LATENTS, LatentCache, PreparedDataset
from cosmos3_train.model.caches import SHARD
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_parts, make_backbone, model_folder
from cosmos3_train.model.packing import Layout
from cosmos3_train.training.batching import Packer
from cosmos3_train.training.benchmark_log import ensure_benchmark_data, only_dataset, only_task
from cosmos3_train.types import StepBatch

AUGMENT = Augment(crop=0.95, brightness=0.2, contrast=0.2, saturation=0.2)
JUDGED = (17, 256, 256)
"""(frames, H, W) of the windows for which the numbers below are wanted: those of `benchmark_policy256`."""
WARM_UP = 8
"""Calls before those that are measured: files are opened, and prompts of the one instruction are built."""


@dataclass(frozen=True)
class LoaderRate:
    """One way of reading.

    windows:  that were read;  a_second: of them, by the clock
    a_core:   by the processor's time, which other work on the machine slows less
    wanted:   so that the loader is never what a GPU waits for, None where nobody has said; `by`: of `a_second` or
              `a_core`
    """

    way: str
    windows: int
    a_second: float
    a_core: float
    wanted: float | None
    by: str

    @property
    def enough(self) -> bool | None:
        """Whether it is reached, None where nothing is wanted."""
        return None if self.wanted is None else (self.a_second if self.by == "a_second" else self.a_core) >= self.wanted

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def measure_loader(loaded: Loaded) -> list[LoaderRate]:
    """Make the data, and read windows of it in each way.

    Raises:
        UserError: the experiment is no benchmark.
    """
    entry = only_dataset(loaded.experiment)
    only_task(entry)
    entry = replace(entry, prepared=f"{entry.prepared}_loader")
    data = replace(loaded.experiment.data, datasets={"made": entry})
    loaded = replace(loaded, experiment=replace(loaded.experiment, data=data))
    ensure_benchmark_data(loaded)
    experiment, robot = loaded.experiment, loaded.experiment.embodiments[entry.embodiment or ""]
    dataset = PreparedDataset(loaded.root / entry.prepared, robot)
    with torch.device("meta"):
        layout = Layout.of(make_backbone(model_folder(loaded.model) / "transformer", loaded.model).config)
    _draw_latents(dataset, layout.channels)
    dataset = PreparedDataset(dataset.folder, robot)
    encoder = Encoder(load_parts(loaded.model, torch.device("cpu"), vae_weights=False), experiment.embodiments)
    training = experiment.training
    packer = Packer(encoder, layout, experiment.objective, training.tokens_per_micro_batch, training.seed)

    cached, decoded, changed = (
        Mixture({"made": (dataset, replace(entry, cache_latents=latents, augment=augment))}, training.seed)
        for latents, augment in ((True, Augment()), (False, Augment()), (False, AUGMENT))
    )
    step, seconds = training.samples_per_step, experiment.benchmark.loader_seconds

    benchmark = experiment.benchmark
    judged = (robot.frames, benchmark.height, benchmark.width) == JUDGED

    def packed(number: int) -> object:
        return packer(StepBatch(number, [cached.sample(number * step + place) for place in range(step)]))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            _rate(way, read, windows, seconds, wanted if judged else None, by)
            for way, read, windows, wanted, by in (
                ("cached latents, read", cached.sample, 1, 250.0, "a_second"),
                ("cached latents, packed with noise", packed, step, 250.0, "a_second"),
                ("decoded to uint8", decoded.sample, 1, 40.0, "a_core"),
                ("decoded, cropped, recoloured", changed.sample, 1, 25.0, "a_core"),
            )
        ]
    finally:
        torch.set_num_threads(threads)


def _rate(
    way: str, read: Callable[[int], object], windows: int, seconds: float, wanted: float | None, by: str
) -> LoaderRate:
    """Args: read: of a number, as many windows."""
    for number in range(WARM_UP):
        read(number)
    calls, began, worked = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        read(WARM_UP + calls)
        calls += 1
    wall, cpu = time.perf_counter() - began, time.process_time() - worked
    return LoaderRate(way, calls * windows, calls * windows / wall, calls * windows / cpu, wanted, by)


def _draw_latents(dataset: PreparedDataset, channels: int) -> None:
    """A latent cache of the right shapes, unless it is there."""
    if dataset.latent_cache is not None:
        return
    row, folder = dataset.row(0), dataset.folder / LATENTS
    shape = (channels, 1 + dataset.embodiment.chunk // 4, max(1, row["height"] // 16), max(1, row["width"] // 16))
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, dataset.rows, SHARD):
        rows = range(first, min(first + SHARD, dataset.rows))
        latents = {str(number): torch.randn(shape, dtype=torch.bfloat16) for number in rows}
        save_file(latents, LatentCache.shard_file(folder, first // SHARD))
    LatentCache(folder, "drawn at random", dataset.rows, SHARD).write_card()
