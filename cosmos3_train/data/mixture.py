"""Which window each sample of a run is: a pure function of (seed, number), in constant time.

Sample n belongs to a dataset by a fixed round of slots (shares hold to within one sample on every prefix of a round,
not just in the mean), is the k-th sample of that dataset, and so window permutation_e(k mod windows) of its epoch
e = k // windows: every window once an epoch. Nothing is counted or stored, so resuming, ranks and workers cannot
change what is seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NoReturn

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from cosmos3_train import config
from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.augment import augmented
from cosmos3_train.data.conversations import ConversationDataset
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.flow.tasks import CONVERSATION, TASKS, sound_task
from cosmos3_train.runtime import fold
from cosmos3_train.types import Sample, StepBatch

ROUND = 4096
"""Slots of a round: a dataset's share is a multiple of 1/4096, and at least one slot."""


@dataclass(frozen=True)
class Pick:
    """What sample `number` is: a dataset's name, a window of the split, and a task."""

    dataset: str
    index: int
    task: str


@dataclass(frozen=True)
class _Entry:
    dataset: PreparedDataset | ConversationDataset
    windows: Sequence[int]  # of the split, that are drawn
    tasks: tuple[str, ...]
    shares: tuple[float, ...]  # running sums of the tasks' weights, the last one 1
    cached: bool
    augment: config.Augment | None = None  # None where nothing is changed


class Mixture:
    """Several datasets as one endless, ordered stream of samples."""

    def __init__(
        self,
        entries: Mapping[str, tuple[PreparedDataset | ConversationDataset, config.Dataset]],
        seed: int,
        split: str = "train",
    ) -> None:
        """Args:
            entries: name in the mixture → opened dataset, and its entry of the experiment.
            split: "train" or "heldout".

        Raises:
            UserError: no entry, a weight that is not positive, an unknown task, or a dataset without windows.
        """
        if not entries:
            raise UserError("data.datasets is empty; name at least one dataset")
        self.seed, self.split = seed, split
        self._entries = {name: _entry(name, dataset, entry, split) for name, (dataset, entry) in entries.items()}
        self._names = list(entries)
        slots = _slots([entries[name][1].weight for name in self._names], ROUND)
        self._slots = slots
        self._before = np.zeros((ROUND + 1, len(self._names)), dtype=np.int64)
        self._before[1:] = np.cumsum(slots[:, None] == np.arange(len(self._names)), axis=0)

    @property
    def windows(self) -> int:
        """Windows of the split over all datasets; of one with a task with sound only those that have it."""
        return sum(len(entry.windows) for entry in self._entries.values())

    def pick(self, number: int) -> Pick:
        """Which window and task sample `number` (0, 1, ...) is."""
        turn, slot = divmod(number, ROUND)
        place = int(self._slots[slot])
        name = self._names[place]
        entry = self._entries[name]
        own = turn * int(self._before[ROUND, place]) + int(self._before[slot, place])
        count = len(entry.windows)
        epoch, position = divmod(own, count)
        index = entry.windows[permute(position, count, fold(self.seed, "order", name, epoch))]
        chance = fold(self.seed, "task", number) / 2**63
        return Pick(name, index, entry.tasks[min(bisect_right(entry.shares, chance), len(entry.tasks) - 1)])

    def sample(self, number: int) -> Sample:
        """Sample `number`, read: with its cached latent where the entry says so, with pixels otherwise.

        Where the entry augments, pixels are changed, or the latent is one of the cached variants, by (seed, number).
        """
        pick = self.pick(number)
        entry = self._entries[pick.dataset]
        if isinstance(entry.dataset, ConversationDataset):
            return entry.dataset.sample(self.split, pick.index, pick.task, number)
        change, variant = None, 0
        if entry.augment is not None and entry.cached:
            variant = fold(self.seed, "variant", number) % entry.augment.variants
        elif entry.augment is not None:
            change = partial(augmented, settings=entry.augment, key=fold(self.seed, "augment", number))
        return entry.dataset.sample(
            self.split,
            pick.index,
            pick.task,
            number,
            pixels=not entry.cached,
            latents=entry.cached,
            change=change,
            variant=variant,
        )


def refuse_few_samples(samples_per_step: int, ranks: int, rank: str = "rank") -> None:
    """Raise `UserError` where a step has fewer samples than there are ranks that draw their own; `rank` is what the
    user calls one."""
    if samples_per_step < ranks:
        raise UserError(
            f"training.samples_per_step is {samples_per_step}, fewer than the {ranks} {rank}s; every {rank} needs a "
            "sample"
        )


class StepDataset(TorchDataset[StepBatch]):
    """Map-style over optimizer steps: item s holds this rank's samples of step s.

    Step s is the samples s·S … s·S + S − 1; ranks take contiguous shares that differ by at most one sample.
    """

    def __init__(self, mixture: Mixture, samples_per_step: int, rank: int, world_size: int, steps: int) -> None:
        refuse_few_samples(samples_per_step, world_size)
        assert 0 <= rank < world_size
        self.mixture, self.steps = mixture, steps
        self._first = rank * samples_per_step // world_size
        self._stop = (rank + 1) * samples_per_step // world_size
        self._samples_per_step = samples_per_step

    def __len__(self) -> int:
        return self.steps

    def numbers(self, step: int) -> range:
        """The sample numbers that this rank contributes to a step."""
        start = step * self._samples_per_step
        return range(start + self._first, start + self._stop)

    def __getitem__(self, step: int) -> StepBatch:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return StepBatch(step, [self.mixture.sample(number) for number in self.numbers(step)])


