"""Two processes make the steps that one makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos3_train.evaluation.pictures import read_metrics
from tests.commands.tiny import QUICK, ROOT


@pytest.mark.slow
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
    environment = {**os.environ, "PROCESSES": "2", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        [ROOT / "launch" / "local.sh", experiment, *settings, "name=two"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_metrics(project / "runs" / name / "metrics.csv") for name in ("one", "two"))
    for name in ("loss", "loss/video", "loss/action", "gradient_norm"):
        assert one[name][0] == two[name][0] == [1, 2, 3, 4, 5]
        assert two[name][1] == pytest.approx(one[name][1], rel=1e-5), name
    assert len(set(one["loss"][1])) == 5
