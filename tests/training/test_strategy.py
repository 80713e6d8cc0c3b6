"""Which strategy the processes that were started make, and those that they cannot make, in one line."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cosmos3_train.config import Strategy, UserError, load_experiment
from cosmos3_train.training.strategy import (
    connect,
    data_rank,
    device_for,
    device_mesh,
    shards_weights,
    strategy_name,
    zero_stage,
)

REPOSITORY = Path(__file__).resolve().parents[2]
ZERO = ("deepspeed_zero2", "deepspeed_zero3")


@pytest.fixture
def started(monkeypatch):
    """Say how many processes torchrun has started, on so many machines."""

    def start(processes: int, machines: int = 1) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes // machines))
        monkeypatch.setenv("LOCAL_RANK", "0")

    return start


def test_auto_is_single_for_one_process_and_ddp_for_several(started):
    assert strategy_name(Strategy()) == "single"
    assert strategy_name(Strategy(devices=4)) == "ddp", "which then says what starts four"
    started(1)
    assert strategy_name(Strategy()) == "single"
    started(2, machines=2)
    assert strategy_name(Strategy(devices=1)) == "ddp"
    assert strategy_name(Strategy(name="fsdp2")) == "fsdp2"


def test_neighbours_that_share_packs_draw_the_same_samples(started, monkeypatch):
    started(4)
    found = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        found.append(data_rank(Strategy(devices=4, context_parallel=2)))
    assert found == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("part", ["auto", "single", "ddp", "fsdp2", "hsdp", *ZERO, "deepspeed_zero3_offload"])
def test_every_strategy_is_a_part(part):
    loaded = load_experiment(REPOSITORY / "experiments" / "nano_policy_lora.yaml", ["parts.strategy=" + part])
    strategy, name = loaded.experiment.strategy, part.removesuffix("_offload")
    assert strategy.name == name and strategy.offload == part.endswith("_offload")
    assert strategy.is_sharded == (name in ("fsdp2", "hsdp", *ZERO))
    assert shards_weights(strategy) == (name in ("fsdp2", "hsdp", "deepspeed_zero3"))
    assert zero_stage(strategy) == {"deepspeed_zero2": 2, "deepspeed_zero3": 3}.get(name, 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["strategy.context_parallel=2"], "context_parallel is 2, which strategy.name 'deepspeed_zero3' does not do"),
        (["strategy.shards=2"], "strategy.shards is 2; hsdp alone reads it, not 'deepspeed_zero3'"),
        (["model.base_precision=fp8"], "strategy.name 'deepspeed_zero3' spreads weights over processes in their own"),
        (["model.base_precision=fp8", "strategy.name=deepspeed_zero2"], "'deepspeed_zero2' was never run; use ddp"),
        (
            ["strategy.name=ddp", "strategy.offload=true"],
            "strategy.offload is true; deepspeed_zero2 and deepspeed_zero3",
        ),
        (["strategy.name=fsdp2", "strategy.hold_gradients=false"], "strategy.hold_gradients is false; deepspeed_zero2"),
    ],
)
def test_what_zero_does_not_do_is_refused_in_one_line(changes, told):
    path = REPOSITORY / "experiments" / "nano_policy_lora.yaml"
    with pytest.raises(UserError, match=told) as caught:
        load_experiment(path, ["strategy.name=deepspeed_zero3", *changes])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "processes", "told"),
    [
        (Strategy(name="fsdp2"), None, "strategy.name is 'fsdp2', but one process was started; use launch/local.sh"),
        (
            Strategy(name="deepspeed_zero2"),
            None,
            "strategy.name is 'deepspeed_zero2', but one process was started; use",
        ),
        (Strategy(devices=2), None, "strategy.devices is 2, but one process was started; use launch/local.sh"),
        (Strategy(name="single"), 2, "strategy.name is 'single', but 2 processes were started"),
        (Strategy(name="fsdp2", devices=1), 2, "strategy.devices is 1, but 2 processes were started"),
        (Strategy(context_parallel=2), None, "context_parallel is 2, which does not divide one process"),
        (Strategy(devices=4, context_parallel=3), 4, "context_parallel is 3, which does not divide the 4 processes"),
        (Strategy(name="hsdp", devices=4, shards=3), 4, "strategy.shards is 3, which does not divide the 4 processes"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(started, strategy, processes, told):
    if processes:
        started(processes)
    with pytest.raises(UserError, match=told) as caught:
        device_for(strategy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("local_rank", ["0", "5"])
def test_more_processes_than_gpus_are_refused_by_each(started, monkeypatch, local_rank):
    """Also by those that have one: the first of a machine tells what all of them find."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    started(16, machines=2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(UserError, match=r"^8 processes were .* torch sees 4 there; use PROCESSES=4 .*$"):
        device_for(Strategy(devices=8))
    assert device_for(Strategy(devices=8, accelerator="cpu")).type == "cpu"
    started(8, machines=2)
    assert device_for(Strategy(devices=4)) == torch.device("cuda", 0)


def wait_in_vain(place: int, folder: Path, told: multiprocessing.Queue) -> None:
    """The last of four ranks stands still: the second waits for it among the copies, the third among the shards."""
    torch.set_num_threads(1)  # a forked process must not use its parent's
    os.environ |= {"RANK": str(place), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=place, world_size=4)
    connect(Strategy(name="hsdp", devices=4, shards=2, collective_timeout_seconds=3), torch.device("cpu"))
    groups = {1: "copies", 2: "shards"}
    if place in groups:
        try:
            dist.all_reduce(torch.zeros(1), group=device_mesh().get_group(groups[place]))
        except RuntimeError as error:
            told.put((groups[place], "Timed out waiting 3000ms" in str(error)))
    time.sleep(60)


def test_the_groups_of_hsdp_wait_as_long_as_the_run_says(tmp_path):
    forked = multiprocessing.get_context("fork")  # which imports nothing anew
    told = forked.Queue()
    processes = [forked.Process(target=wait_in_vain, args=(place, tmp_path, told)) for place in range(4)]
    for process in processes:
        process.start()
    try:
        assert {told.get(timeout=30) for _ in range(2)} == {("copies", True), ("shards", True)}
    finally:
        for process in processes:
            process.kill()
            process.join()
