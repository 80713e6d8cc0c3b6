"""The published robots' logs, by their cards as they stand, on small files of their layout; and a part of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos3_train.config import UserError, load_embodiment
from cosmos3_train.data.card import load_card
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_log
from cosmos3_train.data.sources.lerobot import NOT_HERE
from tests.data.logs import make_log

ROOT = Path(__file__).parents[2]
LENGTHS = [38, 36, 40]
VIEWS = ("wrist_image_left", "exterior_image_1_left", "exterior_image_2_left")
DROID = {
    "action.joint_position": 7,
    "action.gripper_position": 1,
    "observation.state.joint_positions": 7,
    "observation.state.gripper_position": 1,
    "observation.state.cartesian_position": 6,
}
SETS = {  # rate, cameras, columns and their widths
    "libero_lerobot": (20, {f"observation.images.{n}": (64, 64) for n in ("image", "wrist_image")}, {"action": 7}),
    "bridge_lerobot": (5, {"observation.images.image_0": (48, 64)}, {"action": 7, "observation.state": 7}),
    "cosmos3_droid": (15, {f"observation.image.{view}": (36, 64) for view in VIEWS}, DROID),
}


def make(name: str, root: Path, episodes_a_file: int = 3) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """A log of the set's layout and its columns; every number is between 0 and 1."""
    rate, cameras, widths = SETS[name]
    rng = np.random.default_rng(0)
    columns = {
        column: [rng.uniform(0, 1, (length, width)).astype(np.float32) for length in LENGTHS]
        for column, width in widths.items()
    }
    extra: dict[str, Any] = {column: [list(part) for part in parts] for column, parts in columns.items()}
    log = make_log(root, LENGTHS, fps=rate, cameras=cameras, extra=extra, episodes_a_file=episodes_a_file)
    info = json.loads((log / "meta/info.json").read_text())
    for column, width in widths.items():
        info["features"][column]["shape"] = [width]
    (log / "meta/info.json").write_text(json.dumps(info))
    return log, columns


@pytest.mark.parametrize(
    ("name", "robot", "width", "size"),
    [
        ("libero_lerobot", "libero", 10, (64, 128)),
        ("bridge_lerobot", "bridge_orig_lerobot", 10, (48, 64)),
        ("cosmos3_droid", "droid_joints", 8, (54, 64)),
        ("cosmos3_droid", "droid_lerobot", 10, (54, 64)),
    ],
)
def test_a_published_log_by_its_card(tmp_path, name, robot, width, size):
    log, columns = make(name, tmp_path / "log")
    card, embodiment = load_card(ROOT / f"data/published/{name}.yaml"), load_embodiment(robot, ROOT)
    assert robot in (card.embodiment, "droid_lerobot") and card.rate_hz == embodiment.control_hz == SETS[name][0]
    prepare(card, embodiment, log, tmp_path / "out", heldout_fraction=0, progress=False)
    dataset = PreparedDataset(tmp_path / "out", embodiment)
    rows = list(dataset.iter_rows())
    assert {row["instruction"] for row in rows} == {"do task 0", "do task 1"} and embodiment.width == width
    for row in rows[:: len(rows) // 3]:
        action, part = np.array(row["action"]), slice(row["start"], row["start"] + embodiment.chunk)
        assert action.shape == (embodiment.chunk, width) and (row["height"], row["width"]) == size
        said = {column: parts[row["episode_index"]][part] for column, parts in columns.items()}
        if name == "cosmos3_droid":
            assert np.allclose(action[:, -1], 1 - said["action.gripper_position"][:, 0], atol=1e-6), "1 is open"
        else:
            assert np.allclose(action[:, -1], said["action"][:, 6], atol=1e-6)
        assert embodiment.action[-1].meaning == "gripper, 0 closed, 1 open", "so that a swapped one is found"
        if robot == "libero":
            assert np.allclose(action[:, :3], said["action"][:, :3], atol=1e-6), "moves already"
        if robot == "droid_joints":
            assert np.allclose(action[:, :7], said["action.joint_position"], atol=1e-6)
            assert len(row["state"]) == 8
    frames = dataset.frames(rows[0])
    assert frames.shape == (embodiment.frames, 3, *size)


def test_a_part_of_a_log(tmp_path):
    """As `download.subset` leaves it: all of meta/, some files of data/ and videos/."""
    log, _ = make("bridge_lerobot", tmp_path / "log", episodes_a_file=1)
    card, robot = load_card(ROOT / "data/published/bridge_lerobot.yaml"), load_embodiment("bridge_orig_lerobot", ROOT)
    whole = prepare(card, robot, log, tmp_path / "whole", heldout_fraction=0, progress=False)
    assert NOT_HERE not in whole.dropped
    (log / "data/chunk-000/file-001.parquet").unlink()
    (log / "videos/observation.images.image_0/chunk-000/file-002.mp4").unlink()
    summary = prepare(card, robot, log, tmp_path / "part", heldout_fraction=0, progress=False)
    assert summary.dropped[NOT_HERE] == 2 and summary.episodes["train"] == 1
    assert summary.examples[NOT_HERE] == "episode 1: data/chunk-000/file-001.parquet"
    assert summary.windows["train"] == LENGTHS[0] - robot.chunk
    with pytest.raises(UserError, match=r"file-001\.parquet"):
        prepare(replace(card, mapping={}), robot, log, tmp_path / "strict", progress=False)
    (log / "data/chunk-000/file-000.parquet").unlink()
    with pytest.raises(UserError, match=r"no episode has all of its files here \(episode 0: data/chunk-000"):
        open_log(card, log)
