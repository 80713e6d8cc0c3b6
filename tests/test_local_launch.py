"""What launch/local.sh tells torchrun, of this torch or of one that knows fewer options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch" / "local.sh"


@pytest.mark.parametrize("known", [True, False], ids=["torch of today", "torch 2.11"])
def test_an_option_is_given_where_torchrun_knows_it(tmp_path, known):
    for package in ("torch", "torch/distributed", "lightning"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    options = "# --shutdown-timeout\n" if known else ""
    (tmp_path / "torch" / "distributed" / "run.py").write_text(f"{options}import sys\nprint(*sys.argv[1:])\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [LAUNCH, "experiments/quickstart.yaml", "training.steps=3"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "PROCESSES": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    patience = "--shutdown-timeout 120 " if known else ""
    assert done.stdout == (
        f"--standalone --nproc-per-node 2 {patience}-m cosmos3_train.cli train experiments/quickstart.yaml "
        "strategy.devices=2 training.steps=3\n"
    ), done.stderr
