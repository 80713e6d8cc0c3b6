"""Runs of the small project on several processes, one after the other, for a process costs seconds to start.

python -m torch.distributed.run --nproc-per-node N -m tests.training.sharded ROOT JOB...   where a JOB is
"EXPERIMENT key=value ...", also with the words <RUN/STEP, to go on from the checkpoint of another run, and heard, for
what ranks exchange to be written into its folder (`listening`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from cosmos3_train.config import Loaded, load_experiment
from cosmos3_train.runtime import is_first_rank, rank, world_size
from cosmos3_train.training.measures import measure
from cosmos3_train.training.run import quieten_lightning, train
from tests.training.listening import exchanged, listening

REPOSITORY = Path(__file__).resolve().parents[2]
HEARD = "heard"
PYTHONPATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def start(root: Path, count: int, *jobs: str) -> subprocess.Popen:
    """Carry out jobs on so many processes, in the background."""
    return launch(count, "tests.training.sharded", str(root), *jobs)


def launch(count: int, module: str, *arguments: str) -> subprocess.Popen:
    """Run a module on so many processes, in the background; what they print is to be read from it."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)) if count > 1 else ()
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def carry_out(root: Path, job: str) -> None:
    """Carry out a job in this process, by one thread, as torchrun's processes have: more sum in another order, which
    in 20 steps grows to 9e-6 of a loss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _carry_out(root, job)
    finally:
        torch.set_num_threads(threads)


def _carry_out(root: Path, job: str) -> None:
    experiment, *words = job.split()
    overrides = [word for word in words if "=" in word]
    if world_size() > 1:
        overrides.append(f"strategy.devices={world_size()}")
    loaded = load_experiment(root / "experiments" / f"{experiment}.yaml", overrides)
    for word in words:
        if word.startswith("<"):
            go_on_from(loaded, word.removeprefix("<"))
    if HEARD not in words:
        train(loaded, evaluate=measure)
        return
    with listening() as listener:
        train(loaded, evaluate=measure)
    told = {"steps": listener.steps, "between": sorted(listener.between)}
    exchanged(loaded.run_folder, rank()).write_text(json.dumps(told))


def go_on_from(loaded: Loaded, checkpoint: str) -> None:
    """Begin with a copy of another run's checkpoint, "RUN/STEP"."""
    run, step = checkpoint.split("/")
    source = loaded.run_folder.parent / run / "checkpoints" / f"step_{int(step):06d}"
    target = loaded.run_folder / "checkpoints" / source.name
    if is_first_rank():
        shutil.copytree(source, target.with_name("copying"))
        target.with_name("copying").rename(target)
    while not target.is_dir():  # ranks may not have met yet
        time.sleep(0.01)


if __name__ == "__main__":
    quieten_lightning()
    for each in sys.argv[2:]:
        carry_out(Path(sys.argv[1]), each)
