"""One process, or several that sum their gradients: what Lightning's Trainer is told, and the sums over ranks.

Under ddp every rank holds the whole model. Gradients are summed by us, once a step, after the last micro-batch, rather
than by DistributedDataParallel's hooks: ranks may cut their share into different numbers of micro-batches, and a head
that one rank's samples do not use must not hold the others up. For LoRA that is one call over a few dozen megabytes.
Under fsdp2 and hsdp the same holds of what is not sharded; of what is, `sharding` tells.

A collective that one rank does not come to holds all others, for ever or until NCCL aborts them without a name. So the
ranks `meet` first, on the host: the first rank counts, and names who is missing. Of one that stands still within a
collective, those that waited for it find out who it is by who answers a roll call.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from cosmos3_train import config
from cosmos3_train.config import UserError, first_line
from cosmos3_train.model.context import ContextGroup
from cosmos3_train.runtime import (
    is_first_rank,
    launched,
    listen_to_other_machines,
    local_rank,
    local_world_size,
    node_count,
    rank,
    world_size,
)

AS_LONG_AS_IT_TAKES = timedelta(days=7)
GRACE = timedelta(seconds=15)
"""The other ranks wait so much longer than the first one, so that it is the one that says who is missing."""
NCCL_GRACE = timedelta(seconds=90)
"""NCCL ends a process that has waited in vain without a word about whom for; before it does, the hosts name them."""
ROLL_CALL_SECONDS = 10.0
"""For ranks that waited for another one in vain to find out which: less than `PeerLost` keeps a process silent."""

_meetings: dict[timedelta, dist.ProcessGroup] = {}
"""Gloo groups by how long their ranks wait for each other: like torch's own groups, one set a process."""
_patience = AS_LONG_AS_IT_TAKES
_mesh: DeviceMesh | None = None
_contexts: dict[int, ContextGroup] = {}
"""By how many ranks share packs."""


class RankMissing(RuntimeError):
    """A rank has not come to a collective in time."""


class PeerLost(RuntimeError):
    """Another rank went away while this one waited for it; why, that rank's own error says.

    asked_to_stop: the launcher has told this process to end meanwhile, so it knows.
    """

    asked_to_stop = False


class Leaving(Strategy):
    """A strategy that can be left with work queued on the device that will never be done."""

    peer_lost = False
    """Set where another rank has gone or stands still: then nothing is moved off the device, which waits for it."""

    def teardown(self) -> None:
        if not self.peer_lost:
            super().teardown()


class SummedGradients(Leaving, DDPStrategy):
    """Lightning's ddp without the wrapper around the module: processes, devices and barriers stay its own.

    Args:
        patience: how long the hosts wait for each other.
    """

    def __init__(self, patience: timedelta, backend: str) -> None:
        super().__init__(process_group_backend=backend, timeout=_on_devices(patience, backend))
        self._patience = patience

    def configure_ddp(self) -> None:
        """Leave the module as it is; `sum_gradients` does what the wrapper's hooks would."""

    def setup_distributed(self) -> None:
        super().setup_distributed()
        _open_meetings(self._patience)

    def barrier(self, *args: object, **kwargs: object) -> None:
        with peers("a barrier"):
            super().barrier(*args, **kwargs)


