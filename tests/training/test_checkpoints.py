"""Checkpoints whole or not at all: kept, pruned, damaged, and a disk that fills up while one is written."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from cosmos3_train.config import UserError
from cosmos3_train.training.checkpoints import (
    Checkpoint,
    Position,
    check_names,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from cosmos3_train.training.progress import write_status
from cosmos3_train.training.run import train
from tests.disk import small_files
from tests.training.project import load


def checkpoint(step: int, size: int = 8) -> Checkpoint:
    weights = {"a.weight": torch.full((size,), float(step)), "b": torch.arange(6.0).view(2, 3).T}
    state = {f"{name}.exp_avg": value / 2 for name, value in weights.items()}
    return Checkpoint(Position(step, step + 1, 4 * step, 1), weights, {}, state)


def test_what_is_saved_is_loaded(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(12), keep=2)
    assert path.name == "step_000012"
    found, saved = load_checkpoint(path), checkpoint(12)
    assert found.position == Position(step=12, drawn=13, samples=48, skipped=1)
    for part in ("trainables", "average", "optimizer"):
        ours, theirs = getattr(found, part), getattr(saved, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_newest_are_kept_in_the_order_of_their_steps(tmp_path):
    for step in (2, 900, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert [load_checkpoint(p).position.step for p in list_checkpoints(tmp_path)] == [1_000_000, 1_000_001]
    save_checkpoint(tmp_path, checkpoint(1_000_002), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1000002"]


def test_more_digits_do_not_lose_the_newest(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step), keep=1)
    assert [load_checkpoint(p).position.step for p in list_checkpoints(tmp_path)] == [1_000_000]


def test_half_a_checkpoint_is_none(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    partial = tmp_path / ".step_000002.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    (tmp_path / "step_000003").mkdir()  # no state
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000001"]
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    assert load_checkpoint(list_checkpoints(tmp_path)[-1]).position.step == 2
    assert not partial.exists()


@pytest.mark.parametrize("name", ["state.json", "trainables.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_says_what_to_do(tmp_path, name):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (path / name).write_bytes((path / name).read_bytes()[:20])
    with pytest.raises(UserError, match=r"step_000001: damaged checkpoint .*remove the folder to go on from the one"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    with small_files(2000), pytest.raises(UserError, match=r"could not be written .*free some space") as caught:
        save_checkpoint(tmp_path, checkpoint(2, size=100_000), keep=1)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert load_checkpoint(tmp_path / "step_000001").position.step == 1
    save_checkpoint(tmp_path, checkpoint(2, size=100_000), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000002"]


def test_a_disk_that_fills_up_during_a_run_costs_no_checkpoint(project):
    loaded = load(project, "name=full")
    folder: Path = loaded.run_folder
    evaluations = []

    def fill(run) -> dict[str, float]:
        """Called before the first step, then at step 2, after its checkpoint."""
        evaluations.append(run.module.position.step)
        if len(evaluations) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return {}

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match="step_000004: the checkpoint could not be written"):
            train(loaded, evaluate=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000002"]
    assert train(loaded) == "finished"


def test_a_status_that_cannot_be_written_keeps_the_old_one(tmp_path):
    write_status(tmp_path, "running", 1, 4)
    with small_files(4), pytest.raises(UserError, match=r"status.json: could not be written .*free some space"):
        write_status(tmp_path, "finished", 4, 4)
    assert '"running"' in (tmp_path / "status.json").read_text()


def test_names_and_shapes_that_are_not_the_run_s():
    weights = {"layer.a": torch.zeros(2), "layer.b": torch.zeros(3)}
    check_names(Path("there"), weights, weights)
    with pytest.raises(UserError, match=r"there: lacks the trainable 'layer.b', unlike this run"):
        check_names(Path("there"), {"layer.a": torch.zeros(2)}, weights)
    with pytest.raises(UserError, match=r"there: has the trainable 'layer.c', unlike this run. Did you mean 'layer"):
        check_names(Path("there"), {**weights, "layer.c": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match=r"'layer.b' is \[4\], this run's is \[3\]"):
        check_names(Path("there"), {**weights, "layer.b": torch.zeros(4)}, weights)
