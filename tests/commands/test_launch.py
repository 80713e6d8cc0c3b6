"""Two processes make the steps that one makes, and tell a mistake once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos3_train.commands import console
from cosmos3_train.evaluation.pictures import read_metrics
from tests.commands.tiny import QUICK, ROOT

MISTAKE = "error: command line: unknown key 'optimizer.learning_rat'. Did you mean 'learning_rate'?"


def launch(project: Path, *arguments: str, packages: Path = ROOT) -> subprocess.CompletedProcess:
    """`launch/local.sh` on two processes, which look for packages in a folder first."""
    environment = {**os.environ, "PROCESSES": "2", "PYTHONPATH": str(packages)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [ROOT / "launch" / "local.sh", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("known", [True, False], ids=["torch of today", "torch 2.11"])
def test_an_option_is_given_where_torchrun_knows_it(tmp_path, known):
    for package in ("torch", "torch/distributed", "lightning"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    options = "# --shutdown-timeout\n" if known else ""
    (tmp_path / "torch" / "distributed" / "run.py").write_text(f"{options}import sys\nprint(*sys.argv[1:])\n")
    done = launch(tmp_path, "experiments/quickstart.yaml", "training.steps=3", packages=tmp_path)
    patience = "--shutdown-timeout 120 " if known else ""
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"--standalone --nproc-per-node 2 {patience}-m cosmos3_train.cli train experiments/quickstart.yaml "
        "strategy.devices=2 training.steps=3\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("optimizer.learning_rat=1", MISTAKE),
        ("--frehs", "error: unrecognized arguments: --frehs; cosmos3 --help says what there is"),
        pytest.param(
            "strategy.context_parallel=4",
            "error: strategy.context_parallel is 4, which does not divide the 2 processes",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_mistake_that_both_processes_find_is_told_once(project, mistake, told):
    done = launch(project, "experiments/quickstart.yaml", mistake)
    assert done.returncode == 1
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(told), done.stderr


def test_a_mistake_of_one_process_alone_is_told(cosmos3, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(console, "LAUNCHER_ENDS_US_SECONDS", 0.1)
    assert cosmos3("train", "experiments/quickstart.yaml", "optimizer.learning_rat=1") == 2
    assert capsys.readouterr().err.splitlines() == [MISTAKE]


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_give_the_loss_of_one(cosmos3, project, tiny_model):
    settings = (
        *QUICK,
        "data.datasets.pusht_moves.cache_latents=false",
        "data.datasets.pusht_moves.prepared=prepared/quick_pusht_moves",
        f"model.path={tiny_model}",
        "training.steps=5",
        "training.samples_per_step=4",
        "training.evaluate_every_n_steps=0",
        "evaluation.before=false",
        "evaluation.heldout_samples=0",
        "evaluation.action_samples=0",
        "optimizer.warmup_steps=0",
        "export=none",
    )
    experiment = "experiments/nano_policy_hybrid.yaml"
    assert cosmos3("train", experiment, *settings, "name=one") == 0
    done = launch(project, experiment, *settings, "name=two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_metrics(project / "runs" / name / "metrics.csv") for name in ("one", "two"))
    for name in ("loss", "loss/video", "loss/action", "gradient_norm"):
        assert one[name][0] == two[name][0] == [1, 2, 3, 4, 5]
        assert two[name][1] == pytest.approx(one[name][1], rel=1e-5), name
    assert len(set(one["loss"][1])) == 5
