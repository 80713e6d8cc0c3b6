"""The measurement of what FP8 and the caches cost: all of its runs with a tiny model, and what it says of them."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest

from tests.commands.tiny import QUICK
from tests.data.logs import default_actions, make_log


@pytest.fixture(scope="module")
def quality(project) -> ModuleType:
    path = project / "experiments" / "quality" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure_quality", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", ["pico", "nano2"])
def test_check_finds_nothing_wrong(size, cosmos3):
    assert cosmos3("check", f"experiments/quality/quality_{size}.yaml") == 0


@pytest.mark.long
def test_what_is_finished_is_reported(quality, cosmos3, project, tiny_model, tmp_path, capsys):
    moves = {episode: default_actions(episode, 10) / 10 for episode in range(6)}
    make_log(tmp_path / "log", [10] * 6, fps=5, cameras={"observation.images.top": (32, 32)}, actions=moves)
    settings = [*QUICK, f"model.path={tiny_model}", f"data.datasets.moves.source={tmp_path / 'log'}"]
    settings += ["data.heldout_fraction=0.4", "evaluation.heldout_samples=1", "training.log_every_n_steps=9"]
    assert quality.main(["pico", "--report", *settings]) == 2, "nothing is finished"
    assert quality.main(["pico", "--only", "fp9_0", *settings]) == 2
    for name in (*quality.RUNS, quality.GRADIENTS):
        assert quality.main(["pico", "--only", name, *settings]) == 0
    metrics = project / "runs" / "quality_pico_fp8_0" / "metrics.csv"
    written = metrics.stat().st_mtime_ns
    assert quality.main(["pico", "--only", "fp8_0", *settings]) == 0
    assert metrics.stat().st_mtime_ns == written, "what is finished is not done again"
    capsys.readouterr()
    assert quality.main(["pico", "--report", *settings]) == 0
    said = capsys.readouterr().out
    found = json.loads((project / "experiments" / "quality" / "quality_pico.json").read_text())
    curves = {name: curve["values"] for name, curve in found["heldout_loss"].items()}
    assert sorted(curves) == sorted(quality.RUNS)
    # Seeds share the held-out draw and the base, and differ by the fresh rows of the robot's heads.
    assert curves["plain_0"][0] == pytest.approx(curves["caches_0"][0], rel=0.02)
    apart = [tuple(curves[name]) for name in ("plain_0", "plain_1", "plain_2", "fp8_0", "caches_0", "both_0")]
    assert len(set(apart)) == len(apart)
    ways = found["gradients"]["ways"]
    assert {way: len(measured["layers"]) for way, measured in ways.items()} == {"fp8": 2, "caches": 2, "both": 2}
    assert ways["fp8"]["layers"] != ways["both"]["layers"] and min(ways["fp8"]["layers"]) > 0.9
    assert [line["name"] for line in found["lines"][:3]] == ["plain_0", "plain_1", "plain_2"]
    assert not any(line["holds"] for line in found["lines"][:3]), "no loss falls by 30 % in two steps"
    assert said.count("DOES NOT HOLD: plain") == 3 and "from the same seeds" in said
    assert (project / "experiments" / "quality" / "quality_pico.png").stat().st_size > 10_000


def test_what_holds_is_told_from_what_does_not(quality):
    plain = {"plain_0": [2.0, 1.2], "plain_1": [2.0, 1.5], "plain_2": [2.0, 1.3]}
    losses = plain | {
        "fp8_0": [2.0, 1.4],
        "fp8_1": [2.0, 1.6],
        "fp8_2": [2.0, 1.2],
        "both_1": [2.0, 1.0],
        "caches_0": [2, 1.6],
    }
    lines = {line["name"]: line for line in quality._loss_lines(losses)}
    assert {name: line["holds"] for name, line in lines.items()} == {
        "plain_0": True, "plain_1": False, "plain_2": True, "fp8": True, "caches": False, "both": True,
    }  # fmt: skip
    assert lines["fp8"]["mean"] == pytest.approx(1.4)
    assert lines["fp8"]["from_same_seed"] == pytest.approx({"0": 2 / 3, "1": 1 / 3, "2": -1 / 3})
    assert lines["both"]["from_same_seed"] == pytest.approx({"1": -5 / 3})
    assert len(quality._loss_lines({"plain_0": [1, 0.6], "fp8_0": [1, 0.6]})) == 1, "no band without three seeds"
