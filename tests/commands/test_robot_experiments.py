"""Every experiment on a published robot's log, from files of the set's layout to a finished run."""

from __future__ import annotations

import numpy as np
import pytest

from tests.commands.tiny import QUICK, numbers_of_two_steps
from tests.data.test_published_logs import make

FOLDERS = {"libero_lerobot": "libero_goal", "bridge_lerobot": "", "cosmos3_droid": "success"}


@pytest.mark.parametrize(
    ("name", "robot"),
    [
        pytest.param("libero_lerobot", "libero", marks=pytest.mark.slow),
        pytest.param("bridge_lerobot", "bridge_orig_lerobot", marks=pytest.mark.slow),
        ("cosmos3_droid", "droid_joints"),
    ],
)
def test_a_published_robots_log_from_its_files_to_its_report(name, robot, cosmos3, project, tiny_model):
    """Whole chunks on whole canvases are prepared in `test_published_logs`; here they are short and small."""
    experiment, key = f"experiments/nano_video_{name}.yaml", f"embodiments.{robot}"
    make(name, project / "downloads" / name / FOLDERS[name])
    line = [f"model.path={tiny_model}", *QUICK, "data.heldout_fraction=0.3", "export=none"]
    line += [f"{key}.chunk=4", f"{key}.execute=4", f"{key}.resolution_tier=256"]
    assert cosmos3("check", experiment, *line) == 0
    assert cosmos3("train", experiment, *line) == 0
    run = project / "runs" / f"nano_video_{name}"
    numbers = numbers_of_two_steps(run)
    errors = [value for key, value in numbers.items() if key.startswith("policy_error_")]
    assert errors and np.isfinite(errors).all()
