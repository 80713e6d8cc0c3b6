"""Augmentation: alike over a clip, a function of the key alone; what each setting does; of training alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosmos3_train.config import Augment, Data, Dataset, UserError
from cosmos3_train.data.augment import augmented
from cosmos3_train.data.mixture import Mixture
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from tests.data.logs import dataset_card, embodiment, make_log

COLOURS = Augment(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)


@pytest.fixture
def clip():
    """A smooth picture, three times the same, then another one."""
    ramp = torch.linspace(40, 200, 48).expand(32, 48)
    picture = torch.stack([ramp, ramp.flip(1), torch.linspace(60, 160, 32)[:, None].expand(32, 48)]).to(torch.uint8)
    return torch.stack([picture, picture, picture, picture.flip(2)])


@pytest.mark.parametrize("settings", [Augment(crop=0.8), COLOURS, replace(COLOURS, crop=0.8)])
def test_the_same_over_a_clip(clip, settings):
    changed = augmented(clip, settings, key=3)
    assert changed.shape == clip.shape and changed.dtype == torch.uint8
    assert not torch.equal(changed, clip)
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    assert torch.equal(changed, augmented(clip, settings, key=3))
    assert not torch.equal(changed, augmented(clip, settings, key=4))
    last = clip.to(memory_format=torch.channels_last)
    assert (augmented(last, settings, key=3).int() - changed.int()).abs().max() <= 1, "however its bytes lie"


def test_off_is_off(clip):
    assert not Augment().changes
    assert augmented(clip, Augment(), key=1) is clip


def test_a_crop_shows_a_part(clip):
    """A quarter of a horizontal ramp that is as wide as before rises by a quarter of it."""
    changed = augmented(clip, Augment(crop=0.25), key=0)
    before, after = clip[0, 0].float(), changed[0, 0].float()
    rise = (after[:, -1] - after[:, 0]).mean() / (before[:, -1] - before[:, 0]).mean()
    assert rise == pytest.approx(0.25, abs=0.05)


def test_brightness_is_a_factor(clip):
    means = [augmented(clip, Augment(brightness=0.2), key).float().mean() / clip.float().mean() for key in range(40)]
    assert 0.79 < min(means) < 0.85 and 1.15 < max(means) < 1.21


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("augment")
    log = make_log(root / "log", [12, 10, 14])
    prepare(dataset_card(), embodiment(), log, root / "out", heldout_fraction=0.3, progress=False)
    return root / "out"


def test_in_the_mixture(folder):
    dataset = PreparedDataset(folder, embodiment())
    plain, entry = Dataset(prepared="x"), Dataset(prepared="x", augment=replace(COLOURS, crop=0.9))
    mixtures = {split: Mixture({"a": (dataset, entry)}, 7, split) for split in ("train", "heldout")}
    bare = {split: Mixture({"a": (dataset, plain)}, 7, split) for split in ("train", "heldout")}
    first, again = (mixtures["train"].sample(5).frames for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, bare["train"].sample(5).frames)
    assert torch.equal(mixtures["heldout"].sample(0).frames, bare["heldout"].sample(0).frames)
    later = 5 + mixtures["train"].windows  # another epoch
    same = next(
        n for n in range(later, 2 * later) if mixtures["train"].sample(n).key == mixtures["train"].sample(5).key
    )
    assert not torch.equal(mixtures["train"].sample(same).frames, first)


def test_settings():
    crop = Augment(crop=0.9)
    with pytest.raises(
        UserError, match=r"a\.augment changes frames, but cache_latents keeps one latent of each window"
    ):
        Data(datasets={"a": Dataset(prepared="x", cache_latents=True, augment=crop)})
    with pytest.raises(UserError, match=r"a\.augment\.variants is 4, but it is of cached latents"):
        Data(datasets={"a": Dataset(prepared="x", augment=replace(crop, variants=4))})
    Data(datasets={"a": Dataset(prepared="x", cache_latents=True, augment=replace(crop, variants=4))})
    for wrong in ({"crop": 0.0}, {"crop": 1.1}, {"hue": 0.6}, {"contrast": -0.1}, {"variants": 1}):
        with pytest.raises(UserError, match=rf"augment\.{next(iter(wrong))} is"):
            Augment(**wrong)
