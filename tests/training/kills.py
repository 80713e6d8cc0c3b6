"""A run that is killed again and again ends with the weights of an undisturbed one, to the last bit.

python -m tests.training.kills STRATEGY [--kills 20] [--seed 0]

A kill is a SIGKILL of all ranks at a random moment: while they start, between two steps, within one, or while a
checkpoint is written. It takes about ten seconds a kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from cosmos3_train.training.checkpoints import PARTS, load_checkpoint
from tests.training.project import write_project
from tests.training.sharded import start
from tests.training.test_processes import steps_made
from tests.training.test_run import rows, status

STEPS_A_KILL = 6
TAIL = 40
"""Steps after the last kill's, so that it does not come too late."""
START_SECONDS = 12.0
"""A process that is killed while it starts is killed within these."""


def job(strategy: str, name: str, steps: int) -> str:
    copies = " strategy.shards=1" if strategy == "hsdp" else ""
    return (
        f"small name={name} strategy.name={strategy}{copies} tuning.method=full training.steps={steps} "
        "training.samples_per_step=3 training.tokens_per_micro_batch=100 training.checkpoint_every_n_steps=2 "
        "training.keep_checkpoints=2 training.evaluate_every_n_steps=0 evaluation.before=false "
        "evaluation.heldout_samples=0 evaluation.action_samples=0"
    )


def kill_again_and_again(root: Path, strategy: str, kills: int, seed: int) -> list[str]:
    """Kill a run so often and let it end. Returns what it has otherwise than an undisturbed one.

    Args:
        root: of a project (`write_project`), in which both runs are made.
    """
    ranks, steps, chance = 1 if strategy == "single" else 2, STEPS_A_KILL * kills + TAIL, random.Random(seed)
    whole, killed = (job(strategy, name, steps) for name in (f"{strategy}_whole", f"{strategy}_killed"))
    _finish(start(root, ranks, whole))
    folder = root / "runs" / f"{strategy}_killed"
    for number in range(kills):
        process = start(root, ranks, killed)
        starting = chance.random() < 0.2
        target = STEPS_A_KILL * number + chance.randint(1, STEPS_A_KILL)
        _wait(process, folder, target, chance.uniform(0, START_SECONDS) if starting else 250.0)
        time.sleep(chance.uniform(0, 0.05))
        pids = [process.pid] if ranks == 1 else _children(process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=100)
        found = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
        moment = "starting" if starting else f"after step {steps_made(folder)}"
        print(f"kill {number + 1} of {kills}: {moment}, {found}", flush=True)
        assert not (folder / "status.json").is_file() or status(folder)["state"] == "running", "it had ended"
    _finish(start(root, ranks, killed))
    return _differences(root / "runs" / f"{strategy}_whole", folder, steps)


def _wait(process: subprocess.Popen, folder: Path, step: int, longest: float) -> None:
    """Until metrics.csv tells of the step, as it may already, or so many seconds are over."""
    ends = time.monotonic() + longest
    while steps_made(folder) < step and time.monotonic() < ends:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.005)


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found] or [pid]


def _finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output


def _differences(whole: Path, killed: Path, steps: int) -> list[str]:
    theirs, ours = (load_checkpoint(run / "checkpoints" / f"step_{steps:06d}") for run in (whole, killed))
    wrong = []
    for part in PARTS:
        expected, found = getattr(theirs, part), getattr(ours, part)
        assert expected.keys() == found.keys()
        wrong += [f"{part} {name}" for name, value in expected.items() if not torch.equal(found[name], value)]
    if ours.position != theirs.position:
        wrong.append(f"position {ours.position} instead of {theirs.position}")
    return wrong + (["metrics.csv"] if rows(whole) != rows(killed) else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategy", choices=("single", "ddp", "fsdp2", "hsdp", "deepspeed_zero2", "deepspeed_zero3"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = write_project(Path(folder) / "root")
        wrong = kill_again_and_again(root, options.strategy, options.kills, options.seed)
    print(f"{options.strategy}: {options.kills} kills, seed {options.seed}: {wrong or 'not a bit differs'}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
