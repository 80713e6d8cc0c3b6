"""How σ is drawn, as the checkpoints were trained: one σ a sample, a base distribution, then the resolution's shift.

Images use the logit-normal t = sigmoid(z), z ~ N(0, 1); videos the mode-heavy
t = 1 − u − 1.29·(cos²(πu/2) − 1 + u), u ~ U(0, 1). The shift s moves mass towards noise: σ = s·t / (1 + (s−1)·t), with
s = 3, 5, 10 for the 256, 480 and 720 tiers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

MODE_SCALE = 1.29
"""How heavy the mode of the video distribution is (the published value)."""

BANDS = 10
"""Held-out loss is reported in this many equal bands of σ."""

Distribution = Literal["logit_normal", "mode", "uniform"]

Number = TypeVar("Number", Tensor, float)


def mode_heavy(u: Tensor) -> Tensor:
    """t in [0, 1] from u ~ U(0, 1): the published video distribution."""
    return _mode_heavy(u, torch.cos(math.pi / 2 * u))


def _mode_heavy(u: Number, cosine: Number) -> Number:
    return 1 - u - MODE_SCALE * (cosine * cosine - 1 + u)


def shift(t: Number, amount: float) -> Number:
    """σ = s·t / (1 + (s−1)·t); keeps 0 and 1 fixed."""
    return amount * t / (1 + (amount - 1) * t)


def draw_level(distribution: Distribution, amount: float, generator: torch.Generator) -> float:
    """One σ in [0, 1], drawn in float64 so that it does not depend on the device.

    Python's own float64 arithmetic is the tensors' to the last bit, and a tenth of the time; their cosine is another.
    """
    if distribution == "logit_normal":
        t = float(torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64)))
    else:
        u = torch.rand((), generator=generator, dtype=torch.float64)
        t = float(u) if distribution == "uniform" else _mode_heavy(float(u), float(torch.cos(math.pi / 2 * u)))
    return min(max(shift(t, amount), 0.0), 1.0)


def shift_for(tier: int, shifts: Mapping[int, float]) -> float:
    """The shift of a resolution tier.

    Raises:
        KeyError: no shift is configured for the tier; names the tiers that have one.
    """
    if tier not in shifts:
        raise KeyError(f"no shift for resolution tier {tier}: objective.shift has {sorted(shifts)}")
    return shifts[tier]