def permute(position: int, count: int, key: int) -> int:
    """The place of `position` in a permutation of 0 .. count − 1 that `key` selects; constant time and memory.

    A Feistel network of four rounds permutes the next even power of two, at most 4 × count; what falls outside is
    sent through again (cycle walking) until it is inside.
    """
    assert 0 <= position < count
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right + (turn << 40) + key) & mask)
        value = (left << half) | right
        if value < count:
            return value


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: 64 bits in, 64 well-stirred bits out."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def _slots(weights: list[float], length: int) -> np.ndarray:
    """int [length]: which dataset has each slot of a round. On any prefix each count is within 1 of its share."""
    share = np.asarray(weights, dtype=np.float64) / sum(weights)
    quota = np.maximum(1, np.floor(share * length)).astype(np.int64)
    while quota.sum() != length:  # largest remainders first; only a round of very small weights ever shrinks a quota
        error = share * length - quota
        if quota.sum() < length:
            quota[int(np.argmax(error))] += 1
        else:
            quota[int(np.argmin(np.where(quota > 1, error, np.inf)))] -= 1
    # The slot goes to the dataset whose next sample has the earliest deadline, among those that are due (Tijdeman's
    # rule for apportionment over time): that keeps every prefix within one sample of its share.
    taken = np.zeros(len(weights), dtype=np.int64)
    slots = np.empty(length, dtype=np.int64)
    for place in range(length):
        due = taken * length < quota * (place + 1)
        deadline = np.where(due & (taken < quota), (taken + 1) / quota, np.inf)
        slots[place] = int(np.argmin(deadline))
        taken[slots[place]] += 1
    return slots


def check_entry(name: str, entry: config.Dataset, *, talks: bool, robot: bool = True) -> None:
    """What an entry of the mixture shows to be wrong before its data is opened.

    Args:
        talks: it is a dataset of conversations, whose one task needs no name.
        robot: it is a robot's log, or else video without one.

    Raises:
        UserError: a weight that is not positive, or a task that there is not or that robot logs cannot feed.
    """
    where = f"data.datasets.{name}"
    if not entry.weight > 0:
        raise UserError(f"{where}.weight is {entry.weight}; it is above 0 (leave the entry out to use none of it)")
    if talks:
        return
    for task, weight in entry.tasks.items():
        if task not in TASKS:
            raise UserError(f"{where}.tasks: {task!r} is not a task.{nearest(task, TASKS)}")
        if not weight >= 0:
            raise UserError(f"{where}.tasks.{task} is {weight}; a weight is at least 0")
        if TASKS[task].sound != "absent" and robot:
            raise UserError(f"{where}.tasks: {task!r} needs sound, which is not read from a robot's log")
        if weight and TASKS[task].has_robot and not robot:
            others = [known for known, row in TASKS.items() if not row.has_robot]
            raise UserError(
                f"{where}.tasks: {task!r} needs a robot's actions, and this is video without a robot; name some of "
                f"{', '.join(others)}"
            )
    if not any(entry.tasks.values()):
        raise UserError(f"{where}.tasks has no weight above 0; name at least one task, such as policy: 1")


def usable_windows(dataset: PreparedDataset | ConversationDataset, entry: config.Dataset, split: str) -> Sequence[int]:
    """The windows of a split that an entry draws from: all, or those with sound where it names a task with sound."""
    if isinstance(dataset, PreparedDataset) and sound_task(entry.tasks):
        return dataset.sounding(split).tolist()
    return range(dataset.count(split))


def refuse_silence(name: str, task: str, dataset: PreparedDataset, split: str) -> NoReturn:
    """Raise `UserError`: no window of a split has the sound that a task of an entry needs."""
    why = f"none of the {dataset.count(split):,} windows of its split {split!r} has any"
    remedy = "leave the task out, or take clips with a sound track (cosmos3 prepare says why these have none)"
    if not dataset.notes_sound:
        why, remedy = f"{dataset.folder} does not say which rows have it", "prepare it again with --fresh"
    raise UserError(f"data.datasets.{name}.tasks: {task!r} needs sound, and {why}; {remedy}")


def _entry(name: str, dataset: PreparedDataset | ConversationDataset, entry: config.Dataset, split: str) -> _Entry:
    talks = isinstance(dataset, ConversationDataset)
    check_entry(name, entry, talks=talks, robot=talks or dataset.has_robot)
    windows, count = usable_windows(dataset, entry, split), dataset.count(split)
    if count == 0:
        raise UserError(
            f"data.datasets.{name}: no windows in the split {split!r}; prepare it with another heldout_fraction"
        )
    if isinstance(dataset, ConversationDataset):
        return _Entry(dataset, windows, (CONVERSATION,), (1.0,), False)
    heard = sound_task(entry.tasks)
    if heard is not None and not windows:
        refuse_silence(name, heard, dataset, split)
    tasks = {task: weight for task, weight in entry.tasks.items() if weight != 0}
    total = sum(tasks.values())
    cached = entry.cache_latents and dataset.latent_cache is not None
    cached = cached and (heard is None or dataset.sound_cache is not None)
    shares = tuple(accumulate(weight / total for weight in tasks.values()))
    augment = entry.augment if entry.augment.changes and split == "train" else None
    return _Entry(dataset, windows, tuple(tasks), shares, cached, augment)
