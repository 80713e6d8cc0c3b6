"""A rank that stands still while the host of another is stuck in what the first has not begun."""

from __future__ import annotations

import pytest

from tests.training.sharded import launch

pytestmark = pytest.mark.slow


def test_the_rank_that_has_begun_fewer_collectives_is_named_and_none_where_all_are_as_far():
    processes = {which: launch(2, "tests.training.standing", "gloo", which) for which in ("one", "both")}
    outputs = {which: process.communicate(timeout=100)[0] for which, process in processes.items()}
    assert_named(processes["one"].returncode, outputs["one"])
    assert processes["both"].returncode == 0, outputs["both"]
    assert outputs["both"].count("summed 4") == 2 and "error: " not in outputs["both"]


def assert_named(code: int, output: str) -> None:
    words = "step 6: rank 1 did not come in 1 s (strategy.collective_timeout_seconds)"
    assert code == 1 and f"[rank 0] error: {words}" in output and f"told {words}" in output, output
    report = output.rpartition("Root Cause")[2]
    assert "rank      : 0 " in report and f"error: {words}" in report, output
    assert "summed" not in output