class ShardedWeights(Leaving, ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, on processes that `connect` has joined and a backbone that is sharded
    already: it was read so."""

    def setup_environment(self) -> None:
        self._setup_distributed()
        self._device_mesh = device_mesh()

    def model_to_device(self) -> None:
        """It is there. Moving would have every unit look for its shards anew."""

    def barrier(self, name: str | None = None) -> None:
        with peers("a barrier"):
            super().barrier(name)


def _open_meetings(patience: timedelta) -> None:
    global _patience
    _patience = patience
    for wait in (patience, AS_LONG_AS_IT_TAKES):  # a group's own time is what its ranks but the first wait
        if wait not in _meetings:
            group = dist.new_group(backend="gloo", timeout=wait + GRACE)
            assert isinstance(group, dist.ProcessGroup)
            _meetings[wait] = group


Name = Literal["single", "ddp", "fsdp2", "hsdp", "deepspeed_zero2", "deepspeed_zero3"]


def strategy_name(strategy: config.Strategy) -> Name:
    """What `auto` means for the processes that were started."""
    if strategy.name == "auto":
        return "ddp" if strategy.devices > 1 or world_size() > 1 else "single"
    return strategy.name


def shards_weights(strategy: config.Strategy) -> bool:
    """Whether no process holds the whole model."""
    return strategy.is_sharded and strategy.name != "deepspeed_zero2"


def zero_stage(strategy: config.Strategy) -> int:
    """DeepSpeed's, 0 where it takes no part."""
    return {"deepspeed_zero2": 2, "deepspeed_zero3": 3}.get(strategy.name, 0)


def device_for(strategy: config.Strategy) -> torch.device:
    """This process's device, before the others are met.

    Raises:
        UserError: a GPU is asked for and there is none, or torchrun started another number of processes, or more of
            them on this machine than it has GPUs.
    """
    if strategy.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("strategy.accelerator is 'gpu', but torch sees no GPU here; use 'auto' or 'cpu'")
    name = strategy_name(strategy)
    if name == "single" and world_size() > 1:
        raise UserError(f"strategy.name is 'single', but {world_size()} processes were started; use strategy.name=ddp")
    if name != "single":
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
    if strategy.is_sharded and not launched():
        raise UserError(f"strategy.name is {name!r}, but one process was started; use launch/local.sh EXPERIMENT")
    refuse_remainders(strategy, world_size(), _shards(strategy))
    listen_to_other_machines()
    if strategy.accelerator != "cpu" and torch.cuda.is_available():
        processes, gpus = local_world_size(), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(
                f"{processes} processes were started on this machine, each for a GPU of its own, but torch sees {gpus} "
                f"there; use PROCESSES={gpus} (by hand, torchrun's --nproc-per-node {gpus})"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def refuse_remainders(strategy: config.Strategy, processes: int, shards: int) -> None:
    """Raise `UserError` where so many processes cannot be cut into groups that share packs, or a copy of the model."""
    of = f"the {processes} processes" if processes > 1 else "one process"
    if processes % strategy.context_parallel:
        raise UserError(
            f"strategy.context_parallel is {strategy.context_parallel}, which does not divide {of}; start a multiple "
            "of it (launch/local.sh, launch/slurm.sbatch)"
        )
    if strategy.name == "hsdp" and processes % shards:
        raise UserError(f"strategy.shards is {shards}, which does not divide {of}; take a multiple of it")


def make_strategy(strategy: config.Strategy, device: torch.device) -> Strategy:
    """Lightning's strategy for the run."""
    if strategy_name(strategy) == "single":
        return SingleDeviceStrategy(device=device)
    backend, patience = _backend(device), timedelta(seconds=strategy.collective_timeout_seconds)
    if strategy.is_sharded and not zero_stage(strategy):
        return ShardedWeights(process_group_backend=backend, timeout=_on_devices(patience, backend))
    return SummedGradients(patience, backend)


def connect(strategy: config.Strategy, device: torch.device) -> None:
    """Join the processes of a run before its model is read: where it is sharded, or where they share packs."""
    global _mesh
    patience = timedelta(seconds=strategy.collective_timeout_seconds)
    longer = _on_devices(patience, _backend(device))
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), timeout=longer, device_id=device if device.type == "cuda" else None)
        if device.type == "cuda":
            atexit.register(_leave)
    _open_meetings(patience)
    if strategy_name(strategy) in ("fsdp2", "hsdp") and _mesh is None:
        _mesh = _make_mesh(_shards(strategy), device, longer)


def _make_mesh(shards: int, device: torch.device, patience: timedelta) -> DeviceMesh:
    """Of groups whose ranks wait as long as the run says: those that torch makes for a mesh wait half an hour."""
    if shards == world_size():
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=("shards",))
    ranks = torch.arange(world_size()).view(-1, shards)
    groups = [dist.new_subgroups_by_enumeration(lines.tolist(), timeout=patience)[0] for lines in (ranks.T, ranks)]
    return DeviceMesh.from_group(
        cast(list[dist.ProcessGroup], groups), device.type, ranks, mesh_dim_names=("copies", "shards")
    )


def data_rank(strategy: config.Strategy) -> tuple[int, int]:
    """This process's place among those that draw samples of their own, and their number: neighbours that share packs
    draw the same."""
    return rank() // strategy.context_parallel, world_size() // strategy.context_parallel


def context_group(strategy: config.Strategy) -> ContextGroup | None:
    """The ranks that share this one's packs, None where they are its own; after `connect`, and on every rank."""
    size = strategy.context_parallel
    if size == 1:
        return None
    if size not in _contexts:
        patience = timedelta(seconds=strategy.collective_timeout_seconds)
        own, _ = dist.new_subgroups(size, timeout=_on_devices(patience, dist.get_backend()))
        assert isinstance(own, dist.ProcessGroup)
        _contexts[size] = ContextGroup(own)
    return _contexts[size]


