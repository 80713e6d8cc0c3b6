"""The shapes that travel between the floors.

Legend
    B   samples in a pack              U   tokens of the understanding stream (text), all samples end to end
    G   tokens of the generation stream (video, sound, action), all samples end to end
    T   pixel frames of a clip         t, h, w   latent frames, latent height and width (T = 4(t-1)+1, /16, /16)
    C   latent channels (48)           P   elements of a video token (patch 2 x 2 x 48 = 192)
    N   action rows of a clip          A   width of the action heads (64); a robot's own width is smaller
    S   sound frames (25 a second)     R   distinct noise levels in a pack

A `Sample` is what the data floor hands up: pixels or a cached latent, normalised actions, words. The model floor turns
it into a `TokenSample` (token ids, latent, masks) and several of those into one `PackedSequence`, the two flat streams.

None of these is a tuple or a mapping, and a step's samples travel inside `StepBatch`, a plain object: Lightning's
precision plugins cast every float tensor they can reach in a batch, and a position of 15001 cast to bf16 becomes 14976.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""The label of a text token that is not predicted (the value that cross-entropy ignores by default)."""

TEMPORAL, SPATIAL = 4, 16
"""Pixel frames of a latent frame after the first; pixels of a latent cell."""
SOUND_HZ, SOUND_CHANNELS = 25, 64
"""Latents of a second of sound, and their channels."""


@dataclass(frozen=True)
class Picture:
    """An image or a video of a conversation, decoded.

    frames:  uint8 [T, 3, H, W], RGB; one for an image
    numbers: of a video's frames in its file, from 0; None for an image
    fps:     of a video's file
    pixels:  least and most that it is resized to, of all its frames together; None takes the model's own
    """

    frames: Tensor
    numbers: tuple[int, ...] | None = None
    fps: float = 0.0
    pixels: tuple[int | None, int | None] = (None, None)


@dataclass(frozen=True)
class Sample:
    """One window of a log, one clip or one conversation, as the reader returns it.

    key:      where it comes from, unique in its dataset ("pusht/episode_000012/000034")
    number:   its place in the run's global order (0, 1, ...); every random draw for it is a function of (seed, number)
    task:     a row of the mask table (`flow.tasks`), or "conversation"
    caption:  the instruction or caption as a person wrote it; `model.prompts` makes the model's prompt of it
    fps:      frames per second of the clip; for a robot its control rate in Hz
    frames:   uint8 [T, 3, H, W], the composed camera views in their native size, not yet padded; None with a latent
    latent:   float32 [C, t, h, w], normalised and cropped to the content; from the cache, None when encoded online
    size:     (H, W) of the frames in pixels, also known when only the latent is there
    action:   float32 [N, width], normalised; None where the task has no robot
    state:    float32 [width], normalised, the given row 0 of embodiments with a state row
    waveform: float32 [channels, n], the clip's sound at the rate of the model's sound tokenizer, full scale ±1; None
              without sound, or with its latent
    sound:    float32 [2, 64, S], mean and standard deviation of the sound's latent, for its tokenizer gives a
              distribution; from the cache, None when encoded online
    sound_caption: words of what is heard, "" where the set has none
    messages: [{"role": ..., "content": ...}, ...] for a conversation; content is words, or parts in the chat template's
              form: {"type": "text", "text": ...}, {"type": "image"}, {"type": "video"}
    pictures: those that the parts stand for, in their order
    embodiment: name of the embodiment card, None without a robot
    tier:     resolution tier of the frames
    """

    key: str
    number: int
    task: str
    caption: str = ""
    fps: float = 24.0
    frames: Tensor | None = None
    latent: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    action: Tensor | None = None
    state: Tensor | None = None
    waveform: Tensor | None = None
    sound: Tensor | None = None
    sound_caption: str = ""
    messages: list[dict[str, Any]] | None = None
    pictures: tuple[Picture, ...] = ()
    embodiment: str | None = None
    tier: int = 256


