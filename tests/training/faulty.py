"""`cosmos3`, on whose rank 1 something happens when step 5 is read: `python -m tests.training.faulty WHAT train …`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from cosmos3_train import cli
from cosmos3_train.data.mixture import StepDataset

STEP = 5


def fail() -> None:
    raise ValueError("the reader is broken")


def stop() -> None:
    """Stand still, as on a mount that is gone."""
    os.kill(os.getpid(), signal.SIGSTOP)


def spoil(happens: Callable[[], None]) -> None:
    read = StepDataset.__getitem__

    def spoilt(self: StepDataset, step: int):
        if step == STEP and os.environ["RANK"] == "1":
            happens()
        return read(self, step)

    StepDataset.__getitem__ = spoilt


if __name__ == "__main__":
    spoil({"fail": fail, "stop": stop}[sys.argv[1]])
    cli.main(sys.argv[2:])
