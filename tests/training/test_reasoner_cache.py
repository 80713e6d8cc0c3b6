"""A run that recalls its prompts' keys and values beside one that computes them at every step: the same curve, the same
evaluations, the same weights, from a model of which one tower was never loaded."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from cosmos3_train.config import UserError
from cosmos3_train.model import loading
from cosmos3_train.model.omni import is_understanding
from cosmos3_train.model.reasoner_cache import ReasonerCache
from cosmos3_train.training.batching import PackedStep
from cosmos3_train.training.checkpoints import load_checkpoint
from cosmos3_train.training.datamodule import _Loader
from cosmos3_train.training.measures import measure
from cosmos3_train.training.run import build, train
from cosmos3_train.training.throughput import RATES
from tests.training.project import experiment as plain_experiment
from tests.training.project import load, write, write_project

ROBOT = ("forward_dynamics", "inverse_dynamics", "policy")
VIDEO = ("text_to_image", "text_to_video", "image_to_video", "video_to_video")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The small project with robot and video tasks in place of conversations, and half of the captions dropped."""
    root = write_project(tmp_path_factory.mktemp("reasoner") / "root")
    content = plain_experiment(root)
    content["data"]["datasets"].pop("talk")
    content["data"]["datasets"]["moves"]["tasks"] = dict.fromkeys((*ROBOT, *VIDEO), 1)
    content["data"]["caption_dropout"] = 0.5
    content["tuning"]["towers"] = ["generation"]
    content["training"]["samples_per_step"] = 8
    content["evaluation"] = {"heldout_samples": 6, "action_samples": 2, "solver_steps": 2}
    write(root / "experiments" / "small.yaml", content)
    return root


CACHED = "data.datasets.moves.cache_reasoner=true"


def numbers(folder: Path) -> dict[tuple[str, str], float]:
    """metrics.csv without what a clock measured: (step, name) → value."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {(row[0], row[1]): float(row[2]) for row in rows if row[1] not in RATES}


def test_the_curve_the_evaluations_and_the_weights_are_the_same(root, monkeypatch):
    readers: list[str] = []
    read = ReasonerCache.read
    told = lambda self, key: readers.append(threading.current_thread().name) or read(self, key)  # noqa: E731
    monkeypatch.setattr(ReasonerCache, "read", told)
    assert train(load(root, "name=without"), evaluate=measure) == "finished"
    runs = []
    assert train(load(root, "name=with", CACHED), evaluate=lambda run: runs.append(run) or measure(run)) == "finished"
    assert not runs[0].backbone.understands
    assert any(name.startswith("reasoner-cache") for name in readers), "read ahead of the step that asks for it"
    ours, theirs = (numbers(root / "runs" / name) for name in ("with", "without"))
    assert ours.keys() == theirs.keys() and ("4", "heldout/action_error") in ours
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-6, abs=1e-8), key
    ends = [load_checkpoint(root / "runs" / name / "checkpoints" / "step_000004") for name in ("with", "without")]
    for part in ("trainables", "average"):
        mine, other = (getattr(end, part) for end in ends)
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert float((mine[name] - value).norm() / value.norm().clamp(min=1e-12)) <= 1e-5, name


def test_a_second_run_reads_nothing_of_the_understanding_tower_and_resumes(root, monkeypatch):
    build(load(root, "name=first", CACHED))
    names: list[str] = []
    original = loading.fill_from_shards

    def counted(module, *arguments):
        names.extend(name for name, parameter in module.named_parameters() if parameter.is_meta)
        original(module, *arguments)

    monkeypatch.setattr(loading, "fill_from_shards", counted)
    assert train(load(root, "name=second", CACHED, "training.steps=2")) == "finished"
    assert names and not any(is_understanding(name) for name in names)
    run = build(load(root, "name=second", CACHED, "training.steps=2"))
    assert run.module.position.step == 2, "resumed"
    assert not any(is_understanding(name) for name in run.backbone.state_dict())


def test_a_new_task_adds_its_prompts_and_leaves_the_others(root):
    only = [f"data.datasets.moves.tasks.{task}=0" for task in VIDEO]
    prepared = "data.datasets.moves.prepared=prepared/apart"
    build(load(root, "name=robots", CACHED, prepared, *only))
    cache = root / "prepared" / "apart" / "caches" / "reasoner"
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    build(load(root, "name=more", CACHED, prepared))
    after = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert before.items() <= after.items() and len(after) == len(before) + 1


def test_another_models_cache_ends_the_run_before_its_first_step(root):
    prepared = "data.datasets.moves.prepared=prepared/other"
    build(load(root, "name=one", CACHED, prepared))
    card = root / "prepared" / "other" / "caches" / "reasoner" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"fingerprint": "0" * 32}))
    with pytest.raises(UserError, match=r"caches/reasoner: these keys and values are of .* delete the folder"):
        build(load(root, "name=two", CACHED, prepared))


@pytest.mark.parametrize(
    "words, message",
    [
        (("tuning.towers=[generation,understanding]",), r"tuning.towers with 'understanding' trains the tower"),
        (("tuning.method=full",), r"tuning.method 'full' trains the tower whose keys would be cached"),
        (
            ("data.datasets.talk.card=cards/talk.yaml", "data.datasets.talk.prepared=prepared/talk"),
            r"moves.cache_reasoner is true, but talk holds conversations",
        ),
        (
            (
                "data.datasets.again.card=cards/moves.yaml",
                "data.datasets.again.prepared=prepared/moves",
                "data.datasets.again.embodiment=mover",
            ),
            r"moves.cache_reasoner is true, but that of again is false",
        ),
    ],
)
def test_what_needs_the_tower_is_refused_in_one_line(root, words, message):
    with pytest.raises(UserError, match=message):
        build(load(root, "name=refused", CACHED, *words))


def test_nothing_of_the_cache_is_a_weight_of_the_module(root):
    run = build(load(root, "name=plain", CACHED))
    run.module.to("cpu")
    assert not any("recall" in name for name in run.module.state_dict())
    assert all(not parameter.is_meta for parameter in run.module.parameters())
    assert next(run.backbone.parameters()).device == torch.device("cpu")


def test_a_step_that_cannot_be_read_costs_none_before_it():
    class Steps(Dataset[PackedStep]):
        def __getitem__(self, step: int) -> PackedStep:
            if step == bad:
                raise ValueError("a bad sample")
            return PackedStep(step, [], {}, 0, [])

        def __len__(self) -> int:
            return 4

    bad, told = 3, list[list[str]]()
    steps = iter(_Loader(lambda prompts: told.append(list(prompts)), Steps(), batch_size=None))
    assert next(steps).step == 0 and len(told) == 2, "one step ahead"
    assert [next(steps).step for _ in range(2)] == [1, 2]
    with pytest.raises(ValueError, match="a bad sample"):
        next(steps)
    bad = None
    assert [step.step for step in _Loader(lambda prompts: None, Steps(), batch_size=None)] == [0, 1, 2, 3]
