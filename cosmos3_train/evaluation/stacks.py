"""Where a pack holds its samples' values, modality by modality, for a solver that changes only those between its steps.

Samples that share shape and mask form one stack: their scheduler steps are one step on one tensor, and their tokens go
into the pack with one indexed copy instead of a new packing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from cosmos3_train.model.packing import Layout, Values, patchify, unpatchify
from cosmos3_train.types import TokenSample

Modality = Literal["video", "sound", "action"]


@dataclass(frozen=True)
class Stack:
    """The samples of a pack that share shape and mask in one modality: their scheduler steps are one step.

    places: of these b samples in the pack;  shape: of one sample's values;  given: bool along `axis` of the values
    rows:   int64, the rows of the pack's modality tensor that hold them;  out: int64, the rows of the velocities
    width:  action channels in use (all of them, for the others)
    """

    modality: Modality
    places: tuple[int, ...]
    shape: tuple[int, ...]
    given: Tensor
    rows: Tensor
    out: Tensor
    width: int
    patch: int

    @property
    def axis(self) -> int:
        """The axis of stacked values along which tokens are given or generated."""
        return 2 if self.modality == "video" else 1

    @property
    def generates(self) -> bool:
        return self.out.numel() > 0

    @property
    def mask(self) -> Tensor:
        """`given`, to be broadcast over stacked values."""
        shape = [1] * (len(self.shape) + 1)
        shape[self.axis] = -1
        return self.given.view(shape)

    def start(self, clean: Sequence[Values], noise: Sequence[Values], device: torch.device) -> Tensor:
        """[b, *shape]: clean where given, ε elsewhere, zero in unused channels."""
        x0 = torch.stack([self._of(clean[place]) for place in self.places]).to(device)
        eps = torch.stack([self._of(noise[place]) for place in self.places]).to(device)
        return self._cut(torch.where(self.mask, x0, eps))

    def cleaned(self, stepped: Tensor, before: Tensor) -> Tensor:
        """A scheduler's step with given values as they were and unused channels zero."""
        return self._cut(torch.where(self.mask, before, stepped))

    def tokens(self, state: Tensor) -> Tensor:
        """Stacked values as rows of the pack, sample after sample."""
        if self.modality == "video":
            return patchify(state.transpose(0, 1).flatten(1, 2), self.patch)
        return state.flatten(0, 1)

    def velocity(self, rows: Tensor) -> Tensor:
        """[b, *shape] from all of the modality's velocities; zero where given."""
        found = rows.new_zeros((len(self.places), *self.shape))
        if not self.generates:
            return found
        rows, generated, b = rows.index_select(0, self.out), ~self.given, len(self.places)
        if self.modality == "video":
            c, _, h, w = self.shape
            frames = int(generated.sum())
            found[:, :, generated] = (
                unpatchify(rows, (c, b * frames, h, w), self.patch).unflatten(1, (b, frames)).transpose(0, 1)
            )
        else:
            found[:, generated] = rows.unflatten(0, (b, -1))
        return self._cut(found)

    def _of(self, values: Values) -> Tensor:
        value = {"video": values.video, "sound": values.sound, "action": values.action}[self.modality]
        assert value is not None and value.shape == self.shape
        return value.float()

    def _cut(self, x: Tensor) -> Tensor:
        if self.modality != "action" or self.width == self.shape[-1]:
            return x
        return torch.cat([x[..., : self.width], torch.zeros_like(x[..., self.width :])], dim=-1)


def stacks_of(samples: Sequence[TokenSample], layout: Layout, device: torch.device) -> list[Stack]:
    """Samples of one shape and mask together, and where a pack holds their rows."""
    # Packing puts action rows domain by domain, the other modalities' in the order of the samples.
    by_domain = sorted(range(len(samples)), key=lambda place: (samples[place].domain, place))
    found = []
    for modality in ("video", "sound", "action"):
        order = by_domain if modality == "action" else range(len(samples))
        groups: dict[tuple, list[tuple[int, range, range]]] = {}
        row = out = 0
        for place in order:
            value, given = _field(samples[place], modality)
            if value is None or given is None:
                continue
            per_frame = math.prod(layout.grid(value)[1:]) if modality == "video" else 1
            rows, outs = given.numel() * per_frame, int((~given).sum()) * per_frame
            width = samples[place].action_width if modality == "action" else value.shape[-1]
            groups.setdefault((tuple(value.shape), tuple(given.tolist()), width), []).append(
                (place, range(row, row + rows), range(out, out + outs))
            )
            row, out = row + rows, out + outs
        for (shape, given, width), members in groups.items():
            found.append(
                Stack(
                    modality=cast(Modality, modality),
                    places=tuple(place for place, _, _ in members),
                    shape=shape,
                    given=torch.tensor(given, device=device),
                    rows=torch.tensor([r for _, rows, _ in members for r in rows], dtype=torch.long, device=device),
                    out=torch.tensor([r for _, _, outs in members for r in outs], dtype=torch.long, device=device),
                    width=width,
                    patch=layout.patch,
                )
            )
    return found


def _field(sample: TokenSample, modality: str) -> tuple[Tensor | None, Tensor | None]:
    if modality == "video":
        return sample.video, sample.video_given
    if modality == "sound":
        return sample.sound, sample.sound_given
    return sample.action, sample.action_given
