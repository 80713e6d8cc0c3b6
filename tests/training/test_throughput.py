"""The count of a step's operations, by hand and by torch's own counter, and the rates that a run logs."""

from __future__ import annotations

import csv
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from cosmos3_train.config import Tuning
from cosmos3_train.flow.tasks import CONVERSATION
from cosmos3_train.training.gpus import GPUS, find_gpu
from cosmos3_train.training.loop import RunLoop
from cosmos3_train.training.run import make_trainer
from cosmos3_train.training.throughput import Arithmetic, lagging, spread, together
from cosmos3_train.types import StepBatch
from tests.training.steps import CPU, make_module, mixed_samples

NANO = SimpleNamespace(
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_key_value_heads=8,
    head_dim=128,
    num_attention_heads=32,
    vocab_size=151936,
    hidden_act="silu",
)
LORA = Tuning(method="lora", rank=32)


@pytest.mark.parametrize(
    "samples, text, generation, expected",
    [
        (16, 180, 5 * 8 * 8 + 16, 194_430_829_068_288),
        (4, 250, 9 * 17 * 23 + 32, 504_128_723_484_672),
        (2, 400, 24 * 15 * 26, 854_601_939_025_920),
        (1, 400, 24 * 23 * 40, 1_497_346_269_511_680),
    ],
    ids=["policy256", "policy480", "video480", "video720"],
)
def test_the_four_workloads_cost_what_was_counted_by_hand(samples, text, generation, expected):
    counted = Arithmetic.of(NANO, LORA).flops([text] * samples, [generation] * samples)
    assert counted == expected


def test_passes_by_what_trains():
    tokens = ([30, 0, 7], [50, 20, 0])

    def count(labelled=0, **tuning):
        return Arithmetic.of(NANO, Tuning(**tuning)).flops(*tokens, labelled)

    weights = 36 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 12288)
    joint = 36 * 4 * 4096 * (50 * 80 + 20 * 20)
    causal = 36 * 2 * 4096 * (30**2 + 7**2)
    assert count(method="lora") == weights * (2 * 37 + 4 * 70) + 3 * joint + causal
    assert count(method="tower") == weights * (2 * 37 + 6 * 70) + 3 * joint + causal
    assert count(method="full") == weights * 6 * 107 + 3 * (joint + causal)
    reasoner = weights * 4 * 107 + 3 * (joint + causal)
    assert count(method="lora", towers=["understanding"]) == reasoner
    assert count(5, method="lora", towers=["understanding"]) == reasoner + 4 * 4096 * 151936 * 5


def test_the_layers_weights_are_those_that_torch_multiplies_by(project):
    module = make_module(project / "model", tuning=Tuning(method="tower"))
    packs = module.packer(StepBatch(0, mixed_samples())).packs
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        for pack in packs:
            module.backbone(pack)
    counted = sum(
        count
        for name, operations in counter.get_flop_counts().items()
        if name.rpartition(".")[2].isdigit() and ".layers." in name
        for operation, count in operations.items()
        if "mm" in str(operation) and "bmm" not in str(operation)
    )
    tokens = sum(pack.tokens for pack in packs)
    assert counted == 2 * module.arithmetic.tower_weights * tokens


