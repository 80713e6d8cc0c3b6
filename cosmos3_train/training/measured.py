"""The small measured table behind `cosmos3 plan`: what kernels reach of a GPU's peaks, and runs to hold it against.

Rates were measured on one H100 80GB; on another GPU they are the same shares of its own peaks, which but for an H200
nobody has measured. A new run goes into `MEASURED` as it stands in the ledger; the plan is tested against every row.
"""

from __future__ import annotations

from dataclasses import dataclass

LINEAR, LINEAR_FP8 = 0.71, 0.67
"""Of the peak, by products of thousands of tokens with a decoder layer's matrices: 700 and 1330 TFLOP/s."""

BANDWIDTH = 0.74
"""Of the peak, by element-wise work and by LoRA's thin products: what `benchmark_policy256` leaves for them beside the
products and the attention."""

ATTENTION = 0.60
"""Of the bf16 peak, by attention forward and backward of long samples: FlashAttention-4 on Hopper (550 to 630
TFLOP/s), FlashAttention-2 on the GPUs that it was written for."""

FLASH2_TFLOPS = 310.0
"""FlashAttention-2 is no faster than this on newer GPUs either: it does not use their instructions."""

HALF_RATE_TOKENS = 530
"""Generation tokens of a sample at which attention runs at half of its rate."""

LINK = 0.6
"""Of what a link carries one way, by collectives of many megabytes. So four runs of `fsdp2` on two and four H200 are
calculated to 0.89 to 1.09 of their time (`tests/training/test_plan.py`)."""

UNCOMPILED = 2.0
"""Times as much element-wise traffic as compiled layers have. Not measured."""


@dataclass(frozen=True)
class Measured:
    """A run of `cosmos3 benchmark`, or of what it trains; without the reasoner cache mostly its bare step without.

    experiment, overrides: what would be typed for it, `auto` spelt out;  gpu: its key
    repeated: its attention kernel wanted keys and values repeated for all heads, as FlashAttention-2 of torch 2.11 does
    peak_gib: largest memory that was allocated
    """

    experiment: str
    overrides: tuple[str, ...]
    gpu: str
    repeated: bool
    samples_per_second: float
    mfu: float | None
    peak_gib: float


FP8 = "model.base_precision=fp8"
FLASH2, FLASH4 = "model.attention=flash2", "model.attention=flash4"
"""What `auto` took where these ran."""
ATTENTION_KEPT = "model.checkpoint_activations=but_attention"
PRODUCTS_KEPT = "model.checkpoint_activations=but_products"
NO_CACHE = "data.datasets.made.cache_reasoner=false"

MEASURED: tuple[Measured, ...] = (
    Measured("benchmark_policy256", (FLASH2,), "h100-80g", True, 46.4, 0.571, 43.9),
    Measured("benchmark_policy256", (FLASH2, NO_CACHE), "h100-80g", True, 38.4, 0.472, 58.3),
    Measured("benchmark_policy256", (FLASH2, FP8), "h100-80g", True, 60.9, 0.749, 43.9),
    Measured("benchmark_policy256", (FLASH2, FP8, NO_CACHE), "h100-80g", True, 48.8, None, 51.8),
    Measured("benchmark_policy256", (FLASH4,), "h100-80g", False, 48.6, 0.597, 41.0),
    Measured("benchmark_policy256", (FLASH4, NO_CACHE), "h100-80g", False, 40.0, 0.491, 55.3),
    Measured("benchmark_policy256", (FLASH4, FP8), "h100-80g", False, 68.1, 0.837, 41.0),
    Measured("benchmark_policy256", (FLASH4, FP8, NO_CACHE), "h100-80g", False, 57.2, 0.702, 48.8),
    Measured("benchmark_policy256", (FLASH4,), "h200-141g", False, 49.3, 0.605, 40.6),
    Measured("benchmark_policy480", (FLASH4,), "h200-141g", False, 4.09, 0.522, 48.9),
    Measured("benchmark_policy480", (FLASH4, FP8), "h200-141g", False, 5.37, 0.684, 48.9),
    Measured("benchmark_video480", (FLASH4,), "h200-141g", False, 1.24, 0.535, 59.8),
    Measured("benchmark_video720", (FLASH4, ATTENTION_KEPT), "h200-141g", False, 0.296, 0.448, 30.2),
    Measured("benchmark_policy480", (FLASH4, PRODUCTS_KEPT), "h200-141g", False, 4.05, 0.516, 38.8),
    Measured("benchmark_video480", (FLASH4, FP8), "h200-141g", False, 1.5, 0.646, 59.7),
    Measured("benchmark_policy256", (FLASH4, FP8), "h200-141g", False, 69.9, 0.859, 40.5),
    Measured("benchmark_policy256", (FLASH4, FP8, NO_CACHE), "h200-141g", False, 58.4, 0.718, 48.4),
    Measured("benchmark_policy480", (FLASH4,), "h100-80g", False, 4.04, 0.515, 49.0),
    Measured("benchmark_policy480", (FLASH4, PRODUCTS_KEPT), "h100-80g", False, 4.05, 0.516, 39.0),
    Measured("benchmark_policy480", (FLASH4, NO_CACHE), "h100-80g", False, 3.94, 0.503, 63.2),
    Measured("benchmark_policy480", (FLASH4, FP8), "h100-80g", False, 5.28, 0.673, 49.0),
    Measured("benchmark_policy480", (FLASH4, FP8, NO_CACHE), "h100-80g", False, 5.17, 0.658, 56.7),
    Measured("benchmark_video480", (FLASH4,), "h100-80g", False, 1.23, 0.533, 60.0),
    Measured("benchmark_video480", (FLASH4, NO_CACHE), "h100-80g", False, 1.21, 0.524, 74.2),
    Measured("benchmark_video480", (FLASH4, FP8), "h100-80g", False, 1.47, 0.635, 59.9),
    Measured("benchmark_video480", (FLASH4, FP8, NO_CACHE), "h100-80g", False, 1.45, 0.627, 67.6),
    Measured("benchmark_video720", (FLASH4,), "h100-80g", False, 0.335, 0.507, 74.2),
    Measured("benchmark_video720", (FLASH4, NO_CACHE), "h100-80g", False, 0.317, 0.48, 71.5),
    Measured("benchmark_video720", (FLASH4, FP8), "h100-80g", False, 0.381, 0.576, 71.2),
    Measured("benchmark_video720", (FLASH4, FP8, NO_CACHE), "h100-80g", False, 0.374, 0.566, 75.5),
)
