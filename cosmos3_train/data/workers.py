"""Work that several processes share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def run_in_workers(
    work: Callable[..., None],
    tasks: Mapping[int, tuple[Any, ...]],
    done: Callable[[int], object],
    workers: int,
    *,
    begin: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
) -> None:
    """Do tasks in processes. Returns when all are done; an error of one ends all, and is raised.

    Args:
        work: of a module that is safe to import; it writes whole files or none, for it may be stopped anywhere.
        tasks: its arguments, by number.
        done: told the number of every task that has ended.
        begin, given: called once in each process with these arguments.
    """
    # From a server that has only imported, not forked from here: torch and Arrow may hold threads in this process, and
    # a fork would leave their locks taken. The server imports once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    count = min(workers, len(tasks))
    with ProcessPoolExecutor(count, mp_context=context, initializer=begin, initargs=given) as pool:
        futures = {pool.submit(work, *arguments): number for number, arguments in tasks.items()}
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BaseException:
            # Waiting for the tasks at hand could take longer than a batch system waits after its signal.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
