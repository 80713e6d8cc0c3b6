"""Two logs of one robot in a mixture are normalised by one set of statistics, or refused."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import torch

from cosmos3_train.cli import parse
from cosmos3_train.commands.check import examine
from cosmos3_train.commands.check_data import check_dataset
from cosmos3_train.commands.evaluate import _with_dataset
from cosmos3_train.config import UserError
from cosmos3_train.data.card import load_card
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.training.datamodule import open_datasets, refuse_two_scales
from tests.data.logs import make_log
from tests.training.project import CAMERA, load, write, write_project

MORE = (
    "data.datasets.more.card=cards/more.yaml",
    "data.datasets.more.prepared=prepared/more",
    "data.datasets.more.embodiment=mover",
)
SHARED = "data.datasets.more.statistics"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_project(tmp_path_factory.mktemp("two_logs") / "root")
    longer = {0: np.random.default_rng(0).uniform(0, 500, (14, 2)).astype(np.float32)}
    make_log(root / "more", [14], cameras={CAMERA: (32, 48)}, actions=longer)
    write(root / "cards" / "more.yaml", {"name": "more", "format": "lerobot_v3", "source": "more"})
    return root


def test_each_by_its_own_is_refused(root):
    with pytest.raises(UserError, match=rf"{SHARED} to moves"):
        open_datasets(load(root, *MORE, "data.heldout_fraction=0"), None)


def test_one_takes_the_other_s(root):
    opened = open_datasets(load(root, *MORE, f"{SHARED}=moves", "data.heldout_fraction=0"), None)
    (moves, _), (more, _) = opened["moves"], opened["more"]
    assert isinstance(moves, PreparedDataset) and isinstance(more, PreparedDataset)
    assert more.statistics == moves.statistics
    sample, row = more.sample("train", 0, "policy", 0, pixels=False), more.window("train", 0)
    expected = moves.normaliser.normalise(torch.tensor(row["action"]))
    assert sample.action is not None and torch.equal(sample.action, expected) and float(sample.action.abs().max()) > 1.5


def test_check_finds_two_scales_of_prepared_logs(root):
    own, shared = (load(root, *MORE, *lines, "data.heldout_fraction=0") for lines in ((), (f"{SHARED}=moves",)))
    open_datasets(shared, None)
    words = f"set {SHARED} to moves"
    assert [words in str(problem) for problem in examine(own).problems].count(True) == 1
    assert not any(words in str(problem) for problem in examine(shared).problems)


def test_check_says_what_it_cannot_compare_and_by_which_command_it_could(root, monkeypatch):
    monkeypatch.chdir(root)
    places = ("data.datasets.moves.prepared=prepared/late", "data.datasets.more.prepared=prepared/late_more")
    loaded = load(root, *MORE, *places, "data.heldout_fraction=0")

    def unchecked(which=loaded):
        rows = dict(examine(which).rows)
        return {name: rows[key] for name in ("moves", "more") if (key := f"statistics {name}") in rows}

    said = unchecked()
    assert list(said) == ["moves", "more"]
    assert said["more"].startswith("not checked: more is not prepared yet; first cosmos3 prepare cards/more.yaml --")
    shared = unchecked(load(root, *MORE, *places, f"{SHARED}=moves", "data.heldout_fraction=0"))
    assert "moves is not prepared yet" in shared["more"] and shared["moves"] == said["moves"]
    assert not unchecked(load(root, *places[:1], "data.heldout_fraction=0")), "of one log there is nothing to compare"
    for words in said.values():
        options = parse(shlex.split(words.partition("first cosmos3 ")[2]))
        assert options.command(options) == 0
    assert not unchecked() and any(f"set {SHARED} to moves" in str(problem) for problem in examine(loaded).problems)


def test_the_entry_to_be_named_is_one_that_may_be(root):
    """Where the first log takes another's statistics, a third that differs is told to take those too."""
    lines = (*MORE, "data.heldout_fraction=0")
    opened = open_datasets(load(root, *lines, "data.datasets.moves.statistics=more"), None)
    third = open_datasets(load(root, "data.heldout_fraction=0"), None)["moves"]
    robots = {
        name: ("mover", entry, dataset.statistics)
        for name, (dataset, entry) in (opened | {"third": third}).items()
        if isinstance(dataset, PreparedDataset)
    }
    with pytest.raises(UserError, match=r"set data\.datasets\.third\.statistics to more"):
        refuse_two_scales(robots)


def test_evaluating_on_one_of_them_needs_no_other(root):
    loaded = load(root, *MORE, f"{SHARED}=moves", "data.heldout_fraction=0")
    card = root / "cards" / "more.yaml"
    measured = _with_dataset(loaded, load_card(card), card, loaded.experiment.embodiments["mover"])
    assert list(measured.experiment.data.datasets) == ["more"]


def test_check_normalises_by_the_other_s(root):
    own, shared = (load(root, *MORE, *lines, "data.heldout_fraction=0") for lines in ((), (f"{SHARED}=moves",)))
    open_datasets(shared, None)
    said = [
        dict(check_dataset(each, "more", each.experiment.data.datasets["more"]).rows)["ranges more"]
        for each in (own, shared)
    ]
    assert said[0].endswith("none") and "x 91.7%" in said[1]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((f"{SHARED}=movs",), "Did you mean 'moves'"),
        ((f"{SHARED}=more",), "names another entry"),
        ((f"{SHARED}=talk",), "of robot None, but more is of mover"),
        ((f"{SHARED}=moves", "data.datasets.moves.statistics=more"), "name that one"),
    ],
)
def test_what_cannot_be_shared_is_refused(root, lines, words):
    with pytest.raises(UserError, match=words):
        load(root, *MORE, *lines)
