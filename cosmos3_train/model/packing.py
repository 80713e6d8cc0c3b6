"""Several samples, laid end to end in two flat streams, with everything that the backbone and the losses need.

Within a sample the generation stream holds video, then sound, then action, as upstream's pipeline orders them. Position
ids come from upstream's own builders; they are float32 here and must stay so (15001 in bf16 is 14976).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import (
    get_3d_mrope_ids_text_tokens,
    get_3d_mrope_ids_vae_tokens,
)
from torch import Tensor

from cosmos3_train.flow.interpolation import interpolate, velocity
from cosmos3_train.types import (
    IGNORED_LABEL,
    DomainRows,
    ModalityTarget,
    NoiseLevels,
    PackedSequence,
    PictureTokens,
    Spans,
    TokenSample,
)

MODALITIES = ("video", "sound", "action")
"""Of a sample, in their order inside the generation stream."""

SHAPES_KEPT = 256
"""Of positions that depend on a sample's shape alone: a robot's windows have a handful of shapes, whose positions would
otherwise be most of the packing. Those of a clip of 93 frames at 480, 9,360 tokens, are 0.1 MB. What is kept is shared,
so it is never written to."""

MASKS_KEPT = 64
"""The same of which elements are a sample's own: of that clip 1.8 MB."""

VALUES_AT_ONCE = 1 << 18
"""In one tensor of samples that are noised and cut into tokens together: hundreds of small samples cost what one does,
and what a large one needs still stays in the processor's cache. At least one sample."""


@dataclass(frozen=True)
class Layout:
    """What packing must know of the transformer's configuration.

    patch: side of a video token in latent cells;  channels: of the latent;  margin: temporal positions between text
    and the first frame;  temporal: pixel frames per latent frame;  modulate: whether positions follow the frame rate
    """

    patch: int
    channels: int
    action_width: int
    sound_width: int
    margin: int
    base_fps: float
    sound_fps: float
    modulate: bool
    reset_spatial: bool
    temporal: int = 4

    @staticmethod
    def of(config) -> Layout:
        """From a `Cosmos3OmniTransformer`'s config."""
        return Layout(
            patch=config.latent_patch_size,
            channels=config.latent_channel,
            action_width=config.action_dim or 0,
            sound_width=config.sound_dim or 0,
            margin=config.unified_3d_mrope_temporal_modality_margin,
            base_fps=float(config.base_fps),
            sound_fps=float(config.sound_latent_fps),
            modulate=config.enable_fps_modulation,
            reset_spatial=config.unified_3d_mrope_reset_spatial_ids,
        )

    def width(self, modality: str) -> int:
        """Of the tokens of a modality."""
        widths = {"video": self.patch**2 * self.channels, "sound": self.sound_width, "action": self.action_width}
        return widths[modality]

    def grid(self, latent: Tensor) -> tuple[int, int, int]:
        """Tokens of a latent [C, t, h, w] along time, height and width; odd sides are padded to whole patches."""
        _, t, h, w = latent.shape
        return t, math.ceil(h / self.patch), math.ceil(w / self.patch)

    def tokens(self, sample: TokenSample) -> int:
        """Tokens that a sample puts into both streams, what a token budget counts."""
        count = sample.text.numel()
        count += math.prod(self.grid(sample.video)) if sample.video is not None else 0
        count += sample.sound.shape[0] if sample.sound is not None else 0
        return count + (sample.action.shape[0] if sample.action is not None else 0)


@dataclass(frozen=True)
class Values:
    """What stands in a sample's generation stream: video [C, t, h, w], sound [S, 64], action [N, A], float32 each."""

    video: Tensor | None = None
    sound: Tensor | None = None
    action: Tensor | None = None


