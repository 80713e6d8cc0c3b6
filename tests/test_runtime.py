"""Random draws are functions of their place, the same on every machine; ranks come from whichever launcher is there."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos3_train import runtime


def test_a_fold_is_the_same_everywhere_and_depends_on_every_argument():
    assert runtime.fold(0, "noise", 3) == 6347807290990278987
    places = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, 1, "a"), (0, "a1")]
    assert len({runtime.fold(*place) for place in places}) == len(places)
    assert all(0 <= runtime.fold(*place) < 2**63 for place in places)


def test_a_draw_depends_on_its_place_and_on_nothing_else():
    def numbers(*place: int | str) -> torch.Tensor:
        return torch.randn(4, generator=runtime.draw(*place))

    first = numbers(0, "noise", 3)
    torch.manual_seed(1)
    torch.rand(100)
    assert torch.equal(numbers(0, "noise", 3), first)
    assert not torch.equal(numbers(0, "noise", 4), first)
    assert not torch.equal(numbers(1, "noise", 3), first)
    state = torch.get_rng_state()
    numbers(5, "x")
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_seeding_everything():
    runtime.seed_everything(2**40 + 1)
    one = (torch.rand(3), np.random.rand(3))
    runtime.seed_everything(2**40 + 1)
    assert torch.equal(one[0], torch.rand(3)) and (one[1] == np.random.rand(3)).all()


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}


def place() -> tuple[int, ...]:
    return (
        runtime.rank(), runtime.world_size(), runtime.local_rank(), runtime.local_world_size(), runtime.node_count()
    )  # fmt: skip


def test_ranks_of_torchrun_alone(monkeypatch):
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    assert place() == (0, 1, 0, 1, 1)
    assert runtime.is_first_rank() and not runtime.launched()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert place() == (0, 1, 0, 1, 1), "a plain command within a batch job of many tasks is one process"
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert place() == (5, 8, 1, 4, 2)
    assert runtime.launched() and not runtime.is_first_rank()


def test_other_ranks_only_warn(monkeypatch):
    root = logging.getLogger("cosmos3_train")
    before, level, propagate = list(root.handlers), root.level, root.propagate
    try:
        monkeypatch.setenv("RANK", "1")
        runtime.set_up_logging()
        runtime.set_up_logging()
        assert root.level == logging.WARNING
        assert len(root.handlers) == max(1, len(before)), "safe to call twice"
        monkeypatch.setenv("RANK", "0")
        runtime.set_up_logging()
        assert root.level == logging.INFO
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        root.propagate = propagate


def test_torchrun_reads_the_failure_that_was_recorded(monkeypatch, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    runtime.record_failure(ValueError("nobody asks"))
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    runtime.record_failure(ValueError("no such key"), "error: no such key")
    report = str(ChildFailedError("train", {3: ProcessFailure(0, 7, 2, str(path))}))
    assert "rank      : 3 " in report and "error: no such key" in report
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no folder" / "error.json"))
    runtime.record_failure(ValueError("a full disk"))


def test_a_second_sigterm_does_not_cut_what_the_first_one_tidies_up():
    tidied = False
    with pytest.raises(runtime.Interrupted), runtime.interruptible():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            tidied = True
    assert tidied


def test_gloo_listens_where_the_first_machine_is_reached(monkeypatch):
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    default = next((name for name, destination, *_ in routes if destination == "00000000"), None)
    if default is None:
        pytest.skip("no way out of this machine")
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "192.0.2.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "the user's")
    runtime.listen_to_other_machines()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "the user's"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    runtime.listen_to_other_machines()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == default
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    runtime.listen_to_other_machines()
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "one machine's processes meet on the loopback interface"
    for nowhere in ("127.0.0.1", "no.such.host.invalid", ""):
        assert runtime.interface_towards(nowhere) is None
