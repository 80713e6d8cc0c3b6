"""The README's first command, whole: it learns, exports, verifies and reports within its time."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.contracts.test_repository import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_learns_and_delivers(tmp_path):
    # In the repository, whose paths the experiment names, but under another name and prepared folder: a user's own
    # quickstart stays as it is.
    command = [
        *(sys.executable, "-m", "cosmos3_train.cli", "train", "experiments/quickstart.yaml", "--fresh"),
        "name=quickstart_test",
        f"data.datasets.moves.prepared={tmp_path}/prepared",
    ]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-2000:]
    run = ROOT / "runs" / "quickstart_test"
    report = json.loads((run / "report.json").read_text())
    assert report["action_error_after"] <= 0.5 * min(report["action_error_before"], report["action_error_constant"])
    assert report["policy_error_after"] < min(report["policy_error_before"], report["action_error_constant"])
    assert report["coverage_after"] - report["coverage_before"] >= 0.15
    assert report["export_relative_difference"] <= 1e-5
    assert {"action_error_constant", "coverage_before", "coverage_after", "coverage_still"} <= report.keys()
    assert 0 < report["seconds"] <= seconds
    assert "data:image/png" in (run / "report.html").read_text()
    print(f"quickstart: {seconds:.0f} s")
