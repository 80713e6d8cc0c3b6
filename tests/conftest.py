"""What every test needs, and in how many processes they run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

MOST_WORKERS = 4
"""Each takes up to 2 GB."""

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All of the fast tests run on several cores. The slow ones start processes of their own, which wait for each other
    for half of their time: two files at once. A few tests that are named are done sooner in this process."""
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        return 0
    return min(MOST_WORKERS if "not slow" in config.option.markexpr else 2, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """xdist begins with the files of most tests; of the slow ones that leaves the longest, the quickstart, for last."""
    if hasattr(config.option, "loadscopereorder") and "not slow" not in config.option.markexpr:
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that are `long` are slow ones too many for every change: `-m "slow or long"` runs them all."""
    if "long" not in config.option.markexpr:
        too_long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=too_long)
        items[:] = [item for item in items if item not in too_long]


@pytest.fixture(autouse=True)
def no_handlers_left_behind() -> Iterator[None]:
    """The package's handlers hold the standard error of the test that made them, which ends with it."""
    yield
    logging.getLogger("cosmos3_train").handlers.clear()
