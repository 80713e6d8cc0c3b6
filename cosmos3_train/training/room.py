"""Where a whole model stands that is to be exported: on the run's device, or in the host's memory.

It need not have trained there: under fsdp2 no device held all of it. Exporting reads the weights, and comparing them
with upstream's happens on the CPU, so the host is as good a place as the device.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import torch
from torch import nn

from cosmos3_train.config import Experiment, Model
from cosmos3_train.model.fp8 import Fp8Linear
from cosmos3_train.model.loading import DTYPES, KEPT_FLOAT32
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.trainable import make_trainable

logger = logging.getLogger(__name__)

MARGIN = 1.1
"""Of the device's memory that fragments, and of a weight that is there twice while it is converted."""


def with_room(
    model: Model,
    experiment: Experiment,
    device: torch.device,
    empty: Cosmos3PackedTransformer,
    free: float | None = None,
) -> tuple[Model, torch.device]:
    """The device, or the CPU with a model configured for it where the device lacks room.

    Args:
        empty: the backbone on the meta device, of which is told what trains.
        free: bytes of the device that may be taken; None asks a GPU, and leaves any other device as it is.
    """
    if free is None:
        if device.type != "cuda":
            return model, device
        gc.collect()
        torch.cuda.empty_cache()
        free = float(torch.cuda.mem_get_info(device)[0])
    make_trainable(empty, experiment.tuning, list(experiment.embodiments.values()), experiment.training.seed)
    needed = held_bytes(empty, model) * MARGIN
    if needed <= free:
        return model, device
    words = "the whole model needs %.1f GB and %.1f GB of %s are free: it stands in the host's memory"
    logger.info(words, needed / 1e9, free / 1e9, device)
    return replace(model, attention="auto", compile=False), torch.device("cpu")


def held_bytes(backbone: Cosmos3PackedTransformer, model: Model) -> int:
    """Bytes of a backbone's weights once they are read, of which those that train are float32 masters."""
    codes = {id(m.weight): model.fp8_copies for m in backbone.modules() if isinstance(m, Fp8Linear)}

    def width(name: str, parameter: nn.Parameter) -> int:
        if parameter.requires_grad or name.startswith(KEPT_FLOAT32):
            return 4
        return codes.get(id(parameter), DTYPES[model.dtype].itemsize)

    return sum(parameter.numel() * width(name, parameter) for name, parameter in backbone.named_parameters())
