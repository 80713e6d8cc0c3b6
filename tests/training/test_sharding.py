"""Sharded runs on processes make the steps of one process, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosmos3_train.commands.replay import replay
from cosmos3_train.data.mixture import StepDataset
from cosmos3_train.export.verify import read_report
from cosmos3_train.training.checkpoints import load_checkpoint
from cosmos3_train.training.datamodule import StepData
from cosmos3_train.training.run import build
from cosmos3_train.training.skipped import list_skipped, read_shares
from tests.training.kills import kill_again_and_again
from tests.training.listening import heard, heard_between_steps, sums
from tests.training.project import experiment, load, write, write_project
from tests.training.sharded import PYTHONPATH, carry_out, launch, start
from tests.training.steps import difference
from tests.training.test_processes import UNMEASURED
from tests.training.test_run import poison, position, rows

pytestmark = pytest.mark.slow

STEPS = (
    "training.steps=20 training.samples_per_step=3 training.tokens_per_micro_batch=100 optimizer.learning_rate=0.003 "
    "training.checkpoint_every_n_steps=10 training.evaluate_every_n_steps=10 evaluation.heldout_samples=2 "
    "evaluation.action_samples=1"
)
"""Three samples a step: two ranks hold one and two; small packs, so that they also differ in their number."""

TUNINGS = {
    "full": f"small {STEPS} tuning.method=full model.checkpoint_activations=true",
    "hybrid": f"small {STEPS} tuning.method=hybrid model.checkpoint_activations=but_attention",
    "lora": f"small {STEPS} tuning.method=lora embodiments.mover.initialise_from=24",
    "dora": f"small {STEPS} tuning.method=lora embodiments.mover.initialise_from=24 tuning.dora=true",
    "cached": f"moves {STEPS} tuning.method=tower tuning.towers=[generation]",
}


WHOLE = ("full", "hybrid", "lora")
"""Tunings that are made under `ddp` too, where every process holds all weights."""


def job(tuning: str, *more: str) -> str:
    return " ".join((TUNINGS[tuning], *more))


def write_moves(root: Path) -> Path:
    """Add `experiments/moves.yaml`: robots alone, their instructions' keys and values cached."""
    without_talk = experiment(root)
    del without_talk["data"]["datasets"]["talk"]
    without_talk["data"]["datasets"]["moves"]["cache_reasoner"] = True
    write(root / "experiments" / "moves.yaml", without_talk)
    return root


def on_processes(root: Path, count: int, *jobs: str) -> None:
    """Carry out jobs on so many processes."""
    process = start(root, count, *jobs)
    try:
        output, _ = process.communicate(timeout=120 + 60 * len(jobs))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        raise AssertionError(process.communicate()[0]) from None
    assert process.returncode == 0, output


def assert_exported(root: Path, run: str, form: str) -> None:
    """By `cosmos3 export` in a process of its own, which finds upstream's numbers to be those of the run's model."""
    line = (sys.executable, "-m", "cosmos3_train.cli", "export", run, "--to", form)
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(root / "runs" / run / "export" / form)
    assert report.relative_difference <= report.limit and report.change > 1e-3


@pytest.fixture(scope="module")
def root(curves) -> Path:
    """A project in which every tuning was trained by one process, and then by two, with sharded weights or whole."""
    root = curves
    on_processes(
        root,
        2,
        *(job(tuning, f"heard name={tuning}_fsdp2 strategy.name=fsdp2") for tuning in TUNINGS),
        *(job(tuning, f"heard name={tuning}_ddp strategy.name=ddp") for tuning in WHOLE),
        job("full", "name=single_to_fsdp2 strategy.name=fsdp2 <full/10"),
        job("full", "name=ddp_to_fsdp2 strategy.name=fsdp2 <full_ddp/10"),
        job("full", "heard name=fsdp2_to_ddp strategy.name=ddp <full_fsdp2/10"),
    )
    carry_out(root, job("full", "name=fsdp2_to_single <full_fsdp2/10"))
    return root


def told(folder: Path, names: tuple[str, ...]) -> dict[tuple[str, str], float]:
    return {(step, name): float(value) for step, name, value in rows(folder)[1:] if name.startswith(names)}


