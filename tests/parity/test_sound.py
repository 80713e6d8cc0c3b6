"""Sound from a real mp4 to the loss, against upstream's own path: its tokenizer's latent, its length, its positions."""

from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer

from cosmos3_train.config import Objective
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sound import SoundForm
from cosmos3_train.evaluation.heldout import heldout_loss
from cosmos3_train.evaluation.sampling import sample
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout, Values, draw_noise, pack
from cosmos3_train.model.prompts import with_sound
from cosmos3_train.runtime import draw
from cosmos3_train.types import NoiseLevels
from tests.data.clips import row, video_card, write_files, write_rows
from tests.data.sounds import sounding
from tests.evaluation.tiny import tiny_parts
from tests.parity.avae import tiny_tokenizer
from tests.parity.test_pipeline import difference, pictures
from tests.parity.upstream import TINY, randomise

STEPS, FRAMES, CANVAS = 3, 9, (192, 320)
TASKS = ("text_to_video_sound", "image_to_video_sound")


@pytest.fixture(scope="module")
def pipe() -> Cosmos3OmniPipeline:
    """Upstream's pipeline with a random transformer that has a sound head, and a tiny sound tokenizer."""
    parts = tiny_parts()
    theirs = Cosmos3OmniTransformer(**{**TINY, "vocab_size": len(parts.text_tokenizer)})
    randomise(theirs)
    with torch.no_grad():
        theirs.audio_proj_out.weight.mul_(4)
    made = Cosmos3OmniPipeline(
        theirs, parts.text_tokenizer, parts.vae, parts.scheduler, tiny_tokenizer(), enable_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def ours(pipe) -> Cosmos3PackedTransformer:
    made = Cosmos3PackedTransformer(**{**TINY, "vocab_size": len(pipe.text_tokenizer)})
    made.load_state_dict(pipe.transformer.state_dict())
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two clips of three windows each, 44.1 kHz stereo and 48 kHz mono, the first with words of what is heard."""
    root = tmp_path_factory.mktemp("clips")
    videos = {
        "videos/a.mp4": sounding(33, rate=44100, size=CANVAS),
        "videos/b.mp4": sounding(33, layout="mono", size=CANVAS),
    }
    write_files(root, videos)
    write_rows(
        root / "rows.jsonl", [{**row("a", 33, "tones"), "heard": "a tone, then a higher one"}, row("b", 33, "more")]
    )
    return root


@pytest.fixture(scope="module")
def dataset(source, pipe):
    card = video_card(sound_captions=["heard"], frames=FRAMES, stride=12)
    prepare(card, card.clips(), source, source / "out", heldout_fraction=0.0, progress=False)
    return PreparedDataset(source / "out", None, sound=Encoder(pipe, {}).sound_form)


def read(dataset, task, index):
    return dataset.sample("train", index, task, number=index)


@pytest.mark.parametrize("fps", [24.0, 30000 / 1001, 16.0, 10.0, 7.3])
@pytest.mark.parametrize("frames", [1, 9, 61, 93])
def test_a_sound_has_as_many_latents_as_the_pipeline_makes(pipe, frames, fps):
    encoder = Encoder(pipe, {})
    assert encoder.sound_form == SoundForm(48000, 2)
    theirs = pipe.prepare_latents(
        num_frames=frames, height=32, width=32, fps=fps, enable_sound=True, device="cpu", dtype=torch.float32
    )
    waveform = torch.zeros((2, encoder.sound_form.samples(frames, fps)))
    mean, deviation = encoder.encode_sound(waveform)
    assert mean.shape == deviation.shape == theirs[1].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_equal_upstreams_for_the_same_clip(pipe, dataset, source, dtype):
    """Of a window inside a file, read anew by a decoder that has read everything before it."""
    tokenizer = tiny_tokenizer().to(dtype)
    parts = Cosmos3OmniPipeline(
        None, pipe.text_tokenizer, pipe.vae, pipe.scheduler, tokenizer, enable_safety_checker=False
    )
    encoder = Encoder(parts, {}, seed=5)
    indexes = [i for i in range(dataset.count("train")) if dataset.row(i)["video"][0]["path"].endswith("b.mp4")]
    assert len(indexes) == 3
    with av.open(str(source / "videos" / "b.mp4")) as container:
        whole = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    for index in indexes:
        one = read(dataset, TASKS[0], index)
        first, count = round(dataset.row(index)["video"][0]["start_time"] * 48000), int(FRAMES / 24.0 * 48000)
        waveform = torch.from_numpy(whole[:, first : first + count]).repeat(2, 1)
        assert torch.allclose(one.waveform, waveform, atol=5e-3)
        posterior = tokenizer.encode(one.waveform[None]).latent_dist
        (token,) = encoder.encode([one])
        assert token.sound.shape == (10, 64) and not token.sound_given.any()
        if dtype == torch.float32:
            drawn = posterior.sample(generator=draw(5, "sound", one.number))
            assert torch.equal(token.sound, drawn[0].T)
        else:  # upstream would also draw in bf16
            drawn = torch.randn((64, 10), generator=draw(5, "sound", one.number))
            assert torch.equal(token.sound, (posterior.mean[0].float() + posterior.std[0].float() * drawn).T)
        theirs = tokenizer.encode(waveform[None]).latent_dist.mode()
        assert difference(posterior.mode().float(), theirs.float()) < 0.02


def test_every_clip_is_brought_to_one_loudness_by_itself(pipe, dataset):
    """Upstream divides by the loudest sample of a batch: clips that share a batch would not be what they are alone."""
    encoder = Encoder(pipe, {})
    loud, soft = read(dataset, TASKS[0], 0), read(dataset, TASKS[0], 1)
    soft = replace(soft, waveform=soft.waveform / 64)
    together = encoder.encode([loud, soft])
    assert torch.allclose(together[1].sound, encoder.encode([read(dataset, TASKS[0], 1)])[0].sound, atol=1e-3)
    assert torch.equal(together[0].sound, encoder.encode([loud])[0].sound)


def run_upstream(pipe, one, token, noise, seen):
    """The pipeline on our noise: (latent, waveform), and what it handed its transformer in `seen`."""

    def note(module, arguments, named):
        seen.update(named)

    given = token.video_given.view(1, -1, 1, 1)
    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    out = pipe(
        prompt=with_sound(one.caption, one.sound_caption),
        image=pictures(one.frames[:1])[0] if one.task.startswith("image") else None,
        num_frames=FRAMES,
        height=CANVAS[0],
        width=CANVAS[1],
        fps=24.0,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        enable_sound=True,
        latents=torch.where(given, token.video, noise.video)[None],
        sound_latents=noise.sound.T,
        output_type="latent",
    )
    handle.remove()
    return out.video[0], out.sound


def test_positions_ids_and_samples_equal_the_pipelines(pipe, ours, dataset):
    samples = [read(dataset, TASKS[index % 2], index) for index in range(4)]
    tokens = Encoder(pipe, {}).encode(samples)
    noise = [draw_noise(token, draw(5, "noise", token.number)) for token in tokens]
    found = sample(ours, pipe, tokens, steps=STEPS, noise=noise)
    layout = Layout.of(ours.config)
    for one, token, eps, value in zip(samples, tokens, noise, found, strict=True):
        seen = {}
        latent, waveform = run_upstream(pipe, one, token, eps, seen)
        packed = pack([token], [Values(token.video, token.sound)], [NoiseLevels(1, 1, 1)], layout)
        assert torch.equal(packed.text_ids, seen["input_ids"])
        assert torch.equal(torch.cat([packed.text_positions, packed.positions], dim=1), seen["position_ids"].float())
        sound = packed.sound_out + packed.text_spans.total
        assert torch.equal(sound, seen["sound_sequence_indexes"]), "all of the sound is generated, after the video"
        assert torch.equal(sound, seen["sound_mse_loss_indexes"])
        assert difference(value.video, latent) <= 1e-5
        assert difference(value.sound, eps.sound) > 0.1, "the solver has moved it"
        assert difference(pipe.decode_sound(value.sound.T), waveform) <= 1e-5


def test_words_of_what_is_heard_join_the_caption_where_sound_is_made(pipe, dataset):
    encoder = Encoder(pipe, {})
    heard, seen = (encoder.encode([read(dataset, task, 0)])[0] for task in (TASKS[0], "text_to_video"))
    words = [encoder.parts.text_tokenizer.decode(token.text.tolist()) for token in (heard, seen)]
    assert "tones Audio description: a tone, then a higher one" in words[0]
    assert "Audio description" not in words[1] and seen.sound is None
    assert with_sound("a cart", "") == "a cart"
    assert with_sound('{"actions": "rolls – slowly"}', "it squeaks") == (
        '{"actions": "rolls – slowly", "audio_description": "it squeaks"}'
    )
    assert with_sound('{"audio_description": "none", "fps": 5}', "it squeaks") == (
        '{"audio_description": "it squeaks", "fps": 5}'
    )


def test_the_heldout_loss_of_sound_stands_by_itself(pipe, ours, dataset):
    tokens = Encoder(pipe, {}).encode([read(dataset, TASKS[index % 2], index) for index in range(4)])
    found = heldout_loss(ours, tokens, Objective(), seed=0)
    assert set(found.by_modality) == {"video", "sound"} and found.by_modality["sound"] > 0
    assert found.total == pytest.approx(10 * found.by_modality["video"] + 2 * found.by_modality["sound"])
    assert any(key.startswith("heldout/loss/sound/band_") for key in found.metrics())
