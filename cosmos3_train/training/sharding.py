"""A backbone of which every process holds a part: PyTorch's `fully_shard`, one unit a decoder layer.

Sharded are the weights that make a model large: the layers' own, the token embedding and the output layer (these two
are the root unit, gathered for a whole pass). A unit is gathered where it runs, forward and backward, and let go.
Everything else is whole on every rank, and its gradient is summed as under ddp: adapters, of which a gather would cost
more than they take; and the heads, which a rank's samples may not use. So where the base is frozen nothing is reduced
but what ddp reduces; and where whole weights train, masters, moments and gradients are sharded with them.

A gather is a collective. So all ranks go through the same units in the same order, whatever their samples:

- a rank with fewer packs than another runs its last one again, and its losses count nothing;
- where a run mixes conversations with generation, every pack ends with a `padding` sample of one token in each stream,
  which counts nothing, so that both towers run and every layer's weights have a gradient on every rank;
- what the first rank does alone (measuring), the others make possible by gathering with it: `lend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cosmos3_train.config import Model, Tuning
from cosmos3_train.model.loading import LARGE, read_weights
from cosmos3_train.model.omni import Cosmos3PackedTransformer, is_understanding, only_speaks
from cosmos3_train.model.trainable import restart_magnitudes
from cosmos3_train.runtime import is_first_rank, world_size
from cosmos3_train.training.checkpoints import Rows
from cosmos3_train.training.strategy import hear_first_rank, peers

DONE, PASS = 0, 1
"""The first rank's words to those that lend to it."""

Reach = Literal["speaking", "generating", "either"]
"""The samples that a trainable's gradient comes from."""


@dataclass(frozen=True)
class Part:
    """What this rank holds of a parameter that ZeRO manages: some elements of it, flattened.

    values, moments: of these elements, float32, to be read and written in place;  first: of them, in the parameter
    shape: the whole parameter's;  publish: to be called, on every rank, after values were written
    """

    values: Tensor
    moments: dict[str, Tensor]
    first: int
    shape: torch.Size
    publish: Callable[[], None]


def set_part(parameter: nn.Parameter, part: Part) -> None:
    """Say that ZeRO manages the parameter."""
    cast(Any, parameter).zero_part = part


def part_of(tensor: Tensor) -> Part | None:
    """What this rank holds of a parameter that ZeRO manages, None of any other tensor."""
    return getattr(tensor, "zero_part", None)


def reach(name: str, backbone: Cosmos3PackedTransformer) -> Reach:
    """Which samples a trainable of that name has a gradient from."""
    if only_speaks(name, backbone):
        return "speaking"
    return "either" if is_understanding(name) else "generating"


def shard(
    backbone: Cosmos3PackedTransformer, tuning: Tuning, model: Model, device: torch.device, mesh: DeviceMesh
) -> None:
    """Read the large weights of a backbone that was loaded without them, a unit at a time, and keep this rank's part.

    Args:
        backbone: its trainables injected; those of adapters stay whole.
        mesh: of `strategy.connect`.

    Raises:
        UserError: as `load_backbone`.
    """
    adapted = tuning.method in ("lora", "hybrid")
    policy = MixedPrecisionPolicy(
        # Masters are gathered as the copies that the arithmetic runs on: half the bytes.
        param_dtype=None if adapted else backbone.compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # it would cast positions and noise levels
    )

    def whole(name: str, parameter: nn.Parameter) -> bool:
        return not name.startswith(LARGE) or (adapted and parameter.requires_grad)

    def make_unit(module: nn.Module) -> None:
        kept = {parameter for name, parameter in backbone.named_parameters() if whole(name, parameter)}
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=kept)

    for number, layer in enumerate(backbone.layers):
        read_weights(backbone, model, device, lambda name, prefix=f"layers.{number}.": name.startswith(prefix))
        restart_magnitudes(layer)
        make_unit(layer)
    read_weights(backbone, model, device)
    make_unit(cast(nn.Module, backbone))
    root = _unit(backbone)
    # Losses are divided by the whole step's counts, so gradients are summed, not averaged.
    for unit in (root, *map(_unit, backbone.layers)):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    # By itself backward would gather what ran before in forward, which on the first layer is another tower's last one,
    # and differs between ranks after one of them has measured. The first layer has nothing before it.
    for before, layer in zip([backbone.layers[0], *backbone.layers], backbone.layers, strict=False):
        _unit(layer).set_modules_to_backward_prefetch([_unit(before)])
    backbone.joint_layers = True  # else each tower would gather every layer for itself
    _let_root_find_the_others(backbone)


