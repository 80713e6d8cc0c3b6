"""Names the rank for which the devices wait, where the host cannot: a thread that looks at the clock.

NCCL's collectives wait on the device. The host learns nothing of it while it waits for the device itself, to read a
number or because a thousand launches are queued, and no error ever reaches it there; a minute later NCCL ends the
process and says which collective it was, but not who has not come. That rank is the one that has begun fewer.

A launcher that keeps Python's lock while it waits for the queue (as Inductor's own does) keeps this thread out too;
then the other ranks' threads tell, or NCCL ends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from cosmos3_train.runtime import leave_at_once, rank, record_failure, world_size
from cosmos3_train.training.strategy import GRACE, RankMissing, begun, board, named

logger = logging.getLogger(__name__)


class Overdue(threading.Thread):
    """Ends the process where it is in a step and begins no collective for longer than the ranks wait for each other,
    while another rank, that has begun fewer, begins none either.

    Args:
        patience: seconds, `strategy.collective_timeout_seconds`.
        fail: told the error before the process ends, in this thread.
    """

    def __init__(self, patience: float, fail: Callable[[RankMissing], None]) -> None:
        super().__init__(name="overdue", daemon=True)
        self.patience, self.fail = patience, fail
        self._where: str | None = None
        self._closed = threading.Event()

    def begin(self, where: str) -> None:
        """From here on the ranks are in a step."""
        self._where = where

    def end(self) -> None:
        """The ranks are in no step: whatever they do may take as long as it takes."""
        self._where = None

    def close(self) -> None:
        self._closed.set()

    def run(self) -> None:
        # Where the hosts can, they tell it first, and of them the first rank.
        later = 2 * GRACE.total_seconds()
        seen, since, others = (self._where, begun()), time.monotonic(), dict[int, int]()
        while not self._closed.wait(min(1.0, self.patience / 4)):
            now, waited = (self._where, begun()), time.monotonic() - since
            with suppress(RuntimeError):  # the launcher, which keeps the board, has gone
                if now[0] is not None:
                    board().set(str(rank()), str(now[1]))
                if now[0] is None or now != seen:
                    seen, since, others = now, time.monotonic(), {}
                elif waited > later and not others:
                    others = self._counts()
                elif waited > self.patience + later:
                    self._judge(now[0], now[1], others)

    def _counts(self) -> dict[int, int]:
        """What every rank has told that it has begun; -1 where it has told nothing."""
        ranks = range(world_size())
        return {other: int(board().get(str(other))) if board().check([str(other)]) else -1 for other in ranks}

    def _judge(self, where: str, own: int, before: dict[int, int]) -> None:
        after = self._counts()
        behind = [other for other, count in after.items() if count < own and count == before[other]]
        # Where nobody is behind, all compile, or the network stands still, which NCCL itself finds out.
        if not behind or (self._where, begun()) != (where, own):
            return
        error = named(where, behind)
        record_failure(error, f"error: {error}")
        logger.error("error: %s", error)
        try:
            self.fail(error)
        finally:
            leave_at_once(1)  # what the host stands in is not to be left otherwise