def _leave() -> None:
    """NCCL warns about a group that is left open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_mesh() -> DeviceMesh:
    """The mesh [shards] of fsdp2, or [copies, shards] of hsdp, that `connect` made."""
    assert _mesh is not None
    return _mesh


def _shards(strategy: config.Strategy) -> int:
    return world_size() if strategy_name(strategy) == "fsdp2" else strategy.shards or local_world_size()


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _on_devices(patience: timedelta, backend: str) -> timedelta:
    """How long collectives of tensors wait."""
    return patience + NCCL_GRACE if backend == "nccl" else patience


def meet(where: str) -> None:
    """Wait until every rank is here. Costs the host some tenths of a millisecond and waits for no device.

    Raises:
        RankMissing: one has not come in `strategy.collective_timeout_seconds`.
        PeerLost: one has gone.
    """
    if dist.is_initialized():
        _meet(where, _patience)


def wait_for_first_rank(where: str) -> None:
    """Wait while the first rank does alone what the others need not do; it may take as long as it takes."""
    if dist.is_initialized():
        _meet(where, AS_LONG_AS_IT_TAKES)


def _meet(where: str, patience: timedelta) -> None:
    """Every rank tells the first one that it has come, and is told in turn that all have.

    It is what torch's `monitored_barrier` does, which writes lines of its own before those of whoever is at fault.
    """
    group, word, ends = _meetings[patience], torch.zeros(1), time.monotonic() + patience.total_seconds()
    if not is_first_rank():
        with peers(where, "rank 0"):
            dist.send(word, dst=0, group=group)
            dist.recv(word, src=0, group=group)
        return
    others = range(1, world_size())
    coming = {}
    for other in others:
        try:
            coming[other] = dist.irecv(torch.zeros(1), src=other, group=group)
        except RuntimeError as error:  # its connection is closed already
            raise PeerLost(f"{where}: rank {other} has gone") from error
    missing = []
    for other, message in coming.items():
        try:
            assert message is not None
            message.wait(timedelta(seconds=max(1.0, ends - time.monotonic())))
        except RuntimeError as error:
            if time.monotonic() < ends:
                raise PeerLost(f"{where}: rank {other} has gone") from error
            missing.append(other)
    if missing:
        raise named(where, missing)
    with peers(where):
        for other in others:
            dist.send(word, dst=other, group=group)


def named(where: str, missing: list[int]) -> RankMissing:
    """For a group whose ranks wait `strategy.collective_timeout_seconds` for each other."""
    return RankMissing(
        f"{where}: {'ranks' if len(missing) > 1 else 'rank'} {', '.join(map(str, missing))} did not come in "
        f"{_patience.total_seconds():g} s (strategy.collective_timeout_seconds); the log of that rank says what it did "
        f"last"
    )


@contextmanager
def peers(what: str, awaited: str = "") -> Iterator[None]:
    """Errors of a collective are a peer's, not this process's.

    Args:
        awaited: the rank for which this one waits; without, the ranks find out who has not come.
    """
    try:
        yield
    except RuntimeError as error:
        if "Timed out waiting" in str(error):
            missing = [] if awaited else _roll_call()
            if missing:
                raise named(what, missing) from error
            raise RankMissing(f"{what}: {awaited or 'a rank'} did not come ({first_line(error)})") from error
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's have no class of their own
            raise
        _answer_roll_call()
        raise PeerLost(f"{what} failed: {first_line(error)}") from error


def _answer_roll_call() -> None:
    """Let the others know that this rank is not the one that they waited for.

    A rank whose patience ends closes its connections, so that the others who waited meet an error at once, which looks
    like that of a rank that died.
    """
    with suppress(RuntimeError):  # the launcher, which keeps the list, has gone
        _roll().set(str(rank()), "here")


def _roll_call() -> list[int]:
    """Who has not come to a collective in which others waited in vain: those that do not answer now either. Whichever
    rank stands still, the launcher keeps the list."""
    _answer_roll_call()
    ends, missing = time.monotonic() + ROLL_CALL_SECONDS, list(range(world_size()))
    try:
        while missing and time.monotonic() < ends:
            time.sleep(0.1)
            missing = [one for one in missing if not _roll().check([str(one)])]
    except RuntimeError:
        return []
    return missing


def _roll() -> dist.Store:
    return _store("roll call")


def board() -> dist.Store:
    """Where every rank may write and read, also while its host stands in a collective."""
    return _store("board")


def _store(prefix: str) -> dist.Store:
    world = dist.group.WORLD
    assert world is not None
    return dist.PrefixStore(prefix, world.get_group_store())


def begun() -> int:
    """How many collectives of tensors this rank has begun, of those that all ranks begin alike. Ranks that share packs
    exchange more, as often as they have packs."""
    groups = {dist.group.WORLD} if _mesh is None else {dist.group.WORLD, *_mesh.get_all_groups()}
    return sum(cast(Any, group)._get_sequence_number_for_group() for group in groups if group is not None)


def _all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None = None) -> None:
    with peers("a sum over ranks" if operation == dist.ReduceOp.SUM else "a comparison of ranks"):
        dist.all_reduce(values, op=operation, group=group)


def summed(values: Tensor) -> Tensor:
    """The sum over ranks, in place (unchanged where there is one process)."""
    if dist.is_initialized():
        _all_reduce(values, dist.ReduceOp.SUM)
    return values


def summed_over_shards(values: Tensor) -> Tensor:
    """The sum over the ranks that share one copy of the model, in place."""
    with peers("a sum over shards"):
        dist.all_reduce(values, group=device_mesh().get_group("shards"))
    return values


def on_any_rank(flag: Tensor) -> Tensor:
    """The largest over ranks, in place and on the device: what they may have found otherwise by a last bit, they then
    do alike."""
    if dist.is_initialized():
        _all_reduce(flag, dist.ReduceOp.MAX)
    return flag


def any_rank(flag: bool, what: str) -> bool:
    """Whether the flag is up on any rank, agreed on as `largest` is; every rank gets the same answer."""
    return bool(largest([int(flag)], what)[0])


def largest(values: list[int], what: str) -> list[int]:
    """The largest of each over ranks, agreed on by the hosts: no device is waited for."""
    if not dist.is_initialized():
        return values
    meet(what)
    found = torch.tensor(values)
    with peers(what):
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_meetings[_patience])
    return found.tolist()


def from_all_ranks(values: list[float], what: str) -> list[list[float]]:
    """Every rank's values, by rank; told by the hosts: no device is waited for."""
    if not dist.is_initialized():
        return [values]
    meet(what)
    found = [torch.zeros(len(values), dtype=torch.float64) for _ in range(world_size())]
    with peers(what):
        dist.all_gather(found, torch.tensor(values, dtype=torch.float64), group=_meetings[_patience])
    return [one.tolist() for one in found]


