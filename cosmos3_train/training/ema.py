"""An average of the trainables alone: what is evaluated and exported when `training.ema_decay` is above 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cosmos3_train.training.sharding import own_part, write_own_parts


class Average:
    """Exponential moving average in float32. Written as a lerp: a·e + (1−a)·w drifts where e equals w.

    values: by parameter; of a sharded one this rank's part
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {name: own_part(p).clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move every value towards its parameter by 1 − decay."""
        values = list(self.values.values())
        torch._foreach_lerp_(values, [own_part(p) for p in parameters.values()], 1 - self.decay)

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within the block the parameters hold the average."""
        kept = {name: own_part(p).clone() for name, p in parameters.items()}
        write_own_parts(parameters, self.values)
        try:
            yield
        finally:
            write_own_parts(parameters, kept)
