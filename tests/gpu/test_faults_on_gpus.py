"""By NCCL, a rank that dies or stands still is named, before NCCL itself ends the others."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.training.project import write_project
from tests.training.sharded import launch
from tests.training.test_faults import faulty, local, log_of, root_cause
from tests.training.test_overdue import assert_named
from tests.training.test_processes import LONG, ended, wait_for_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(300),
]
GPUS = ("strategy.accelerator=gpu", "model.attention=sdpa", "model.compile=false")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return write_project(tmp_path_factory.mktemp("faults") / "root")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_dead_rank_ends_the_run_and_is_named_first(project, strategy):
    folder = project / "runs" / f"dead_{strategy}"
    process = local(project, f"name={folder.name}", f"strategy.name={strategy}", *GPUS, *LONG, "training.steps=2000")
    wait_for_step(process, folder, 5)
    os.kill(int(re.findall(r"process (\d+)", log_of(folder, 1))[-1]), signal.SIGKILL)
    killed = time.monotonic()
    code, output = ended(process)
    seconds = time.monotonic() - killed
    print(f"\n{strategy}: ended {seconds:.1f} s after the kill")
    assert code == 1 and seconds < 60, output
    assert "rank      : 1 " in root_cause(output) and "SIGKILL" in root_cause(output), output
    assert "error: " not in output.partition("exitcode: -9")[0], output


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_a_rank_that_stands_still_within_a_step_is_named(project, strategy):
    name = f"name=within_{strategy}"
    settings = (name, f"strategy.name={strategy}", *GPUS, "strategy.collective_timeout_seconds=5")
    began = time.monotonic()
    code, output = ended(faulty(project, "wait", *settings))
    print(f"\n{strategy}: ended after {time.monotonic() - began:.1f} s in all")
    assert code == 1
    told = r"error: .*: rank 1 did not come in 5 s \(strategy.collective_timeout_seconds\)"
    assert "rank      : 0 " in root_cause(output) and re.search(told, root_cause(output)), output
    assert "Watchdog" not in output, output


def test_a_rank_for_which_the_host_waits_in_the_device_is_named():
    process = launch(2, "tests.training.standing", "nccl", "one")
    output, _ = process.communicate(timeout=100)
    assert_named(process.returncode, output)
