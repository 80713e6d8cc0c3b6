"""A rank's part of a pack under context parallelism: a contiguous slice of either stream, with what is read there."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from cosmos3_train.types import (
    IGNORED_LABEL,
    DomainRows,
    ModalityTarget,
    PackedSequence,
    PictureTokens,
    Slices,
)


def slice_of(pack: PackedSequence, place: int, size: int) -> PackedSequence:
    """The pack as rank `place` of `size` holds it. Its losses, with the whole pack's denominators, are the part of the
    whole's that its tokens have.

    Borders of samples and the joint order stay the whole pack's, for attention has all tokens. Slices differ by one
    token at most, so nothing is padded; a stream of fewer tokens than ranks leaves some of them without.
    """
    slices = Slices(_shares(pack.text_spans.total, size), _shares(pack.generation_spans.total, size))
    text, own = _range(slices.text, place), _range(slices.generation, place)
    rows = pack.order[own.start : own.stop].sort().values  # of cat(video, sound, action)
    borders = accumulate((len(pack.video), len(pack.sound), len(pack.action)), initial=0)
    video, sound, action = (rows[_within(rows, range(*pair))] - pair[0] for pair in pairwise(borders))
    read = {name: _within(getattr(pack, name), own) for name in ("video_out", "sound_out", "action_out")}
    places, labels = _text_out(pack, text)
    return replace(
        pack,
        text_ids=pack.text_ids[text.start : text.stop],
        text_positions=pack.text_positions[:, text.start : text.stop],
        positions=pack.positions[:, own.start : own.stop],
        video=pack.video[video],
        sound=pack.sound[sound],
        action=pack.action[action],
        action_domains=_some(pack.action_domains, torch.isin(torch.arange(len(pack.action)), action)),
        order=torch.searchsorted(rows, pack.order[own.start : own.stop]),
        level_index=pack.level_index[own.start : own.stop],
        noisy=pack.noisy[own.start : own.stop],
        **{name: getattr(pack, name)[kept] - own.start for name, kept in read.items()},
        action_out_domains=_some(pack.action_out_domains, read["action_out"]),
        video_target=_target(pack.video_target, read["video_out"]),
        sound_target=_target(pack.sound_target, read["sound_out"]),
        action_target=_target(pack.action_target, read["action_out"]),
        text_out=places,
        labels=labels,
        pictures=_pictures(pack.pictures, text),
        slices=slices,
    )


def _shares(total: int, size: int) -> tuple[int, ...]:
    return tuple(total // size + int(place < total % size) for place in range(size))


def _range(lengths: tuple[int, ...], place: int) -> range:
    start = sum(lengths[:place])
    return range(start, start + lengths[place])


def _within(places: Tensor, own: range) -> Tensor:
    return (places >= own.start) & (places < own.stop)


def _some(domains: DomainRows, kept: Tensor) -> DomainRows:
    counts = [int(part.sum()) for part in kept.split(domains.counts)] if domains.counts else []
    left = [place for place, count in enumerate(counts) if count]
    return DomainRows(ids=domains.ids[left], counts=tuple(counts[place] for place in left))


def _target(target: ModalityTarget | None, kept: Tensor) -> ModalityTarget | None:
    """Rows of a target; also where none are left it is there, and the samples' denominators stay."""
    if target is None:
        return None
    parts = {name: getattr(target, name)[kept] for name in ("velocity", "valid", "sample", "levels")}
    return replace(target, **parts)


def _pictures(pictures: PictureTokens | None, text: range) -> PictureTokens | None:
    """All pictures, for each rank of a group encodes them itself, with those of their tokens that are in the slice."""
    if pictures is None:
        return None
    kept = _within(pictures.places, text)
    return replace(pictures, places=pictures.places[kept] - text.start, rows=pictures.rows[kept])


def _text_out(pack: PackedSequence, text: range) -> tuple[Tensor, Tensor]:
    """Where text is predicted in the slice. Where it is somewhere in the pack but not here, a token is read that counts
    nothing: the exchanges of the last layer's backward are every rank's."""
    kept = _within(pack.text_out, text)
    if pack.labels.numel() and not kept.any():
        assert len(text), "a rank without text can take no part in a backward of text"
        return torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORED_LABEL)
    return pack.text_out[kept] - text.start, pack.labels[kept]
