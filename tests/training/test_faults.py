"""Two processes of one run, one of which dies, fails or stands still; and what the other and the user are told."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from cosmos3_train.training.checkpoints import list_checkpoints
from tests.training.faulty import LATE_SECONDS
from tests.training.sharded import PYTHONPATH, REPOSITORY
from tests.training.test_processes import LONG, ended, steps_made, wait_for_step
from tests.training.test_run import rows, status

pytestmark = pytest.mark.slow

SHORT = (*LONG, "training.steps=12", "training.checkpoint_every_n_steps=4")
FAULTY = ("-m", "tests.training.faulty")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(project: Path, command: tuple[str | Path, ...], *arguments: str, processes: int = 2) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "PROCESSES": str(processes)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.Popen(
        [*command, *arguments],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def local(project: Path, *arguments: str, processes: int = 2) -> subprocess.Popen:
    launcher = (REPOSITORY / "launch" / "local.sh", "experiments/small.yaml")
    return start(project, launcher, *arguments, processes=processes)


def faulty(project: Path, what: str, *arguments: str, on: int = 1) -> subprocess.Popen:
    launcher = (*TORCHRUN, *FAULTY, what, str(on), "train", "experiments/small.yaml")
    return start(project, launcher, "strategy.name=ddp", "strategy.devices=2", *LONG, *arguments)


def by_hand(folders: Sequence[Path], *arguments: str) -> list[subprocess.Popen]:
    """A torchrun of one process in each folder, as on machines of their own."""
    place = ("--nnodes", str(len(folders)), "--nproc-per-node", "1")
    first = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    line = ("-m", "cosmos3_train.cli", "train", "experiments/small.yaml", "strategy.name=ddp", "strategy.devices=1")
    return [
        start(folder, (*TORCHRUN[:3], *place, *first, "--node-rank", str(number), *line), *arguments)
        for number, folder in enumerate(folders)
    ]


def log_of(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank_{rank:03d}.log").read_text()


def root_cause(output: str) -> str:
    """The last part of torchrun's report."""
    return output.rpartition("Root Cause")[2]


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), pytest.param("fsdp2", 3, marks=pytest.mark.long)])
def test_a_dead_rank_ends_the_run_and_is_named_first(project, strategy, processes):
    folder = project / "runs" / f"dead_{strategy}"
    line = (f"name=dead_{strategy}", f"strategy.name={strategy}", "training.samples_per_step=3", *LONG)
    process = local(project, *line, processes=processes)
    wait_for_step(process, folder, 5)
    found = re.findall(r"process (\d+)", log_of(folder, 1))
    os.kill(int(found[-1]), signal.SIGKILL)
    killed = time.monotonic()
    code, output = ended(process)
    assert code == 1 and time.monotonic() - killed < 60, output
    assert "rank      : 1 " in root_cause(output) and "SIGKILL" in root_cause(output), output
    before = output.partition("exitcode: -9")[0]
    assert "error" not in before.lower() and "Traceback" not in before, "another rank's complaint came first"
    assert status(folder)["state"] == "running"


def test_a_signal_that_reaches_one_rank_alone_stops_all_of_them_at_one_step(project):
    folder = project / "runs" / "one_signalled"
    process = local(project, "name=one_signalled", "strategy.name=ddp", *LONG)
    wait_for_step(process, folder, 5)
    os.kill(int(re.findall(r"process (\d+)", log_of(folder, 1))[-1]), signal.SIGTERM)
    ended(process)
    told = status(folder)
    assert told["state"] == "interrupted" and 5 <= told["step"] < 120
    assert list_checkpoints(folder / "checkpoints")[-1].name == f"step_{told['step']:06d}"


def test_a_rank_s_own_error_comes_first(project):
    folder = project / "runs" / "failing"
    code, output = ended(faulty(project, "fail", "name=failing"))
    assert code == 1
    assert "ValueError: the reader is broken" in root_cause(output), output
    first = re.search(r"error.*", output, re.IGNORECASE)
    assert first is not None and "rank" not in first[0] and "gone" not in output, output
    assert "ValueError: the reader is broken" in log_of(folder, 1) and "Traceback" in log_of(folder, 1)
    assert steps_made(folder) == 5, "steps are counted from 0 where they are drawn"


@pytest.mark.long
def test_a_rank_that_stands_still_is_named(project):
    began = time.monotonic()
    # torchrun gives the one that stands still half a minute to end.
    code, output = ended(faulty(project, "stop", "name=stuck", "strategy.collective_timeout_seconds=3"))
    assert code == 1 and time.monotonic() - began < 120, output
    told = "error: the samples of step 6: rank 1 did not come in 3 s (strategy.collective_timeout_seconds)"
    assert output.count(told) == 2, "once by the first rank, once in torchrun's report\n" + output
    assert "rank      : 0 " in root_cause(output) and "Traceback" not in output.partition(told)[0], output


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "on"),
    [
        ("fsdp2", 1),
        ("fsdp2", 0),
        ("ddp", 1),
        ("ddp strategy.context_parallel=2", 1),
        ("hsdp strategy.shards=1", 1),
        ("deepspeed_zero3", 1),
    ],
)
def test_a_rank_that_stands_still_within_a_step_is_named(project, strategy, on):
    name = f"name=within_{re.sub(r'[^a-z0-9]', '_', strategy)}_{on}"
    settings = (name, *f"strategy.name={strategy}".split(), "strategy.collective_timeout_seconds=3")
    code, output = ended(faulty(project, "wait", *settings, on=on))
    assert code == 1
    report, told = root_cause(output), rf"rank {on} did not come in 3 s \(strategy.collective_timeout_seconds\)"
    assert f"rank      : {1 - on} " in report and "Traceback" not in report, output
    assert re.search(f"error: .*: {told}", report), output


