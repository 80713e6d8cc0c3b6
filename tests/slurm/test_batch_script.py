"""What launch/slurm.sbatch makes of the end of a start: a step of a few lines in the place of srun, and no Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SLURM = {
    "srun": 'case "$*" in *sees_mark*) exit 0 ;; esac; eval "$STEP"',
    "scancel": "",
    "scontrol": 'case $1 in requeue) touch requeued ;; *) echo "JobState=RUNNING" ;; esac',
}
WARNING, REPORTED = "kill -USR1 $PPID; sleep 0.1; ", "touch runs/short/report.html; "


class Job:
    """One that may be started several times, on a run that is named `short`."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.starts = root, root / "runs" / "short", 0
        for name, lines in SLURM.items():
            (root / "bin").mkdir(exist_ok=True)
            (root / "bin" / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
            (root / "bin" / name).chmod(0o755)
        (root / "short.yaml").write_text("name: short\nmodel: {path: none}\n")

    def start(self, step: str, *, state: str = "", at: int = 0) -> tuple[int, bool, str]:
        """Carry out lines of bash for the step, which then says how the run stands ('': nothing).

        Returns:
            The exit code, whether the job was requeued, and what was printed.
        """
        told = json.dumps({"state": state, "step": at, "steps": 9})
        if state:
            step = f"echo '{told}' >{self.folder}/status.json; {step}"
        environment = os.environ | {
            "PATH": f"{self.root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "STEP": step,
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(self.starts),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node1",
        }
        self.starts += 1
        (self.root / "requeued").unlink(missing_ok=True)
        done = subprocess.run(
            [REPOSITORY / "launch" / "slurm.sbatch", "short.yaml"],
            cwd=self.root, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, (self.root / "requeued").exists(), done.stdout + done.stderr


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("step", "state", "code", "requeued"),
    [
        (REPORTED, "finished", 0, False),
        ("exit 1", "finished", 1, False),  # its export is not what was trained
        pytest.param(WARNING, "finished", 0, True, id="it was exporting"),
        pytest.param(WARNING + REPORTED, "finished", 0, False, id="it could end"),
        ("exit 3", "failed", 3, False),
        (WARNING, "interrupted", 0, True),
        (WARNING, "", 0, True),  # it was loading
        # A step that was told to stop ends with 0, whatever happened.
        pytest.param(WARNING, "failed", 1, False, id="it failed as it saved"),
        pytest.param(WARNING, "running", 1, False, id="it lost a process as it saved"),
        pytest.param(f"{WARNING} exit 3", "failed", 3, False, id="the step tells of a failure"),
    ],
)
def test_what_was_interrupted_is_requeued_and_what_failed_is_not(job, step, state, code, requeued):
    found = job.start(step, state=state)
    assert found[:2] == (code, requeued), found[2]


def test_a_job_that_is_warned_at_the_same_step_again_and_again_is_not_requeued(job):
    """The first start has come somewhere; the second and the third have not, and say why there is no fourth."""
    told = "error: job 7: two starts in a row were warned before the run came past step {}, so it is not requeued; "
    for state, at, goes_on in (("interrupted", 5, True), ("", 0, True), ("interrupted", 5, False)):
        code, requeued, output = job.start(WARNING, state=state, at=at)
        assert (code, requeued) == (0 if goes_on else 1, goes_on), output
        assert output.count(told.format(5)) == (not goes_on) == output.count("error"), output


def test_what_advances_is_requeued_as_often_as_it_takes(job):
    """Also where it was stuck once in between, and where a start that Slurm ended by itself comes between."""
    for state, at in (("", 0), ("interrupted", 3), ("interrupted", 3), ("interrupted", 4), ("", 0)):
        assert job.start(WARNING, state=state, at=at)[:2] == (0, True)
    assert job.start("exit 1", state="running", at=4)[:2] == (1, False)
    assert job.start(WARNING, state="interrupted", at=5)[:2] == (0, True)


def test_loading_that_takes_longer_than_a_start_ends_the_job(job):
    assert [job.start(WARNING)[:2] for _ in range(2)] == [(0, True), (1, False)]
