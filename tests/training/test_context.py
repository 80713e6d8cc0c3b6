"""Ranks that share packs make the steps of one process, under ddp and with sharded weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.project import write_project
from tests.training.sharded import carry_out
from tests.training.test_sharding import assert_same_curve, job, on_processes, write_moves

pytestmark = pytest.mark.slow

TWO = "strategy.context_parallel=2"
UNMEASURED = "training.evaluate_every_n_steps=0 evaluation.before=false evaluation.action_samples=0"
RUNS = [("lora", "ddp")]
MORE = [("full", "fsdp2"), ("hybrid", "ddp"), ("full", "ddp")]
FEW = f"{UNMEASURED} training.steps=4 training.samples_per_step=5"


@pytest.fixture(scope="module")
def root(tmp_path_factory, long_too) -> Path:
    """A project in which every tuning was trained by one process, and then by two that share its packs."""
    runs = RUNS + MORE * long_too
    root = write_moves(write_project(tmp_path_factory.mktemp("context") / "root"))
    tunings = dict.fromkeys(tuning for tuning, _ in runs)
    shared = [job(tuning, f"name={tuning}_{name} strategy.name={name}", TWO, UNMEASURED) for tuning, name in runs]
    for each in (*(job(name, f"name={name}", UNMEASURED) for name in tunings), job("cached", "name=few", FEW)):
        carry_out(root, each)
    on_processes(root, 2, *shared)
    return root


@pytest.mark.parametrize(("tuning", "strategy"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.long) for run in MORE)])
def test_two_ranks_that_share_packs_make_the_curve_of_one(root, tuning, strategy):
    assert_same_curve(root, tuning, f"{tuning}_{strategy}")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "hsdp strategy.shards=2"])
def test_two_pairs_that_share_packs_make_the_curve_of_one(root, strategy):
    """Two data ranks of two ranks each, the text's keys and values from a cache."""
    name = f"few_pairs_{strategy.split()[0]}"
    on_processes(root, 4, job("cached", f"name={name} strategy.name={strategy} {TWO}", FEW))
    assert_same_curve(root, "few", name, steps=4)
