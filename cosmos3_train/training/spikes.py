"""Which gradient norm is a spike: one many times above what was usual in the steps before.

What is usual is a mean of logarithms in which a step counts less the longer ago it was. A spike counts in it too, so a
run whose norms have risen for good goes on after a few steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from cosmos3_train.training.checkpoints import Position

WINDOW = 50
"""Steps that the mean is over, about; before so many were looked at nothing is a spike."""


def largest_norm(position: Position, factor: float) -> float:
    """The largest norm that is no spike, a float32; infinite where `factor` is 0 or too few were looked at."""
    if not factor or position.norms < WINDOW:
        return math.inf
    return float(torch.tensor(factor * position.usual_norm, dtype=torch.float32))  # it is compared on the device


def looked_at(position: Position, norm: float) -> dict[str, Any]:
    """`usual_norm` and `norms` of a position after a step of this norm."""
    if not math.isfinite(norm) or norm <= 0:
        return {"usual_norm": position.usual_norm, "norms": position.norms}
    weight = 1 / min(position.norms + 1, WINDOW)
    before = math.log(position.usual_norm) if position.norms else 0.0
    return {"usual_norm": math.exp((1 - weight) * before + weight * math.log(norm)), "norms": position.norms + 1}
