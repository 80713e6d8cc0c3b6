"""Several samples, laid end to end in two flat streams, with everything that the backbone and the losses need.

Within a sample the generation stream holds video, then sound, then action, as upstream's pipeline orders them. Position
ids come from upstream's own builders; they are float32 here and must stay so (15001 in bf16 is 14976).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

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
    Spans,
    TokenSample,
)

VIDEO, SOUND, ACTION = 0, 1, 2
"""Order of the modalities inside a sample of the generation stream."""

SHAPES_KEPT = 256
"""Of positions that depend on a sample's shape alone: a robot's windows have a handful of shapes, whose positions and
masks would otherwise be most of the packing. Positions of a clip of 93 frames at 480 are half a megabyte, its mask
seven: hence so few. What is kept is shared, so it is never written to."""


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

    def mix(x0: Tensor | None, eps: Tensor | None, given: Tensor | None, sigma: float, axis: int) -> Tensor | None:
        if x0 is None:
            return None
        assert eps is not None and given is not None
        shape = [1] * x0.dim()
        shape[axis] = -1
        return torch.where(given.view(shape), x0, interpolate(x0, eps, sigma))

    action = mix(sample.action, noise.action, sample.action_given, levels.action, 0)
    if action is not None:
        action = action.clone()
        action[:, sample.action_width :] = 0
    return Values(
        video=mix(sample.video, noise.video, sample.video_given, levels.video, 1),
        sound=mix(sample.sound, noise.sound, sample.sound_given, levels.sound, 0),
        action=action,
    )


def patchify(latent: Tensor, patch: int) -> Tensor:
    """[C, t, h, w] → [t·h/p·w/p, p·p·C], elements in the order (row, column, channel); odd sides zero-padded."""
    _, _, h, w = latent.shape
    latent = F.pad(latent, (0, -w % patch, 0, -h % patch))
    cells = latent.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [C, t, h/p, p, w/p, p]
    return cells.permute(1, 2, 4, 3, 5, 0).flatten(3).flatten(0, 2)


def unpatchify(tokens: Tensor, shape: Sequence[int], patch: int) -> Tensor:
    """The inverse of `patchify`, for a latent of `shape` [C, t, h, w]."""
    c, t, h, w = shape
    rows, columns = math.ceil(h / patch), math.ceil(w / patch)
    cells = tokens.view(t, rows, columns, patch, patch, c).permute(5, 0, 1, 3, 2, 4)
    return cells.flatten(4).flatten(2, 3)[:, :, :h, :w]


def pack(
    samples: Sequence[TokenSample],
    values: Sequence[Values],
    levels: Sequence[NoiseLevels],
    layout: Layout,
    noise: Sequence[Values] | None = None,
    mean_over: str = "all",
) -> PackedSequence:
    """Lay samples end to end.

    Args:
        samples: in the order in which they will stand in both streams.
        values: what their generation tokens hold, from `noisy_values` or a sampler.
        levels: σ of each sample's modalities.
        noise: ε, to form the targets v = ε − x0; without it the pack is for sampling and has no targets.
        mean_over: "all" or "generated": which elements each sample's mean counts.
    """
    streams = [_stream(place, s, v, layout) for place, (s, v) in enumerate(zip(samples, values, strict=True))]
    text = _text_fields(samples, layout)
    rows = _row_fields(samples, streams)
    levels_of = torch.tensor([[lv.video, lv.sound, lv.action] for lv in levels], dtype=torch.float32).flatten()
    modality = torch.cat([s.modality for s in streams])
    sample_of = torch.repeat_interleave(torch.arange(len(streams)), torch.tensor([s.modality.numel() for s in streams]))
    generation_lengths = tuple(s.modality.numel() for s in streams)
    joint_order = _joint_order([s.text.numel() for s in samples], generation_lengths)
    packed = PackedSequence(
        **text,
        generation_lengths=generation_lengths,
        generation_spans=Spans.of(n for n in generation_lengths if n),
        joint_spans=Spans.of(s.text.numel() + n for s, n in zip(samples, generation_lengths, strict=True) if n),
        positions=torch.cat([s.positions for s in streams], dim=1),
        levels=levels_of,
        level_index=sample_of * 3 + modality,
        noisy=torch.cat([~s.given for s in streams]),
        joint_order=joint_order,
        joint_places=torch.nonzero(joint_order >= text["text_ids"].numel()).flatten(),
        **rows,
    )
    if noise is None:
        return packed
    return _with_targets(packed, samples, noise, levels, layout, mean_over)


# ------------------------------------------------------------------------------------------------ details


@dataclass(frozen=True)
class _Stream:
    """One sample's generation stream. modality int64 [n]; given bool [n]; positions float32 [3, n]."""

    modality: Tensor
    given: Tensor
    positions: Tensor
    video: Tensor
    sound: Tensor
    action: Tensor


