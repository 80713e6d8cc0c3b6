"""One process, or several that sum their gradients: what Lightning's Trainer is told, and the sums over ranks.

Under ddp every rank holds the whole model. Gradients are summed by us, once a step, after the last micro-batch, rather
than by DistributedDataParallel's hooks: ranks may cut their share into different numbers of micro-batches, and a head
that one rank's samples do not use must not hold the others up. For LoRA that is one call over a few dozen megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from cosmos3_train import config
from cosmos3_train.config import UserError
from cosmos3_train.runtime import launched, local_rank, node_count, world_size


class SummedGradients(DDPStrategy):
    """Lightning's ddp without the wrapper around the module: processes, devices and barriers stay its own."""

    def configure_ddp(self) -> None:
        """Leave the module as it is; `sum_gradients` does what the wrapper's hooks would."""


def device_for(strategy: config.Strategy) -> torch.device:
    """This process's device.

    Raises:
        UserError: a GPU is asked for and there is none, or torchrun started another number of processes.
    """
    if strategy.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("strategy.accelerator is 'gpu', but torch sees no GPU here; use 'auto' or 'cpu'")
    if strategy.name == "single" and world_size() > 1:
        raise UserError(f"strategy.name is 'single', but {world_size()} processes were started; use strategy.name=ddp")
    if strategy.name == "ddp":
        if strategy.devices > 1 and not launched():
            raise UserError(
                f"strategy.devices is {strategy.devices}, but one process was started; "
                f"use launch/local.sh EXPERIMENT, which starts one a device"
            )
        if launched() and strategy.devices * node_count() != world_size():
            raise UserError(
                f"strategy.devices is {strategy.devices}, but {world_size()} processes were started on "
                f"{node_count()} machines; give strategy.devices={world_size() // node_count()}"
            )
    if strategy.accelerator != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def make_strategy(strategy: config.Strategy, device: torch.device) -> Strategy:
    """Lightning's strategy for the run."""
    if strategy.name == "single":
        return SingleDeviceStrategy(device=device)
    return SummedGradients(process_group_backend="nccl" if device.type == "cuda" else "gloo")


def summed(values: Tensor) -> Tensor:
    """The sum over ranks, in place (unchanged where there is one process)."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank; every rank gets the same answer."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum every gradient over ranks, in one flat buffer. A gradient that no rank has stays absent on all."""
    if not dist.is_initialized():
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    used = [p for p, has in zip(parameters, present.tolist(), strict=True) if has]
    if not used:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in used])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = part.view_as(parameter)


def assert_same_on_all_ranks(tensors: Iterable[Tensor], what: str) -> None:
    """Compare a digest of the tensors over ranks; a difference is a defect of ours and ends the run."""
    if not dist.is_initialized():
        return
    digest = torch.stack([t.detach().double().sum() for t in tensors]).sum()
    low, high = digest.clone(), digest.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    assert bool(low == high), f"{what} differ between ranks"
