"""Fused AdamW over float32 masters, its schedule as a pure function of the step, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cosmos3_train.config import Optimizer
from cosmos3_train.model.trainable import Trainables
from cosmos3_train.training.sharding import own_part, part_of
from cosmos3_train.training.strategy import summed_over_shards


def make_optimizer(trainables: Trainables, config: Optimizer) -> torch.optim.AdamW:
    """AdamW with state from the start for every trainable that ZeRO does not manage.

    A head that sees no gradient before the first save would otherwise have no state to save, and no run that is
    sharded could resume it.
    """
    groups = trainables.groups(config.learning_rate, config.weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if part_of(parameter) is None]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def learning_rate_factor(step: int, steps: int, config: Optimizer) -> float:
    """What the peak learning rate is multiplied by at optimizer step `step` (0, 1, …) of `steps`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if config.schedule == "cosine" else 1 - min(1.0, done)
    return config.final_fraction + (1 - config.final_fraction) * falling


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, config: Optimizer) -> float:
    """Give every group its learning rate for the step about to be made; returns that of factor 1."""
    rate = config.learning_rate * learning_rate_factor(step, steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def clip_gradients(parameters: list[nn.Parameter], largest: float, managed: Tensor | None = None) -> Tensor:
    """Scale the gradients so that their joint norm is at most `largest` (0: leave them); returns the norm before.

    Args:
        managed: the squared norm of what is not among the parameters, for ZeRO manages it, and is not scaled here.
    """
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole if p.grad is not None])
    # Of the sharded ones the rows here: an operation on the whole tensor would be a collective for each.
    rows = [own_part(p.grad) for p in parameters if isinstance(p, DTensor) and p.grad is not None]
    if len(whole) < len(parameters):
        theirs = summed_over_shards(torch.nn.utils.get_total_norm(rows).square().to(parameters[0].device))
        norm = (norm.to(theirs).square() + theirs).sqrt()  # every rank takes the same step, or leaves it out
    if managed is not None:
        norm = (norm.to(managed).square() + managed).sqrt()
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(whole, largest, norm)
        if rows:
            torch._foreach_mul_(rows, clip_factor(norm, largest))
    return norm


def clip_factor(norm: Tensor, largest: float) -> Tensor:
    """What gradients of that norm are scaled by, so that it is at most `largest` (0: 1)."""
    return (largest / (norm + 1e-6)).clamp(max=1.0) if largest > 0 else torch.ones_like(norm)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: 'NAME.step', 'NAME.exp_avg', 'NAME.exp_avg_sq'; this rank's rows."""
    return {
        f"{name}.{key}": own_part(value)
        for name, parameter in parameters.items()
        for key, value in _moments(optimizer, parameter).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put saved state back, in place."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            for key, value in _moments(optimizer, parameter).items():
                own_part(value).copy_(tensors[f"{name}.{key}"])


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    part = part_of(parameter)
    return optimizer.state[parameter] if part is None else part.moments
