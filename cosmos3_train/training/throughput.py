"""How fast a run goes: the floating-point operations that a step must do, and the times that its steps take.

MFU is those operations over the time and the GPU's bf16 peak. Counted is only what the step must do, so a slower way
of doing it cannot raise the figure: the weights of the layers' projections and MLPs and the attention, of both towers.
It counts as the yardstick does, whose understanding tower runs at every step: also where its keys and values are cached
and nothing of it is done. Not counted: recomputation, LoRA's own small matrices, embeddings and heads (together under
2 % in Nano), anything element-wise. The language model's output layer counts for labelled tokens alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from cosmos3_train.config import Tuning
from cosmos3_train.training.gpus import find_gpu
from cosmos3_train.types import PackedSequence

Effort = Literal["cached", "frozen", "adapted", "trained"]
"""What a step does with a tower: nothing, for its keys and values are kept; a forward pass alone; also gradients of
inputs (LoRA, or weights below it that train); also gradients of its weights."""

PASSES: dict[Effort, int] = {"cached": 0, "frozen": 1, "adapted": 2, "trained": 3}
"""Matrix products by each weight: forward, gradient of the input, gradient of the weight; 2 FLOPs a weight and token
each."""

ATTENTION_PASSES: dict[Effort, int] = {"cached": 0, "frozen": 1, "adapted": 3, "trained": 3}
"""Attention's backward is four matrix products to the forward's two, and needs neither more nor fewer with LoRA."""

RATES = (
    "tokens_per_second",
    "samples_per_second",
    "step_seconds",
    "mfu",
    "data_wait_share",
    "own_seconds",
    "reading_seconds",
    "peak_memory_gib",
    "slowest_rank",
    "slowest_rank_own_seconds",
    "slowest_reader",
    "slowest_reader_seconds",
    "largest_peak_memory_gib",
)
"""Names of what `Throughput.rates` and `spread` measure: functions of the machine, not of the run."""
SLOW = 1.2
"""A rank is told of whose passes of a step take so many times what the middle one's do, or whose data comes later than
the middle one's by what would make its passes take so long."""


