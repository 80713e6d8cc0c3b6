"""`cosmos3`, on whose rank 1 something happens when step 5 is read, or in every step from there on:
`python -m tests.training.faulty WHAT train …`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from cosmos3_train import cli
from cosmos3_train.data.mixture import StepDataset

STEP = 5
LATE_SECONDS = 0.4


def fail() -> None:
    raise ValueError("the reader is broken")


def stop() -> None:
    """Stand still, as on a mount that is gone."""
    os.kill(os.getpid(), signal.SIGSTOP)


def be_late() -> None:
    """As a disk that is slower than the others'."""
    time.sleep(LATE_SECONDS)


def spoil(happens: Callable[[], None]) -> None:
    read = StepDataset.__getitem__

    def spoilt(self: StepDataset, step: int):
        if step >= STEP and os.environ["RANK"] == "1":
            happens()
        return read(self, step)

    StepDataset.__getitem__ = spoilt


if __name__ == "__main__":
    spoil({"fail": fail, "stop": stop, "be_late": be_late}[sys.argv[1]])
    cli.main(sys.argv[2:])
