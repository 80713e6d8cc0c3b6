"""Runs as a batch system sees them: exit codes, signals, kills, two processes. Each start costs seconds of imports."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosmos3_train.training.run import train
from tests.training.project import load
from tests.training.sharded import PYTHONPATH
from tests.training.steps import difference
from tests.training.test_run import assert_same, rows, status, tensors

pytestmark = pytest.mark.slow

UNMEASURED = ("evaluation.heldout_samples=0", "evaluation.action_samples=0")
"""Evaluations happen, which the marks in metrics.csv tell, but look at nothing: they are not what is tested here."""

LONG = ("training.steps=120", "training.checkpoint_every_n_steps=8", "training.keep_checkpoints=2", *UNMEASURED)
"""About five seconds of steps, to have time to disturb them."""


def start(project: Path, *arguments: str, limit: str = "", launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """`cosmos3 train` on the small experiment, in a process of its own."""
    python = [sys.executable, *launcher, "-m", "cosmos3_train.cli", "train", "experiments/small.yaml", *arguments]
    command = ["bash", "-c", f'{limit} exec "$@"', "bash", *python]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def steps_made(folder: Path) -> int:
    """The last step that metrics.csv tells of."""
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    return max((int(line.split(",")[0]) for line in lines if line.count(",") == 2), default=0)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    while steps_made(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(project) -> Path:
    # As the disturbed ones are run: another number of threads sums in another order, which is another last bit.
    code, output = ended(start(project, "name=undisturbed", *LONG))
    assert code == 0, output
    return project / "runs" / "undisturbed"


def test_signal_full_disk_and_the_end_with_their_exit_codes(project, undisturbed):
    folder = project / "runs" / "signalled"
    process = start(project, "name=signalled", *LONG)
    wait_for_step(process, folder, 20)
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == 75, output
    told = status(folder)
    assert told["state"] == "interrupted" and 20 <= told["step"] < 120
    assert (folder / "checkpoints" / f"step_{told['step']:06d}" / "state.json").is_file()
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())

    code, output = ended(start(project, "name=signalled", *LONG, limit="ulimit -f 24;"))  # 24 KiB a file
    assert code == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "could not be written" in errors[0] and "Traceback" not in output
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == kept
    assert status(folder)["state"] == "failed" and errors[0].endswith(status(folder)["reason"])

    code, output = ended(start(project, "name=signalled", *LONG))
    assert code == 0, output
    assert status(folder) == {"state": "finished", "step": 120, "steps": 120}
    assert_same(tensors(folder, 120), tensors(undisturbed, 120))
    assert rows(folder) == rows(undisturbed)


def test_killed_at_any_moment_it_ends_with_the_same_weights(project, undisturbed):
    folder, chance = project / "runs" / "killed", random.Random(7)
    kills = [chance.uniform(5, 50), chance.uniform(60, 110)]
    for step in kills:
        process = start(project, "name=killed", *LONG, "data.workers=1")
        wait_for_step(process, folder, int(step))
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        code, output = ended(process)
        assert code == -signal.SIGKILL, output
        assert status(folder)["state"] == "running"
    code, output = ended(start(project, "name=killed", *LONG))
    assert code == 0, output
    assert "resumed at step" in output
    assert_same(tensors(folder, 120), tensors(undisturbed, 120))
    assert rows(folder) == rows(undisturbed)


def test_two_processes_with_uneven_shares_make_the_step_of_one(project):
    """Five samples a step: ranks hold two and three; packs are small, so ranks also differ in their number.

    Both go on from one checkpoint after the first step, where neither LoRA factor is zero any more.
    """
    steps = ("training.steps=3", "training.samples_per_step=5", "training.checkpoint_every_n_steps=1", *UNMEASURED)
    alone = load(project, "name=alone", *steps, "training.tokens_per_micro_batch=4000")
    train(alone)
    folder = project / "runs" / "two"
    shutil.copytree(alone.run_folder / "checkpoints" / "step_000001", folder / "checkpoints" / "step_000001")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = ("strategy.name=ddp", "strategy.devices=2", "training.tokens_per_micro_batch=100")
    code, output = ended(start(project, "name=two", *steps, *two, launcher=launcher))
    assert code == 0, output
    start_of_both, ours, theirs = tensors(folder, 1), tensors(folder, 2), tensors(alone.run_folder, 2)
    compared = 0
    for name, value in theirs.items():  # AdamW's first moment is β · what it was + (1 − β) · the gradient
        if name.endswith("exp_avg"):
            gradient, expected = (moment - 0.9 * start_of_both[name] for moment in (ours[name], value))
            if float(expected.norm()) > 0:
                assert difference(gradient, expected) <= 1e-5, name
                compared += 1
    assert compared > sum(name.startswith("trainables/") for name in theirs) / 2
    told = [{row[:2]: float(row[2]) for row in rows(f)[1:]} for f in (folder, alone.run_folder)]
    losses = [key for key in told[1] if key[1].startswith("loss") and int(key[0]) > 1]
    assert {key[1] for key in losses} >= {"loss", "loss/video", "loss/action", "loss/text"}
    assert {key: told[0][key] for key in losses} == pytest.approx({key: told[1][key] for key in losses}, rel=1e-4)
    last = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines() if line.startswith("3,")]
    times = {name: float(value) for _, name, value in last}
    assert times["slowest_rank"] in (0, 1) and times["slowest_rank_own_seconds"] >= times["own_seconds"] > 0
    assert times["samples_per_second"] * times["step_seconds"] == pytest.approx(5, rel=0.1), "the first rank has two"


def test_a_user_s_mistake_exits_with_2_and_one_line(project):
    code, output = ended(start(project, "optimizer.learning_rat=1"))
    assert code == 2
    assert output.splitlines() == [
        "error: command line: unknown key 'optimizer.learning_rat'. Did you mean 'learning_rate'?"
    ]


def test_bad_numbers_exit_with_1_and_their_reason(project):
    bad = ("name=diverged", "optimizer.learning_rate=1e30", "optimizer.patience=2", "training.steps=60",
           "optimizer.clip=0", *UNMEASURED)  # fmt: skip
    code, output = ended(start(project, *bad))
    assert code == 1
    assert "error: 2 steps in a row were skipped for their gradients" in output and "Traceback" not in output
    assert status(project / "runs" / "diverged")["state"] == "failed"
