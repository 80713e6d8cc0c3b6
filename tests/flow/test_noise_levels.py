"""σ is drawn as published: densities, quantiles, the resolution's shift, and from nothing but its place."""

from __future__ import annotations

import math

import pytest
import torch

from cosmos3_train.flow.noise_levels import draw_level, mode_heavy, shift, shift_for
from cosmos3_train.runtime import draw

DRAWS = 4000


def levels(distribution, amount: float) -> torch.Tensor:
    return torch.tensor([draw_level(distribution, amount, draw(3, "test", n)) for n in range(DRAWS)]).double()


def distance(sample: torch.Tensor, cdf) -> float:
    """Kolmogorov-Smirnov: the largest gap between the sample's distribution and a closed form."""
    ordered = sample.sort().values
    expected = cdf(ordered)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max())


LIMIT = 1.95 / math.sqrt(DRAWS)
"""A fair sample is further away than this once in a thousand."""


def normal_cdf(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def mode_cdf(t: torch.Tensor) -> torch.Tensor:
    """P(T ≤ t) of t = 1 − u − 1.29·(cos²(πu/2) − 1 + u): the map falls, so it is 1 − u(t), u found by bisection."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        above = 1 - middle - 1.29 * (torch.cos(math.pi * middle / 2) ** 2 - 1 + middle) > t
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 1 - low


def unshift(sigma: torch.Tensor, amount: float) -> torch.Tensor:
    return sigma / (amount - (amount - 1) * sigma)


@pytest.mark.parametrize("amount", [1.0, 3.0, 10.0])
def test_images_are_logit_normal(amount):
    def cdf(s):
        t = unshift(s, amount)
        return normal_cdf(torch.log(t / (1 - t)))

    assert distance(levels("logit_normal", amount), cdf) < LIMIT


@pytest.mark.parametrize("amount", [1.0, 3.0, 5.0])
def test_videos_are_mode_heavy(amount):
    assert distance(levels("mode", amount), lambda s: mode_cdf(unshift(s, amount))) < LIMIT


def test_uniform_is_uniform():
    assert distance(levels("uniform", 1.0), lambda s: s) < LIMIT


def test_the_distributions_are_told_apart():
    """The limit is sharp enough to fail for the wrong distribution or shift."""
    assert distance(levels("mode", 1.0), lambda s: s) > 2 * LIMIT
    assert distance(levels("uniform", 3.0), lambda s: s) > 2 * LIMIT


def test_mode_heavy_has_its_ends_its_middle_and_its_mode():
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    t = mode_heavy(u)
    assert t[0] == 1 and abs(float(t[-1])) < 1e-12
    assert float(mode_heavy(torch.tensor(0.5, dtype=torch.float64))) == pytest.approx(0.5)
    assert (t.diff() < 0).all()
    density = 1 / (-t.diff() * 2000)  # dP/dt = −du/dt
    assert abs(float(t[density.argmax()]) - 0.5) < 0.01, "most mass in the middle"
    assert float(density.max()) == pytest.approx(1 / abs(-1 - 1.29 + 1.29 * math.pi / 2), rel=1e-3)


def test_shift_values():
    assert shift(torch.tensor([0.0, 0.25, 0.5, 1.0]), 3.0).tolist() == pytest.approx([0.0, 0.5, 0.75, 1.0])
    assert shift_for(480, {256: 3.0, 480: 5.0}) == 5.0
    with pytest.raises(KeyError, match=r"tier 720.*\[256\]"):
        shift_for(720, {256: 3.0})
