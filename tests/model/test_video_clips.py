"""Clips without a robot as the model sees them: their canvas, the prompt that states it, clips of several sizes."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.config import Clips
from cosmos3_train.model.encoders import Encoder, _cover
from cosmos3_train.model.prompts import video_prompt
from cosmos3_train.types import Sample
from tests.evaluation.tiny import tiny_parts


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny_parts(), {})


def clip(height: int, width: int, tier: int, caption: str = "a street", frames: int = 5) -> Sample:
    pixels = torch.randint(0, 256, (frames, 3, height, width), generator=torch.Generator().manual_seed(height)).byte()
    return Sample("k", 0, "image_to_video", caption, 24.0, pixels, size=(height, width), tier=tier)


@pytest.mark.parametrize(
    ("size", "tier", "cells"),
    [
        ((270, 480), 256, (12, 20)),
        ((480, 270), 256, (20, 12)),
        ((300, 400), 256, (16, 20)),
        ((342, 608), 480, (30, 52)),
    ],
)
def test_a_clip_covers_the_canvas_of_its_tier(encoder, size, tier, cells):
    (found,) = encoder.encode([clip(*size, tier)])
    assert found.video.shape[1:] == (2, *cells) and found.tier == tier
    assert found.video_given.tolist() == [True, False] and found.action is None
    canvas = (cells[0] * 16, cells[1] * 16)
    assert torch.equal(found.text, video_prompt(encoder.parts, "a street", 5, canvas, 24.0))


def test_what_covers_a_canvas_is_resized_by_its_shorter_side_and_cropped_to_the_middle():
    """Smooth across, so that the place of a column shows in its number."""
    ramp = torch.linspace(-1, 1, 192).expand(1, 3, 64, 192)
    wide = _cover(ramp, (32, 32))
    assert wide.shape == (1, 3, 32, 32)
    middle = ramp[:, :, 0, 64:128].reshape(1, 3, 32, 2).mean(-1)  # half the size: two columns make one
    assert torch.allclose(wide, middle[:, :, None].expand_as(wide), atol=0.01), "the sides are cut, not squeezed"
    assert torch.allclose(_cover(ramp.mT, (32, 32)), wide.mT, atol=1e-6)
    whole = _cover(ramp, (64, 192))
    assert torch.allclose(whole, ramp, atol=1e-5)


def test_clips_of_several_sizes_keep_their_order(encoder):
    clips = [clip(270, 480, 256), clip(300, 400, 256), clip(270, 480, 256), clip(270, 480, 480)]
    together, alone = encoder.encode(clips), [encoder.encode([one])[0] for one in clips]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.video, other.video, atol=1e-5)
    frames = [one.frames for one in clips[::2]]
    assert len(encoder.encode_frames(frames, Clips(frames=5))) == 2


def test_a_structured_caption_is_used_word_for_word(encoder):
    words = '{"subjects": ["a cart"], "fps": 5}'
    (found,) = encoder.encode([clip(270, 480, 256, words)])
    said = encoder.parts.text_tokenizer.decode(found.text.tolist())
    assert words in said and "frames per second" not in said.lower() and "resolution" not in said
    (plain,) = encoder.encode([clip(270, 480, 256, "a cart")])
    assert "resolution" in encoder.parts.text_tokenizer.decode(plain.text.tolist())
