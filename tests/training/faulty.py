"""`cosmos3`, on one of whose ranks something happens when step 5 is read, and in every step from there on:
`python -m tests.training.faulty WHAT RANK train …`."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable

from cosmos3_train import cli
from cosmos3_train.data.mixture import StepDataset
from cosmos3_train.model.omni import Cosmos3PackedTransformer

STEP = 5
SMALL = 24 << 10
"""Bytes: more than a log, less than a part of a checkpoint."""
LATE_SECONDS = 0.4


def fail() -> None:
    raise ValueError("the reader is broken")


def stop() -> None:
    """Stand still, as on a mount that is gone."""
    os.kill(os.getpid(), signal.SIGSTOP)


def be_late() -> None:
    """As a disk that is slower than the others'."""
    time.sleep(LATE_SECONDS)


def wait() -> None:
    """Stand still, but end when told to: torchrun waits half a minute for one that does not."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(600)


def fill() -> None:
    """Have a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def spoil(happens: Callable[[], None], on: str, *, within: bool) -> None:
    """Let it happen where a step is read, or within its first forward."""
    read, forward, due = StepDataset.__getitem__, Cosmos3PackedTransformer.forward, []

    def spoilt(self: StepDataset, step: int):
        if step >= STEP and os.environ["RANK"] == on:
            due.append(step) if within else happens()
        return read(self, step)

    def spoilt_forward(self: Cosmos3PackedTransformer, *arguments, **named):
        if due:
            due.clear()
            happens()
        return forward(self, *arguments, **named)

    StepDataset.__getitem__, Cosmos3PackedTransformer.forward = spoilt, spoilt_forward


if __name__ == "__main__":
    what, on = sys.argv[1:3]
    happens = {"fail": fail, "stop": stop, "wait": wait, "fill": fill, "be_late": be_late}[what]
    spoil(happens, on, within=what == "wait")
    cli.main(sys.argv[3:])