@pytest.mark.long
def test_a_disk_that_is_full_for_one_rank_alone_is_its_own_error_and_costs_no_checkpoint(project):
    """Rank 1 writes its rows of the second checkpoint, the first rank waits for them."""
    folder = project / "runs" / "one_full"
    settings = ("name=one_full", "strategy.name=fsdp2", "tuning.method=full", *SHORT)
    code, output = ended(faulty(project, "fill", *settings))
    assert code == 1
    told = re.search(r"error: (.*)", output)
    assert told is not None, output
    assert re.search(r"one_full/checkpoints/step_000008: the checkpoint .* \(.*too large.*\); free some space", told[1])
    assert "rank      : 1 " in root_cause(output) and told[1] in root_cause(output), output
    assert "No such file" not in output and "gone" not in output, output
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_000004"]
    code, output = ended(local(project, *settings))
    assert code == 0 and "resumed at step 4 from step_000004" in output, output
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000008", "step_000012"]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_whose_data_come_late_is_named(project, strategy):
    """Also where all are as slow within their passes, as they wait for each other there."""
    folder = project / "runs" / f"late_{strategy}"
    code, output = ended(
        faulty(project, "be_late", f"name=late_{strategy}", f"strategy.name={strategy}", "training.steps=14")
    )
    assert code == 0, output
    found = re.findall(r"step (\d+): rank 1 waits longest for its data: (0\.\d+) s a step, the middle rank 0", output)
    assert len(found) == 1 and int(found[0][0]) in range(9, 12) and float(found[0][1]) >= LATE_SECONDS, output
    last = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines() if line.startswith("14,")]
    times = {name: float(value) for _, name, value in last}
    assert times["slowest_reader"] == 1 and times["slowest_reader_seconds"] >= LATE_SECONDS > times["reading_seconds"]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_zero3"])
def test_sigterm_during_an_evaluation_leaves_it_on_all_ranks(project, strategy):
    """The first rank measures, the other lends it its parts; the run that goes on makes what was left."""
    brief = (
        "training.steps=3", "training.evaluate_every_n_steps=3", "training.checkpoint_every_n_steps=0",
        f"strategy.name={strategy}", "evaluation.before=false", "evaluation.heldout_samples=2",
        "evaluation.action_samples=1",
    )  # fmt: skip
    whole, left = (project / "runs" / f"{name}_{strategy}" for name in ("measured", "left"))
    process = local(project, f"name={left.name}", *brief, "evaluation.solver_steps=100000")
    while not (left / "checkpoints" / "step_000003").is_dir():  # made whole before the evaluation begins
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    time.sleep(2)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, output = ended(process)
    assert time.monotonic() - asked < 40 and "error: " not in output, output
    assert status(left) == {"state": "interrupted", "step": 3, "steps": 3}
    assert not [row for row in rows(left) if row[1].startswith(("heldout", "evaluated"))]
    for folder in (left, whole):
        code, output = ended(local(project, f"name={folder.name}", *brief))
        assert code == 0, output
    assert [row[1] for row in rows(left)].count("evaluated") == 1 and rows(left) == rows(whole)


def test_sigterm_to_torchrun_saves_and_tells_so(project):
    folder = project / "runs" / "told"
    process = local(project, "name=told", *LONG)
    wait_for_step(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    ended(process)
    told = status(folder)
    assert told["state"] == "interrupted" and 5 <= told["step"] < 120
    assert (folder / "checkpoints" / f"step_{told['step']:06d}" / "state.json").is_file()


@pytest.mark.long
def test_torchrun_by_hand_on_each_machine_ends_on_all_when_a_rank_dies(project):
    """Two machines are two torchruns here. Nothing tells the one of the living rank but that rank itself."""
    folder = project / "runs" / "by_hand"
    machines = by_hand((project, project), "name=by_hand", *LONG)
    wait_for_step(machines[0], folder, 5)
    found = re.findall(r"process (\d+)", log_of(folder, 1))
    os.kill(int(found[-1]), signal.SIGKILL)
    killed = time.monotonic()
    (first, told), (second, of_the_dead) = (ended(machine) for machine in machines)
    assert first == second == 1 and time.monotonic() - killed < 60, told
    assert "rank      : 1 " in root_cause(of_the_dead) and "SIGKILL" in root_cause(of_the_dead)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ("rank 1 has gone" in errors[0] or "Connection" in errors[0]), told


@pytest.mark.long
def test_machines_that_see_other_checkpoints_are_told_so(project, tmp_path):
    process = local(project, "name=apart", *LONG)
    wait_for_step(process, project / "runs" / "apart", 20)
    process.send_signal(signal.SIGTERM)
    ended(process)
    elsewhere = shutil.copytree(project, tmp_path / "elsewhere")
    before, newest = list_checkpoints(elsewhere / "runs" / "apart" / "checkpoints")
    shutil.rmtree(newest)
    output, _ = (ended(machine)[1] for machine in by_hand((project, elsewhere), "name=apart", *LONG))
    steps = [int(path.name.removeprefix("step_")) for path in (newest, before)]
    told = f"rank 0 stands at step {steps[0]}, rank 1 at step {steps[1]}, so they do not see the same checkpoints"
    assert told in root_cause(output) and "Traceback" not in root_cause(output), output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
