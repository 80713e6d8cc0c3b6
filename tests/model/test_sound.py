"""A folder's sound tokenizer: what is refused before a run, what is loaded of it, and the cache of what it makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos3_train.config import Augment, Dataset, Model, UserError
from cosmos3_train.data.mixture import Mixture
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sound import SoundForm
from cosmos3_train.model.caches import ensure_latents
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_parts
from cosmos3_train.model.sound import add_sound_tokenizer, check_sound
from tests.data.clips import mp4, row, video_card, write_files, write_rows
from tests.data.sounds import sounding
from tests.evaluation.tiny import PICO
from tests.parity.avae import add_tokenizer, tiny_tokenizer
from tests.training.project import write_model

CPU, TASK = torch.device("cpu"), "text_to_video_sound"


def model(folder, **changes) -> Model:
    return Model(path=str(folder), dtype="float32", vae_dtype="float32", **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    return add_tokenizer(write_model(made))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def encoder_of(folder, **changes) -> Encoder:
    parts = load_parts(model(folder), CPU)
    add_sound_tokenizer(parts, model(folder), CPU, TASK)
    return Encoder(parts, {}, seed=3, **changes)


def test_the_encoder_is_loaded_and_nothing_else(folder):
    assert check_sound(folder, model(folder), TASK) == SoundForm(48000, 2)
    found, whole = encoder_of(folder), tiny_tokenizer()
    assert found.parts.sound_tokenizer.decoder is None
    waveform = torch.randn((2, 20000), generator=torch.Generator().manual_seed(0))
    mean, deviation = found.encode_sound(waveform)
    theirs = whole.encode(waveform[None]).latent_dist
    assert torch.equal(mean, theirs.mean[0]) and torch.equal(deviation, theirs.std[0])
    silent = load_parts(model(folder), CPU)
    add_sound_tokenizer(silent, model(folder), CPU, None)
    assert silent.sound_tokenizer is None and Encoder(silent, {}).sound_form is None


def test_mono_tokenizers_take_mono(copy):
    shutil.rmtree(copy / "sound_tokenizer")
    strides = {"dec_strides": (2, 4, 5, 6, 4), "enc_strides": (4, 5, 3)}
    add_tokenizer(copy, stereo=False, dec_out_channels=1, sampling_rate=24000, **strides)
    assert encoder_of(copy).sound_form == SoundForm(24000, 1)


def change_config(part, **changes):
    path = part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_encoder(folder):
    path = folder / "sound_tokenizer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name.startswith("decoder.")}, path)


SPOILT = {
    "no sound tokenizer is in the folder": lambda folder: shutil.rmtree(folder / "sound_tokenizer"),
    "its transformer has no sound head": lambda folder: change_config(folder / "transformer", sound_gen=False),
    "is a decoder alone and cannot encode": without_encoder,
    "at 25 Hz, its transformer takes 64 at 50": lambda folder: change_config(
        folder / "transformer", sound_latent_fps=50.0
    ),
    "gives 64 channels at 25 Hz, its transformer takes 32": lambda folder: change_config(
        folder / "transformer", sound_dim=32
    ),
    "config.json cannot be read": lambda folder: change_config(folder / "sound_tokenizer", model_type="newer"),
    "damaged": lambda folder: (folder / "sound_tokenizer" / "diffusion_pytorch_model.safetensors").write_bytes(
        b"x" * 99
    ),
}


@pytest.mark.parametrize("words", SPOILT)
def test_what_a_sound_task_cannot_do_with_a_folder_is_one_line(copy, words):
    SPOILT[words](copy)
    with pytest.raises(UserError, match=words) as error:
        check_sound(copy, model(copy), TASK)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)
    with pytest.raises(UserError, match=words):
        encoder_of(copy)


def test_pico_has_a_sound_head_and_no_tokenizer():
    with pytest.raises(
        UserError, match=r"no sound tokenizer is in the folder .* 'text_to_video_sound' needs; leave it"
    ):
        check_sound(Path(PICO), model(PICO), TASK)


@pytest.fixture
def rows(tmp_path):
    write_files(tmp_path, {"videos/a.mp4": sounding(18), "videos/mute.mp4": mp4(18), "videos/b.mp4": sounding(18)})
    write_rows(tmp_path / "rows.jsonl", [row(stem, 18, stem) for stem in ("a", "mute", "b")])
    card = video_card()
    prepare(card, card.clips(), tmp_path, tmp_path / "out", heldout_fraction=0.0, progress=False)
    return tmp_path / "out"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_sound_is_the_sound(folder, rows, workers):
    encoder = encoder_of(folder)
    dataset = PreparedDataset(rows, None, sound=encoder.sound_form)
    ensure_latents(dataset, encoder, progress=False)
    assert not (rows / "caches" / "sound").exists(), "made where it is asked for alone"
    frames = (rows / "caches" / "latents" / "00000.safetensors").stat().st_mtime_ns
    ensure_latents(PreparedDataset(rows, None, sound=encoder.sound_form), encoder, workers, progress=False, sound=True)
    assert (rows / "caches" / "latents" / "00000.safetensors").stat().st_mtime_ns == frames
    cached = PreparedDataset(rows, None)
    shard = load_file(rows / "caches" / "sound" / "00000.safetensors")
    assert sorted(shard) == ["0", "1", "4", "5"] and all(tensor.shape == (2, 64, 10) for tensor in shard.values())
    entry = Dataset(prepared="out", tasks={TASK: 1.0, "image_to_video_sound": 1.0}, cache_latents=True)
    for number in range(6):
        online = Mixture({"d": (dataset, entry)}, seed=0).sample(number)
        kept = Mixture({"d": (cached, entry)}, seed=0).sample(number)
        assert online.waveform is not None and kept.waveform is None and kept.frames is None
        one, other = encoder.encode([online])[0], Encoder(load_parts(model(folder), CPU), {}, seed=3).encode([kept])[0]
        assert torch.equal(one.text, other.text)
        # A worker has one thread and this process may have more, which add in another order.
        assert torch.allclose(one.sound, other.sound, atol=1e-4) and torch.allclose(one.video, other.video, atol=1e-5)
    first, again = (encoder.encode([cached.sample("train", 0, TASK, n, pixels=False, latents=True)])[0] for n in (0, 9))
    assert not torch.equal(first.sound, again.sound), "every sample draws from the distribution anew"


def test_a_changed_window_keeps_its_sound(folder, rows):
    """Changed anew, its frames differ and its waveform does not; of every cached variant, the sound is the one kept."""
    encoder, change = encoder_of(folder), Augment(crop=0.5, variants=2)
    dataset = PreparedDataset(rows, None, sound=encoder.sound_form)
    plain, changed = (
        Mixture({"d": (dataset, Dataset(prepared="out", tasks={TASK: 1.0}, augment=augment))}, seed=0).sample(1)
        for augment in (Augment(), Augment(crop=0.5))
    )
    assert plain.key == changed.key and torch.equal(plain.waveform, changed.waveform)
    assert not torch.equal(plain.frames, changed.frames)
    ensure_latents(dataset, encoder, progress=False, augment=change, sound=True)
    assert sorted(path.name for path in (rows / "caches").iterdir()) == [
        "latents",
        "latents_variant_1",
        "rows",
        "sound",
    ]
    cached = PreparedDataset(rows, None)
    mixture = Mixture(
        {"d": (cached, Dataset(prepared="out", tasks={TASK: 1.0}, cache_latents=True, augment=change))}, 0
    )
    variants = set()
    for number in range(20):
        sample, row = mixture.sample(number), cached.row_number("train", mixture.pick(number).index)
        assert torch.equal(sample.sound, cached.sound_cache.read(row))
        variants |= {one for one in range(2) if torch.equal(sample.latent, cached.latents(one).read(row))}
    assert variants == {0, 1}


def test_sound_of_another_tokenizer_is_refused(folder, copy, rows):
    encoder = encoder_of(folder)
    ensure_latents(PreparedDataset(rows, None, sound=encoder.sound_form), encoder, progress=False, sound=True)
    shutil.rmtree(copy / "sound_tokenizer")
    other = encoder_of(add_tokenizer(copy, seed=1))
    with pytest.raises(
        UserError, match=r"caches/sound: these latents \(sound\) are of another sound tokenizer .*copy.* or of"
    ):
        ensure_latents(PreparedDataset(rows, None, sound=other.sound_form), other, progress=False, sound=True)
    louder = encoder_of(folder)
    louder.parts.sound_tokenizer.register_to_config(normalize_volume=False)
    with pytest.raises(UserError, match="caches/sound: "):
        ensure_latents(PreparedDataset(rows, None, sound=louder.sound_form), louder, progress=False, sound=True)
    ensure_latents(PreparedDataset(rows, None, sound=encoder.sound_form), encoder, progress=False, sound=True)
