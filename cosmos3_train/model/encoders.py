"""From a `Sample` of the data floor to a `TokenSample`: words to ids, pixels and sound to latents, actions to rows with
masks.

Pixels pass through upstream's own steps: a robot's frames are padded right and bottom to the tier's canvas, encoded,
and the latent is cropped to the content; a plain clip is resized to cover its canvas and cropped to the middle. Sound
is brought to one loudness by its tokenizer, clip by clip, and its latent drawn from the distribution that comes out,
as Cosmos 3 was trained; so what a cache keeps of a sound is that distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import Cosmos3OmniPipeline
from PIL import Image
from torch import Tensor

from cosmos3_train.config import MAX_ACTION_WIDTH, Clips, Embodiment
from cosmos3_train.data.sound import SoundForm
from cosmos3_train.flow.tasks import CONVERSATION, TASKS, action_given, sound_given, video_given
from cosmos3_train.model.prompts import (
    canvas,
    conversation,
    dropped_prompt,
    robot_prompt,
    video_prompt,
    whole,
    with_sound,
)
from cosmos3_train.model.sight import Sight
from cosmos3_train.model.sound import form_of
from cosmos3_train.runtime import draw, leave_if_asked
from cosmos3_train.types import Sample, TokenSample

Parts = Cosmos3OmniPipeline
"""Upstream's pipeline without a transformer, as `loading.load_parts` makes it, for the floors that only pass it on."""

PIXELS_AT_ONCE = 3 * 17 * 256 * 256 * 8
"""Pixel values in one call of the video tokenizer: 8 policy clips of the 256 tier, or one of 33 frames at 480."""


PROMPTS_KEPT = 4096


