"""What ranks exchange in each step of a run, pass by pass, and what of it are sums."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.types import PackedSequence


class Listener(TorchDispatchMode):
    """Hears every operation of torch.distributed of this process, whoever calls for it.

    steps: their names by step and pass, from the pass's forward to the next one's, of the last one to the optimizer's
        step
    between: their names from there to the next step's first forward
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[list[str]]] = []
        self.between: set[str] = set()
        self._passes: list[list[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (self._passes or self.steps):
            (self._passes[-1].append if self._passes else self.between.add)(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def begin_pass(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        trains = isinstance(module, Cosmos3PackedTransformer) and torch.is_grad_enabled()
        if trains and isinstance(inputs[0], PackedSequence):
            self._passes.append([])

    def end_step(self, *_: object) -> None:
        if self._passes:  # ZeRO's optimizer follows the one of the heads
            self.steps.append(self._passes)
            self._passes = []


@contextmanager
def listening() -> Iterator[Listener]:
    """Listen while the block runs. What compiles does not, under a listener."""
    listener = Listener()
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(listener.begin_pass),
        register_optimizer_step_pre_hook(listener.end_step),
    ]
    try:
        with listener:
            yield listener
    finally:
        for hook in hooks:
            hook.remove()


def exchanged(run: Path, rank: int) -> Path:
    """The file of what a rank has heard."""
    return run / f"exchanged.{rank}.json"


def heard(run: Path, ranks: int = 2) -> tuple[set[str], set[str]]:
    """What the ranks of a run exchanged in steps of several passes: before the last one, and in it."""
    steps = [step for rank in range(ranks) for step in _of(run, rank)["steps"]]
    several = [step for step in steps if len(step) > 1]
    assert several, "no step has several packs"
    before = {name for step in several for names in step[:-1] for name in names}
    last = {name for step in several for name in step[-1]}
    return before, last


def heard_between_steps(run: Path, ranks: int = 2) -> set[str]:
    return {name for rank in range(ranks) for name in _of(run, rank)["between"]}


def _of(run: Path, rank: int) -> dict[str, Any]:
    return json.loads(exchanged(run, rank).read_text())


def sums(names: set[str]) -> set[str]:
    return {name for name in names if "reduce" in name}