@dataclass(frozen=True)
class PictureTokens:
    """The pictures of one conversation, or of a pack's, as the vision encoder takes them: n patches, m text tokens.

    patches: [n, P] normalised pixels in the encoder's dtype, pictures end to end in the order of the stream
    cells:   int64 [n, 2], row and column of each;  grids: int64 [pictures, 3], each one's patches along t, h and w
    taps, tap_weights: int64 and float32 [n, 4], how its learned positions are interpolated
    frames:  borders of what attends to itself: every image, every two frames of a video
    places:  int64 [m], in the understanding stream;  rows: int64 [m], of the encoder's output that stand there
    """

    patches: Tensor
    cells: Tensor
    grids: Tensor
    taps: Tensor
    tap_weights: Tensor
    frames: Spans
    places: Tensor
    rows: Tensor


@dataclass(frozen=True)
class TokenSample:
    """A sample as the model sees it, before noise and before packing.

    text:         int64 [L] token ids of the understanding stream, end-of-turn and start-of-generation included
    labels:       int64 [L], the token to be predicted *at* each position (already shifted), IGNORED_LABEL elsewhere
    positions:    float32 [3, L], of the text where it shows pictures; None counts from 0
    video:        float32 [C, t, h, w] clean latent, or None
    video_given:  bool [t], True where a latent frame is given
    action:       float32 [N, A] clean action rows, zero beyond `action_width`; row 0 is the state where there is one
    action_given: bool [N]
    action_start: position of row 0 on the frame grid: 1 (row i lies between frames i and i+1), 0 with a state row
    sound:        float32 [S, 64] clean sound latent; sound_given: bool [S]
    tier:         resolution tier (256, 480, 704, 720), which picks the shift of the noise level
    """

    key: str
    number: int
    task: str
    text: Tensor
    labels: Tensor | None = None
    positions: Tensor | None = None
    pictures: PictureTokens | None = None
    fps: float = 24.0
    tier: int = 256
    video: Tensor | None = None
    video_given: Tensor | None = None
    action: Tensor | None = None
    action_given: Tensor | None = None
    action_width: int = 0
    action_start: int = 1
    domain: int = 0
    sound: Tensor | None = None
    sound_given: Tensor | None = None


@dataclass(frozen=True)
class NoiseLevels:
    """σ in [0, 1] of one sample for each modality (equal unless the objective asks for independent ones)."""

    video: float
    action: float
    sound: float


@dataclass(frozen=True)
class ModalityTarget:
    """What the velocities of one modality are compared with, at its generated tokens, in packing order.

    velocity: float32 [n, width] ε − x0;  valid: bool [n, width], False for padding (odd latents, unused channels)
    sample:   int64 [n], the sample in the pack that a row belongs to
    elements: float32 [B], the denominator of each sample's mean; 0 where the sample does not count for this modality
    levels:   float32 [n], σ of each row, for the losses by noise band
    """

    velocity: Tensor
    valid: Tensor
    sample: Tensor
    elements: Tensor
    levels: Tensor


@dataclass(frozen=True)
class Spans:
    """Where the samples of a flat stream begin and end.

    offsets: int32 [n + 1], cumulative; lengths: the same borders as host integers, so that nothing waits for the device
    """

    offsets: Tensor
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @staticmethod
    def of(lengths: Iterable[int]) -> Spans:
        counts = tuple(lengths)
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        return Spans(offsets=offsets, lengths=counts)


@dataclass(frozen=True)
class DomainRows:
    """Action rows grouped by domain: int64 [K] distinct domain ids, and how many rows in order belong to each."""

    ids: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Slices:
    """Tokens of either stream that each rank holds, where a group of ranks shares a pack."""

    text: tuple[int, ...]
    generation: tuple[int, ...]


