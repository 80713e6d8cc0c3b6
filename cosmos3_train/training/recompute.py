"""How many layers keep what they have computed for backward, and how many compute it again: `checkpoint_activations` of
`auto`.

Memory that a run leaves free is time that it pays twice. So the first step is tried before it is made: with nearly
all layers recomputed, with two more that keep theirs, and from what those two took follows how many the device holds.
Where it does not hold all, the layers become lean, which costs little, and are counted once more. It is the last layers
that keep theirs: backward comes to them first, and has freed them when it recomputes the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch

from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.training.strategy import any_rank, largest
from cosmos3_train.types import PackedSequence

logger = logging.getLogger(__name__)

MARGIN, MARGIN_TOGETHER = 0.03, 0.06
"""Of what the process may allocate, for what the allocator cannot fill; and where memory that runs out ends the run."""

DOUBT = 1.5
"""What a layer keeps is at most so many times what is calculated, which is within a tenth of what was measured."""

TRIED = (1, 3)
"""Layers that keep theirs in the two trials. The first is not without any: a layer that is recomputed takes as much as
one that keeps its own while it is at work, so between none and one the largest moment hardly changes."""

LARGER_STEPS = 1.25
"""A step to come may have so many times the tokens of the first, where steps are smaller than a micro-batch."""

GIVEN_UP = 12
"""Where memory runs out all the same, a layer of so many gives up what it keeps."""

Keeps = Callable[[PackedSequence, bool], int]
"""Bytes that a layer keeps of a pack by calculation, without norms and gates or with them."""

Measure = Callable[[int], int | None]
"""The largest number of bytes allocated in a step with so many layers keeping theirs; None where memory ran out."""


def settle(
    backbone: Cosmos3PackedTransformer,
    device: torch.device,
    accumulate: Callable[[Sequence[PackedSequence], int], object],
    packs: Sequence[PackedSequence],
    passes: int,
    budget: int,
    together: Keeps | None = None,
) -> None:
    """Let as many layers of a backbone keep what they compute as the device has room for. Leaves gradients behind.

    Args:
        accumulate: forward and backward of packs, in so many passes;  packs, passes: of the step to come
        budget: tokens that a micro-batch may have
        together: given where ranks exchange something in a pass, so that all make the same ones, and memory that runs
            out ends the run
    """
    # Two micro-batches: while a later one is at work, the gradients of the first are there.
    passes = min(passes, 2)
    packs = sorted(packs, key=lambda pack: pack.tokens, reverse=True)[:passes]
    before = torch.cuda.memory_allocated(device)

    def measure(kept: int) -> int | None:
        backbone.kept_layers = kept
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            accumulate(packs, passes)
        except torch.OutOfMemoryError:
            if together is not None:
                raise
            return None
        return torch.cuda.max_memory_allocated(device)

    measure(0)  # compiles, and makes whatever stays
    fullest = max(pack.tokens for pack in packs)
    if passes == 1:  # all of a step goes into one micro-batch, and steps are about as large as this one
        budget = min(budget, int(fullest * LARGER_STEPS))
    if together is not None:  # a run that cannot give way later counts with a micro-batch of generation tokens alone
        fullest = max((pack.generation_spans.total for pack in packs if pack.generation_spans.total), default=fullest)
    layers, fuller = len(backbone.layers), max(1.0, budget / fullest)
    room, largest_layer = room_on(device, MARGIN if together is None else MARGIN_TOGETHER), None
    for backbone.lean in (False, True):
        if together is not None:
            largest_layer = int(DOUBT * max(together(pack, backbone.lean) for pack in packs))
        kept = most_that_fit(measure, layers, room, before, fuller, largest_layer)
        backbone.kept_layers = -largest([-kept], "how many layers keep their activations")[0]
        if backbone.kept_layers == layers:
            break
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # the log tells of the run's own
    logger.info("model.checkpoint_activations is auto: %s", describe_recomputed(backbone))


def most_that_fit(
    measure: Measure,
    layers: int,
    room: int,
    before: int,
    fuller: float = 1.0,
    largest_layer: int | None = None,
) -> int:
    """How many of `layers` may keep what they have computed.

    Args:
        room: bytes that may be allocated;  before: those that are, before the step
        fuller: micro-batches to come have up to so many times the tokens of those that are measured
        largest_layer: bytes that a layer keeps at most: given where ranks do the same, and for none may memory run out.
            Else the answer is measured too, and gives way where it does not fit
    """
    one = measure(min(TRIED[0], layers))
    if one is None:
        return 0
    more = TRIED[1] - TRIED[0]
    # Ranks try more where that fits on each of them.
    if largest_layer is not None and any_rank(
        one + more * largest_layer > room, "whether layers may keep their activations"
    ):
        return 0
    three = measure(min(TRIED[1], layers))
    if three is None:
        return 0
    layer = max(1, three - one) / more * fuller
    spare = room - before - (one - before) * fuller
    count = min(layers, max(0, TRIED[0] + math.floor(spare / layer)))
    while largest_layer is None and count > TRIED[1] and ((found := measure(count)) is None or found > room):
        count = int(count * 0.9)
    return count


def recompute_more(backbone: Cosmos3PackedTransformer) -> bool:
    """After memory ran out: make layers lean, let fewer keep theirs, then none its attention. False where nothing is
    left to give up."""
    if backbone.kept_layers and not backbone.lean:
        backbone.lean = True
    elif backbone.kept_layers:
        backbone.kept_layers = max(0, backbone.kept_layers - max(1, len(backbone.layers) // GIVEN_UP))
    elif backbone.keep_attention:
        backbone.keep_attention = False
    else:
        return False
    logger.warning("memory ran out; now %s", describe_recomputed(backbone))
    return True


def describe_recomputed(backbone: Cosmos3PackedTransformer) -> str:
    """In words, for the log and the benchmark."""
    layers, again = len(backbone.layers), backbone.recomputed_layers
    attention = ", attention kept" if backbone.keep_attention else ""
    those = ["norms and gates recomputed"] if backbone.lean and again < layers else []
    if again:
        those.append(f"{again} of {layers} layers recomputed{attention}")
    return "; ".join(those) or "activations kept"


def room_on(device: torch.device, margin: float) -> int:
    """Bytes that this process may allocate on a GPU, but for a margin: what is free and what it holds, or the cap that
    was set on it."""
    place = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(device)
    cap = torch.cuda.get_per_process_memory_fraction(place) * total
    return int(min(free + torch.cuda.memory_reserved(device), cap) * (1 - margin))