def assert_same_curve(root: Path, one: str, other: str, first_step: int = 1, steps: int = 20) -> None:
    """Losses within 1e-5 at every step, what is measured in between too, and the weights at the end."""
    expected, found = (told(root / "runs" / run, ("loss", "heldout/loss")) for run in (one, other))
    expected = {key: value for key, value in expected.items() if int(key[0]) >= first_step}
    assert sum(key[1] == "loss" for key in expected) == steps + 1 - first_step
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7, nan_ok=True)
    ends = [load_checkpoint(root / "runs" / run / "checkpoints" / f"step_{steps:06d}") for run in (one, other)]
    for part in ("trainables", "average", "optimizer"):
        theirs, ours = (getattr(end, part) for end in ends)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].shape == value.shape
            if name.endswith(".step"):
                assert torch.equal(ours[name], value), name
    wrong = {n: difference(ends[1].trainables[n], v) for n, v in ends[0].trainables.items()}
    assert max(wrong.values()) < 1e-3, max(wrong, key=wrong.__getitem__)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_two_processes_that_share_the_weights_make_the_curve_of_one(root, tuning):
    assert_same_curve(root, tuning, f"{tuning}_fsdp2")


@pytest.mark.parametrize("tuning", WHOLE)
def test_two_processes_that_each_hold_the_weights_make_the_curve_of_one(root, tuning):
    assert_same_curve(root, tuning, f"{tuning}_ddp")


@pytest.mark.parametrize("run", ["single_to_fsdp2", "ddp_to_fsdp2", "fsdp2_to_ddp", "fsdp2_to_single"])
def test_a_run_goes_on_under_another_strategy(root, run):
    assert_same_curve(root, "full", run, first_step=11)


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_shards(root):
    on_processes(root, 3, job("full", "name=two_to_three strategy.name=fsdp2 <full_fsdp2/10"))
    assert_same_curve(root, "full", "two_to_three", first_step=11)


@pytest.mark.parametrize(
    ("run", "form"),
    [
        ("full_fsdp2", "merged"),
        pytest.param("lora_fsdp2", "adapter", marks=pytest.mark.long),
        pytest.param("hybrid_ddp", "adapter", marks=pytest.mark.long),
    ],
)
def test_one_process_exports_what_several_hold_a_part_of_each(root, run, form):
    assert_exported(root, run, form)


def test_gradients_are_summed_in_the_last_pass_of_a_step_alone(root):
    before, last = heard(root / "runs" / "fsdp2_to_ddp")
    assert not before and sums(last)
    for tuning in WHOLE:
        before, last = heard(root / "runs" / f"{tuning}_ddp")
        assert not before and sums(last)
    for tuning in TUNINGS:
        before, last = heard(root / "runs" / f"{tuning}_fsdp2")
        assert before and not sums(before), "weights are gathered in every pass"
        whole = tuning in ("full", "cached")
        assert ("_reduce_scatter_base_" in last) == whole, "adapters' are summed as under ddp"


def test_between_steps_lightning_tells_the_ranks_nothing_that_a_device_waits_for(root):
    assert "broadcast_" not in heard_between_steps(root / "runs" / "fsdp2_to_ddp")


def test_the_shares_of_those_steps_differ_in_every_way(root):
    """In their packs' number, and in what they hold: a step without conversations, one where a rank has none."""
    run = build(load(root, "name=looked", *STEPS.split()))
    mixture = StepData(run.loaded, run.opened, run.module.packer, run.device).mixture
    shares = [StepDataset(mixture, 3, rank, 2, 20) for rank in (0, 1)]
    steps = [[run.module.packer(share[step]) for share in shares] for step in range(20)]
    assert any(len(one.packs) != len(other.packs) for one, other in steps)
    assert any(one.speaks != other.speaks for one, other in steps)
    assert any(not one.speaks and not other.speaks for one, other in steps)
    assert any(not one.generates for one, other in steps)


def test_a_checkpoint_holds_each_row_once_and_whole_weights_once(root):
    folder = root / "runs" / "full_fsdp2" / "checkpoints" / "step_000020"
    whole, *shards = "whole.safetensors", "shard_00000.safetensors", "shard_00001.safetensors"
    assert {path.name for path in (folder / "trainables").iterdir()} == {whole, *shards}
    sizes = [(folder / "trainables" / name).stat().st_size for name in shards]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    lora = root / "runs" / "lora_fsdp2" / "checkpoints" / "step_000020"
    assert [path.name for path in (lora / "trainables").iterdir()] == [whole], "adapters are whole on every rank"


@pytest.mark.parametrize("copies", ["ddp", pytest.param("hsdp strategy.shards=1", marks=pytest.mark.long)])
def test_copies_that_differ_end_the_run(project, copies):
    experiment, *words = job("full", f"name=differing strategy.name={copies} strategy.devices=2", *UNMEASURED).split()
    line = ("train", str(project / "experiments" / f"{experiment}.yaml"), *words, "export=none", "--fresh")
    process = launch(2, "tests.training.differing", *line)
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0 and "AssertionError: trainable weights differ between ranks" in output, output


