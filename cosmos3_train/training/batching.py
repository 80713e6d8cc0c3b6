"""From a step's samples to packs with their noise and targets: CPU work, done in the loader's workers where it can be.

It can be where no sample needs the video tokenizer on the device, that is where latents are cached. The result is the
same either way: every draw is a function of the seed and the sample's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from cosmos3_train.config import Objective, UserError
from cosmos3_train.data.mixture import StepDataset
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.slices import slice_of
from cosmos3_train.objectives import flow_matching, next_token
from cosmos3_train.types import IGNORED_LABEL, PackedSequence, Sample, StepBatch, TokenSample

TEXT = "text"
LOSSES: tuple[str, ...] = (*flow_matching.MODALITIES, TEXT)


class PackedStep:
    """One rank's share of a step, packed. Opaque like `StepBatch`, so that nothing casts positions or noise levels.

    packs:   on the CPU
    counts:  what this rank's samples add to the step's denominators, by loss; with context parallelism what its group's
             add, which every rank of the group says
    samples: of this rank or its group, padding left out
    keys:    of the samples in each pack
    """

    __slots__ = ("counts", "keys", "packs", "samples", "step")

    def __init__(
        self, step: int, packs: list[PackedSequence], counts: dict[str, int], samples: int, keys: list[list[str]]
    ) -> None:
        self.step = step
        self.packs = packs
        self.counts = counts
        self.samples = samples
        self.keys = keys

    @property
    def generates(self) -> bool:
        return any(self.counts[name] for name in flow_matching.MODALITIES)

    @property
    def speaks(self) -> bool:
        return self.counts[TEXT] > 0

    def pin_memory(self) -> PackedStep:
        """The loader's hook: from page-locked memory packs move to the GPU without the host waiting for it."""
        return PackedStep(self.step, [pack.pinned() for pack in self.packs], self.counts, self.samples, self.keys)


@dataclass(frozen=True)
class Packer:
    """Encodes, cuts and packs a step's samples.

    padded: whether every pack ends with `padding`, which counts nothing (`sharding` says what for)
    part:   this rank's place among those that share packs, and their number; the step's counts stay the whole packs'
    """

    encoder: Encoder
    layout: Layout
    objective: Objective
    budget: int
    seed: int
    padded: bool = False
    part: tuple[int, int] = (0, 1)

    def __call__(self, batch: StepBatch) -> PackedStep:
        samples = self.encoder.encode(batch.samples)
        members = split_into_packs(samples, self.layout, self.budget)
        packs = [self._packed(few) for few in members]
        counts = flow_matching.counts(samples, self.objective)
        counts[TEXT] = next_token.labelled_tokens(samples)
        return PackedStep(batch.step, packs, counts, len(samples), [[s.key for s in few] for few in members])

    def _packed(self, members: list[TokenSample]) -> PackedSequence:
        pack, (place, size) = self._whole(members), self.part
        return pack if size == 1 else slice_of(pack, place, size)

    def _whole(self, members: list[TokenSample]) -> PackedSequence:
        if not self.padded:
            return flow_matching.noisy_pack(members, self.layout, self.objective, self.seed)
        members = [*members, padding(self.layout)]
        return without_last(flow_matching.noisy_pack(members, self.layout, self.objective, self.seed))


def padding(layout: Layout) -> TokenSample:
    """A sample of one text token and one video token."""
    latent = torch.zeros((layout.channels, 1, layout.patch, layout.patch))
    text, given = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool)
    return TokenSample("padding", 0, "text_to_image", text, video=latent, video_given=given)


def without_last(pack: PackedSequence) -> PackedSequence:
    """The pack with a last sample of one token in each stream that is predicted but counts nothing: its loss is 0, and
    so is its gradient, which every weight of both towers has."""
    video = pack.video_target
    assert video is not None
    counted = (video.sample < pack.samples - 1)[:, None]
    return replace(
        pack,
        video_target=replace(video, valid=video.valid & counted),
        text_out=torch.cat((pack.text_out, torch.tensor([pack.text_spans.total - 1]))),
        labels=torch.cat((pack.labels, torch.tensor([IGNORED_LABEL]))),
    )


class SeenSteps(Dataset[StepBatch]):
    """Steps whose conversations with pictures are tokens where they are read, lest the process that trains, which
    encodes the latents of others, waits for pictures to be cut."""

    def __init__(self, steps: StepDataset, encoder: Encoder) -> None:
        self.steps, self.encoder = steps, encoder

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> StepBatch:
        batch = self.steps[step]
        return StepBatch(step, [self.encoder.see(s) if isinstance(s, Sample) else s for s in batch.samples])


class PackedSteps(Dataset[PackedStep]):
    """Steps packed where they are read."""

    def __init__(self, steps: StepDataset, packer: Packer) -> None:
        self.steps, self.packer = steps, packer

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> PackedStep:
        return self.packer(self.steps[step])


def split_into_packs(samples: Sequence[TokenSample], layout: Layout, budget: int) -> list[list[TokenSample]]:
    """The samples in as few packs as first-fit by falling length makes, none over `budget` tokens of both streams.

    The order inside a step carries no meaning: its gradient is a sum over samples.

    Raises:
        UserError: one sample alone is larger than the budget; names it, its size and the key to raise.
    """
    sizes = [layout.tokens(sample) for sample in samples]
    packs: list[list[int]] = []
    rooms: list[int] = []  # left in each
    for place in sorted(range(len(samples)), key=lambda p: -sizes[p]):
        size = sizes[place]
        if size > budget:
            raise UserError(
                f"sample {samples[place].key!r} ({samples[place].task}) has {size} tokens, over "
                f"training.tokens_per_micro_batch = {budget}; raise it to at least {size}"
            )
        first = next((index for index, room in enumerate(rooms) if room >= size), len(packs))
        if first == len(packs):
            packs.append([])
            rooms.append(budget)
        packs[first].append(place)
        rooms[first] -= size
    return [[samples[place] for place in sorted(members)] for members in packs]
