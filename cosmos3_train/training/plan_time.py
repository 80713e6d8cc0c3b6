"""How long a step takes, by kinds of kernel: products, attention, element-wise traffic, and what GPUs tell each other.

Each kind's work is counted from the sizes and divided by what such kernels were measured to reach (`measured`). A run
of a small model on a fast GPU waits for the host to launch its kernels, which is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cosmos3_train.config import Experiment
from cosmos3_train.model.attention import Backend
from cosmos3_train.training.gpus import Gpu
from cosmos3_train.training.measured import (
    ATTENTION,
    BANDWIDTH,
    FLASH2_TFLOPS,
    HALF_RATE_TOKENS,
    LINEAR,
    LINEAR_FP8,
    LINK,
    UNCOMPILED,
)
from cosmos3_train.training.throughput import PASSES, Arithmetic

OPTIMIZER_BYTES = 40
"""AdamW reads a number that trains, its gradient and two moments and writes three; the norm and clipping read the
gradient twice and write it once; float32."""

CAST_BYTES = 12
"""A micro-batch reads a master and writes it in the model's dtype, and adds to its gradient."""

ITEM_BYTES, FP8_BYTES = 2, 1


@dataclass(frozen=True)
class Kind:
    """Samples that are alike. share: of a step's samples; text, generation, labelled: tokens of one."""

    share: float
    text: int
    generation: int
    labelled: int = 0


@dataclass(frozen=True)
class Seconds:
    """Of one step of one process. told: what GPUs tell each other."""

    linear: float
    attention: float
    elementwise: float
    told: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.elementwise + self.told


def predict_seconds(
    experiment: Experiment,
    arithmetic: Arithmetic,
    gpu: Gpu,
    kinds: Sequence[Kind],
    *,
    backend: Backend,
    compiled: bool,
    recomputed: float,
    lean: bool,
    trained: int,
    samples: int,
    packs: int,
    gathered: float,
    summed: float,
    ranks: int,
) -> Seconds:
    """Seconds of one step of a process.

    Args:
        arithmetic: what is done, so with `cached` where that is so.
        recomputed: share of the layers that are;  lean: of the others norms and gates are.
        trained: numbers that it steps;  samples, packs: of its share of a step.
        gathered: bytes of the weights that it gathers in a pass over the layers;  summed: of gradients.
    """
    model = experiment.model
    fp8 = model.base_precision == "fp8"
    linear_rate = 1e12 * (LINEAR_FP8 * gpu.fp8 if fp8 and gpu.fp8 else LINEAR * gpu.bfloat16)
    heads_rate = 1e12 * LINEAR * gpu.bfloat16
    linear = attention = traffic = 0.0
    # Every micro-batch reads the weights, which a small one multiplies no faster than they come.
    read = _weights_read(arithmetic) + recomputed * _weights_read(_again(arithmetic))
    weights = packs * read * (FP8_BYTES if fp8 else ITEM_BYTES) / (1e12 * BANDWIDTH * gpu.bandwidth)
    for kind in kinds:
        count = kind.share * samples
        products, heads, attended = _operations(experiment, arithmetic, kind, recomputed)
        linear += count * (products / linear_rate + heads / heads_rate)
        attention += count * attended / _attention_rate(gpu, backend, kind)
        traffic += count * _traffic(experiment, arithmetic, kind, fp8, recomputed, lean)
    if not compiled:
        traffic *= UNCOMPILED
    if fp8 and model.fp8_copies == 1:  # the codes are turned at every backward
        traffic += packs * 2 * FP8_BYTES * arithmetic.tower_weights
    traffic += trained * (OPTIMIZER_BYTES + packs * CAST_BYTES)
    elementwise = traffic / (1e12 * BANDWIDTH * gpu.bandwidth)
    link, share = 1e9 * LINK * gpu.link, (ranks - 1) / ranks
    # Twice a pass, for forward and backward. A layer is gathered beside the arithmetic of the one before, and yet every
    # step that was measured took as much longer as if it were not: both want the same memory and processors.
    gathers = packs * 2 * gathered * share / link
    return Seconds(max(linear, weights), attention, elementwise, gathers + 2 * summed * share / link)


def _again(arithmetic: Arithmetic) -> Arithmetic:
    """What recomputing a layer does: a forward again of the towers that gradients pass through."""
    learns = arithmetic.understanding_learns
    return replace(arithmetic, understanding="frozen" if learns else "cached", generation="frozen")


def _weights_read(arithmetic: Arithmetic) -> int:
    """How many weights of the layers a micro-batch's products read: forward, and back through them. Their own gradient,
    the third pass of what trains, is made without."""
    efforts = (arithmetic.understanding, arithmetic.generation)
    return arithmetic.tower_weights * sum(min(PASSES[effort], 2) for effort in efforts)


def _operations(
    experiment: Experiment, arithmetic: Arithmetic, kind: Kind, recomputed: float
) -> tuple[float, float, float]:
    """(of the layers' products, of the output layer, of attention) of one sample, with what is recomputed."""
    a, text, generation = arithmetic, [kind.text], [kind.generation]
    products, attended = a.linear_flops(text, generation), a.attention_flops(text, generation)
    if recomputed:
        again = _again(a)
        products += recomputed * again.linear_flops(text, generation)
        if experiment.model.checkpoint_activations is True:
            attended += recomputed * again.attention_flops(text, generation)
    # Logits are made once more in backward.
    heads = 2 * a.hidden * a.vocabulary * (PASSES[a.understanding] + 1) * kind.labelled
    return products, heads, attended


def _attention_rate(gpu: Gpu, backend: Backend, kind: Kind) -> float:
    best = ATTENTION * gpu.bfloat16
    if backend in ("flash2", "sdpa"):
        best = min(best, FLASH2_TFLOPS)
    tokens = max(1, kind.generation or kind.text)
    return 1e12 * best * tokens / (tokens + HALF_RATE_TOKENS)


def _traffic(
    experiment: Experiment, arithmetic: Arithmetic, kind: Kind, fp8: bool, recomputed: float, lean: bool
) -> float:
    """Bytes that element-wise kernels, norms and LoRA's thin products read and write for one sample, in all layers."""
    a, tuning = arithmetic, experiment.tuning
    # Two norms and two sums with the stream; norms and rotary of queries and keys; the gate.
    forward = 9 * a.hidden + 2 * (a.queries + a.keys) + 3 * a.intermediate
    # Of each layer the input is read and the output read and written, once for those that share an input.
    lora = 6 * a.hidden + 3 * a.queries + 4 * a.keys + 5 * a.intermediate
    rounded = 2 * a.hidden + a.queries + a.intermediate
    rounded_back = 2 * a.hidden + a.queries + 2 * a.keys + 2 * a.intermediate
    found = 0.0
    for tokens, tower, effort in (
        (kind.text, "understanding", a.understanding),
        (kind.generation, "generation", a.generation),
    ):
        if effort == "cached" or not tokens:
            continue
        adapted = tuning.method in ("lora", "hybrid") and tower in tuning.towers
        once = ITEM_BYTES * (forward + lora * adapted) + (ITEM_BYTES + FP8_BYTES) * rounded * fp8
        back = ITEM_BYTES * (forward + lora * adapted) * 2 + (ITEM_BYTES + FP8_BYTES) * rounded_back * fp8
        if effort == "frozen":
            found += tokens * once
            continue
        again = recomputed * once
        if lean:  # two norms and the gate
            again += (1 - recomputed) * ITEM_BYTES * (4 * a.hidden + 3 * a.intermediate)
        found += tokens * (once + again + back)
    return a.layers * found