def prompt_key(text: Tensor) -> str:
    """A name of token ids int64 [L] on the CPU, the same for the same ids: what the reasoner cache knows them by."""
    return hashlib.blake2b(text.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def draw_noise(sample: TokenSample, generator: torch.Generator) -> Values:
    """ε ~ N(0, 1) for every modality of a sample, drawn on the CPU in one order: video, sound, action."""

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.randn(x.shape, generator=generator)

    return Values(video=like(sample.video), sound=like(sample.sound), action=like(sample.action))


def noisy_values(sample: TokenSample, noise: Values, levels: NoiseLevels) -> Values:
    """x_σ of a sample: given parts stay clean, and action channels beyond the robot's own width stay zero."""
    found = {}
    for name in MODALITIES:
        x0, given = getattr(sample, name), getattr(sample, f"{name}_given")
        if x0 is not None:
            eps = getattr(noise, name)
            found[name] = _noisy(name, given, sample.action_width, x0[None], eps[None], [levels])[0]
    return Values(**found)


def patchify(latent: Tensor, patch: int) -> Tensor:
    """[..., C, t, h, w] → [..., t·h/p·w/p, p·p·C], elements in the order (row, column, channel); odd sides
    zero-padded."""
    return _cells(latent, patch).flatten(-3).flatten(-4, -2)


def unpatchify(tokens: Tensor, shape: Sequence[int], patch: int) -> Tensor:
    """The inverse of `patchify`, for a latent of `shape` [C, t, h, w]."""
    c, t, h, w = shape
    rows, columns = math.ceil(h / patch), math.ceil(w / patch)
    cells = tokens.view(t, rows, columns, patch, patch, c).permute(5, 0, 1, 3, 2, 4)
    return cells.flatten(4).flatten(2, 3)[:, :, :h, :w]


def pack(
    samples: Sequence[TokenSample],
    values: Sequence[Values] | None,
    levels: Sequence[NoiseLevels],
    layout: Layout,
    noise: Sequence[Values] | None = None,
    mean_over: str = "all",
) -> PackedSequence:
    """Lay samples end to end.

    Args:
        samples: in the order in which they will stand in both streams.
        values: what their generation tokens hold; None for x_σ of `noise` at `levels`, what `noisy_values` gives.
        levels: σ of each sample's modalities.
        noise: ε, to form the targets v = ε − x0; without it the pack is for sampling and has no targets.
        mean_over: "all" or "generated": which elements each sample's mean counts.
    """
    by_domain = sorted(range(len(samples)), key=lambda place: samples[place].domain)
    orders = {"video": range(len(samples)), "sound": range(len(samples)), "action": by_domain}
    parts = {name: _part(name, order, samples, layout) for name, order in orders.items()}
    counts = torch.zeros((len(samples), len(MODALITIES)), dtype=torch.long)
    for column, part in enumerate(parts.values()):
        counts[part.places, column] = part.counts
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    lengths = tuple(counts.sum(dim=1).tolist())
    sigmas = torch.tensor([[getattr(level, name) for name in MODALITIES] for level in levels], dtype=torch.float32)
    rows, places = {}, []
    for column, (name, part) in enumerate(parts.items()):
        places.append(_ranges(starts[part.places, column], part.counts))
        tokens, velocities, valid = _rows(part, samples, values, levels, noise, layout)
        rows |= {name: tokens, f"{name}_out": places[-1][part.generated]}
        if noise is not None and part.groups:
            elements = torch.zeros(len(samples))
            elements[part.places] = (part.elements if mean_over == "all" else part.generated_elements).float()
            sample = part.places.repeat_interleave(part.generated_counts)
            rows[f"{name}_target"] = ModalityTarget(velocities, valid, sample, elements, sigmas[sample, column])
    stream_places = torch.cat(places)
    order = torch.empty_like(stream_places)
    order[stream_places] = torch.arange(stream_places.numel())
    text = _text_fields(samples, layout)
    joint_order = _joint_order(text["text_spans"].lengths, lengths)
    return PackedSequence(
        **text,
        **rows,
        generation_lengths=lengths,
        generation_spans=Spans.of(n for n in lengths if n),
        joint_spans=Spans.of(s.text.numel() + n for s, n in zip(samples, lengths, strict=True) if n),
        positions=torch.cat([_stream_positions(s, layout) for s in samples], dim=1),
        levels=sigmas.flatten(),
        level_index=torch.arange(counts.numel()).repeat_interleave(counts.flatten()),
        noisy=torch.cat([part.generated for part in parts.values()])[order],
        joint_order=joint_order,
        joint_places=torch.nonzero(joint_order >= text["text_ids"].numel()).flatten(),
        order=order,
        action_domains=_grouped(samples, parts["action"].places, parts["action"].counts),
        action_out_domains=_grouped(samples, parts["action"].places, parts["action"].generated_counts),
    )


# ------------------------------------------------------------------------------------------------ details


def _cells(latent: Tensor, patch: int) -> Tensor:
    """[..., C, t, h, w] → [..., t, h/p, w/p, p, p, C], the tokens of `patchify`, a view where no side is odd."""
    h, w = latent.shape[-2:]
    if h % patch or w % patch:
        latent = F.pad(latent, (0, -w % patch, 0, -h % patch))
    cells = latent.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [..., C, t, h/p, p, w/p, p]
    return cells.movedim(-6, -1).transpose(-4, -3)


@dataclass(frozen=True)
class _Group:
    """Those of a modality's n samples that have one shape, action width and mask.

    turns: of them among the n;  given: bool [frames] (action rows, sound frames)
    own:   bool [rows, width], which elements are a sample's own, and not padding of odd sides or unused action channels
    elements: of these in a frame
    """

    turns: list[int]
    given: Tensor
    own: Tensor
    elements: int

    @property
    def tokens(self) -> int:
        """Of a frame."""
        return len(self.own) // max(1, self.given.numel())


@dataclass(frozen=True)
class _Part:
    """Where one modality's rows are: n of a pack's samples have it, and stand one after another.

    places:    int64 [n], of the samples in the pack;  generated: bool [rows]
    counts, generated_counts: int64 [n], tokens of each, and those of them that are generated
    elements, generated_elements: int64 [n], the same of values that are a sample's own
    """

    name: str
    places: Tensor
    generated: Tensor
    counts: Tensor
    generated_counts: Tensor
    elements: Tensor
    generated_elements: Tensor
    groups: list[_Group]


def _part(name: str, order: Sequence[int], samples: Sequence[TokenSample], layout: Layout) -> _Part:
    places = [place for place in order if getattr(samples[place], name) is not None]
    given = [getattr(samples[place], f"{name}_given") for place in places]
    alike: dict[tuple[tuple[int, ...], int, bytes], list[int]] = {}
    for turn, (place, mask) in enumerate(zip(places, given, strict=True)):
        shape = tuple(getattr(samples[place], name).shape)
        alike.setdefault((shape, samples[place].action_width, mask.numpy().tobytes()), []).append(turn)
    groups = [
        _Group(turns, given[turns[0]], *_own(name, shape, width, layout.patch))
        for (shape, width, _), turns in alike.items()
    ]
    # Of each sample: frames, generated frames, and tokens and elements of a frame.
    numbers = torch.zeros((4, len(places)), dtype=torch.long)
    for group in groups:
        row = (group.given.numel(), int((~group.given).sum()), group.tokens, group.elements)
        numbers[:, group.turns] = torch.tensor(row)[:, None]
    frames, generated, tokens, elements = numbers
    masks = torch.cat([torch.zeros(0, dtype=torch.bool), *given])
    return _Part(
        name=name,
        places=torch.tensor(places, dtype=torch.long),
        generated=~masks.repeat_interleave(tokens.repeat_interleave(frames)),
        counts=frames * tokens,
        generated_counts=generated * tokens,
        elements=frames * elements,
        generated_elements=generated * elements,
        groups=groups,
    )


def _rows(
    part: _Part,
    samples: Sequence[TokenSample],
    values: Sequence[Values] | None,
    levels: Sequence[NoiseLevels],
    noise: Sequence[Values] | None,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a modality's tokens hold [rows, width]; v, and which of its elements are a sample's own, at the generated
    ones [n, width], n = 0 without noise."""
    name, width = part.name, layout.width(part.name)
    wanted = part.generated_counts if noise is not None else torch.zeros_like(part.counts)
    tokens, targets = torch.empty((int(part.counts.sum()), width)), torch.empty((int(wanted.sum()), width))
    valid = torch.ones(targets.shape, dtype=torch.bool)
    token_places, target_places = tokens.split(part.counts.tolist()), targets.split(wanted.tolist())
    valid_places = valid.split(wanted.tolist())

    def stacked(of: Sequence[TokenSample] | Sequence[Values], places: Sequence[int]) -> Tensor:
        return torch.stack([getattr(of[place], name) for place in places])

    def write(stack: Tensor, turns: Sequence[int], to: Sequence[Tensor]) -> None:
        cut = _cells(stack, layout.patch) if name == "video" else stack
        for turn, one in zip(turns, cut, strict=True):
            to[turn].view(one.shape).copy_(one)

    for group in part.groups:
        generated = torch.nonzero(~group.given).flatten()
        at_once = max(1, VALUES_AT_ONCE // max(1, group.own.numel()))
        for turns in (group.turns[start : start + at_once] for start in range(0, len(group.turns), at_once)):
            places = part.places[turns].tolist()
            held = stacked(values, places) if values is not None else None
            if noise is not None:
                x0, eps = stacked(samples, places), stacked(noise, places)
                if held is None:
                    few = [levels[place] for place in places]
                    held = _noisy(name, group.given, samples[places[0]].action_width, x0, eps, few)
                write(velocity(x0, eps).index_select(_frame_axis(name), generated), turns, target_places)
            assert held is not None, "neither values nor the noise to form them of"
            write(held, turns, token_places)
        if noise is not None and not group.own.all():
            own = group.own.unflatten(0, (-1, group.tokens))[generated].flatten(0, 1)
            for turn in group.turns:
                valid_places[turn].copy_(own)
    return tokens, targets, valid


def _frame_axis(name: str) -> int:
    """Of stacked values: latent frames of video [b, C, t, h, w], rows of the others [b, n, width]."""
    return 2 if name == "video" else 1


def _noisy(
    name: str, given: Tensor, action_width: int, x0: Tensor, eps: Tensor, levels: Sequence[NoiseLevels]
) -> Tensor:
    """x_σ [b, ...] of b samples of one shape, mask and action width: what is given stands at σ = 0."""
    sigma = torch.tensor([getattr(level, name) for level in levels], dtype=torch.float64)
    shape = [1] * x0.dim()
    shape[0], shape[_frame_axis(name)] = len(levels), given.numel()
    mixed = interpolate(x0, eps, torch.where(given, 0.0, sigma[:, None]).view(shape))
    if name == "action":
        mixed[..., action_width:] = 0
    return mixed


@lru_cache(MASKS_KEPT)
def _own(name: str, shape: tuple[int, ...], action_width: int, patch: int) -> tuple[Tensor, int]:
    """`own` and `elements` of a `_Group`."""
    if name == "video":
        own, frames = patchify(torch.ones(shape), patch) > 0, shape[1]
    else:
        own, frames = torch.ones(shape, dtype=torch.bool), shape[0]
        if name == "action":
            own[:, action_width:] = False
    return own, int(own.sum()) // max(1, frames)


def _stream_positions(sample: TokenSample, layout: Layout) -> Tensor:
    """float32 [3, n]: the positions of a sample's generation stream."""
    return _positions(
        None if sample.video is None else layout.grid(sample.video),
        0 if sample.sound is None else len(sample.sound),
        0 if sample.action is None else len(sample.action),
        sample.action_start,
        sample.text.numel() + layout.margin,
        sample.fps,
        layout,
    )


@lru_cache(SHAPES_KEPT)
def _positions(
    video: tuple[int, int, int] | None,
    sound: int,
    action: int,
    action_start: int,
    offset: int,
    fps: float,
    layout: Layout,
) -> Tensor:
    def of(grid: tuple[int, int, int], rate: float, temporal: int, base: int | None = None, start: int = 0) -> Tensor:
        ids, _ = get_3d_mrope_ids_vae_tokens(
            grid_t=grid[0],
            grid_h=grid[1],
            grid_w=grid[2],
            temporal_offset=offset,
            reset_spatial_indices=layout.reset_spatial,
            fps=rate if layout.modulate else None,
            base_fps=layout.base_fps,
            temporal_compression_factor=temporal,
            base_temporal_compression_factor=base,
            start_frame_offset=start,
        )
        return ids.to(torch.float32)

    found = [torch.zeros((3, 0))]
    if video is not None:
        found.append(of(video, fps, layout.temporal))
    if sound:
        found.append(of((sound, 1, 1), layout.sound_fps, 1))
    if action:
        found.append(of((action, 1, 1), fps, 1, base=layout.temporal, start=action_start))
    return torch.cat(found, dim=1)


def _text_fields(samples: Sequence[TokenSample], layout: Layout) -> dict:
    """The understanding stream: ids, positions from 0 for each sample, and where labelled tokens are predicted."""
    spans = Spans.of(s.text.numel() for s in samples)
    labels = torch.full((spans.total,), IGNORED_LABEL)
    for start, sample in zip(accumulate(spans.lengths, initial=0), samples, strict=False):
        if sample.labels is not None:
            labels[start : start + sample.text.numel()] = sample.labels
    places = torch.nonzero(labels != IGNORED_LABEL).flatten()
    return {
        "text_ids": torch.cat([s.text for s in samples]),
        "text_positions": torch.cat(
            [_text_positions(s.text.numel(), layout.modulate) if s.positions is None else s.positions for s in samples],
            dim=1,
        ),
        "pictures": _pictures(samples, spans),
        "text_spans": spans,
        "prompts": tuple(prompt_key(s.text) for s in samples),
        "text_out": places,
        "labels": labels[places],
    }


def _pictures(samples: Sequence[TokenSample], spans: Spans) -> PictureTokens | None:
    """All pictures end to end: one pass of the vision encoder."""
    starts = accumulate(spans.lengths, initial=0)
    shown = [(start, s.pictures) for start, s in zip(starts, samples, strict=False) if s.pictures is not None]
    if not shown:
        return None
    parts = [pictures for _, pictures in shown]
    places = torch.cat([start + pictures.places for start, pictures in shown])
    return PictureTokens(
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("patches", "cells", "grids", "taps", "tap_weights")
        },
        frames=Spans.of(length for part in parts for length in part.frames.lengths),
        places=places,
        rows=torch.arange(places.numel()),
    )


@lru_cache(SHAPES_KEPT)
def _text_positions(length: int, modulate: bool) -> Tensor:
    return get_3d_mrope_ids_text_tokens(length, 0, use_float_positions=modulate)[0].to(torch.float32)


def _grouped(samples: Sequence[TokenSample], places: Tensor, counts: Tensor) -> DomainRows:
    """The domains of `places`, which stand together, and the rows of each that has any."""
    rows: dict[int, int] = {}
    for place, count in zip(places.tolist(), counts.tolist(), strict=True):
        if count:
            domain = samples[place].domain
            rows[domain] = rows.get(domain, 0) + count
    return DomainRows(ids=torch.tensor(list(rows), dtype=torch.long), counts=tuple(rows.values()))


def _joint_order(text_lengths: Sequence[int], generation_lengths: Sequence[int]) -> Tensor:
    """Rows of cat(understanding, generation) sample by sample, samples without generation tokens left out."""
    lengths = torch.tensor([text_lengths, generation_lengths])  # [2, B]
    starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
    generates = lengths[1] > 0
    return _ranges(starts.T[generates].flatten(), lengths.T[generates].flatten())


def _ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """start, start + 1, … of each, so many as its count, one after another: int64."""
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (starts - before).repeat_interleave(counts)
