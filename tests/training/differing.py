"""`cosmos3`, whose rank 1 begins with other weights than rank 0: `python -m tests.training.differing train …`."""

from __future__ import annotations

import os
import sys

import torch
from torch.distributed.tensor import DTensor

from cosmos3_train import cli
from cosmos3_train.training.module import PostTraining


@torch.no_grad()
def drift(module: PostTraining) -> None:
    if os.environ["RANK"] == "1":
        for parameter in module.trainables.parameters.values():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).add_(0.01)


if __name__ == "__main__":
    PostTraining.on_train_start = drift
    cli.main(sys.argv[1:])
