"""Weights & Biases without a network: what its files hold, under which id, and what they must not hold."""

from __future__ import annotations

import csv
import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from cosmos3_train.config import UserError
from cosmos3_train.training.progress import WANDB_ID
from cosmos3_train.training.run import train
from cosmos3_train.training.throughput import RATES
from tests.training.project import load

SECRET = "0f1e2d3c4b5a69788796a5b4c3d2e1f001234567"
NO_EVALUATION = ("evaluation.before=false", "training.evaluate_every_n_steps=0")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Iterator[None]:
    """As on a machine without a network, with a key; nothing of it touches the home folder."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    yield
    wandb.teardown()  # a process reads the environment once


def records(path: Path) -> list[Record]:
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log of protobufs."""
    content, place, found, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def written(run: Path) -> dict[str, dict[tuple[int, str], float]]:
    """Of each start of the run, by its place on disk: (step, metric) → value."""
    found = {}
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        rows = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records(path)
            if record.HasField("history")
        ]
        found[str(path)] = {
            (row["_step"], name): value for row in rows for name, value in row.items() if not name.startswith("_")
        }
    return found


def told(run: Path) -> dict[tuple[int, str], float]:
    with (run / "metrics.csv").open(newline="") as file:
        return {(int(step), name): float(value) for step, name, value in list(csv.reader(file))[1:]}


def test_offline_files_hold_the_losses_under_one_id_over_interruptions(project, offline, capfd):
    loaded = load(project, "name=tracked", "logging.wandb=true", *NO_EVALUATION)
    run, made = loaded.run_folder, []

    def stop_after_two(*_) -> None:
        made.append(None)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(loaded, watch=stop_after_two) == "interrupted"
    name = (run / WANDB_ID).read_text().strip()
    assert train(loaded) == "finished"
    assert (run / WANDB_ID).read_text().strip() == name
    starts = written(run)
    assert len(starts) == 2 and all(path.endswith(f"run-{name}.wandb") for path in starts)
    first, second = starts.values()
    assert {step for step, _ in first} == {1, 2} and {step for step, _ in second} == {3, 4}
    assert first | second == pytest.approx(told(run))
    assert {"loss", "loss/video", "loss/action", "loss/text"} <= {metric for _, metric in first | second}
    assert set(RATES) & {metric for _, metric in second}
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    assert not [path for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]

    assert train(loaded, fresh=True) == "finished"
    assert (run / WANDB_ID).read_text().strip() != name, "another run, whatever its name"


def test_offline_in_the_experiment_is_enough(project, offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    loaded = load(project, "name=alone", "logging={wandb: true, offline: true}", "training.steps=1", *NO_EVALUATION)
    assert train(loaded) == "finished"
    (only,) = written(loaded.run_folder).values()
    assert only == pytest.approx(told(loaded.run_folder))


def test_without_a_key_the_remedy_is_one_line(project, offline, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))  # where `wandb login` would have left one
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    loaded = load(project, "name=keyless", "logging.wandb=true", *NO_EVALUATION)
    with pytest.raises(
        UserError, match=r"logging\.wandb is true, but W&B did not start .*logging\.offline=true"
    ) as caught:
        train(loaded)
    assert "\n" not in str(caught.value)
