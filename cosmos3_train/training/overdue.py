"""Names the rank for which the devices wait, where the host cannot: a thread that looks at the clock.

NCCL's collectives wait on the device. The host learns nothing of it while it waits for the device itself, to read a
number or because a thousand launches are queued, and no error ever reaches it there; a minute later NCCL ends the
process and says which collective it was, but not who has not come. That rank is the one that has begun fewer.
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
    while another rank has begun fewer.

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
        seen, since = (self._where, begun()), time.monotonic()
        while not self._closed.wait(min(1.0, self.patience / 4)):
            now = (self._where, begun())
            if now != seen or self._where is None:
                seen, since = now, time.monotonic()
                continue
            waited = time.monotonic() - since
            with suppress(RuntimeError):  # the launcher, which keeps the board, has gone
                if waited > self.patience / 2:
                    board().set(str(rank()), str(begun()))
                # The hosts tell it first, where they can, and of them the first rank.
                if waited > self.patience + 2 * GRACE.total_seconds():
                    self._look(now)

    def _look(self, now: tuple[str | None, int]) -> None:
        where, own = now
        counts = {other: _count(other) for other in range(world_size())}
        behind = [other for other, count in counts.items() if count < own]
        # Where nobody is behind, all compile, or the network stands still, which NCCL itself finds out.
        if not behind or where is None or self._where != where or begun() != own:
            return
        error = named(where, behind)
        record_failure(error, f"error: {error}")
        logger.error("error: %s", error)
        self.fail(error)
        leave_at_once(1)  # what the host stands in is not to be left otherwise


def _count(other: int) -> int:
    """What another rank has told of itself; -1 where it is in no step, or far from being overdue."""
    return int(board().get(str(other))) if board().check([str(other)]) else -1