def _stream(place: int, sample: TokenSample, values: Values, layout: Layout) -> _Stream:
    offset = sample.text.numel() + layout.margin
    fps = sample.fps if layout.modulate else None
    modality, given, positions = [], [], []
    video = torch.zeros((0, layout.patch**2 * layout.channels))
    sound = torch.zeros((0, layout.sound_width))
    action = torch.zeros((0, layout.action_width))
    if sample.video is not None:
        assert values.video is not None and sample.video_given is not None
        t, h, w = layout.grid(sample.video)
        video = patchify(values.video, layout.patch)
        ids = _positions((t, h, w), offset, fps, layout, layout.temporal)
        modality.append(torch.full((t * h * w,), VIDEO))
        given.append(sample.video_given.repeat_interleave(h * w))
        positions.append(ids)
    if sample.sound is not None:
        assert values.sound is not None and sample.sound_given is not None
        sound = values.sound
        rate = layout.sound_fps if layout.modulate else None
        modality.append(torch.full((sound.shape[0],), SOUND))
        given.append(sample.sound_given)
        positions.append(_positions((sound.shape[0], 1, 1), offset, rate, layout, 1))
    if sample.action is not None:
        assert values.action is not None and sample.action_given is not None
        action = values.action
        ids = _positions(
            (action.shape[0], 1, 1), offset, fps, layout, 1, base=layout.temporal, start=sample.action_start
        )
        modality.append(torch.full((action.shape[0],), ACTION))
        given.append(sample.action_given)
        positions.append(ids)
    if not modality:
        return _Stream(
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, dtype=torch.bool),
            torch.zeros((3, 0)),
            video,
            sound,
            action,
        )
    return _Stream(torch.cat(modality), torch.cat(given), torch.cat(positions, dim=1), video, sound, action)


@lru_cache(SHAPES_KEPT)
def _positions(
    grid: tuple[int, int, int],
    offset: int,
    fps: float | None,
    layout: Layout,
    temporal: int,
    base: int | None = None,
    start: int = 0,
) -> Tensor:
    ids, _ = get_3d_mrope_ids_vae_tokens(
        grid_t=grid[0],
        grid_h=grid[1],
        grid_w=grid[2],
        temporal_offset=offset,
        reset_spatial_indices=layout.reset_spatial,
        fps=fps,
        base_fps=layout.base_fps,
        temporal_compression_factor=temporal,
        base_temporal_compression_factor=base,
        start_frame_offset=start,
    )
    return ids.to(torch.float32)


def _text_fields(samples: Sequence[TokenSample], layout: Layout) -> dict:
    """The understanding stream: ids, positions from 0 for each sample, and where labelled tokens are predicted."""
    positions = [_text_positions(s.text.numel(), layout.modulate) for s in samples]
    labels = torch.cat([s.labels if s.labels is not None else torch.full_like(s.text, IGNORED_LABEL) for s in samples])
    places = torch.nonzero(labels != IGNORED_LABEL).flatten()
    return {
        "text_ids": torch.cat([s.text for s in samples]),
        "text_positions": torch.cat(positions, dim=1),
        "text_spans": Spans.of(s.text.numel() for s in samples),
        "prompts": tuple(prompt_key(s.text) for s in samples),
        "text_out": places,
        "labels": labels[places],
    }


@lru_cache(SHAPES_KEPT)
def _text_positions(length: int, modulate: bool) -> Tensor:
    return get_3d_mrope_ids_text_tokens(length, 0, use_float_positions=modulate)[0].to(torch.float32)


def _row_fields(samples: Sequence[TokenSample], streams: Sequence[_Stream]) -> dict:
    """The modalities' rows, the order that makes the stream of them, and the places where velocities are read."""
    starts = [0]
    for stream in streams:
        starts.append(starts[-1] + stream.modality.numel())
    # For every modality the places of its tokens in the stream, sample after sample.
    places = {
        kind: [start + torch.nonzero(s.modality == kind).flatten() for start, s in zip(starts, streams, strict=False)]
        for kind in (VIDEO, SOUND, ACTION)
    }
    generated = {
        kind: [
            start + torch.nonzero((s.modality == kind) & ~s.given).flatten()
            for start, s in zip(starts, streams, strict=False)
        ]
        for kind in (VIDEO, SOUND, ACTION)
    }
    domains = [s.domain for s in samples]
    by_domain = sorted(range(len(samples)), key=lambda place: (domains[place], place))
    stream_places = torch.cat([*places[VIDEO], *places[SOUND], *(places[ACTION][place] for place in by_domain)])
    order = torch.empty_like(stream_places)
    order[stream_places] = torch.arange(stream_places.numel())
    return {
        "video": torch.cat([s.video for s in streams]),
        "sound": torch.cat([s.sound for s in streams]),
        "action": torch.cat([streams[place].action for place in by_domain]),
        "action_domains": _grouped([(domains[place], places[ACTION][place].numel()) for place in by_domain]),
        "order": order,
        "video_out": torch.cat(generated[VIDEO]),
        "sound_out": torch.cat(generated[SOUND]),
        "action_out": torch.cat([generated[ACTION][place] for place in by_domain]),
        "action_out_domains": _grouped([(domains[p], generated[ACTION][p].numel()) for p in by_domain]),
    }


