"""A run through its own door: stopped and resumed, finished, changed, refused, with what it leaves on disk."""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from cosmos3_train.config import UserError, load_experiment, to_plain
from cosmos3_train.data.files import alone_in
from cosmos3_train.evaluation.heldout import ActionError
from cosmos3_train.evaluation.protocol import measure_actions
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout
from cosmos3_train.training.budget import refuse_over_budget
from cosmos3_train.training.checkpoints import list_checkpoints
from cosmos3_train.training.datamodule import StepData
from cosmos3_train.training.loop import RunLoop
from cosmos3_train.training.measures import measure
from cosmos3_train.training.module import TrainingFailed
from cosmos3_train.training.run import _empty, _memory_named, _refuse_changes, build, claim_folder, make_trainer, train
from cosmos3_train.training.strategy import PeerLost
from cosmos3_train.training.throughput import RATES
from tests.data.logs import CAMERA, make_log
from tests.training.project import FRESH, experiment, load, write, write_project

PARTS = ("trainables", "average", "optimizer")


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, by part and name."""
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    return {f"{p}/{k}": v for p in PARTS for k, v in load_file(checkpoint / p / "whole.safetensors").items()}


def position(folder: Path, step: int) -> dict[str, int]:
    return json.loads((folder / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def rows(folder: Path) -> list[tuple[str, ...]]:
    """metrics.csv without what a clock measured."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [tuple(row) for row in csv.reader(file) if row[1] not in RATES]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def stop_after(step: int, then: dict[str, float]):
    """An evaluation that asks the run to stop when it has made `step` steps, by the signal that a batch system sends.

    Call it with `evaluate_every_n_steps = 1`: the evaluation at step − 1 raises the signal, the step border obeys.
    """
    calls = []

    def evaluate(run) -> dict[str, float]:
        calls.append(None)
        if len(calls) == step:  # one before the first step, one after each
            os.kill(os.getpid(), signal.SIGTERM)
        return then

    return evaluate


def test_a_window_over_the_budget_is_refused_by_name_before_the_first_step(tmp_path):
    """The longest of one episode's three windows, wherever it lies, and not a token too early."""
    root = write_project(tmp_path / "project")
    words = [[said] * length for said, length in (("push", 14), ("push", 13), ("push", 12), ("push " * 9, 14))]
    make_log(
        root / "log", [14, 13, 12, 14, 13], cameras={CAMERA: (32, 48)}, extra={"say": [*words, ["push " * 200] * 13]}
    )
    card = {"name": "moves", "format": "lerobot_v3", "source": "log", "caption_column": "say"}
    (root / "cards" / "moves.yaml").write_text(yaml.safe_dump(card))
    loaded = load(root, "data.datasets.moves.cache_latents=false")
    with pytest.raises(UserError, match=r"datasets\.moves: sample 'moves/episode_000004/\d+' \(") as told:
        train(loaded)
    assert "= 150; raise it to at least " in str(told.value) and "the windows over it (3 were found)" in str(told.value)
    assert not (loaded.run_folder / "checkpoints").exists()
    needed = int(str(told.value).partition(" has ")[2].split()[0])
    run = build(loaded)
    layout = Layout.of(run.backbone.config)
    dataset = run.opened["moves"][0]
    places = ((split, index) for split in ("train", "heldout") for index in range(dataset.count(split)))
    samples = [dataset.sample(*place, "policy", number) for number, place in enumerate(places)]
    assert max(map(layout.tokens, run.encoder.encode(samples))) == needed
    refuse_over_budget(run.opened, run.encoder, layout, needed)
    with pytest.raises(UserError, match=rf"has {needed} tokens"):
        refuse_over_budget(run.opened, run.encoder, layout, needed - 1)


def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(project):
    often = "training.evaluate_every_n_steps=1"
    whole = load(project, "name=whole", often)
    assert train(whole, evaluate=lambda run: {"heldout": 1.0}) == "finished"
    parts = load(project, "name=parts", often)
    assert train(parts, evaluate=stop_after(2, {"heldout": 1.0})) == "interrupted"
    assert status(parts.run_folder) == {"state": "interrupted", "step": 2, "steps": 4}
    assert train(parts, evaluate=lambda run: {"heldout": 1.0}) == "finished"
    assert status(parts.run_folder) == {"state": "finished", "step": 4, "steps": 4}
    assert_same(tensors(whole.run_folder, 4), tensors(parts.run_folder, 4))
    assert rows(whole.run_folder) == rows(parts.run_folder)
    evaluated = [row[0] for row in rows(parts.run_folder) if row[1] == "heldout"]
    assert evaluated == ["0", "1", "2", "3", "4"]
    end = position(parts.run_folder, 4)
    assert end == position(whole.run_folder, 4)
    assert [end[key] for key in ("step", "drawn", "samples", "skipped")] == [4, 4, 16, 0]
    moved = tensors(whole.run_folder, 2)
    assert any(not torch.equal(value, moved[name]) for name, value in tensors(whole.run_folder, 4).items())