class Encoder:
    """Turns samples into token samples; holds upstream's tokenizer, video tokenizer and sound tokenizer.

    Args:
        parts: `loading.load_parts`; its VAE needs weights only where samples come without a latent, and sound needs
            `sound.add_sound_tokenizer` then.
        embodiments: cards by name.
        caption_dropout: probability that a caption is emptied, drawn from (seed, sample number).
        sight: reads conversations with pictures; None where none are met.
    """

    def __init__(
        self,
        parts: Cosmos3OmniPipeline,
        embodiments: Mapping[str, Embodiment],
        *,
        caption_dropout: float = 0.0,
        seed: int = 0,
        sight: Sight | None = None,
    ) -> None:
        self.parts = parts
        self.sight = sight
        self.embodiments = dict(embodiments)
        self.caption_dropout = caption_dropout
        self.seed = seed
        self._prompts: dict[tuple, Tensor] = {}

    def plain(self, embodiments: Mapping[str, Embodiment] | None = None) -> Encoder:
        """The same that empties no caption, for other embodiments where these are given."""
        cards = self.embodiments if embodiments is None else embodiments
        return Encoder(self.parts, cards, seed=self.seed, sight=self.sight)

    def encode(self, samples: Sequence[Sample | TokenSample]) -> list[TokenSample]:
        """Token samples in the same order, those that are already as they are; clips of one shape share a call of the
        video tokenizer."""
        left = [sample for sample in samples if isinstance(sample, Sample)]
        found = iter([self._token_sample(*pair) for pair in zip(left, self._latents(left), strict=True)])
        return [next(found) if isinstance(sample, Sample) else sample for sample in samples]

    def see(self, sample: Sample) -> Sample | TokenSample:
        """A conversation with pictures as tokens, on the CPU; any other sample as it is."""
        return self._token_sample(sample, None) if sample.pictures else sample

    @property
    def sound_form(self) -> SoundForm | None:
        """The sound that the parts' tokenizer takes, None where they have none."""
        tokenizer = self.parts.sound_tokenizer
        return None if tokenizer is None else form_of(tokenizer)

    def robot_text(self, instruction: str, embodiment: Embodiment, size: tuple[int, int]) -> Tensor:
        """The ids of a robot's prompt, built once per distinct instruction."""
        key = (instruction, embodiment.name, size)
        return self._kept(key, lambda: robot_prompt(self.parts, instruction, embodiment, size))

    def dropped_text(self) -> Tensor:
        """The ids that stand for an emptied caption, whatever the task."""
        return self._kept(("",), lambda: dropped_prompt(self.parts))

    def text(
        self, task: str, caption: str, contract: Embodiment | Clips, size: tuple[int, int], frames: int, fps: float,
        sound_caption: str = "",
    ) -> Tensor:  # fmt: skip
        """The ids of a caption in a task.

        Args:
            size: (H, W) of the native frames;  frames: of the clip, 1 for an image.
            sound_caption: words of what is heard, which tasks with sound also say.
        """
        if TASKS[task].has_robot:
            assert isinstance(contract, Embodiment)
            return self.robot_text(caption, contract, size)
        if TASKS[task].sound != "absent":
            caption = with_sound(caption, sound_caption)
        shape = canvas(size, contract.resolution_tier)
        key = (caption, frames, shape, fps)
        return self._kept(key, lambda: video_prompt(self.parts, caption, frames, shape, fps))

    def encode_frames(self, frames: Sequence[Tensor], contract: Embodiment | Clips) -> list[Tensor]:
        """Latents float32 [C, t, h, w] on the CPU of clips uint8 [T, 3, H, W], all of one size, some at a time."""
        at_once = max(1, PIXELS_AT_ONCE // frames[0].numel())
        found = []
        for start in range(0, len(frames), at_once):
            leave_if_asked()
            found += self._encode_together(frames[start : start + at_once], contract)
        return found

    def encode_sound(self, waveform: Tensor) -> Tensor:
        """float32 [2, C, S] on the CPU: mean and standard deviation of the latent of a clip's sound.

        One clip at a time: upstream's tokenizer divides by the loudest sample of all that it is given.

        Args:
            waveform: float32 [channels, n], full scale ±1, as `sound_form` says.
        """
        tokenizer = self.parts.sound_tokenizer
        assert tokenizer is not None, "the parts have no sound tokenizer"
        leave_if_asked()
        with torch.no_grad():
            found = tokenizer.encode(waveform[None].to(tokenizer.device)).latent_dist
        return torch.cat([found.mean, found.std]).float().cpu()

    # -------------------------------------------------------------------------------------------- details

    def _kept(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        if len(self._prompts) >= PROMPTS_KEPT:  # a log may have as many instructions as episodes
            self._prompts.clear()
        if key not in self._prompts:
            self._prompts[key] = make()
        return self._prompts[key]

    def _latents(self, samples: Sequence[Sample]) -> list[Tensor | None]:
        found: list[Tensor | None] = [sample.latent for sample in samples]
        groups: dict[tuple, list[int]] = {}
        for place, sample in enumerate(samples):
            if sample.frames is not None and sample.latent is None:
                key = (tuple(sample.frames.shape), sample.embodiment, sample.tier)
                groups.setdefault(key, []).append(place)
        for places in groups.values():
            contract = self._contract(samples[places[0]])
            frames = [cast(Tensor, samples[place].frames) for place in places]
            for place, latent in zip(places, self.encode_frames(frames, contract), strict=True):
                found[place] = latent
        return found

    def _contract(self, sample: Sample) -> Embodiment | Clips:
        return self.embodiments[sample.embodiment] if sample.embodiment else Clips(resolution_tier=sample.tier)

    def _encode_together(self, clips: Sequence[Tensor], contract: Embodiment | Clips) -> list[Tensor]:
        prepared, sizes = self._prepare(torch.stack(list(clips)), contract)
        with torch.no_grad():
            latents = self.parts._encode_video(prepared).float()
        if sizes is not None:
            latents = self.parts._remove_action_video_padding_from_latent(latents, sizes)
        return list(latents.cpu())

    def _token_sample(self, sample: Sample, latent: Tensor | None) -> TokenSample:
        if sample.task == CONVERSATION:
            assert sample.messages is not None
            if sample.pictures:
                assert self.sight is not None, "pictures, and nothing to read them"
                seen = self.sight.read(sample.messages, sample.pictures, sample.key)
                return TokenSample(sample.key, sample.number, sample.task, **vars(seen))
            text, labels = conversation(self.parts.text_tokenizer, sample.messages, sample.key)
            return TokenSample(sample.key, sample.number, sample.task, text, labels=labels)
        task = TASKS[sample.task]
        contract = self._contract(sample)
        assert latent is not None
        fields: dict[str, Any] = {"video": latent, "video_given": video_given(task, latent.shape[1])}
        if task.has_robot:
            assert isinstance(contract, Embodiment) and sample.action is not None
            fields |= action_fields(sample.action, sample.state, contract, sample.task)
        if task.sound != "absent":
            sound = self._sound(sample)
            fields |= {"sound": sound, "sound_given": sound_given(task, len(sound))}
        return TokenSample(
            key=sample.key,
            number=sample.number,
            task=sample.task,
            text=self._text(sample, contract, latent),
            fps=sample.fps,
            tier=contract.resolution_tier,
            **fields,
        )

    def _sound(self, sample: Sample) -> Tensor:
        """float32 [S, C]: drawn from the latent's distribution by (seed, sample number)."""
        found = sample.sound
        if found is None:
            assert sample.waveform is not None
            found = self.encode_sound(sample.waveform)
        mean, deviation = found
        drawn = torch.randn(mean.shape, generator=draw(self.seed, "sound", sample.number))
        return (mean + deviation * drawn).T.contiguous()

    def _text(self, sample: Sample, contract: Embodiment | Clips, latent: Tensor) -> Tensor:
        if self.caption_dropout:
            dropout = torch.rand((), generator=draw(self.seed, "caption", sample.number))
            if float(dropout) < self.caption_dropout:
                return self.dropped_text()
        frames = 4 * (latent.shape[1] - 1) + 1
        return self.text(sample.task, sample.caption, contract, sample.size, frames, sample.fps, sample.sound_caption)

    def _prepare(self, clips: Tensor, contract: Embodiment | Clips) -> tuple[Tensor, Tensor | None]:
        """Clips uint8 [B, T, 3, H, W] → float [B, 3, T, H', W'] in [-1, 1] on the canvas; for a robot also upstream's
        (canvas, content) sizes. Upstream prepares frame by frame, so all clips pass as one long one."""
        device = self.parts.vae.device
        count, length = clips.shape[:2]
        size = (clips.shape[-2], clips.shape[-1])
        frames = clips.flatten(0, 1)
        if isinstance(contract, Clips):
            covered = _cover(frames.to(device).float() / 255 * 2 - 1, canvas(size, contract.resolution_tier))
            return covered.unflatten(0, (count, length)).transpose(1, 2), None
        pixels: Any = frames.to(device).float() / 255
        if whole(size) != size:
            # Upstream first resizes such frames to whole latent cells: pictures smoothly, tensors to the nearest pixel.
            # A robot is served pictures.
            pixels = [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in frames]
        prepared, sizes, _, _ = self.parts._prepare_action_video_conditioning(
            pixels, contract.resolution_tier, count * length, device=device, dtype=torch.float32
        )
        return prepared[0].unflatten(1, (count, length)).transpose(0, 1), sizes


def action_fields(action: Tensor, state: Tensor | None, embodiment: Embodiment, task: str) -> dict[str, Any]:
    """The action fields of a token sample from normalised actions [N, width] and, with a state row, state [width]."""
    rows = action if not embodiment.state_row else torch.cat([cast(Tensor, state)[None], action])
    return {
        "action": F.pad(rows, (0, MAX_ACTION_WIDTH - rows.shape[1])),
        "action_given": action_given(TASKS[task], rows.shape[0], embodiment.state_row),
        "action_width": embodiment.width,
        "action_start": 0 if embodiment.state_row else 1,
        "domain": embodiment.domain_id,
    }


def _cover(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, 3, H, W] resized to cover `size` and cropped to its middle → [N, 3, *size]."""
    height, width = clip.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    resized = F.interpolate(
        clip,
        size=(math.ceil(scale * height), math.ceil(scale * width)),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    ).clamp(-1, 1)
    top, left = (resized.shape[-2] - size[0]) // 2, (resized.shape[-1] - size[1]) // 2
    return resized[:, :, top : top + size[0], left : left + size[1]]
