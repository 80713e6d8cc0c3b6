"""DeepSpeed's stage 3 as `zero` drives it: what is gathered, when, and how far ahead of the device.

Imported where a run asks for it, for it imports DeepSpeed.

A layer's frozen weights are one parameter (`frozen`), gathered while the layer before runs; its adapters are gathered
once a step and kept. On a GPU a layer's work waits for its own gather and for none after it: DeepSpeed gathers on a
stream of its own, lets the current stream wait for that one, and only then begins the next gather. The memory of what
is let go is free once the current stream is done with it (`record_stream`).
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from cosmos3_train.model.projections import is_adapter
from cosmos3_train.training.frozen import settle_frozen

ALL = 10**15
"""More numbers than there are: no limit."""
AHEAD = 1
"""Units whose work may wait on the device when the next one's is queued."""


class Gathering(DeepSpeedZeRoOffload):
    """What DeepSpeed does around the forward and backward of a unit (all there is: nothing is offloaded here)."""

    def __init__(self, **named: Any) -> None:
        self._ends: deque[torch.cuda.Event] = deque()
        super().__init__(**named)

    def mark_persistent_parameters(self, param_threshold: int, model_threshold: int) -> list[nn.Parameter]:
        # Small, many, and float32: gathered with each layer they would cost the host more than the rest of it.
        self.adapters = [parameter for name, parameter in self.module.named_parameters() if is_adapter(name)]
        for parameter in self.adapters:
            each = cast(Any, parameter)
            # Until it knows the order of units, DeepSpeed lets go of what persists too after a unit's backward, which
            # a rank sees where the unit's input has a gradient. No unit lets go of what another one owns.
            each.ds_persist = each.is_external_param = True
        return []  # those that DeepSpeed gathers after a step, one by one

    def pre_sub_module_forward_function(self, sub_module: nn.Module) -> None:
        self._wait_for_device()
        super().pre_sub_module_forward_function(sub_module)
        settle_frozen(sub_module)

    def post_sub_module_forward_function(self, sub_module: nn.Module) -> None:
        super().post_sub_module_forward_function(sub_module)
        self._end(sub_module)

    def pre_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        self._wait_for_device()
        super().pre_sub_module_backward_function(sub_module)
        settle_frozen(sub_module)

    def post_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        super().post_sub_module_backward_function(sub_module)
        self._end(sub_module)

    def release_backward_leftovers(self) -> None:
        super().release_backward_leftovers()
        self._settle_all()

    def partition_all_parameters(self) -> None:
        super().partition_all_parameters()
        self._settle_all()

    def _settle_all(self) -> None:
        for unit in self.module.children():
            settle_frozen(unit)

    def _end(self, unit: nn.Module) -> None:
        settle_frozen(unit)
        if next(unit.parameters()).is_cuda:
            end = torch.cuda.Event()
            end.record()
            self._ends.append(end)

    def _wait_for_device(self) -> None:
        # No gather waits for the layers before it. A host that is fast would gather the whole model ahead of them, and
        # what they have let go would not be free yet.
        while len(self._ends) > AHEAD:
            self._ends.popleft().synchronize()


class Stage3(DeepSpeedZeroOptimizer_Stage3):
    """The optimizer, over a list of units that are gathered at once each."""

    def initialize_ds_offload(self, **named: Any) -> Gathering:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Gathering(**named)

    def _post_step(self, timer_names: Any) -> None:
        super()._post_step(timer_names)
        adapters = cast(Any, self.parameter_offload).adapters
        if adapters:
            adapters[0].all_gather_coalesced(adapters).wait()

    def create_reduce_and_remove_grad_hooks(self) -> None:
        # Of a module that is gathered whole, gradients would be taken by a hook on its inputs and outputs, which sees
        # no tensors within tuples. So each weight has a hook of its own.
        for parameter in (each for group in self.fp16_groups for each in group):
            del parameter.ds_z3_leaf_module
        super().create_reduce_and_remove_grad_hooks()


def numbers_of(unit: nn.Module) -> int:
    """What is gathered of a unit when its turn comes."""
    return sum(cast(Any, p).ds_numel for name, p in unit.named_parameters() if not is_adapter(name))