@pytest.mark.long
def test_two_copies_of_two_shards_make_the_curve_of_one(root):
    """Five samples a step: no rank of four is without one."""
    five, tunings = "training.samples_per_step=5", ("full", "hybrid", "lora")
    for tuning in tunings:
        carry_out(root, job(tuning, f"name=five_{tuning}", five))
    hsdp = "strategy.name=hsdp strategy.shards=2"
    on_processes(root, 4, *(job(tuning, f"heard name=five_{tuning}_hsdp {hsdp}", five) for tuning in tunings))
    for tuning in tunings:
        assert_same_curve(root, f"five_{tuning}", f"five_{tuning}_hsdp")
        before, last = heard(root / "runs" / f"five_{tuning}_hsdp", ranks=4)
        assert before and not sums(before) and sums(last)
    assert_exported(root, "five_full_hsdp", "merged")


@pytest.mark.long
def test_eight_processes_make_the_steps_of_one(root):
    """Of a node's number; a sample each."""
    few = f"training.steps=4 training.samples_per_step=8 {' '.join(UNMEASURED)}"
    carry_out(root, job("lora", "name=one_of_eight", few))
    strategies = ("ddp", "fsdp2")
    on_processes(root, 8, *(job("lora", f"name=eight_{name} strategy.name={name}", few) for name in strategies))
    for name in strategies:
        assert_same_curve(root, "one_of_eight", f"eight_{name}", steps=4)


@pytest.mark.long
def test_a_step_with_a_bad_gradient_is_left_out_by_every_rank(tmp_path):
    strategies = ("fsdp2", "deepspeed_zero2", "deepspeed_zero3")
    root = write_project(tmp_path / "root")
    few = "training.steps=6 training.samples_per_step=2 data.datasets.talk.weight=0.001 data.caption_dropout=0"
    build(load(root, *few.split()))  # encodes the latents
    poison(root)  # held-out windows too, whose loss is then no number
    carry_out(root, job("full", "name=bad", few))
    on_processes(root, 2, *(job("full", f"name=bad_{name} strategy.name={name}", few) for name in strategies))
    expected = position(root / "runs" / "bad", 6)
    assert expected["skipped"] > 0
    for name in strategies:
        assert position(root / "runs" / f"bad_{name}", 6) == pytest.approx(expected, rel=1e-5)
        assert_same_curve(root, "bad", f"bad_{name}", steps=6)


@pytest.mark.long
def test_a_spike_is_left_out_by_every_rank_and_made_again_by_one_process(root):
    """All go on from one checkpoint, by whose position the norm of the next step is just too far above the usual."""
    strategies = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
    primed = root / "runs" / "primed" / "checkpoints" / "step_000010"
    shutil.copytree(root / "runs" / "full" / "checkpoints" / "step_000010", primed)
    told_norms = {int(row[0]): float(row[2]) for row in rows(root / "runs" / "full") if row[1] == "gradient_norm"}
    state = json.loads((primed / "state.json").read_text())
    (primed / "state.json").write_text(json.dumps(state | {"norms": 60, "usual_norm": 0.09 * told_norms[11]}))
    carry_out(root, job("full", "name=spike <primed/10"))
    on_processes(root, 2, *(job("full", f"name=spike_{name} strategy.name={name} <primed/10") for name in strategies))
    expected = position(root / "runs" / "spike", 20)
    assert expected["skipped"] > 0
    for name in strategies:
        assert position(root / "runs" / f"spike_{name}", 20) == pytest.approx(expected, rel=1e-4)
        assert_same_curve(root, "spike", f"spike_{name}", first_step=11)
    at_once = json.loads((primed / "state.json").read_text())["drawn"]
    module = build(load(root, *job("full", "name=primed").split()[1:])).module  # with the weights of that draw
    for name in strategies:
        shares, norm = read_shares(list_skipped(root / "runs" / f"spike_{name}")[at_once])
        samples, again = replay(shares, module)
        assert len(shares) == 2 and len(samples) == 3 and again == pytest.approx(norm, rel=1e-5)


@pytest.mark.long
def test_killed_at_random_it_ends_with_the_weights_of_an_undisturbed_run(root):
    seed = random.randrange(1 << 30)
    assert kill_again_and_again(root, "fsdp2", 1, seed) == [], f"seed {seed}"
