"""Two hundred damaged logs, drawn by fixed seeds: each ends in one line of error, or in a result that tells what is
left out; never in a crash, a hang, or windows that are silently gone.

Every one is prepared and read in a process of its own, for libraries that parse damaged bytes may end it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from cosmos3_train.config import UserError
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from tests.data.clips import mp4, row, video_card, window, write_files, write_rows, write_tar
from tests.data.logs import dataset_card, embodiment, make_log
from tests.data.sources.test_hdf5 import make_aloha
from tests.data.sources.test_lerobot_v2 import make_v2
from tests.data.sources.test_mcap import MAPPING, arm, camera, write_bag

LENGTHS = [9, 12, 7]
WRONG: tuple[Any, ...] = (None, True, -1, 3.5, "", "x", "../../x", [], [None], {}, {"a": []}, [[[]]], 10**30, "\x00")
HANGS_AFTER = 30.0
"""Seconds; one takes a tenth."""


def lerobot(root: Path) -> None:
    make_log(root, LENGTHS, episodes_a_file=2)


def rows_and_mp4s(root: Path) -> None:
    write_files(root, {f"videos/{name}.mp4": mp4(20, size=(48, 64)) for name in "abc"})
    write_rows(root / "rows.jsonl", [row(name, 20, "one", window(0, 9, "two"), window(10, 19)) for name in "abc"])


def shard(root: Path) -> None:
    members: dict[str, Any] = {f"{n}.mp4": mp4(10, size=(48, 64)) for n in range(3)}
    write_tar(root / "shard.tar", members | {f"{n}.json": {"caption": f"c {n}"} for n in range(3)})


def aloha(root: Path) -> None:
    make_aloha(root, (6, 9, 7))


def bag(root: Path) -> None:
    times = np.arange(14) / 10
    write_bag(root / "a.mcap", [*camera(times), *arm(np.arange(29) / 20)], chunk_size=3000)


# ------------------------------------------------------------------------------------------------ damage


def cut_off(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def flipped(content: bytes, random: Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(random.choice((1, 1, 4, 40))):
        damaged[random.randrange(len(damaged))] ^= random.randrange(1, 256)
    return bytes(damaged)


def zeroed(content: bytes, random: Random) -> bytes:
    first = random.randrange(len(content))
    return content[:first] + bytes(len(content[first : first + 300])) + content[first + 300 :]


def retyped(content: bytes, random: Random) -> bytes:
    """One value of one line of JSON becomes something else."""
    lines = content.decode().splitlines()
    place = random.randrange(len(lines)) if content.count(b"\n") > 1 else 0
    document = json.loads(lines[place] if content.count(b"\n") > 1 else content)
    holder, key = document, None
    while isinstance(holder, dict | list) and holder:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = random.choice(keys)
        if not isinstance(holder[key], dict | list) or not holder[key] or random.random() < 0.3:
            holder[key] = random.choice(WRONG)
            break
        holder = holder[key]
    lines[place : None if content.count(b"\n") <= 1 else place + 1] = [json.dumps(document)]
    return "\n".join(lines).encode()


BYTES = (cut_off, flipped, zeroed)
Damage = Callable[[bytes, Random], bytes]

ALOHA = {"name": "aloha", "format": "hdf5", "rate_hz": 10.0, "mapping": {"preset": "aloha"}, "constant_caption": "go"}
ONE_VIEW = embodiment(cameras=["observation.images.cam_high"])
BAG = DatasetCard(name="bags", format="mcap", rate_hz=10, constant_caption="tidy up", mapping=MAPPING)
ARM = embodiment(cameras=["front"])

LOGS: dict[str, tuple[Callable[[Path], None], DatasetCard, Any]] = {
    "lerobot_v3": (lerobot, dataset_card(), embodiment()),
    "lerobot_v2": (lambda root: make_v2(root, LENGTHS) and None, dataset_card(format="lerobot_v2"), embodiment()),
    "jsonl": (rows_and_mp4s, video_card(), None),
    "tar": (shard, video_card(format="webdataset", captions=["caption"]), None),
    "hdf5": (aloha, DatasetCard(**ALOHA), ONE_VIEW),
    "mcap": (bag, BAG, ARM),
}
"""Name -> what makes it, its dataset card, its embodiment card."""

KINDS: list[tuple[str, str, tuple[Damage, ...], int]] = [
    ("lerobot_v3", "videos/**/*.mp4", BYTES, 25),
    ("jsonl", "videos/*.mp4", BYTES, 15),
    ("lerobot_v3", "data/**/*.parquet", BYTES, 20),
    ("lerobot_v3", "meta/**/*.parquet", BYTES, 15),
    ("tar", "*.tar", BYTES, 30),
    ("hdf5", "*.hdf5", BYTES, 30),
    ("mcap", "*.mcap", BYTES, 25),
    ("lerobot_v3", "meta/info.json", (retyped,), 15),
    ("lerobot_v2", "meta/*.json*", (retyped,), 15),
    ("jsonl", "rows.jsonl", (retyped,), 10),
]
"""Log, its files, what befalls one of them, how often."""
CASES = [(*kind[:3], number) for kind in KINDS for number in range(kind[3])]


def carry_out(pristine: Path, folder: Path, case: int) -> None:
    """Damage a copy, prepare it, read every window; what came of it goes to `result.json`."""
    name, pattern, damages, number = CASES[case]
    _, card, robot = LOGS[name]
    sys.stderr = (folder / "stderr").open("w")
    random = Random(f"{name} {pattern} {number}")
    shutil.copytree(pristine / name, folder / "log")
    path = random.choice(sorted((folder / "log").glob(pattern)))
    path.write_bytes(random.choice(damages)(path.read_bytes(), random))
    result: dict[str, Any] = {"file": str(path), "refused": None, "windows": 0, "dropped": {}}
    try:
        summary = prepare(card, robot or card.clips(), folder / "log", folder / "out", progress=False)
        result |= {"windows": sum(summary.windows.values()), "dropped": summary.dropped}
        dataset = PreparedDataset(folder / "out", None)
        for one in dataset.iter_rows():
            assert len(dataset.frames(one)) == len(one["timestamps"])
        assert dataset.rows == result["windows"]
    except UserError as error:
        result["refused"] = str(error)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    for name, (make, *_) in LOGS.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def whole(pristine, tmp_path_factory) -> dict[str, tuple[int, dict[str, int]]]:
    """Windows of the undamaged logs, and what is left out of them."""
    found = {}
    for name, (_, card, robot) in LOGS.items():
        output = tmp_path_factory.mktemp("whole") / "out"
        summary = prepare(card, robot or card.clips(), pristine / name, output, progress=False)
        found[name] = (sum(summary.windows.values()), summary.dropped)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
def test_two_hundred_damaged_logs(pristine, whole, tmp_path, every):
    assert len(CASES) == 200
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    outcomes, failures, running = Counter[str](), list[str](), {}
    waiting = list(range(0, len(CASES), every))
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            case = waiting.pop(0)
            folder = tmp_path / f"{case:03d}"
            folder.mkdir()
            process = context.Process(target=carry_out, args=(pristine, folder, case))
            process.start()
            running[case] = (process, folder, time.monotonic())
        case = next(iter(running))
        process, folder, began = running.pop(case)
        process.join(max(0.0, began + HANGS_AFTER - time.monotonic()))
        if process.is_alive():
            process.kill()
            outcome = "hangs"
        elif process.exitcode != 0:
            outcome = f"ended with {process.exitcode}: {(folder / 'stderr').read_text()}"
        else:
            outcome = judged(json.loads((folder / "result.json").read_text()), *whole[CASES[case][0]])
        outcomes[outcome.partition(" ")[0]] += 1
        if outcome not in ("refused", "read", "counted"):
            failures.append(f"case {case}, {CASES[case][0]}, {CASES[case][1]}: {outcome}")
        shutil.rmtree(folder)
    print(f"\n{dict(outcomes)}")
    assert not failures, "\n\n".join(failures)
    assert outcomes["refused"] > 50 / every and outcomes["counted"] > 10 / every, "most damage is noticed"


def judged(result: dict[str, Any], windows: int, dropped: dict[str, int]) -> str:
    """In a word what came of a damaged log that has so many windows, and drops so many, when it is whole."""
    refused, gone = result["refused"], windows - result["windows"]
    if refused is not None:
        return "refused" if "\n" not in refused and len(refused) < 1000 else f"no one line: {refused}"
    if gone <= 0:
        return "read"
    told = any(count > dropped.get(reason, 0) for reason, count in result["dropped"].items())
    return "counted" if told else f"{gone} windows are gone without a word: {result}"
