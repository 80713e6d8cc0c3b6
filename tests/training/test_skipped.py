"""Steps that are left out: which gradients are spikes, and that a step that was left out can be made again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cosmos3_train.commands import replay
from cosmos3_train.config import UserError
from cosmos3_train.training import skipped
from cosmos3_train.training.checkpoints import Position, list_checkpoints
from cosmos3_train.training.module import TrainingFailed
from cosmos3_train.training.run import build, train
from cosmos3_train.training.spikes import WINDOW, largest_norm, looked_at
from tests.training.project import load, write_project
from tests.training.test_run import MOVES_ONLY, poison


def after(norms: list[float], factor: float) -> tuple[Position, list[bool]]:
    """Where a run stands after these norms, and which of the steps were made."""
    position, made = Position(), []
    for norm in norms:
        made.append(norm <= largest_norm(position, factor))
        position = Position(step=position.step + made[-1], **looked_at(position, norm))
    return position, made


def test_a_norm_far_above_the_usual_is_a_spike_and_hardly_changes_what_is_usual():
    position, made = after([2.0] * WINDOW + [19.9, 20.3, 2.0], 10.0)
    assert made[-3:] == [True, True, True], "a step of ten times raises what is usual by a few per cent"
    position, made = after([2.0] * WINDOW + [1e6, 2.0], 10.0)
    assert made[-2:] == [False, True]
    assert position.usual_norm == pytest.approx(2.0 * 5e5 ** (1 / WINDOW), rel=0.05)
    assert all(after([2.0, 1e6, 2.0], 10.0)[1]), "too few steps to say what is usual"
    assert all(after([2.0] * WINDOW + [1e6], 0.0)[1])


def test_norms_that_have_risen_for_good_are_usual_after_some_steps():
    _, made = after([1.0] * WINDOW + [12.0] * 20, 10.0)
    assert made[WINDOW:].index(True) < 8 and all(made[WINDOW + 8 :])


def test_what_is_no_number_changes_nothing_of_what_is_usual():
    before = Position(step=60, usual_norm=3.0, norms=60)
    same = {"usual_norm": 3.0, "norms": 60}
    assert [looked_at(before, norm) for norm in (math.nan, math.inf, 0.0)] == [same, same, same]


def test_a_run_from_before_norms_were_looked_at_begins_to():
    old = Position(step=200)
    assert largest_norm(old, 10.0) == math.inf
    assert looked_at(old, 4.0) == {"usual_norm": pytest.approx(4.0), "norms": 1}


def test_a_spike_ends_as_it_was_before_and_is_made_again_to_the_last_bit(tmp_path):
    root = write_project(tmp_path / "root")
    words = ("name=spiky", "training.steps=90", "optimizer.spike=1.02", "optimizer.patience=1", *MOVES_ONLY)
    quick = ("evaluation.before=false", "training.evaluate_every_n_steps=0", "training.checkpoint_every_n_steps=1")
    loaded = load(root, *words, *quick)
    with pytest.raises(TrainingFailed, match="'cosmos3 replay spiky' says which samples"):
        train(loaded)
    made = int(list_checkpoints(loaded.run_folder / "checkpoints")[-1].name.removeprefix("step_"))
    assert made >= WINDOW
    ((draw, files),) = skipped.list_skipped(loaded.run_folder).items()
    (step,), norm = skipped.read_shares(files)
    assert draw == step.step == made and math.isfinite(norm)
    module = build(loaded).module
    before = {name: p.detach().clone() for name, p in module.trainables.parameters.items()}
    found, again = replay.replay([step], module)
    assert again == norm
    assert sorted(one.key for one in found) == sorted(key for keys in step.keys for key in keys) and len(found) == 2
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.trainables.parameters.items())


def test_the_samples_that_made_a_step_no_number_are_named(tmp_path, capsys, monkeypatch):
    root = write_project(tmp_path / "root")
    loaded = load(root, "name=poisoned", "training.steps=12", "data.caption_dropout=0", *MOVES_ONLY)
    build(loaded)  # prepares, and encodes the latents
    poison(root)
    train(loaded)
    monkeypatch.chdir(root)
    found = skipped.list_skipped(loaded.run_folder)
    assert 1 <= len(found) <= skipped.KEPT
    assert replay.run("poisoned", None) == 0
    said = capsys.readouterr().out
    for draw, files in found.items():
        (step,), _ = skipped.read_shares(files)
        bad = set()
        for pack, keys in zip(step.packs, step.keys, strict=True):
            broken = ~torch.cat([rows.isfinite().all(1) for rows in (pack.video, pack.sound, pack.action)])[pack.order]
            parts = broken.split(pack.generation_lengths)
            bad |= {key for key, part in zip(keys, parts, strict=True) if part.any()}
        told = said.split(f"\ndraw {draw} (")[1].splitlines()
        assert "norm was nan and is nan" in told[0] and told[2].split()[0] in bad
    with pytest.raises(UserError, match=r"--draw 999: not kept; there are \d+"):
        replay.run("poisoned", 999)


def test_only_the_newest_are_kept_and_a_damaged_one_is_named(tmp_path):
    root = write_project(tmp_path / "root")
    loaded = load(root, "name=hopeless", "optimizer.patience=12", "evaluation.before=false", *MOVES_ONLY)
    build(loaded)
    poison(root, every=True)
    with pytest.raises(TrainingFailed, match="12 steps in a row"):
        train(loaded)
    found = skipped.list_skipped(loaded.run_folder)
    assert list(found) == list(range(12 - skipped.KEPT, 12))
    file: Path = found[11][0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"draw_00000011.rank_00000.safetensors: damaged .*; remove the file"):
        skipped.read_skipped(file)