@dataclass(frozen=True)
class Arithmetic:
    """The sizes of a Cosmos 3 transformer and what a step does with each tower, by the yardstick's count.

    layers, hidden, intermediate, vocabulary: of both towers alike
    queries, keys: width of all query heads, and of all key heads
    mlp_matrices:  3 with a gate, 2 without (Edge)
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    queries: int
    keys: int
    mlp_matrices: int
    understanding: Effort
    generation: Effort

    @staticmethod
    def of(config: Any, tuning: Tuning) -> Arithmetic:
        """From a `Cosmos3OmniTransformer`'s config and what trains of it."""
        whole = tuning.method in ("tower", "full")

        def effort(tower: str) -> Effort:
            chosen = tuning.method == "full" or tower in tuning.towers
            if chosen:
                return "trained" if whole else "adapted"
            # The losses lie above the generation tower, so gradients pass through it whatever trains.
            return "adapted" if tower == "generation" else "frozen"

        return Arithmetic(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            queries=config.num_attention_heads * config.head_dim,
            keys=config.num_key_value_heads * config.head_dim,
            mlp_matrices=2 if config.hidden_act == "relu2" else 3,
            understanding=effort("understanding"),
            generation=effort("generation"),
        )

    def cached(self) -> Arithmetic:
        """What is left to do where the understanding tower's keys and values are cached."""
        return replace(self, understanding="cached")

    @property
    def understanding_learns(self) -> bool:
        """Whether gradients pass through the understanding tower."""
        return self.understanding in ("adapted", "trained")

    @property
    def tower_weights(self) -> int:
        """Weights of the projections and MLPs of one tower."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        return self.layers * (attention + self.mlp_matrices * self.hidden * self.intermediate)

    def flops(self, text: Sequence[int], generation: Sequence[int], labelled: int = 0) -> int:
        """Floating-point operations that one forward and backward of these samples must do.

        Args:
            text, generation: tokens of each sample in the two streams.
            labelled: text tokens whose next token is predicted.
        """
        head = 2 * self.hidden * self.vocabulary * PASSES[self.understanding] * labelled
        return self.linear_flops(text, generation) + self.attention_flops(text, generation) + head

    def linear_flops(self, text: Sequence[int], generation: Sequence[int]) -> int:
        """Of these, the products by the layers' projections and MLPs."""
        understanding, generating = PASSES[self.understanding], PASSES[self.generation]
        return 2 * self.tower_weights * (understanding * sum(text) + generating * sum(generation))

    def attention_flops(self, text: Sequence[int], generation: Sequence[int]) -> int:
        """Of these, the attention."""
        # q·k and the sum over v: 2 FLOPs each a pair and channel. A text token sees half of its sample's text.
        causal = 2 * self.queries * sum(t * t for t in text)
        joint = 4 * self.queries * sum(g * (t + g) for t, g in zip(text, generation, strict=True))
        attention = causal * ATTENTION_PASSES[self.understanding] + joint * ATTENTION_PASSES[self.generation]
        return self.layers * attention

    def step_flops(self, packs: Iterable[PackedSequence]) -> int:
        """The same of a step's packs."""
        return sum(self.flops(p.text_spans.lengths, p.generation_lengths, p.labels.numel()) for p in packs)


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of this process.

    seconds: from the end of the step before, so reading, logging and everything around the step is in it
    waited:  seconds of these in which the loader had nothing ready (and Lightning's own moments)
    tokens, samples: of this process's share, or of its context group's;  flops: that this process must do
    own:     seconds that went into its own forward and backward passes; on a GPU of the step before
    reading: seconds that it waited for its own data, and not for another rank
    """

    seconds: float
    waited: float
    tokens: int
    samples: int
    flops: int
    own: float
    reading: float


class OwnTime:
    """How long a process works on a step by itself, up to where it waits for the others: by its GPU's clock, for the
    host runs ahead of it. Where weights are sharded, ranks wait for each other within, and all take about as long."""

    def __init__(self) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._began = self._ended = 0.0

    def begin(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._began = time.perf_counter()

    def end(self) -> None:
        if self._events is not None:
            self._events[1].record()
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of the last step, once the device has made it."""
        if self._events is not None:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._ended - self._began


class Throughput:
    """The times of steps, gathered between two lines of the log.

    On a GPU a step ends when the host has queued it and knows what the one before has come to, so the host is one step
    ahead of the device at most, and its clock is the steps', if not exactly each one's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = gpu.bfloat16 * 1e12 if gpu else None
        self._steps: list[StepTime] = []
        self.restart()

    def restart(self) -> None:
        """Begin the next step here: what came before it (an evaluation, a checkpoint) is no part of a step."""
        self._since = self._started = self._asked = time.perf_counter()
        self._reading = 0.0

    def await_data(self) -> None:
        """All that belongs to the step before is done: from here on it is the next one's data that is waited for."""
        self._asked = time.perf_counter()

    def have_data(self) -> None:
        """This process's data is here; now it waits for the other ranks."""
        self._reading = time.perf_counter() - self._asked

    def start(self) -> None:
        """Every rank's data is here."""
        self._started = time.perf_counter()

    def stop(self, tokens: int, samples: int, flops: int, own: float) -> StepTime:
        """The step is made."""
        now = time.perf_counter()
        step = StepTime(now - self._since, self._started - self._since, tokens, samples, flops, own, self._reading)
        self._since = self._started = now
        self._steps.append(step)
        return step

    def rates(self) -> dict[str, float]:
        """What this rank's steps since the last call came to; MFU only of a known GPU."""
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        seconds = max(1e-9, sum(step.seconds for step in steps))
        found = {
            "tokens_per_second": sum(step.tokens for step in steps) / seconds,
            "samples_per_second": sum(step.samples for step in steps) / seconds,
            "step_seconds": seconds / len(steps),
            "data_wait_share": sum(step.waited for step in steps) / seconds,
            "own_seconds": sum(step.own for step in steps) / len(steps),
            "reading_seconds": sum(step.reading for step in steps) / len(steps),
        }
        if self._peak is not None:
            found["mfu"] = sum(step.flops for step in steps) / seconds / self._peak
        if self._device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return found


OWN = ("own_seconds", "reading_seconds", "peak_memory_gib", "tokens_per_second", "samples_per_second", "mfu")
"""What ranks tell each other of their `rates`, in this order, 0 for what a rank has none of."""


def together(ranks: Sequence[Sequence[float]], sharing: int) -> dict[str, float]:
    """What ranks come to: together, and MFU of one GPU. Their shares of a step's samples need not be equal.

    Args:
        ranks: of every rank its `OWN`.
        sharing: how many in a row count the same samples.
    """
    _, _, _, tokens, samples, mfu = zip(*ranks, strict=True)
    found = {"tokens_per_second": sum(tokens) / sharing, "samples_per_second": sum(samples) / sharing}
    return found | ({"mfu": sum(mfu) / len(mfu)} if max(mfu) else {})


def spread(ranks: Sequence[Sequence[float]]) -> dict[str, float]:
    """What differs between ranks.

    Args:
        ranks: of every rank its `OWN`, the first three at least.
    """
    own, reading, memory, *_ = zip(*ranks, strict=True)
    found = {
        "slowest_rank": float(own.index(max(own))),
        "slowest_rank_own_seconds": max(own),
        "slowest_reader": float(reading.index(max(reading))),
        "slowest_reader_seconds": max(reading),
    }
    return found | ({"largest_peak_memory_gib": max(memory)} if max(memory) else {})


def lagging(ranks: Sequence[Sequence[float]]) -> dict[tuple[str, int], str]:
    """Which rank holds the others up, by its passes or by its reading, with a line about it; empty where none does.

    Args:
        ranks: as `spread`.
    """
    own, reading, *_ = zip(*ranks, strict=True)
    (passes, slowest), (read, latest) = ((_middle(seconds), max(seconds)) for seconds in (own, reading))
    found = {}
    if slowest >= SLOW * passes:
        rank = own.index(slowest)
        words = f"is the slowest: its passes of a step take {slowest:.3g} s, the middle rank's {passes:.3g} s"
        found["passes", rank] = f"rank {rank} {words}"
    if latest - read >= (SLOW - 1) * passes:
        rank = reading.index(latest)
        found["reading", rank] = (
            f"rank {rank} waits longest for its data: {latest:.3g} s a step, the middle rank {read:.3g} s"
        )
    return found


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
