"""What no sample reaches is saved, resumed and left as it was, under every strategy.

The runs have videos alone: of whole weights neither the heads of actions and sound have a gradient nor the output layer
of text, of a hybrid tuning not the robot's own rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosmos3_train.training.checkpoints import PARTS, Checkpoint, load_checkpoint
from cosmos3_train.training.run import build
from tests.training.project import experiment, load, write, write_project
from tests.training.sharded import carry_out
from tests.training.test_run import rows
from tests.training.test_sharding import on_processes

pytestmark = pytest.mark.slow

STEPS, HALF = 4, 2
HEADS = ("action_proj_in.", "action_proj_out.")
UNREACHED = {"full": (*HEADS, "audio_proj_in.", "audio_proj_out.", "lm_head."), "hybrid": HEADS}
STRATEGIES = {
    "single": "strategy.name=single",
    "ddp": "strategy.name=ddp",
    "fsdp2": "strategy.name=fsdp2",
    "hsdp": "strategy.name=hsdp strategy.shards=1",
    "zero2": "strategy.name=deepspeed_zero2",
    "zero3": "strategy.name=deepspeed_zero3",
}
RUNS = [("full", "single"), ("hybrid", "single")]
MORE = [("full", how) for how in STRATEGIES if how != "single"] + [("hybrid", "zero3")]


def write_videos(root: Path) -> Path:
    """Add `experiments/videos.yaml`: the log's videos without their actions, and nothing measured."""
    videos = experiment(root)
    del videos["data"]["datasets"]["talk"]
    videos["data"]["datasets"]["moves"]["tasks"] = {"image_to_video": 1}
    videos["training"] |= {"steps": STEPS, "checkpoint_every_n_steps": HALF, "evaluate_every_n_steps": 0}
    videos["evaluation"] = {"before": False, "heldout_samples": 0, "action_samples": 0}
    write(root / "experiments" / "videos.yaml", videos)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory, long_too) -> Path:
    """A project with an undisturbed run of each, and one that goes on from its checkpoint."""
    root = write_videos(write_project(tmp_path_factory.mktemp("unreached") / "root"))
    on_several = []
    for tuning, how in RUNS + MORE * long_too:
        words = f"tuning.method={tuning} {STRATEGIES[how]}"
        whole = f"videos name={tuning}_{how} {words}"
        resumed = f"videos name={tuning}_{how}_resumed {words} <{tuning}_{how}/{HALF}"
        if how == "single":
            carry_out(root, whole)
            carry_out(root, resumed)
        else:
            on_several += [whole, resumed]
    if on_several:
        on_processes(root, 2, *on_several)
    return root


def end_of(root: Path, run: str) -> Checkpoint:
    return load_checkpoint(root / "runs" / run / "checkpoints" / f"step_{STEPS:06d}")


def losses(root: Path, run: str) -> list[tuple[str, ...]]:
    return [row for row in rows(root / "runs" / run) if row[1].startswith("loss") and int(row[0]) > HALF]


@pytest.mark.parametrize(("tuning", "how"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.long) for run in MORE)])
def test_a_run_with_such_parts_goes_on_as_if_undisturbed(root, tuning, how):
    run = f"{tuning}_{how}"
    assert len(losses(root, run)) >= STEPS - HALF and losses(root, run) == losses(root, f"{run}_resumed")
    whole, resumed = end_of(root, run), end_of(root, f"{run}_resumed")
    for part in PARTS:
        expected, found = getattr(whole, part), getattr(resumed, part)
        assert expected.keys() == found.keys()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("tuning", UNREACHED)
def test_their_weights_average_and_moments_are_as_they_were(root, tuning, long_too):
    fresh = build(load(root, f"name=fresh_{tuning}", f"tuning.method={tuning}")).trainables.parameters
    unreached = {name for name in fresh if name.startswith(UNREACHED[tuning])}
    assert all(any(name.startswith(part) for name in unreached) for part in UNREACHED[tuning])
    for how in (how for method, how in RUNS + MORE * long_too if method == tuning):
        end = end_of(root, f"{tuning}_{how}_resumed")
        for name, value in fresh.items():
            moments = [end.optimizer[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")]
            if name in unreached:
                kept = torch.equal(end.trainables[name], value) and torch.equal(end.average[name], value)
                assert kept and not any(moment.any() for moment in moments), f"{how}: {name}"
        moved = [name for name, value in fresh.items() if not torch.equal(end.trainables[name], value)]
        assert moved, how