MANY = 100_000
"""Solver steps that take minutes."""


def measure_for_minutes(at: int, waited: list[float]):
    """`measure`, whose evaluation at step `at` takes minutes, and half a second of it later the run is asked to stop;
    `waited` is given the seconds from there to the end of the evaluation."""
    asked: list[float] = []

    def stop(number: int, frame) -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(run) -> dict[str, float]:
        if run.module.position.step != at:
            return measure(run)
        evaluation = replace(run.experiment.evaluation, solver_steps=MANY)
        long = replace(run.loaded, experiment=replace(run.experiment, evaluation=evaluation))
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            return measure(replace(run, loaded=long))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            waited.append(time.monotonic() - asked[0])

    return evaluate


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(0, marks=pytest.mark.slow, id="before the first step"),
        pytest.param(1, id="without a checkpoint of that step"),
        pytest.param(2, marks=pytest.mark.slow, id="with one"),
        pytest.param(3, marks=pytest.mark.slow, id="after the last step"),
    ],
)
def test_an_evaluation_is_left_at_a_signal_and_made_by_the_run_that_goes_on(project, step):
    few = ("evaluation.heldout_samples=1", "evaluation.action_samples=1")
    brief = ("training.steps=3", "training.evaluate_every_n_steps=1", *few)
    whole, left = (load(project, f"name={name}_{step}", *brief) for name in ("measured", "left"))
    waited: list[float] = []
    assert train(left, evaluate=measure_for_minutes(step, waited)) == "interrupted"
    assert len(waited) == 1 and waited[0] < 15
    assert status(left.run_folder) == {"state": "interrupted", "step": step, "steps": 3}
    assert not [row for row in rows(left.run_folder) if row[0] == str(step) and row[1].startswith(("heldout", "eval"))]
    saved = [path.name for path in list_checkpoints(left.run_folder / "checkpoints")]
    assert saved[-1:] == [f"step_{step:06d}"] * (step > 0)
    assert train(left, evaluate=measure) == train(whole, evaluate=measure) == "finished"
    assert rows(left.run_folder) == rows(whole.run_folder)
    assert_same(tensors(left.run_folder, 3), tensors(whole.run_folder, 3))


def test_resuming_from_any_checkpoint_gives_the_same_end(project):
    """As after a kill: the newest checkpoints and the status are gone, metrics of later steps are there."""
    loaded = load(project, "name=cut", "training.checkpoint_every_n_steps=1", "data.workers=2")
    train(loaded)
    end, told = tensors(loaded.run_folder, 4), rows(loaded.run_folder)
    for step in (3, 1):
        for folder in list_checkpoints(loaded.run_folder / "checkpoints")[step:]:
            shutil.rmtree(folder)
        (loaded.run_folder / "status.json").write_text('{"state": "running", "step": 3, "steps": 4}')
        with (loaded.run_folder / "metrics.csv").open("a") as file:
            file.write("4,lo")  # a row that the kill cut short
        assert train(loaded) == "finished"
        assert_same(tensors(loaded.run_folder, 4), end)
        assert rows(loaded.run_folder) == told


def test_killed_after_the_last_checkpoint_the_last_evaluation_is_still_made_once(project):
    loaded = load(project, "name=late")
    train(loaded, evaluate=lambda run: {"heldout": 1.0})
    told = rows(loaded.run_folder)
    for lost in ("never", "4,heldout 4,evaluated"):  # killed after the last evaluation, or before it
        lines = (loaded.run_folder / "metrics.csv").read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.rpartition(",")[0] not in lost.split()]
        (loaded.run_folder / "metrics.csv").write_text("".join(kept))
        (loaded.run_folder / "status.json").write_text('{"state": "running", "step": 4, "steps": 4}')
        assert train(loaded, evaluate=lambda run: {"heldout": 1.0}) == "finished"
        assert rows(loaded.run_folder) == told
        assert status(loaded.run_folder)["state"] == "finished"