def _grouped(rows: Sequence[tuple[int, int]]) -> DomainRows:
    counts: dict[int, int] = {}
    for domain, count in rows:
        if count:
            counts[domain] = counts.get(domain, 0) + count
    return DomainRows(ids=torch.tensor(list(counts), dtype=torch.long), counts=tuple(counts.values()))


def _joint_order(text_lengths: Sequence[int], generation_lengths: Sequence[int]) -> Tensor:
    """Rows of cat(understanding, generation) sample by sample, samples without generation tokens left out."""
    parts, text_start, generation_start = [], 0, sum(text_lengths)
    for text, generation in zip(text_lengths, generation_lengths, strict=True):
        if generation:
            parts.append(torch.arange(text_start, text_start + text))
            parts.append(torch.arange(generation_start, generation_start + generation))
        text_start += text
        generation_start += generation
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def _with_targets(
    packed: PackedSequence,
    samples: Sequence[TokenSample],
    noise: Sequence[Values],
    levels: Sequence[NoiseLevels],
    layout: Layout,
    mean_over: str,
) -> PackedSequence:
    by_domain = sorted(range(len(samples)), key=lambda place: (samples[place].domain, place))
    everyone = range(len(samples))
    video = _target(
        everyone,
        samples,
        mean_over,
        lambda s: s.video_given,
        levels,
        0,
        lambda place: _video_rows(samples[place], noise[place], layout),
    )
    sound = _target(
        everyone,
        samples,
        mean_over,
        lambda s: s.sound_given,
        levels,
        1,
        lambda place: _sound_rows(samples[place], noise[place]),
    )
    action = _target(
        by_domain,
        samples,
        mean_over,
        lambda s: s.action_given,
        levels,
        2,
        lambda place: _action_rows(samples[place], noise[place]),
    )
    return replace(packed, video_target=video, sound_target=sound, action_target=action)


@dataclass(frozen=True)
class _Rows:
    """v and valid [n, width] at every token of a modality; tokens and elements of each frame or row."""

    velocity: Tensor
    valid: Tensor
    per_frame: int
    elements: int


def _video_rows(sample: TokenSample, noise: Values, layout: Layout) -> _Rows | None:
    if sample.video is None:
        return None
    assert noise.video is not None
    _, h, w = layout.grid(sample.video)
    c, _, rows, columns = sample.video.shape
    valid = _valid_video(tuple(sample.video.shape), layout.patch)
    return _Rows(patchify(velocity(sample.video, noise.video), layout.patch), valid, h * w, c * rows * columns)


@lru_cache(64)
def _valid_video(shape: tuple[int, ...], patch: int) -> Tensor:
    """Which elements of a latent's tokens are its own, and not the padding of odd sides."""
    return patchify(torch.ones(shape), patch) > 0


def _sound_rows(sample: TokenSample, noise: Values) -> _Rows | None:
    if sample.sound is None:
        return None
    assert noise.sound is not None
    target = velocity(sample.sound, noise.sound)
    return _Rows(target, torch.ones_like(target, dtype=torch.bool), 1, target.shape[1])


def _action_rows(sample: TokenSample, noise: Values) -> _Rows | None:
    if sample.action is None:
        return None
    assert noise.action is not None
    target = velocity(sample.action, noise.action)
    valid = torch.zeros_like(target, dtype=torch.bool)
    valid[:, : sample.action_width] = True
    return _Rows(target, valid, 1, sample.action_width)


def _target(places, samples, mean_over, given_of, levels, column, rows_of) -> ModalityTarget | None:
    """Targets at the generated tokens of one modality, samples in the order of `places`."""
    velocities, valids, owners, sigmas = [], [], [], []
    elements = torch.zeros(len(samples))
    for place in places:
        rows = rows_of(place)
        if rows is None:
            continue
        given = given_of(samples[place])
        generated = (~given).repeat_interleave(rows.per_frame)
        frames = given.numel() if mean_over == "all" else int((~given).sum())
        elements[place] = frames * rows.elements
        count = int(generated.sum())
        velocities.append(rows.velocity[generated])
        valids.append(rows.valid[generated])
        owners.append(torch.full((count,), place))
        level = levels[place]
        sigmas.append(torch.full((count,), (level.video, level.sound, level.action)[column], dtype=torch.float32))
    if not velocities:
        return None
    return ModalityTarget(
        velocity=torch.cat(velocities),
        valid=torch.cat(valids),
        sample=torch.cat(owners),
        elements=elements,
        levels=torch.cat(sigmas),
    )
