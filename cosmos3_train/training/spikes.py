"""Which gradient norm is a spike: one many times above what was usual in the steps before.

What is usual is a mean of logarithms in which a step counts less the longer ago it was. A spike counts in it too, so a
run whose norms have risen for good goes on after a few steps.
"""

from __future__ import annotations

import math

import torch

from cosmos3_train.training.checkpoints import Position

WINDOW = 50
"""Steps that the mean is over, about; before so many are made nothing is a spike."""


def largest_norm(position: Position, factor: float) -> float:
    """The largest norm that is no spike, a float32; infinite where `factor` is 0 or too few steps are made."""
    if not factor or position.step < WINDOW:
        return math.inf
    return float(torch.tensor(factor * position.usual_norm, dtype=torch.float32))  # compared on the device and here


def usual_norm(position: Position, norm: float) -> float:
    """What is usual after a step of this norm."""
    if not math.isfinite(norm) or norm <= 0:
        return position.usual_norm
    if not position.usual_norm:
        return norm
    weight = 1 / min(position.step + 1, WINDOW)
    return math.exp((1 - weight) * math.log(position.usual_norm) + weight * math.log(norm))
