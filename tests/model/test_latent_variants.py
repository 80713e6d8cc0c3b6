"""Cached latents of changed windows: one of them is drawn in training, the unchanged one is what is evaluated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from cosmos3_train.config import Augment, Dataset, UserError
from cosmos3_train.data.augment import augmented
from cosmos3_train.data.mixture import Mixture
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.model.caches import ensure_latents
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.runtime import fold
from tests.data.logs import dataset_card, embodiment, make_log
from tests.evaluation.tiny import tiny_parts

AUGMENT = Augment(crop=0.8, brightness=0.3, variants=3)


def test_variants(tmp_path):
    robot = embodiment()
    prepare(dataset_card(), robot, make_log(tmp_path / "log", [8, 7]), tmp_path / "out", progress=False)
    encoder = Encoder(tiny_parts(), {robot.name: robot})
    ensure_latents(PreparedDataset(tmp_path / "out", robot), encoder, 1, False, augment=AUGMENT)
    dataset = PreparedDataset(tmp_path / "out", robot)

    row = dataset.row_number("train", 1)
    frames = dataset.frames(dataset.row(row), change=lambda x: augmented(x, AUGMENT, fold(0, "variant", 2, row)))
    assert torch.allclose(dataset.latents(2).read(row), encoder.encode_frames([frames], robot)[0], atol=1e-5)

    entry = Dataset(prepared="out", cache_latents=True, augment=AUGMENT)
    mixtures = {split: Mixture({"a": (dataset, entry)}, 0, split) for split in ("train", "heldout")}
    seen = set()
    for number in range(40):
        sample, pick = mixtures["train"].sample(number), mixtures["train"].pick(number)
        assert sample.frames is None
        row = dataset.row_number("train", pick.index)
        seen |= {v for v in range(3) if torch.equal(sample.latent, dataset.latents(v).read(row))}
    assert seen == {0, 1, 2}
    for number in range(mixtures["heldout"].windows):
        row = dataset.row_number("heldout", mixtures["heldout"].pick(number).index)
        assert torch.equal(mixtures["heldout"].sample(number).latent, dataset.latents(0).read(row))

    shard = next((tmp_path / "out" / "caches" / "latents").glob("*.safetensors"))
    before, whole = {path: path.stat().st_mtime_ns for path in shard.parent.parent.rglob("*.*")}, load_file(shard)
    shard.unlink()
    ensure_latents(dataset, encoder, 1, False, augment=AUGMENT)
    assert {name: value.tolist() for name, value in load_file(shard).items()} == {
        n: v.tolist() for n, v in whole.items()
    }
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != shard), "it alone is made"

    ensure_latents(dataset, encoder, 1, False, augment=replace(AUGMENT, variants=2))  # the first two of them still
    with pytest.raises(
        UserError, match=r"latents_variant_1: these latents \(variant 1\) are of .* another augmentation"
    ):
        ensure_latents(dataset, encoder, 1, False, augment=replace(AUGMENT, crop=0.9))
