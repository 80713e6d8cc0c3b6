"""A mixture goes on where it was: with another number of ranks, from the middle of an epoch, and in the same memory."""

from __future__ import annotations

import gc
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from cosmos3_train.config import Clips, Dataset
from cosmos3_train.data.mixture import Mixture, StepDataset
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import LATENTS, PreparedDataset
from tests.data.clips import mp4, row, video_card, write_files, write_rows
from tests.data.logs import prepared_logs

ENTRY = Dataset(prepared="x", tasks={"policy": 1.0})


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    found = prepared_logs(root, {"large": [20, 20, 17], "small": [9, 8]})
    return found


def test_another_world_size_goes_on_from_the_same_sample(robot):
    """Steps 0-3 on four ranks, 4-6 on three, 7 on one: together the very samples of one undisturbed rank, in order."""
    mixture = Mixture({name: (dataset, ENTRY) for name, dataset in robot.items()}, seed=3)

    def keys(world, steps):
        shares = [StepDataset(mixture, 7, rank, world, 8) for rank in range(world)]
        return [sample.key for step in steps for share in shares for sample in share[step].samples]

    stretched = keys(4, range(4)) + keys(3, range(4, 7)) + keys(1, range(7, 8))
    assert stretched == keys(1, range(8)) and len(stretched) == 56
    again = Mixture({name: (dataset, ENTRY) for name, dataset in robot.items()}, seed=3)  # as after a restart
    assert [again.sample(number).key for number in range(28, 56)] == stretched[28:]


ROWS, FILES = 10_000_000, 40


@pytest.mark.slow
def test_resuming_among_ten_million_rows(tmp_path):
    """Opening, finding the place in the middle of an epoch and reading its first sample: under a second."""
    write_files(tmp_path, {"videos/a.mp4": mp4(12)})
    write_rows(tmp_path / "rows.jsonl", [row("a", 12, "one"), row("a", 12, "two")])
    prepare(video_card(), Clips(frames=9), tmp_path, tmp_path / "out", heldout_fraction=0, progress=False)
    (only,) = (tmp_path / "out").glob("windows-*.parquet")
    table, each = pq.read_table(only), ROWS // FILES
    many = table.take(pa.array(np.zeros(each, np.int64)))
    many = many.set_column(0, table.schema.field(0), pa.array(np.arange(each)))  # episode_index tells them apart
    pq.write_table(many, only)
    for number in range(1, FILES):
        os.link(only, only.with_name(f"windows-{number:05d}.parquet"))
    entry = Dataset(prepared="x", tasks={"image_to_video": 1.0})
    assert PreparedDataset(tmp_path / "out", None).rows == ROWS  # the first reading maps the rows into memory

    seconds = []
    for _ in range(3):  # the machine may be busy for a moment
        began = time.monotonic()
        dataset = PreparedDataset(tmp_path / "out", None)
        steps = StepDataset(Mixture({"a": (dataset, entry)}, seed=1), 256, 3, 8, 1 << 40)
        middle = steps.numbers(ROWS // 2 // 256)[0]
        sample = steps.mixture.sample(middle)
        seconds.append(time.monotonic() - began)
    print(f"\nresumed among {ROWS:,} rows in {min(seconds):.2f} s")
    assert min(seconds) < 1
    place = steps.mixture.pick(middle).index
    assert sample.key == f"scenes/episode_{place % each:06d}/000000" and sample.frames.shape[0] == 9
    before, after = (
        {steps.mixture.pick(n).index for n in some} for some in (range(2000), range(middle, middle + 2000))
    )
    assert len(before) == len(after) == 2000 and before.isdisjoint(after), "no window twice in an epoch"
    del dataset, steps, sample
    gc.collect()
    shutil.rmtree(tmp_path / "out")  # a gigabyte


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("latents", "samples"), [(True, 100_000), (False, 10_000)])
def test_memory_is_flat(robot, tmp_path, latents, samples):
    """Over 100 thousand samples from cached latents, and ten thousand that are decoded from two logs in turn."""
    opened = {}
    for name, dataset in robot.items():
        folder = dataset.folder / LATENTS
        folder.mkdir(parents=True, exist_ok=True)
        drawn = {str(number): torch.randn(48, 2, 6, 6, dtype=torch.bfloat16) for number in range(dataset.rows)}
        save_file(drawn, folder / "00000.safetensors")
        (folder / "card.json").write_text(f'{{"fingerprint": "drawn", "windows": {dataset.rows}, "shard": 256}}')
        entry = Dataset(prepared="x", tasks={"policy": 1.0}, cache_latents=latents)
        opened[name] = (PreparedDataset(dataset.folder, None), entry)
    mixture = Mixture(opened, seed=0)
    seen = []
    for number in range(samples):
        mixture.sample(number)
        if (number + 1) % (samples // 10) == 0:
            gc.collect()
            seen.append(own_memory())
    grown = max(seen[1:]) - seen[0]  # the first tenth opens files and fills caches
    assert grown < 16 << 20, f"grew by {grown / 2**20:.1f} MiB: {[round(one / 2**20, 1) for one in seen]}"
