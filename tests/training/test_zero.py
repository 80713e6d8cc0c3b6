"""DeepSpeed's ZeRO on processes makes the steps of one process, and goes on from other strategies' checkpoints."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training.test_faults import local
from tests.training.test_processes import LONG, ended, wait_for_step
from tests.training.test_run import rows, status
from tests.training.test_sharding import assert_same_curve, job, on_processes

pytestmark = pytest.mark.slow

HOWS = {
    "zero2": "strategy.name=deepspeed_zero2",
    "zero3": "strategy.name=deepspeed_zero3",
    "zero2_offload": "strategy.name=deepspeed_zero2 strategy.offload=true",
    "zero3_offload": "strategy.name=deepspeed_zero3 strategy.offload=true",
}
RUNS = [
    *((tuning, how) for tuning in ("lora", "hybrid", "full") for how in ("zero2", "zero3")),
    ("full", "zero2_offload"),
    ("lora", "zero3_offload"),
    ("full", "zero3_offload"),
    ("cached", "zero3"),
]


@pytest.fixture(scope="module")
def root(curves) -> Path:
    """The project of one process's runs, in which two have made them under ZeRO."""
    on_processes(curves, 2, *(job(tuning, f"name={tuning}_{how} {HOWS[how]}") for tuning, how in RUNS))
    on_processes(
        curves,
        2,
        job("full", f"name=single_to_zero3 {HOWS['zero3']} <full/10"),
        job("full", f"name=zero3_to_zero2 {HOWS['zero2']} <full_zero3/10"),
        job("full", "name=zero2_to_fsdp2 strategy.name=fsdp2 <full_zero2/10"),
        job("hybrid", "name=zero3_to_ddp strategy.name=ddp <hybrid_zero3/10"),
    )
    return curves


@pytest.mark.parametrize(("tuning", "how"), RUNS)
def test_two_processes_make_the_curve_of_one(root, tuning, how):
    assert_same_curve(root, tuning, f"{tuning}_{how}")


@pytest.mark.parametrize("run", ["single_to_zero3", "zero3_to_zero2", "zero2_to_fsdp2", "zero3_to_ddp"])
def test_a_run_goes_on_under_another_strategy(root, run):
    assert_same_curve(root, "hybrid" if run == "zero3_to_ddp" else "full", run, first_step=11)


@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_each_process_writes_its_half_of_what_is_managed(root, how):
    folder = root / "runs" / f"full_{how}" / "checkpoints" / "step_000020"
    for part in ("trainables", "average", "optimizer"):
        sizes = [path.stat().st_size for path in sorted(folder.glob(f"{part}.shard*"))]
        assert len(sizes) == 2 and abs(sizes[0] - sizes[1]) < 0.05 * sizes[0]


def test_through_the_launcher_it_is_stopped_goes_on_and_is_exported(project):
    folder = project / "runs" / "launched"
    named = ("name=launched", "strategy.name=deepspeed_zero3", "export=adapter")
    arguments = (*named, *LONG, "training.steps=30")
    process = local(project, *arguments)
    wait_for_step(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    ended(process)
    told = status(folder)
    assert told["state"] == "interrupted" and 5 <= told["step"] < 30
    code, output = ended(local(project, *arguments))
    assert code == 0 and f"resumed at step {told['step']}" in output, output
    assert status(folder)["state"] == "finished"
    assert [int(step) for step, name, _ in rows(folder)[1:] if name == "loss"] == list(range(1, 31))
    assert (folder / "export").is_dir(), output
