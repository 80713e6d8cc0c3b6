"""The straight path between data and noise: x_σ = σ·ε + (1−σ)·x0, whose velocity dx_σ/dσ is v = ε − x0."""

from __future__ import annotations

from torch import Tensor


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """x_σ, of x0's shape. float32 in, float32 out: the path is never walked in bf16.

    Args:
        sigma: one, or several to be broadcast, of any float type; 1 − σ is formed in it, and then rounded to x0's.
    """
    rest = 1 - sigma
    if isinstance(sigma, Tensor) and isinstance(rest, Tensor):
        sigma, rest = sigma.to(x0.dtype), rest.to(x0.dtype)
    return sigma * noise + rest * x0


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = ε − x0, what the network is trained to predict."""
    return noise - x0
