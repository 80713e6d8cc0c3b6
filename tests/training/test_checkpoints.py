"""Checkpoints whole or not at all: kept, pruned, damaged, and a disk that fills up while one is written."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from cosmos3_train.config import UserError
from cosmos3_train.training.checkpoints import (
    Checkpoint,
    Position,
    Rows,
    Saving,
    _copied,
    _write_parts,
    check_names,
    list_checkpoints,
    load_checkpoint,
    load_result,
    save_checkpoint,
)
from cosmos3_train.training.measures import measure
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


def test_those_at_an_interval_are_kept_beside_the_newest(tmp_path):
    for step in range(100, 1001, 100):
        save_checkpoint(tmp_path, checkpoint(step), keep=2, keep_every=400)
    assert [load_checkpoint(p).position.step for p in list_checkpoints(tmp_path)] == [400, 800, 900, 1000]


def test_more_digits_do_not_lose_the_newest(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step), keep=1)
    assert [load_checkpoint(p).position.step for p in list_checkpoints(tmp_path)] == [1_000_000]


def test_half_a_checkpoint_is_none(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    partial = tmp_path / ".step_000002.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    never_again = tmp_path / ".step_000007.partial"
    never_again.mkdir()
    (tmp_path / "step_000003").mkdir()  # no state
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000001"]
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    assert load_checkpoint(list_checkpoints(tmp_path)[-1]).position.step == 2
    assert not partial.exists() and not never_again.exists()


def write_in_shards(folder: Path, shards: int, monkeypatch, flat: bool = False) -> Path:
    """As ranks of a sharded run write it, each its rows: `a.weight` of 8 rows is theirs in parts, `b` is whole. Or, as
    under ZeRO, each its elements of both, flattened."""
    whole = checkpoint(3)
    split = {"a.weight": 8, "b": 6} if flat else {"a.weight": 8}
    for place in reversed(range(shards)):  # the first rank makes it whole
        own = {name: {**getattr(whole, name)} for name in ("trainables", "optimizer")}
        places = {}
        for name, total in split.items():
            each = -(-total // shards)
            first = min(total, each * place)
            shape = list(whole.trainables[name].shape) if flat else None
            held = places[name] = Rows(first, min(total, first + each) - first, total, shape)
            for part, key in (("trainables", name), ("optimizer", f"{name}.exp_avg")):
                value = own[part][key].flatten() if flat else own[part][key]
                own[part][key] = value[held.first :][: held.count]
        own["optimizer"]["a.weight.step"] = torch.tensor(3.0)
        monkeypatch.setenv("RANK", str(place))
        part = Checkpoint(whole.position, own["trainables"], {}, own["optimizer"], places)
        if place:
            partial = folder / ".step_000003.partial"
            partial.mkdir(parents=True, exist_ok=True)
            _write_parts(partial, _copied(part))
            for file in partial.rglob("*_0000*"):  # the first rank would begin with an empty folder
                aside = folder / file.relative_to(partial)
                aside.parent.mkdir(exist_ok=True)
                file.replace(aside)
        else:
            path = save_checkpoint(folder, part, keep=2)
    for file in folder.rglob("*_0000[1-9]*"):
        if path not in file.parents:
            file.replace(path / file.relative_to(folder))
    return path


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "elements"])
@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_shards_are_read_whole_and_in_any_rows(tmp_path, monkeypatch, shards, flat):
    path, saved = write_in_shards(tmp_path, shards, monkeypatch, flat), checkpoint(3)
    found = load_checkpoint(path)
    assert all(torch.equal(found.trainables[name], value) for name, value in saved.trainables.items())
    assert torch.equal(found.optimizer["a.weight.exp_avg"], saved.optimizer["a.weight.exp_avg"])
    assert torch.equal(found.optimizer["a.weight.step"], torch.tensor(3.0))
    for rows in (Rows(0, 8, 8), Rows(1, 5, 8), Rows(7, 1, 8), Rows(8, 0, 8)):
        some, span = load_checkpoint(path, {"a.weight": rows}), slice(rows.first, rows.first + rows.count)
        assert torch.equal(some.trainables["a.weight"], saved.trainables["a.weight"][span])
        assert torch.equal(some.optimizer["a.weight.exp_avg"], saved.optimizer["a.weight.exp_avg"][span])
        assert torch.equal(some.trainables["b"], saved.trainables["b"])
    b = saved.trainables["b"]
    for rows in (Rows(0, 3, 3), Rows(1, 1, 3), Rows(3, 0, 3), Rows(2, 1, 3)):
        some, span = load_checkpoint(path, {"b": rows}).trainables["b"], slice(rows.first, rows.first + rows.count)
        assert some.shape == (rows.count, 2) and torch.equal(some, b[span])
    for rows in (Rows(0, 6, 6, [3, 2]), Rows(1, 4, 6, [3, 2]), Rows(3, 1, 6, [3, 2]), Rows(6, 0, 6, [3, 2])):
        some = load_checkpoint(path, {"b": rows})
        assert torch.equal(some.trainables["b"], b.flatten()[rows.first : rows.first + rows.count])
        assert torch.equal(some.optimizer["b.exp_avg"], some.trainables["b"] / 2)


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_torch_reads_each_part_as_a_distributed_checkpoint(tmp_path, monkeypatch, shards):
    path, saved = write_in_shards(tmp_path, shards, monkeypatch, flat=False), checkpoint(3)
    for part in ("trainables", "optimizer"):
        wanted: dict[str, torch.Tensor] = getattr(saved, part)
        found = {name: torch.full_like(value, torch.nan) for name, value in wanted.items()}
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path / part)), no_dist=True)
        assert found and all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_a_lost_shard_and_a_changed_byte_are_damage(tmp_path, monkeypatch):
    path = write_in_shards(tmp_path, 2, monkeypatch)
    file = path / "trainables/shard_00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"damaged checkpoint \(trainables/shard_00001.safetensors has changed since"):
        load_checkpoint(path)
    file.unlink()
    (path / "files_00001.json").unlink()
    with pytest.raises(UserError, match=r"damaged checkpoint \(rows of trainables 'a.weight' are missing"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["state.json", "trainables/whole.safetensors", "optimizer/whole.safetensors"])
def test_a_damaged_checkpoint_says_what_to_do(tmp_path, name):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (path / name).write_bytes((path / name).read_bytes()[:20])
    with pytest.raises(UserError, match=r"step_000001: damaged checkpoint .*remove the folder to go on from the one"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["state.json", "average/whole.safetensors", "trainables/whole.safetensors"])
def test_what_is_exported_is_not_read_from_a_damaged_checkpoint(tmp_path, name):
    whole = checkpoint(1)
    path = save_checkpoint(tmp_path, replace(whole, average=whole.trainables), keep=2)
    averaged = name != "trainables/whole.safetensors"
    assert load_result(path, averaged=averaged)[0].step == 1
    (path / name).write_bytes((path / name).read_bytes()[:20])
    with pytest.raises(UserError, match=r"step_000001: damaged checkpoint .*remove the folder to go on from the one"):
        load_result(path, averaged=averaged)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    with small_files(2000), pytest.raises(UserError, match=r"could not be written .*free some space") as caught:
        save_checkpoint(tmp_path, checkpoint(2, size=100_000), keep=1)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert load_checkpoint(tmp_path / "step_000001").position.step == 1
    save_checkpoint(tmp_path, checkpoint(2, size=100_000), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000002"]


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path):
    large = checkpoint(1, size=4_000_000)
    saving = Saving(tmp_path, large, keep=1)
    large.trainables["a.weight"] += 1
    saving.finish()
    assert torch.equal(load_checkpoint(saving.target).trainables["a.weight"], torch.ones(4_000_000))


def test_a_disk_that_fills_up_meanwhile_is_told_at_the_next_look(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    with small_files(2000):
        saving = Saving(tmp_path, checkpoint(2, size=100_000), keep=1)
        with pytest.raises(UserError, match=r"step_000002: the checkpoint could not be written .*free some space"):
            while True:
                saving.check()
                time.sleep(0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def sharded(step: int, size: int = 8) -> Checkpoint:
    """Of which another rank writes half."""
    return replace(checkpoint(step, size), rows={"a.weight": Rows(0, size, 2 * size)}, writers=2)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_cannot_write_its_rows_leaves_the_folder_to_the_others(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    partial = tmp_path / ".step_000002.partial"
    partial.mkdir()
    with (
        small_files(2000),
        pytest.raises(UserError, match=r"step_000002: the checkpoint could not be .*; free some sp"),
    ):
        save_checkpoint(tmp_path, sharded(2, size=100_000), keep=1)
    assert partial.is_dir()
    monkeypatch.setenv("RANK", "0")
    save_checkpoint(tmp_path, checkpoint(3), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]


def test_a_folder_that_goes_away_while_the_first_rank_waits_for_the_others_is_told(tmp_path):
    saving = Saving(tmp_path / "checkpoints", sharded(2), keep=1)
    while not (tmp_path / "checkpoints" / ".step_000002.partial" / "files_00000.json").is_file():
        time.sleep(0.001)
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"checkpoints/step_000002: .* \(No such file or directory\); bring the folder"):
        saving.finish()


def test_a_disk_that_fills_up_during_a_run_costs_no_checkpoint(project):
    loaded = load(project, "name=full")
    folder: Path = loaded.run_folder
    evaluations = []

    def fill(run) -> dict[str, float]:
        """Called before the first step, then at step 2, after its checkpoint."""
        evaluations.append(run.module.position.step)
        if len(evaluations) == 2:
            while not (folder / "checkpoints" / "step_000002").is_dir():  # it is written while the run goes on
                time.sleep(0.01)
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


def test_a_run_s_folder_that_is_gone_is_told_and_nothing_is_made_in_its_place(tmp_path):
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    run.rename(away)
    with pytest.raises(UserError, match=r"run/.*step_000001: the checkpoint could not be .*; bring the folder") as told:
        save_checkpoint(run / "checkpoints", checkpoint(1), keep=1)
    assert "\n" not in str(told.value) and "space" not in str(told.value)
    assert not run.exists(), "below a mount that is gone it would be hidden once that is back"


def test_a_run_s_folder_that_goes_away_costs_no_checkpoint(project):
    loaded = load(project, "name=away", "training.log_every_n_steps=9", "training.steps=6")
    folder: Path = loaded.run_folder
    away, made = folder.with_name("away.moved"), []

    def take_away(run, time_of_step) -> None:
        made.append(run.module.position.step)
        if made == [1, 2, 3]:
            while not list_checkpoints(folder / "checkpoints"):  # it is written while the run goes on
                time.sleep(0.01)
            folder.rename(away)

    with pytest.raises(UserError, match=r"away/checkpoints/step_000004: .* \(No such file or directory\); bring the f"):
        train(loaded, watch=take_away)
    assert not folder.exists()
    away.rename(folder)
    assert train(loaded, watch=take_away) == "finished" and made == [1, 2, 3, 4, 3, 4, 5, 6]


@pytest.mark.parametrize("how", ["gone", "full"])
def test_what_an_evaluation_cannot_write_is_told_and_made_by_the_run_that_goes_on(project, how):
    loaded = load(project, f"name=measured_{how}", "evaluation.heldout_samples=2", "evaluation.action_samples=1")
    folder: Path = loaded.run_folder
    away, reason = folder.with_name(f"{folder.name}.moved"), {"gone": "No such file.*bring", "full": "large.*free some"}

    def measure_without_a_place(run) -> dict[str, float]:
        if run.module.position.step == 0:
            return measure(run)
        while not (folder / "checkpoints" / "step_000002").is_dir():  # it is written while the run goes on
            time.sleep(0.01)
        if how == "gone":
            folder.rename(away)
            return measure(run)
        with small_files(100):
            return measure(run)

    told = rf"{folder.name}/evaluations/step_000002.json: what was measured could not be written \(.*{reason[how]}"
    with pytest.raises(UserError, match=told):
        train(loaded, evaluate=measure_without_a_place)
    if how == "gone":
        assert not folder.exists(), "below a mount that is gone it would be hidden once that is back"
        away.rename(folder)
    assert [path.name for path in (folder / "evaluations").iterdir()] == ["step_000000.json"]
    assert train(loaded, evaluate=measure) == "finished"
    assert {path.name for path in (folder / "evaluations").glob("*.json")} >= {"step_000002.json", "step_000004.json"}


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