def hear_first_rank(value: int) -> int:
    """What the first rank says, which may take as long as it takes; the others' own value counts for nothing."""
    word = torch.tensor(value)
    with peers("the first rank's word", "rank 0"):
        dist.broadcast(word, 0, group=_meetings[AS_LONG_AS_IT_TAKES])
    return int(word)


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum every gradient over ranks, in one flat buffer. A gradient that no rank has stays absent on all."""
    if not dist.is_initialized() or not parameters:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    _all_reduce(present, dist.ReduceOp.MAX)
    used = [p for p, has in zip(parameters, present.tolist(), strict=True) if has]
    if not used:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in used])
    _all_reduce(flat, dist.ReduceOp.SUM)
    for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = part.view_as(parameter)


def assert_same_on_all_ranks(tensors: Iterable[Tensor], what: str) -> None:
    """Compare sums of the tensors over the ranks that have them: whole ones over all, rows over the copies of a model
    (where there is one copy, nobody else has them). A difference is a defect of ours and ends the run."""
    whole, rows = [], []
    for tensor in tensors:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        (whole if part is tensor else rows).append(part.detach().double().sum())
    if whole and dist.is_initialized():
        _assert_same(torch.stack(whole), what, None)
    if rows and "copies" in (device_mesh().mesh_dim_names or ()):
        _assert_same(torch.stack(rows), what, device_mesh().get_group("copies"))


def _assert_same(sums: Tensor, what: str, group: dist.ProcessGroup | None) -> None:
    low, high = sums.clone(), sums.clone()
    _all_reduce(low, dist.ReduceOp.MIN, group)
    _all_reduce(high, dist.ReduceOp.MAX, group)
    assert bool((low == high).all()), f"{what} differ between ranks"