def test_the_first_evaluation_is_told_once_however_often_the_start_is_repeated(project):
    """Killed before its first checkpoint, a run begins again; the evaluation before it is there already."""
    loaded = load(project, "name=early")
    loaded.run_folder.mkdir(parents=True)
    (loaded.run_folder / "metrics.csv").write_text("step,metric,value\n0,heldout,2.0\n0,evaluated,1.0\n1,loss,3.0\n")
    train(loaded, evaluate=lambda run: {"heldout": 2.0})
    assert [row for row in rows(loaded.run_folder) if row[1] == "heldout"] == [
        ("0", "heldout", "2.0"), ("2", "heldout", "2.0"), ("4", "heldout", "2.0")
    ]  # fmt: skip


def test_a_file_of_metrics_that_was_only_opened_does_no_harm(project):
    loaded = load(project, "name=opened")
    loaded.run_folder.mkdir(parents=True)
    (loaded.run_folder / "metrics.csv").touch()
    assert train(loaded) == "finished"
    assert rows(loaded.run_folder)[0] == ("step", "metric", "value")


def test_a_finished_run_is_reported_and_not_made_again(project, caplog):
    loaded = load(project, "name=done")
    train(loaded)
    before = (loaded.run_folder / "metrics.csv").stat().st_mtime_ns
    with caplog.at_level("INFO", logger="cosmos3_train"):
        assert train(loaded) == "finished"
    assert "done is finished (4 steps); --fresh starts another" in caplog.text
    assert (loaded.run_folder / "metrics.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize("more", [["variants=2"], []], ids=["cached", "online"])
def test_a_run_that_augments(project, more):
    """Other losses than without, the same each time it is made; in the cache's folder is a variant of each window."""
    keys = [f"data.datasets.moves.augment.{key}" for key in ("crop=0.8", "brightness=0.4", *more)]
    keys += [] if more else ["data.datasets.moves.cache_latents=false"]
    plain = [] if more else ["data.datasets.moves.cache_latents=false"]
    losses = {}
    for name, overrides in (("plain", plain), ("changed", keys), ("again", keys)):
        loaded = load(project, f"name=augment_{len(more)}_{name}", "training.steps=2", *overrides)
        assert train(loaded) == "finished"
        losses[name] = [value for _, key, value in rows(loaded.run_folder) if key == "loss"]
    assert losses["changed"] == losses["again"] != losses["plain"] and len(losses["plain"]) == 2
    assert (
        loaded.root / loaded.experiment.data.datasets["moves"].prepared / "caches/latents_variant_1"
    ).is_dir() or not more


def test_a_run_from_before_a_key_existed_goes_on(project):
    loaded = load(project, "name=older", "training.steps=2")
    train(loaded)
    kept = loaded.run_folder / "experiment.yaml"
    older = yaml.safe_load(kept.read_text())
    assert older["data"]["datasets"]["moves"].pop("augment")["crop"] == 1.0
    kept.write_text(yaml.safe_dump(older))
    assert train(load(project, "name=older", "training.steps=2")) == "finished"
    with pytest.raises(UserError, match=r"augment\.crop is 0\.9, but the run there was started with 1\.0"):
        changed = [f"data.datasets.moves.augment.{key}" for key in ("crop=0.9", "variants=2")]
        train(load(project, "name=older", "training.steps=2", *changed))


def test_a_changed_configuration_is_refused_by_key_and_fresh_starts_over(project):
    loaded = load(project, "name=changed")
    train(loaded)
    before = tensors(loaded.run_folder, 4)
    for key, value in (("optimizer.learning_rate", 0.5), ("tuning.rank", 8), ("data.datasets.moves.weight", 9.0)):
        with pytest.raises(UserError, match=rf"{key} is {value}, but the run there was started with .*--fresh"):
            train(load(project, "name=changed", f"{key}={value}"))
    assert_same(tensors(loaded.run_folder, 4), before)
    other = load(project, "name=changed", "optimizer.learning_rate=0.5")
    (loaded.run_folder / "stray").touch()
    assert train(other, fresh=True) == "finished"
    assert not (loaded.run_folder / "stray").exists()
    assert not torch.equal(
        *(t["trainables/" + name] for t in (before, tensors(other.run_folder, 4)) for name in [some_trainable(before)])
    )


def test_a_second_run_in_a_folder_is_refused_before_it_empties_it_and_a_killed_one_is_in_nobody_s_way(project):
    loaded, began = load(project, "name=held", "training.steps=1"), multiprocessing.Event()
    train(loaded)

    def hold() -> None:
        with alone_in(loaded.run_folder):
            multiprocessing.Process(target=time.sleep, args=(5,)).start()  # as a loader's worker, which outlives it
            began.set()
            time.sleep(60)

    other = multiprocessing.get_context("fork").Process(target=hold)
    other.start()
    assert began.wait(30)
    with pytest.raises(UserError, match=rf"runs/held: process {other.pid} on \S+ is at work there; wait for its end"):
        train(loaded, fresh=True)
    assert list_checkpoints(loaded.run_folder / "checkpoints"), "nothing was thrown away"
    other.kill()
    other.join()
    assert train(loaded, fresh=True) == "finished"


def test_a_lock_of_another_machine_is_waited_for_and_a_full_disk_does_not_spoil_it(tmp_path, caplog):
    caplog.set_level("INFO")
    context = multiprocessing.get_context("fork")
    held, folder = context.Event(), tmp_path / "run"

    def hold() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with alone_in(folder):  # which cannot say who it is
            held.set()
            time.sleep(3)

    other = context.Process(target=hold)
    other.start()
    assert held.wait(30)
    with alone_in(folder):
        assert "has locked it; waiting 120 s" in caplog.text
    other.join()
    assert other.exitcode == 0


def test_a_fresh_start_is_the_first_rank_s_to_make(project, monkeypatch):
    loaded = load(project, "name=others")
    train(loaded)
    other = load(project, "name=others", "optimizer.learning_rate=0.5")
    monkeypatch.setenv("RANK", "1")
    assert not claim_folder(other, fresh=True), "whatever is there still, it is about to go"
    assert (loaded.run_folder / "experiment.yaml").is_file()
    with pytest.raises(UserError, match="--fresh"):
        claim_folder(other, fresh=False)
    monkeypatch.setenv("RANK", "0")
    assert not claim_folder(other, fresh=True)
    assert sorted(p.name for p in other.run_folder.iterdir()) == ["experiment.yaml"]
    assert not claim_folder(other, fresh=False)


def some_trainable(found: dict[str, torch.Tensor]) -> str:
    return next(name.removeprefix("trainables/") for name in found if "lora_B" in name)


def test_how_a_run_is_carried_out_may_change_while_it_is_interrupted(project):
    often = "training.evaluate_every_n_steps=1"
    train(load(project, "name=freed", often), evaluate=stop_after(2, {}))
    changed = load(
        project,
        "name=freed",
        often,
        "training.tokens_per_micro_batch=900",
        "model.checkpoint_activations=true",
        "data.workers=1",
        "training.checkpoint_every_n_steps=1",
        "question=why",
    )
    assert train(changed, evaluate=lambda run: {}) == "finished"
    whole = load(project, "name=whole_freed", often)
    train(whole, evaluate=lambda run: {})
    ours, theirs = tensors(changed.run_folder, 4), tensors(whole.run_folder, 4)
    for name, value in ours.items():
        if name.startswith("trainables/"):
            assert float((value - theirs[name]).norm() / theirs[name].norm()) < 1e-3, name


def test_data_that_changed_under_a_half_finished_run_are_refused_by_name(tmp_path):
    """Another order of samples and other statistics would follow, and held-out lines might train."""
    root = write_project(tmp_path / "root")
    loaded = load(root, "name=half", "training.evaluate_every_n_steps=1")
    assert train(loaded, evaluate=stop_after(2, {})) == "interrupted"
    kept = tensors(loaded.run_folder, 2)
    talk = (root / "talk.jsonl").read_text()
    (root / "talk.jsonl").write_text(talk + talk.replace("left", "right"))
    with pytest.raises(UserError, match=r"half: data\.datasets\.talk has changed since the run .*--fresh") as caught:
        train(loaded)
    assert "\n" not in str(caught.value)
    (root / "talk.jsonl").write_text(talk)
    (root / "log").rename(root / "first_log")
    make_log(root / "log", [14, 13, 12, 14, 15], cameras={CAMERA: (32, 48)})
    with pytest.raises(UserError, match="prepared/moves: the log has changed since"):
        train(loaded)
    (root / "prepared" / "moves").rename(root / "prepared" / "first_moves")
    with pytest.raises(
        UserError, match=r"half: data\.datasets\.moves has changed since the run .* \(fingerprint \w{12},"
    ):
        train(loaded)
    assert_same(tensors(loaded.run_folder, 2), kept)
    for name in ("log", "prepared/moves"):
        (root / name).rename((root / name).with_name("second"))
        (root / name).with_name(f"first_{Path(name).name}").rename(root / name)
    assert train(loaded, evaluate=lambda run: {}) == "finished"


def test_no_step_is_cut_short_where_the_data_begin_anew(project):
    """Lightning would end a window of accumulation with its epoch. The run's order has no end, a step is one item."""
    run = build(load(project, "name=endless", "training.samples_per_step=7", "data.workers=0"))
    data = StepData(run.loaded, run.opened, run.module.packer, run.device)
    steps = list(itertools.islice(data.train_dataloader(), 12))
    assert 3 * data.mixture.windows < 12 * 7, "several epochs of the data"
    assert [step.step for step in steps] == list(range(12))
    assert [sum(pack.samples for pack in step.packs) for step in steps] == [7] * 12
    data.first_step = 5
    assert next(iter(data.train_dataloader())).step == 5, "a resumed run draws on where it stood, and nothing twice"


# ------------------------------------------------------------------------------------------------ what trains


def test_what_trains_is_said_and_every_other_row_keeps_its_bits(project, caplog):
    loaded = load(project, "name=rows")
    with caplog.at_level("INFO", logger="cosmos3_train"):
        run = build(loaded)
        train(loaded)
    assert "trains (hybrid): " in caplog.text and "action heads: " in caplog.text
    parameters = run.trainables.parameters
    heads = {name: p for name, p in parameters.items() if name.startswith("action_proj")}
    assert {p.shape[0] for p in heads.values()} == {1}, "one row, that of the robot's domain"
    backbone = run.backbone
    for head in ("action_proj_in", "action_proj_out"):
        for part in ("fc", "bias"):
            wrapper = backbone.get_submodule(f"{head}.{part}")
            delta = wrapper.token_adapter.trainable_tokens_delta["default"]
            assert torch.equal(delta[0], wrapper.original_module.weight[4]), "starts from domain 4"
            assert FRESH != 4
    before = {n: p.clone() for n, p in backbone.named_parameters() if n not in parameters}
    again = build(loaded)  # resumes at the end
    assert again.module.position.step == 4
    for name, parameter in again.backbone.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
        else:
            assert not torch.equal(parameter, parameters[name]), f"{name} did not move"


def test_lora_on_a_slot_that_nobody_trained_is_refused(project):
    with pytest.raises(UserError, match=rf"embodiment 'mover' is on domain {FRESH}, an untrained slot.*hybrid"):
        train(load(project, "name=lora", "tuning.method=lora"))
    loaded = load(project, "name=lora2", "tuning.method=lora", f"embodiments.mover.initialise_from={FRESH}")
    assert train(loaded) == "finished"


def test_a_learning_rate_pattern_that_matches_nothing_names_the_nearest(project):
    bad = 'tuning.learning_rate_multipliers={"action_porj_in*": 5.0}'
    with pytest.raises(
        UserError, match=r"'action_porj_in\*' matches no trainable parameter. Did you mean 'action_proj_in"
    ):
        train(load(project, "name=pattern", bad))


def test_a_token_budget_that_is_too_small_names_the_sample(project):
    with pytest.raises(UserError, match=r"sample '(moves|talk)/.*' \(.*\) has \d+ tokens, over .*= 40; raise it to"):
        train(load(project, "name=budget", "training.tokens_per_micro_batch=40"))


# ------------------------------------------------------------------------------------------------ bad numbers


def poison(root: Path, every: bool = False) -> None:
    """A real NaN in the cached latents of every third window, or of all."""
    for file in (root / "prepared" / "moves" / "caches" / "latents").glob("*.safetensors"):
        latents = load_file(file)
        for key in list(latents)[:: 1 if every else 3]:
            latents[key][0, 0, 0, 0] = float("nan")
        save_file(latents, file)


MOVES_ONLY = ("data.datasets.talk.weight=0.001", "training.samples_per_step=2")


def test_a_step_with_a_bad_gradient_is_left_out_and_advances_nothing(tmp_path):
    root = write_project(tmp_path / "root")
    loaded = load(root, "name=poisoned", "training.steps=8", "data.caption_dropout=0", *MOVES_ONLY)
    build(loaded)  # prepares, and encodes the latents
    poison(root)
    assert train(loaded, evaluate=lambda run: {"heldout": 1.0}) == "finished"
    told = rows(loaded.run_folder)
    skipped = position(loaded.run_folder, 8)["skipped"]
    assert skipped > 0
    assert position(loaded.run_folder, 8)["drawn"] == 8 + skipped
    assert [row[2] for row in told if row[1] == "skipped"] == [str(float(n + 1)) for n in range(skipped)]
    for step in range(1, 9):
        assert len([row for row in told if row[:2] == (str(step), "loss")]) == 1
    assert len([row for row in told if row[1] == "heldout"]) == 5
    rates = [float(row[2]) for row in told if row[1] == "learning_rate"]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True) and len(rates) == 8
    end = tensors(loaded.run_folder, 8)
    assert all(torch.isfinite(value).all() for value in end.values())
    # Parameters that some steps do not reach count fewer; the generation tower's are reached by every one.
    assert {float(v) for k, v in end.items() if k.endswith(".step") and "add_v_proj" in k} == {8.0}