def reduce_after_this_pack(backbone: nn.Module, last: bool) -> None:
    """Whether the next backward sums the gradients of sharded weights over ranks, or keeps them for a later one."""
    if isinstance(backbone, FSDPModule):
        backbone.set_requires_gradient_sync(last)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradient and in the same memory: its rows where it is sharded, or
    elements where ZeRO manages it."""
    part = part_of(tensor)
    if part is not None:
        return part.values
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def write_own_parts(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give parameters values, of each this rank's part; every rank calls it where they are sharded."""
    for name, parameter in parameters.items():
        own_part(parameter).copy_(values[name])
    part = next((part for p in parameters.values() if (part := part_of(p)) is not None), None)
    if part is not None:
        part.publish()


def own_rows(parameters: Mapping[str, Tensor]) -> dict[str, Rows]:
    """Which rows this rank holds, of those that are sharded."""
    found = {}
    for name, parameter in parameters.items():
        part = part_of(parameter)
        if part is not None:
            found[name] = Rows(part.first, part.values.numel(), math.prod(part.shape), list(part.shape))
        elif isinstance(parameter, DTensor):
            shards = parameter.device_mesh["shards"]
            total, each = parameter.shape[0], -(-parameter.shape[0] // shards.size())
            first = min(total, each * shards.get_local_rank())
            found[name] = Rows(first, own_part(parameter).shape[0], total)
    return found


def shard_count(parameters: Mapping[str, Tensor]) -> int:
    """Among how many ranks the rows of a parameter are spread; 1 where all are whole."""
    if any(part_of(p) is not None for p in parameters.values()):
        return world_size()
    mesh = _mesh_of(parameters)
    return 1 if mesh is None else mesh["shards"].size()


def writes_shards(parameters: Mapping[str, Tensor]) -> bool:
    """Whether this rank's copy of the model is the first one: every other holds the same rows again."""
    mesh = _mesh_of(parameters)
    return mesh is None or mesh.ndim == 1 or mesh.get_local_rank("copies") == 0


def _mesh_of(parameters: Mapping[str, Tensor]) -> DeviceMesh | None:
    return next((p.device_mesh for p in parameters.values() if isinstance(p, DTensor)), None)


def lend(backbone: Cosmos3PackedTransformer, work: Callable[[], None]) -> None:
    """Let the first rank do work in which it runs the backbone alone; the others gather with it, and compute nothing.

    Every rank calls it.
    """
    layers, root = [_unit(layer) for layer in backbone.layers], _unit(backbone)

    def gather_layers() -> None:
        for layer in layers:
            layer.unshard()
            layer.reshard()

    with peers("the weights that are lent for measuring"):
        root.unshard()
        tell_passes(backbone, work, gather_layers)
        root.reshard()


def tell_passes(
    backbone: Cosmos3PackedTransformer, work: Callable[[], None], gather_layers: Callable[[], None]
) -> None:
    """Do the work on the first rank; on the others gather all layers, one after the other, in every pass that it makes.

    A pass of either tower goes through all layers, so one word a pass is enough.
    """
    if not is_first_rank():
        while hear_first_rank(DONE) == PASS:
            gather_layers()
        return
    first = cast(nn.Module, backbone.layers[0])
    # Before the unit's own hook, which gathers.
    hook = first.register_forward_pre_hook(lambda *_: (hear_first_rank(PASS), None)[1], prepend=True)
    try:
        work()
    finally:
        hook.remove()
    hear_first_rank(DONE)


def _let_root_find_the_others(backbone: Cosmos3PackedTransformer) -> None:
    """It does so in its first forward, and cannot any more once a layer has run without it, as in measuring."""
    root = cast(Any, backbone)
    root.forward = lambda _: None
    root(None)  # without an argument torch 2.11 fails on a GPU
    del root.forward
    _unit(backbone).reshard()


def _unit(module: Any) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