class SlowSteps(Dataset[StepBatch]):
    """The same samples again and again, after a wait."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> StepBatch:
        time.sleep(self.seconds)
        return StepBatch(step, [s for s in mixed_samples() if s.task != CONVERSATION])


@pytest.mark.parametrize("seconds, low, high", [(0.0, 0.0, 0.3), (1.5, 0.3, 1.0)])
def test_a_slow_loader_shows_in_the_log(project, tmp_path, seconds, low, high):
    module = make_module(project / "model")
    training = replace(module.experiment.training, steps=3, log_every_n_steps=3, checkpoint_every_n_steps=0)
    module.experiment = replace(module.experiment, training=training)
    seen = []
    trainer = make_trainer(module.experiment, CPU, RunLoop(module, tmp_path, watch=seen.append))
    trainer.fit(module, DataLoader(SlowSteps(3, seconds), batch_size=None))  # pyright: ignore[reportArgumentType]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        found = {name: float(value) for step, name, value in csv.reader(file) if step == "3"}
    assert low <= found["data_wait_share"] <= high
    assert len(seen) == 3
    assert found["reading_seconds"] == pytest.approx(sum(time.reading for time in seen) / 3)
    assert seconds <= found["reading_seconds"] <= found["data_wait_share"] * found["step_seconds"]
    assert found["step_seconds"] == pytest.approx(sum(time.seconds for time in seen) / 3)
    assert found["samples_per_second"] == pytest.approx(4 / found["step_seconds"])
    assert found["tokens_per_second"] == pytest.approx(seen[0].tokens / found["step_seconds"])
    assert found["budget_filled"] == seen[0].tokens / (found["packs"] * module.packer.budget) <= 1
    assert "mfu" not in found, "a CPU has no peak to compare with"
    assert all(step.flops == module.report.flops > 0 for step in seen)


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie-80g"),
        ("NVIDIA H100 NVL", "h100-nvl-94g"),
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24g"),
        ("NVIDIA L4", "l4-24g"),
        ("NVIDIA L40S", "l40s-48g"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_found_by_the_name_that_torch_gives_it(name, key):
    found = find_gpu(name)
    assert (found.key if found else None) == key


def test_gpus_have_keys_of_their_own():
    assert len({gpu.key for gpu in GPUS}) == len(GPUS)


def test_the_slowest_rank_is_named_where_it_holds_the_others_up():
    ranks = [[1.0, 0.02, 30.5], [1.1, 0.01, 31.0], [2.0, 0.0, 0.0], [1.05, 0.0, 29.0]]
    assert spread(ranks) == {
        "slowest_rank": 2.0, "slowest_rank_own_seconds": 2.0,
        "slowest_reader": 0.0, "slowest_reader_seconds": 0.02, "largest_peak_memory_gib": 31.0,
    }  # fmt: skip
    assert lagging(ranks) == {
        ("passes", 2): "rank 2 is the slowest: its passes of a step take 2 s, the middle rank's 1.05 s"
    }
    assert lagging([[1.0, 0.0, 0.0], [1.1, 0.0, 0.0]]) == {}
    assert "largest_peak_memory_gib" not in spread([[1.0, 0.0, 0.0], [1.1, 0.0, 0.0]]), "on CPUs there is none"


def test_ranks_that_draw_more_samples_than_the_first_are_counted():
    """Ten samples a step of 2 s on four ranks, the first of which draws two."""
    ranks = [[1.0, 0.0, 0.0, count * 50.0, count / 2, count / 10] for count in (2, 3, 2, 3)]
    assert together(ranks, 1) == pytest.approx({"tokens_per_second": 500.0, "samples_per_second": 5.0, "mfu": 0.25})
    shared = [ranks[0], ranks[0], ranks[1], ranks[1]]
    assert together(shared, 2) == pytest.approx({"tokens_per_second": 250.0, "samples_per_second": 2.5, "mfu": 0.25})
    assert "mfu" not in together([[1.0, 0.0, 0.0, 50.0, 1.0, 0.0]] * 2, 1), "of a GPU whose peak is not known"


def test_the_rank_whose_data_come_late_is_named_where_the_others_wait_for_them():
    late = [[1.0, 0.01, 0.0], [1.0, 0.4, 0.0], [1.0, 0.01, 0.0]]
    assert lagging(late) == {
        ("reading", 1): "rank 1 waits longest for its data: 0.4 s a step, the middle rank 0.01 s"
    }  # fmt: skip
    assert lagging([[10.0, 0.01, 0.0], [10.0, 0.4, 0.0]]) == {}, "little beside the step"
    assert lagging([[1.0, 0.8, 0.0], [1.0, 0.9, 0.0]]) == {}, "all read as slowly: data_wait_share tells"
    assert list(lagging([[1.0, 0.0, 0.0], [2.0, 0.4, 0.0]])) == [("passes", 1), ("reading", 1)]