def test_a_run_that_is_a_step_ahead_of_its_device_comes_to_the_same(tmp_path):
    """As on a GPU: what a step comes to is asked when the next is queued, or when something is due. With skipped steps,
    an average, and a schedule that only made steps advance."""
    root = write_project(tmp_path / "root")
    more = ("training.steps=8", "data.caption_dropout=0", "training.log_every_n_steps=3", *MOVES_ONLY)
    build(load(root, "name=built", *more))
    poison(root)
    waiting: list[int] = []

    def ahead(run, time) -> None:
        run.module.runs_ahead = True
        waiting.append(run.module.coming - run.module.position.step)

    ends = {}
    for name, watch in (("waits", None), ("ahead", ahead)):
        loaded = load(root, f"name={name}", *more)
        assert train(loaded, watch=watch) == "finished"
        ends[name] = tensors(loaded.run_folder, 8), position(loaded.run_folder, 8), rows(loaded.run_folder)
    (end, stands, told), (same, also_stands, also_told) = ends.values()
    assert_same(end, same)
    assert stands == also_stands and stands["skipped"] > 0
    assert sorted(told) == sorted(also_told)
    assert 0 < sum(waiting) < len(waiting) == stands["drawn"]


@pytest.mark.slow
def test_memory_that_runs_out_is_named_with_its_step_and_what_helps(tmp_path):
    root = write_project(tmp_path / "root")
    loaded = load(root, "name=large", "training.log_every_n_steps=9", "evaluation.before=false", *MOVES_ONLY)
    made = []

    def ahead(run, time) -> None:
        run.module.runs_ahead = True
        made.append(None)
        if len(made) == 3:  # which is queued, and not concluded
            assert (run.module.position.step, run.module.coming) == (2, 3)
            run.backbone.register_forward_pre_hook(run_out)

    def run_out(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    helps = "checkpoint_activations=auto, where a single sample is too large, strategy.context_parallel on several GPUs"
    with pytest.raises(TrainingFailed, match=rf"memory ran out in step 4 .*{helps}; .*Tried to"):
        train(loaded, watch=ahead)
    assert status(loaded.run_folder)["state"] == "failed"


@pytest.mark.slow
def test_a_step_whose_memory_runs_out_is_made_again_with_more_of_it_recomputed(tmp_path, caplog):
    root = write_project(tmp_path / "root")
    packs = ("training.steps=3", "training.samples_per_step=4", "training.tokens_per_micro_batch=60")
    words = (*packs, "model.checkpoint_activations=auto", "evaluation.before=false", *MOVES_ONLY)
    train(load(root, "name=undisturbed", *words))
    made = []

    def run_out(module, _) -> None:
        if isinstance(module, Cosmos3PackedTransformer) and torch.is_grad_enabled():
            made.append(module.keep_attention)
            if len(made) == 2:  # gradients of the first pack are there
                raise torch.OutOfMemoryError("CUDA out of memory.")

    with register_module_forward_pre_hook(run_out):
        train(load(root, "name=short", *words))
    assert made[:2] == [True, True] and not any(made[2:]) and "memory ran out; now" in caplog.text
    assert rows(root / "runs" / "short") == rows(root / "runs" / "undisturbed")


CACHED, FP8, GRAPHS = "data.datasets.moves.cache_reasoner=true", "model.base_precision=fp8", "model.cuda_graphs=false"
ALL, AUTO, GENERATION = "checkpoint_activations=true", "checkpoint_activations=auto", "tuning.towers=[generation]"


@pytest.mark.parametrize(
    ("talks", "line", "helps"),
    [
        (False, (GENERATION,), {CACHED, FP8, GRAPHS, AUTO}),
        (False, (GENERATION, CACHED, FP8, "model.fp8_copies=1", f"model.{AUTO}"), {GRAPHS}),
        (True, (GENERATION,), {FP8, AUTO}),  # conversations need the other tower
        (False, (), {FP8, AUTO}),  # which trains
        (False, (GENERATION, "tuning.method=full"), {AUTO}),
        (False, (GENERATION, CACHED, "tuning.dora=true"), {AUTO}),
        (True, ("strategy.name=fsdp2", f"model.{AUTO}"), {ALL}),
        (True, ("strategy.name=deepspeed_zero3", f"model.{ALL}"), set()),
        (True, ("strategy.context_parallel=2",), {FP8, ALL}),
    ],
)
def test_what_is_named_against_memory_that_runs_out_is_what_the_run_would_take(tmp_path, talks, line, helps):
    root = write_project(tmp_path / "root")
    if not talks:
        content = experiment(root)
        del content["data"]["datasets"]["talk"]
        write(root / "experiments" / "small.yaml", content)
    loaded, graphs = load(root, *line), GRAPHS in helps
    with pytest.raises(TrainingFailed) as told, _memory_named(loaded, lambda: "here", recorded=lambda: graphs):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "a smaller training.tokens_per_micro_batch (now " in str(told.value)
    assert ("strategy.context_parallel" in str(told.value)) == ("strategy.name=deepspeed_zero3" not in line)
    assert {one for one in (CACHED, FP8, GRAPHS, ALL, AUTO) if one in str(told.value)} == helps


def test_a_run_of_bad_gradients_ends_the_run_with_its_reason(tmp_path):
    root = write_project(tmp_path / "root")
    loaded = load(root, "name=hopeless", "optimizer.patience=3", *MOVES_ONLY)
    start = {name: p.detach().clone() for name, p in build(loaded).trainables.parameters.items()}
    poison(root, every=True)
    with pytest.raises(TrainingFailed, match="3 steps in a row were skipped"):
        train(loaded)
    assert status(loaded.run_folder)["state"] == "failed"
    assert "3 steps in a row" in status(loaded.run_folder)["reason"]
    assert not list_checkpoints(loaded.run_folder / "checkpoints")
    assert start.keys() == build(loaded).trainables.parameters.keys()


def test_any_error_of_the_first_rank_is_told_as_failed_and_a_lost_peer_is_not(project):
    """A batch system starts again what was interrupted, not what fails every time."""
    loaded = load(project, "name=erring", *MOVES_ONLY)

    def raising(error: Exception):
        def watch(*_) -> None:
            raise error

        return watch

    for error in (UserError("step_000001: the disk is full; free some space"), ValueError("broken\nat line 3")):
        with pytest.raises(type(error)):
            train(loaded, watch=raising(error))
        reason = str(error).splitlines()[0]
        assert status(loaded.run_folder) == {"state": "failed", "step": 1, "steps": 4, "reason": reason}
    with pytest.raises(PeerLost):
        train(loaded, watch=raising(PeerLost("rank 1 has gone")))
    assert status(loaded.run_folder)["state"] == "running"


def test_patience_counts_on_over_interruptions(tmp_path):
    """A run that is stopped and started again within a streak of bad steps is aborted where an undisturbed one is."""
    root = write_project(tmp_path / "root")
    loaded = load(root, "name=patient", "optimizer.patience=5", "evaluation.before=false", *MOVES_ONLY)
    build(loaded)
    poison(root, every=True)

    def stop_at(step: int):
        made = []

        def watch(*_) -> None:
            made.append(None)
            if len(made) == step:
                os.kill(os.getpid(), signal.SIGTERM)

        return watch

    for step, so_far in ((3, 3), (1, 4)):  # the second finds its checkpoint made, and replaces the position in it
        assert train(loaded, watch=stop_at(step)) == "interrupted"
        assert position(loaded.run_folder, 0) == {
            "step": 0, "drawn": so_far, "samples": 2 * so_far, "skipped": so_far, "skipped_in_a_row": so_far,
            "usual_norm": 0.0, "norms": 0,
        }  # fmt: skip
        assert not list((loaded.run_folder / "checkpoints").rglob("*.writing"))
    with pytest.raises(TrainingFailed, match="5 steps in a row"):
        train(loaded, watch=lambda *_: pytest.fail("the fifth bad step is the last"))
    assert rows(loaded.run_folder)[1:] == [("1", "skipped", f"{n}.0") for n in (1, 2, 3, 4, 5)]


def test_a_signal_to_the_whole_group_reaches_the_workers_too_and_does_no_harm(project):
    """Slurm and a terminal signal every process of a job; a worker that died of it would take the run with it."""
    loaded = load(project, "name=group", "training.evaluate_every_n_steps=1", "data.workers=2")
    seen = []

    def signal_all(run) -> dict[str, float]:
        seen.append(run.module.position.step)
        if len(seen) == 2:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            # By another process, as a batch system does: torch's workers tell their parent's signals from others'.
            subprocess.run(["kill", "-TERM", *(str(pid) for pid in (*(w.pid for w in workers), os.getpid()))])
            time.sleep(0.2)
        return {}

    assert train(loaded, evaluate=signal_all) == "interrupted"
    assert status(loaded.run_folder)["state"] == "interrupted"
    assert train(loaded, evaluate=lambda run: {}) == "finished"


def test_caches_may_be_given_up_while_a_run_goes_on(tmp_path):
    """Their values are those that are computed otherwise, and error messages advise it."""
    path = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
    before = to_plain(load_experiment(path).experiment)
    switches = [f"data.datasets.moves.{name}=false" for name in ("cache_latents", "cache_reasoner")]
    _refuse_changes(before, load_experiment(path, switches).experiment, tmp_path)
    with pytest.raises(UserError, match=r"data\.datasets\.moves\.weight"):
        _refuse_changes(before, load_experiment(path, ["data.datasets.moves.weight=2"]).experiment, tmp_path)


def test_latents_of_another_tokenizer_are_refused_and_without_cache_latents_not_read(tmp_path):
    root = write_project(tmp_path / "project")
    build(load(root))
    cache, other, without = root / "prepared/moves/caches/latents", "model.vae_dtype=bfloat16", "cache_latents=false"
    whose = r"another video tokenizer \('.*' in float32, not '.*' in bfloat16\)"
    with pytest.raises(UserError, match=rf"latents are of {whose} .* or set cache_latents to false"):
        build(load(root, other))

    def errors() -> list[ActionError]:
        run = build(load(root, other, f"data.datasets.moves.{without}", "data.caption_dropout=0"))
        dataset, tasks = run.opened["moves"][0], ("policy", "inverse_dynamics")
        experiment = replace(run.experiment, evaluation=replace(run.experiment.evaluation, action_samples=2))
        return measure_actions(run.backbone, run.encoder, dataset, tasks, experiment)

    assert cache.is_dir()
    beside_a_foreign_one = errors()
    shutil.rmtree(cache)
    assert beside_a_foreign_one == errors()


def test_what_says_that_a_folder_is_a_run_is_emptied_last(tmp_path, monkeypatch):
    """Killed meanwhile, `--fresh` empties it again, and does not go on from the checkpoints that were left."""
    removed, unlink = [], Path.unlink
    for number in range(20):
        (tmp_path / f"{number}.csv").touch()
    (tmp_path / "experiment.yaml").touch()
    monkeypatch.setattr(Path, "unlink", lambda path: (removed.append(path.name), unlink(path)))
    _empty(tmp_path)
    assert len(removed) == 21 and removed[-1] == "experiment.yaml"


def test_a_rounded_base_s_reasoner_cache_may_not_be_given_up(tmp_path):
    """What it holds is exact, and what the rounded tower gives is not: the run would compute something else."""
    path, rounded = Path(__file__).parents[2] / "experiments" / "quickstart.yaml", "model.base_precision=fp8"
    before = to_plain(load_experiment(path, [rounded]).experiment)
    _refuse_changes(
        before, load_experiment(path, [rounded, "data.datasets.moves.cache_latents=false"]).experiment, tmp_path
    )
    without = load_experiment(path, [rounded, "data.datasets.moves.cache_reasoner=false"]).experiment
    with pytest.raises(UserError, match=r"data\.datasets\.moves\.cache_reasoner is False, but the run there"):
        _refuse_changes(before, without, tmp_path)


def test_what_is_turned_off_of_lightning_is_there(project, tmp_path):
    """Else a later version, which calls it by another name, would exchange before every step again."""
    run = build(load(project, "name=signals"))
    trainer = make_trainer(run.experiment, run.device, RunLoop(run.module, tmp_path))
    for part, name in (
        (trainer._signal_connector, "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ):
        assert callable(getattr(type(part), name)) and name in vars(part)
