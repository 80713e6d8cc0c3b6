"""A layer's frozen weights laid end to end, for stage 3 of ZeRO: one tensor is gathered a layer, and nothing copied.

DeepSpeed gathers, waits for and lets go of one parameter after the other, and packs several into a buffer before they
travel and unpacks them after. Of a layer's twenty that takes the host as long as a GPU takes to run the layer. A
parameter alone travels from where it lies to where it is used.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

NAME = "frozen_weights"
"""Of the one parameter, a layer's own."""
ALIGNED = 256
"""Numbers: every weight begins at a multiple of so many, as if it had been allocated by itself."""


class FrozenWeights:
    """The frozen weights of a layer. They are no parameters any more, but tensors of the same name and place: views of
    the one that is, or empty, as `settle` finds it gathered or not.

    Args:
        layer: its weights on their device, the frozen ones of one dtype; there is at least one.
    """

    def __init__(self, layer: nn.Module) -> None:
        owned = [(m, name, p) for m in layer.modules() for name, p in m.named_parameters(recurse=False)]
        frozen = [(module, name, parameter.data) for module, name, parameter in owned if not parameter.requires_grad]
        sizes = [-(-weight.numel() // ALIGNED) * ALIGNED for *_, weight in frozen]
        (kind,) = {(weight.dtype, weight.device) for *_, weight in frozen}
        whole = torch.zeros(sum(sizes), dtype=kind[0], device=kind[1])
        self._places: list[tuple[Tensor, int, torch.Size]] = []
        for (module, name, weight), start in zip(frozen, accumulate(sizes, initial=0), strict=False):
            whole.narrow(0, start, weight.numel()).view(weight.shape).copy_(weight)
            delattr(module, name)
            view = torch.empty(0, dtype=kind[0], device=kind[1])
            setattr(module, name, view)
            self._places.append((view, start, weight.shape))
        self._whole = nn.Parameter(whole, requires_grad=False)
        layer.register_parameter(NAME, self._whole)
        self._shown = 0
        self.settle()

    def settle(self) -> None:
        """After the one tensor was gathered or let go: its memory stays for as long as a view of it does."""
        whole = self._whole.data
        if self._shown == whole.data_ptr():
            return
        self._shown = whole.data_ptr()
        for weight, start, shape in self._places:
            weight.data = whole.narrow(0, start, shape.numel()).view(shape) if self._shown else whole


def lay_frozen(layer: nn.Module) -> None:
    """Lay a layer's frozen weights end to end, if there are any."""
    if not all(parameter.requires_grad for parameter in layer.parameters()):
        cast(Any, layer).frozen = FrozenWeights(layer)


def settle_frozen(module: nn.Module) -> None:
    """`FrozenWeights.settle` of a module that may have some."""
    frozen = getattr(module, "frozen", None)
    if frozen is not None:
        frozen.settle()
