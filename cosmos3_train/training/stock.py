"""The yardstick's loop, timed: one sample a forward through stock diffusers and PEFT, the best of its settings."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cosmos3_train.config import Model, Tuning
from cosmos3_train.model.stock import BACKENDS, make_stock, set_way, stock_inputs, stock_loss
from cosmos3_train.types import TokenSample

logger = logging.getLogger(__name__)

STEPS = 3
"""Whole steps of the best setting that the median is over: the loop has no compilation, and a step takes seconds."""
TRIED, WARM = 4, 2
"""Samples by which settings are compared, and samples before them."""


@dataclass(frozen=True)
class StockRate:
    """What stock came to.

    way:     the best setting, in words;  steps: measured
    seconds: of a step, the median;  peak_bytes: of the device's memory, 0 on a CPU
    tried:   samples a second of every setting that ran, by a few samples
    """

    way: str
    steps: int
    seconds: float
    peak_bytes: int
    tried: dict[str, float]


def time_stock(model: Model, tuning: Tuning, samples: Sequence[TokenSample], device: torch.device) -> StockRate | None:
    """Time optimizer steps of these samples, by stock's best attention backend, with or without checkpointing; None
    where the device holds none of these."""
    try:
        stock: Any = make_stock(model, tuning, device)
    except torch.OutOfMemoryError:
        logger.warning("stock diffusers and PEFT do not fit on this device, so they are not timed")
        return None
    parameters = [p for p in stock.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    inputs = [stock_inputs(sample, stock, device) for sample in samples]

    def seconds(chosen: Sequence[dict[str, Any]]) -> float:
        """Of one optimizer step."""
        began = _now(device)
        for one in chosen:
            (stock_loss(stock, one) / len(chosen)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return _now(device) - began

    few = [inputs[place % len(inputs)] for place in range(TRIED)]
    tried: dict[tuple[str, bool], float] = {}
    for backend, checkpoint in itertools.product(BACKENDS if device.type == "cuda" else BACKENDS[:1], (True, False)):
        try:
            set_way(stock, backend, checkpoint)
            seconds(few[:WARM])
            tried[backend, checkpoint] = TRIED / seconds(few)
        # Whatever a backend that does not fit this machine raises, out of memory included: it is not stock's best.
        except Exception as error:  # noqa: BLE001
            logger.info("stock, %s: does not run (%s)", _words(backend, checkpoint), str(error).split("\n")[0][:120])
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            logger.info("stock, %s: %.2f samples/s", _words(backend, checkpoint), tried[backend, checkpoint])
    if not tried:
        logger.warning("stock diffusers and PEFT run in no setting on this device (see above), so they are not timed")
        return None
    best = max(tried, key=lambda way: tried[way])
    set_way(stock, *best)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [seconds(inputs) for _ in range(STEPS)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    words = {_words(*way): rate for way, rate in tried.items()}
    return StockRate(_words(*best), STEPS, statistics.median(times), peak, words)


def _words(backend: str, checkpoint: bool) -> str:
    return f"{backend.strip('_')}, {'with' if checkpoint else 'without'} checkpointing"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
