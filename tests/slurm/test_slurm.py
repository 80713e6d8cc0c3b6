"""launch/slurm.sbatch on a real Slurm of two nodes: runs, goes on after a warning, loses a rank, is cancelled."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training.project import write_project
from tests.training.sharded import REPOSITORY
from tests.training.test_processes import UNMEASURED, steps_made
from tests.training.test_run import assert_same, rows, status, tensors

pytestmark = pytest.mark.slow

CLUSTER = Path(__file__).with_name("cluster.sh")
CANNOT_BE_INSTALLED = 77
SITE = (
    "WaitTime=2",  # shorter than a node looks for what the first one has written
    "PreemptType=preempt/partition_prio",
    "PreemptMode=REQUEUE",
    "PartitionName=DEFAULT GraceTime=60",
    "PartitionName=urgent Nodes=node1,node2 PriorityTier=10",
)
ENV_OF_RHEL_8 = """#!/bin/bash
case $1 in --default-signal*) echo "env: unrecognized option" >&2; exit 125 ;; esac
exec /usr/bin/env "$@"
"""
STEPS = 60
SETTINGS = (f"training.steps={STEPS}", "training.checkpoint_every_n_steps=8", *UNMEASURED)
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Job:
    """A submitted run."""

    def __init__(
        self, project: Path, environment: dict[str, str], name: str, *overrides: str, options: tuple[str, ...] = ()
    ) -> None:
        self.environment = environment
        self.folder = project / "runs" / name
        self.output_file = project.parent / f"{name}.out"
        line = (
            str(REPOSITORY / "launch" / "slurm.sbatch"),
            "experiments/small.yaml",
            f"name={name}",
            *SETTINGS,
            *overrides,
        )
        options = ("--parsable", "--gpus-per-node=0", f"--chdir={project}", f"--output={self.output_file}", *options)
        self.number = self._slurm("sbatch", *options, *line).strip()

    def _slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    @property
    def output(self) -> str:
        return self.output_file.read_text() if self.output_file.is_file() else ""

    @property
    def state(self) -> str:
        found = re.search(r"JobState=(\w+)", self._slurm("scontrol", "show", "job", self.number))
        assert found is not None
        return found[1]

    def wait(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.state}: {self.output}"
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: steps_made(self.folder) >= step)
        assert self.state == "RUNNING", self.output

    def wait_for_end(self, seconds: float = 90) -> str:
        self.wait(lambda: self.state in ENDED, seconds)
        return self.state

    def signal(self, name: str) -> None:
        """To the batch shell alone, as Slurm's own warning."""
        self._slurm("scancel", "--batch", f"--signal={name}", self.number)

    def preempt(self, seconds: int) -> None:
        """By a job that wants all nodes, of a partition that comes first."""
        line = ("--partition=urgent", "--nodes=2", "--output=/dev/null", f"--wrap=sleep {seconds}")
        self._slurm("sbatch", *line)

    def cancel(self) -> None:
        self._slurm("scancel", self.number)

    def process_of(self, rank: int) -> int:
        log = (self.folder / "logs" / f"rank_{rank:03d}.log").read_text()
        return int(re.findall(r"process (\d+)", log)[-1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """The folder of a Slurm that is up."""
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    up = subprocess.run([CLUSTER, "up", folder, *SITE], capture_output=True, text=True, timeout=280, check=False)
    if up.returncode == CANNOT_BE_INSTALLED:
        pytest.skip(up.stderr.strip().splitlines()[-1])
    try:
        assert up.returncode == 0, up.stderr
        yield folder
    finally:
        subprocess.run([CLUSTER, "down", folder], timeout=60, check=False)


@pytest.fixture(scope="module")
def submit(cluster, tmp_path_factory) -> Callable[..., Job]:
    common = write_project(tmp_path_factory.mktemp("project") / "root")
    older = tmp_path_factory.mktemp("older") / "env"
    older.write_text(ENV_OF_RHEL_8)
    older.chmod(0o755)
    environment = os.environ | {
        "SLURM_CONF": str(cluster / "slurm.conf"),
        "PATH": f"{older.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }

    def job(name: str, *overrides: str, project: Path = common, options: tuple[str, ...] = ()) -> Job:
        return Job(project, environment, name, *overrides, options=options)

    return job


@pytest.fixture(scope="module")
def hidden(cluster) -> Path:
    """A project that the second node does not see."""
    folder = cluster / "only_node1"
    if not folder.is_dir():
        pytest.skip("a node cannot have mounts of its own here")
    return write_project(folder / "root")


@pytest.fixture(scope="module")
def undisturbed(submit) -> Job:
    job = submit("undisturbed")
    assert job.wait_for_end(150) == "COMPLETED", job.output
    return job


def test_it_runs_on_two_nodes_and_finishes(undisturbed):
    assert status(undisturbed.folder) == {"state": "finished", "step": STEPS, "steps": STEPS}
    assert "2 nodes, 1 processes each" in undisturbed.output and "[rank 0] " in undisturbed.output
    assert "[rank 1] " not in undisturbed.output
    assert "[rank 1] " in (undisturbed.folder / "logs" / "rank_001.log").read_text()


def test_warned_it_saves_is_requeued_and_ends_with_the_same_weights(submit, undisturbed):
    job = submit("warned")
    job.wait_for_step(10)
    job.signal("USR1")
    job.wait(lambda: "interrupted; requeued" in job.output)
    told = status(job.folder)
    assert told["state"] == "interrupted" and 10 <= told["step"] < STEPS, job.output
    job.wait(lambda: f"job {job.number}, start 2" in job.output, 60)
    assert job.wait_for_end(120) == "COMPLETED", job.output
    assert f"resumed at step {told['step']} " in job.output
    assert status(job.folder) == {"state": "finished", "step": STEPS, "steps": STEPS}
    # Bit for bit: two summands have one order, and every draw is a function of the seed and the step.
    assert_same(tensors(job.folder, STEPS), tensors(undisturbed.folder, STEPS))
    assert rows(job.folder) == rows(undisturbed.folder)


@pytest.mark.long
def test_before_its_time_limit_slurm_warns_it_and_it_goes_on_in_another_start(submit):
    """Slurm counts a job's time in minutes and warns up to one earlier than it was asked to."""
    job = submit("limited", "training.steps=100000", options=("--time=2", "--signal=B:USR1@60"))
    job.wait(lambda: "got USR1, tells the run to save and end" in job.output, 150)
    job.wait(lambda: "interrupted; requeued" in job.output, 60)
    told = status(job.folder)
    assert told["state"] == "interrupted" and told["step"] > 0, job.output
    job.wait(lambda: f"resumed at step {told['step']} " in job.output, 120)
    job.wait(lambda: steps_made(job.folder) > told["step"])
    job.cancel()
    assert job.wait_for_end() == "CANCELLED"


@pytest.mark.long
def test_preempted_it_saves_and_goes_on_when_the_nodes_are_free(submit, undisturbed):
    job = submit("preempted")
    job.wait_for_step(10)
    job.preempt(seconds=5)
    job.wait(lambda: status(job.folder)["state"] == "interrupted", 60)
    told = status(job.folder)
    assert 10 <= told["step"] < STEPS
    job.wait(lambda: f"job {job.number}, start 2" in job.output, 150)
    assert job.wait_for_end(150) == "COMPLETED", job.output
    assert f"resumed at step {told['step']} " in job.output
    assert_same(tensors(job.folder, STEPS), tensors(undisturbed.folder, STEPS))


@pytest.mark.long
def test_a_dead_rank_ends_the_job_and_is_named_first(submit):
    job = submit("dead")
    job.wait_for_step(5)
    os.kill(job.process_of(1), signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait_for_end() == "FAILED"
    assert time.monotonic() - killed < 60
    first = re.search(r"^.*(error|failed|Traceback).*$", job.output, re.IGNORECASE | re.MULTILINE)
    assert first is not None and "exitcode: -9" in first[0], job.output
    root = job.output.partition("Root Cause")[2]
    assert "rank      : 1 " in root and "SIGKILL" in root, job.output
    assert "requeued" not in job.output


@pytest.mark.long
def test_cancelled_it_saves_and_stays_cancelled(submit):
    job = submit("cancelled")
    job.wait_for_step(5)
    job.cancel()
    job.wait(lambda: "so it is not requeued" in job.output, 60)
    assert status(job.folder)["state"] == "interrupted"
    assert job.wait_for_end() == "CANCELLED"


def test_mistakes_are_told_in_one_line_before_anything_starts(submit, hidden):
    misspelt = submit("misspelt", "training.step=5")
    assert misspelt.wait_for_end() == "FAILED"
    assert [line for line in misspelt.output.splitlines() if line.startswith("error: ")] == [
        "error: command line: unknown key 'training.step'. Did you mean 'steps'?"
    ]
    apart = submit("apart", project=hidden)
    assert apart.wait_for_end() == "FAILED"
    errors = [line for line in apart.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: node2 does not see "), apart.output
    for job in (misspelt, apart):
        assert "start 1" not in job.output and not (job.folder / "status.json").exists()
