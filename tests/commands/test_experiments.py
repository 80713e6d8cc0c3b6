"""Every experiment that ships passes `check` and makes two steps, with the model cut to two layers of tiny width."""

from __future__ import annotations

import json

import pytest

from cosmos3_train.config import load_experiment
from cosmos3_train.evaluation.pictures import read_metrics
from tests.commands.tiny import QUICK, ROOT, quick_data

NAMES = (
    "nano_policy_lora",
    "nano_policy_hybrid",
    "super_policy_lora",
    "nano_dynamics_lora",
    "nano_reasoner_text_lora",
    "nano_sound_lora",
    "quickstart",
)


def overrides(name: str, model) -> list[str]:
    experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml").experiment
    return [f"model.path={model}", *QUICK, *quick_data(experiment)]


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_nothing_wrong_without_the_model(name, cosmos3, capsys):
    hub = load_experiment(ROOT / "experiments" / f"{name}.yaml").experiment.model.path.startswith("nvidia/")
    assert cosmos3("check", f"experiments/{name}.yaml") == 0
    assert ("model not fetched: hf download nvidia/" in capsys.readouterr().out) == hub


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_on_a_tiny_model(name, cosmos3, project, tiny_model, capsys):
    settings = overrides(name, tiny_model)
    assert cosmos3("check", f"experiments/{name}.yaml", *settings) == 0
    assert "trains" in capsys.readouterr().out
    assert cosmos3("train", f"experiments/{name}.yaml", *settings, "export=none") == 0
    run = project / "runs" / name
    metrics = read_metrics(run / "metrics.csv")
    assert metrics["loss"][0] == [1, 2]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["heldout_loss_before"] != numbers["heldout_loss_after"]
    assert ("action_error_after" in numbers) == ("policy" in name or name == "quickstart")
    assert (run / "report.html").stat().st_size > 10_000
