"""DeepSpeed's ZeRO on processes makes the steps of one process, and goes on from other strategies' checkpoints."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training.listening import heard, sums
from tests.training.test_faults import local
from tests.training.test_processes import LONG, ended, wait_for_step
from tests.training.test_run import rows, status
from tests.training.test_sharding import assert_exported, assert_same_curve, job, on_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first one makes the runs of all

HOWS = {
    "zero2": "strategy.name=deepspeed_zero2",
    "zero3": "strategy.name=deepspeed_zero3",
    "zero2_offload": "strategy.name=deepspeed_zero2 strategy.offload=true",
    "zero3_offload": "strategy.name=deepspeed_zero3 strategy.offload=true",
    "zero2_parted": "strategy.name=deepspeed_zero2 strategy.hold_gradients=false",
    "zero3_parted": "strategy.name=deepspeed_zero3 strategy.hold_gradients=false",
    "zero3_measured": "strategy.name=deepspeed_zero3 training.evaluate_every_n_steps=5",
    "zero3_often": "strategy.name=deepspeed_zero3 training.evaluate_every_n_steps=1",
    "zero3_compiled": "strategy.name=deepspeed_zero3 model.compile=true",
}
RUNS = [("full", "zero3"), ("lora", "zero3_measured")]
"""Evaluated: after each time stage 3 has to learn anew what follows what, also with a rank of no robot."""
MORE = [
    ("lora", "zero3_often"),
    ("full", "zero2"),
    ("lora", "zero3"),
    ("lora", "zero2"),
    ("hybrid", "zero2"),
    ("hybrid", "zero2_offload"),
    ("hybrid", "zero3"),
    ("hybrid", "zero3_often"),
    ("full", "zero2_parted"),
    ("full", "zero3_parted"),
    ("full", "zero2_offload"),
    ("lora", "zero2_offload"),
    ("lora", "zero3_offload"),
    ("hybrid", "zero3_offload"),
    ("full", "zero3_offload"),
    ("cached", "zero3"),
    ("lora", "zero3_compiled"),
    ("hybrid", "zero3_compiled"),
    ("full", "zero3_compiled"),
]
RESUMED = {
    "zero3_to_fsdp2": ("full", "strategy.name=fsdp2 <full_zero3/10"),
}
MORE_RESUMED = {
    "single_to_zero3": ("full", f"{HOWS['zero3']} <full/10"),
    "zero2_to_fsdp2": ("full", "strategy.name=fsdp2 <full_zero2/10"),
    "zero2_to_zero3": ("full", f"{HOWS['zero3']} <full_zero2/10"),
    "zero3_to_zero2": ("full", f"{HOWS['zero2']} <full_zero3/10"),
    "zero3_to_ddp": ("hybrid", "strategy.name=ddp <hybrid_zero3/10"),
}


def listened(how: str) -> str:
    return "" if "compiled" in how else "heard"


@pytest.fixture(scope="module")
def root(curves, long_too) -> Path:
    """The project of one process's runs, in which two have made them under ZeRO."""
    runs, resumed = RUNS + MORE * long_too, RESUMED | (MORE_RESUMED if long_too else {})
    made = [job(tuning, f"{listened(how)} name={tuning}_{how} {HOWS[how]}") for tuning, how in runs]
    on_processes(curves, 2, *made, *(job(tuning, f"name={name} {words}") for name, (tuning, words) in resumed.items()))
    return curves


@pytest.mark.parametrize(("tuning", "how"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.long) for run in MORE)])
def test_two_processes_make_the_curve_of_one(root, tuning, how):
    assert_same_curve(root, tuning, f"{tuning}_{how}")


@pytest.mark.parametrize(
    ("tuning", "how"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.long) for run in MORE if listened(run[1]))],
)
def test_gradients_are_summed_in_the_last_pass_of_a_step_alone_unless_they_are_parted(root, tuning, how):
    before, last = heard(root / "runs" / f"{tuning}_{how}")
    assert sums(last) and bool(sums(before)) == how.endswith("parted")


@pytest.mark.parametrize("run", [*RESUMED, *(pytest.param(run, marks=pytest.mark.long) for run in MORE_RESUMED)])
def test_a_run_goes_on_under_another_strategy(root, run):
    tuning, _ = (RESUMED | MORE_RESUMED)[run]
    assert_same_curve(root, tuning, run, first_step=11)


@pytest.mark.parametrize("how", [pytest.param("zero2", marks=pytest.mark.long), "zero3"])
def test_each_process_writes_its_half_of_what_is_managed(root, how):
    folder = root / "runs" / f"full_{how}" / "checkpoints" / "step_000020"
    for part in ("trainables", "average", "optimizer"):
        sizes = [path.stat().st_size for path in sorted((folder / part).glob("shard*"))]
        assert len(sizes) == 2 and abs(sizes[0] - sizes[1]) < 0.05 * sizes[0]


@pytest.mark.long
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_a_run_goes_on_with_another_number_of_processes(root, how):
    on_processes(root, 3, job("full", f"name={how}_two_to_three {HOWS[how]} <full_{how}/10"))
    assert_same_curve(root, "full", f"{how}_two_to_three", first_step=11)


@pytest.mark.long
@pytest.mark.parametrize(
    ("run", "form"), [("full_zero3", "merged"), ("full_zero2", "merged"), ("lora_zero2", "adapter")]
)
def test_one_process_exports_what_two_hold_a_part_of_each(root, run, form):
    assert_exported(root, run, form)


@pytest.mark.long
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
