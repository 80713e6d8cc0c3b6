"""The module that stands in an exported folder, used there as its reader would."""

import importlib.util

import numpy as np
from PIL import Image

from cosmos3_train.config import Embodiment, Recorded
from cosmos3_train.data import poses
from cosmos3_train.data.recorded import made_actions
from cosmos3_train.data.statistics import Statistics, compute_moments
from cosmos3_train.export.usage import Robot, write_robot_files


def exported(folder, card, action):
    statistics = Statistics("log", card.name, "0", compute_moments([action], card.width))
    write_robot_files(folder, [Robot(card, statistics)])
    spec = importlib.util.spec_from_file_location("exported_robot", folder / "robot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_moves_lead_to_the_poses_that_were_recorded(tmp_path):
    random = np.random.default_rng(0)
    turned = poses.to_matrices(random.normal(size=(12, 3)), "axis_angle")
    there = poses.to_poses(random.normal(size=(12, 3)), turned)
    tool = poses.to_poses(np.array([[0, 0.086, 0.09]]), turned[3:4])[0, :3].ravel().tolist()
    joint = Recorded("joint", "values", "joints[0:2]")
    card = Embodiment(
        name="arm", domain_id=24, control_hz=10, chunk=4, execute=2, cameras=["a", "b", "c"], layout="over_two",
        recorded=[joint, Recorded("hand", column="pose", form="transform", tool=tool)],
    )  # fmt: skip
    columns = {"joints": random.normal(size=(12, 2)), "pose": there.reshape(12, 16)}
    action = made_actions(columns, card, "log")
    robot = exported(tmp_path, card, action)
    found = robot.targets(action, {"hand": there[0]})
    assert list(found) == ["hand"] and np.abs(found["hand"] - there[1:]).max() <= 1e-5
    first, half = np.full((4, 8, 3), 200, np.uint8), np.full((2, 4, 3), 9, np.uint8)
    whole = np.repeat(np.repeat(half, 2, axis=0), 2, axis=1)
    composed = robot._compose([Image.fromarray(first), Image.fromarray(whole), half], robot._find("arm"))
    assert np.array_equal(composed, np.concatenate([first, np.concatenate([half, half], axis=1)]))