@dataclass(frozen=True)
class PackedSequence:
    """Two flat token streams of B samples, no padding. Offsets are arguments of attention, never module state.

    text_ids            int64 [U];  text_positions float32 [3, U]
    text_spans          borders of the samples in the understanding stream (B of them)
    prompts             a name of each sample's token ids, the same for the same ids (`packing.prompt_key`)
    generation_lengths  tokens of each of the B samples in the generation stream (0 for a conversation)
    generation_spans    borders in the generation stream, samples without generated modalities left out
    joint_spans         borders of the keys that generation attends to: each sample's text, then its generation tokens
    positions           float32 [3, G], the (t, h, w) axes of the rotary embedding
    video / sound / action   float32 [*, P] [*, 64] [*, A], the noisy or clean values of every token of a modality;
                             action rows are grouped by domain as `action_domains` says
    order               int64 [G]: row of cat(video, sound, action) that stands at each place of the stream
    levels              float32 [R] distinct σ;  level_index int64 [G];  noisy bool [G] (False: no timestep is added)
    joint_order         int64 [K]: row of cat(understanding, generation) keys in the order sample by sample,
                        samples without generated modalities left out
    joint_places        int64 [G]: place of each generation token in that order
    *_out               int64: places in the generation stream (video_out, sound_out, action_out) where velocities are
                        read; action_out is grouped by domain as `action_out_domains` says
    text_out, labels    int64 [n]: places in the understanding stream where logits are read, and the tokens expected
    *_target            what the velocities are compared with; None when the pack is only for sampling
    pictures            those of all conversations; None without
    slices              None, or of one rank's part of a pack (`model.slices`) how it is shared: then U and G count this
                        rank's tokens, and prompts, *_spans, *_lengths and joint_* are the whole pack's
    """

    text_ids: Tensor
    text_positions: Tensor
    text_spans: Spans
    prompts: tuple[str, ...]
    generation_lengths: tuple[int, ...]
    generation_spans: Spans
    joint_spans: Spans
    positions: Tensor
    video: Tensor
    sound: Tensor
    action: Tensor
    action_domains: DomainRows
    order: Tensor
    levels: Tensor
    level_index: Tensor
    noisy: Tensor
    joint_order: Tensor
    joint_places: Tensor
    video_out: Tensor
    sound_out: Tensor
    action_out: Tensor
    action_out_domains: DomainRows
    text_out: Tensor
    labels: Tensor
    video_target: ModalityTarget | None = None
    sound_target: ModalityTarget | None = None
    action_target: ModalityTarget | None = None
    pictures: PictureTokens | None = None
    slices: Slices | None = None

    def to(self, device: torch.device | str) -> PackedSequence:
        """The same pack on a device. Only moves: no dtype ever changes here."""
        return _changed(self, lambda tensor: tensor.to(device, non_blocking=True))

    def copied(self) -> PackedSequence:
        """The same pack in memory of its own."""
        return _changed(self, Tensor.clone)

    def pinned(self) -> PackedSequence:
        """The same pack in page-locked memory."""
        return _changed(self, Tensor.pin_memory)

    @property
    def samples(self) -> int:
        return len(self.text_spans.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of both streams together, what the token budget counts: of the whole pack, also of a rank's part."""
        return self.text_spans.total + self.generation_spans.total


@dataclass(frozen=True)
class Velocities:
    """What the backbone returns: float velocities at the generated tokens in packing order, hidden states at labels.

    video [n, P], sound [n, 64], action [n, A]; text_hidden [n, D] at `text_out`, for the chunked cross-entropy.
    """

    video: Tensor
    sound: Tensor
    action: Tensor
    text_hidden: Tensor


class StepBatch:
    """The samples that one rank contributes to one optimizer step. Deliberately opaque to `apply_to_collection`."""

    __slots__ = ("samples", "step")

    def __init__(self, step: int, samples: Sequence[Sample | TokenSample]) -> None:
        self.step = step
        self.samples = samples


def _changed(record, change: Callable[[Tensor], Tensor]):
    changes = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = change(value)
        elif isinstance(value, ModalityTarget | Spans | DomainRows | PictureTokens):
            changes[field.name] = _changed(value, change)
    return replace(record, **changes)
