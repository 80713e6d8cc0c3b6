import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos3_train.config import Embodiment, Recorded, UserError, load_embodiment
from cosmos3_train.data import poses
from cosmos3_train.data.actions import still
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.recorded import made_actions, made_states, recorded_columns, targets
from cosmos3_train.data.video import compose
from tests.data.logs import CAMERA, dataset_card, make_log

FORMS = [*((form, "xyz") for form in poses.NUMBERS if form != "euler")]
FORMS += [("euler", order) for order in ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx", "XYZ", "XZY", "YXZ", "YZX", "ZYX")]


def rotations(count, seed=0):
    """Uniform ones, and those at which conversions break: none, half turns, a quarter turn about the middle axis."""
    quaternion = np.random.default_rng(seed).normal(size=(count, 4))
    special = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0], [1, 0, -1, 0], [1, 1e-9, 0, 0]]
    quaternion = np.concatenate([quaternion, special])
    return poses.to_matrices(quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True), "quaternion_wxyz")


def path(count, seed=0):
    turned = rotations(count, seed)
    return poses.to_poses(np.random.default_rng(seed + 1).normal(size=(len(turned), 3)), turned)


@pytest.mark.parametrize(("form", "order"), FORMS)
def test_every_form_goes_there_and_back(form, order):
    there = rotations(500)
    written = poses.from_matrices(there, form, order)
    assert written.shape == (len(there), poses.NUMBERS[form])
    assert np.abs(poses.to_matrices(written.astype(np.float32), form, order) - there).max() <= 1e-5
    assert np.allclose(there @ there.swapaxes(1, 2), np.eye(3)) and np.allclose(np.linalg.det(there), 1)


def test_the_forms_mean_what_they_say():
    quarter = np.pi / 2
    about_z = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
    assert np.allclose(poses.to_matrices([[0, 0, quarter]], "axis_angle"), about_z)
    assert np.allclose(poses.to_matrices([[0, 0, 0.5**0.5, 0.5**0.5]], "quaternion_xyzw"), about_z)
    assert np.allclose(poses.from_matrices(about_z[None], "rot6d"), [[0, 1, 0, -1, 0, 0]]), "its first two columns"
    # Rolled about x and then turned about z, both axes fixed: the body's y ends on z. About its own axes it would not.
    rolled = poses.to_matrices([[quarter, 0, quarter]], "euler", "xyz")[0]
    assert np.allclose(rolled @ [0, 1, 0], [0, 0, 1])
    assert np.allclose(poses.to_matrices([[quarter, 0, quarter]], "euler", "XYZ")[0] @ [1, 0, 0], [0, 0, 1])


def test_moves_are_of_the_earlier_pose_and_lead_back():
    there = path(300)
    moves = poses.moves_between(there)
    assert np.allclose(poses.to_steps(moves)[4], np.linalg.inv(there[4]) @ there[5])
    assert np.abs(poses.carried_out(there[0], moves) - there[1:]).max() <= 1e-9
    short = path(50)
    assert np.abs(poses.carried_out(short[0], poses.moves_between(short).astype(np.float32)) - short[1:]).max() <= 1e-5
    assert np.allclose(poses.moves_between(np.stack([there[0], there[0]])), poses.STILL)
    drift = poses.carried_out(there[0], moves * [1, 1, 1, 2, 2, 2, 0.5, 0.5, 0.5])
    assert np.abs(drift - there[1:]).max() <= 1e-9, "columns that are too long, as a model writes them, turn the same"


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([0.1, 0.2, 0.3, 0.4], "quaternion_xyzw"),
        ([0, 0, 0, 0], "quaternion_wxyz"),
        ([1, 0, 0, 1, 0, 0], "rot6d"),
        ([1, 0, 0, 0, 1, 0, 0, 0, -1], "matrix"),
    ],
)
def test_what_is_no_rotation_is_refused(values, form):
    fine = poses.from_matrices(np.eye(3)[None], form)
    with pytest.raises(UserError, match=rf"episode 3, row 1: \(.*\) is no rotation written as {form}"):
        poses.to_matrices(np.concatenate([fine, [values]]), form, where="episode 3")


# ------------------------------------------------------------------------------------------------ pieces


TOOL = poses.to_poses(np.array([[0.0, 0.086, 0.09]]), rotations(1, seed=9)[:1])[0, :3].ravel().tolist()


def robot(*pieces, **changes):
    card = dict(name="arm", domain_id=8, control_hz=10.0, chunk=4, execute=2, cameras=["top"], recorded=list(pieces))
    return Embodiment(**{**card, **changes})


@pytest.mark.parametrize("tool", [[], TOOL], ids=["as recorded", "tool"])
@pytest.mark.parametrize("form", [*poses.NUMBERS, "transform"])
@pytest.mark.parametrize("moves", [False, True])
def test_actions_lead_back_to_the_recorded_targets(form, tool, moves):
    there = path(40)
    millimetres = there.copy()
    millimetres[:, :3, 3] *= 1000
    columns = {"gripper": np.random.default_rng(3).uniform(0, 255, (len(there), 1))}
    if form == "transform":
        columns["pose"] = millimetres.reshape(-1, 16)
        place = dict(column="pose")
    else:
        angles = poses.from_matrices(there[:, :3, :3], form, "ZYX")
        angles = np.degrees(angles) if form in ("euler", "axis_angle") else angles
        columns["state"] = np.concatenate([millimetres[:, :3, 3], angles], axis=1)
        place = dict(column="state[0:3]", rotation=f"state[3:{3 + poses.NUMBERS[form]}]")
    card = robot(
        Recorded("hand", **place, form=form, order="ZYX", degrees=True, metres=0.001, tool=tool, moves=moves),
        Recorded("grip", "gripper", "gripper", closed=255.0, open=0.0, next=True),
    )
    action = made_actions(columns, card, "log")
    assert action.shape == (len(there) - 1, 10) and action.dtype == np.float32
    found = targets(action.astype(np.float64), {name: rows[0] for name, rows in columns.items()}, card)
    assert np.allclose(found["gripper"], columns["gripper"][1:], atol=1e-4)
    expected = there[:-1] if moves else there[1:]
    if form == "transform":
        returned = found["pose"].reshape(-1, 4, 4)
    else:
        turned = found[place["rotation"]]
        turned = np.radians(turned) if form in ("euler", "axis_angle") else turned
        returned = poses.to_poses(found["state[0:3]"], poses.to_matrices(turned, form, "ZYX"))
    returned[:, :3, 3] *= 0.001
    assert np.abs(returned - expected).max() <= 1e-5


def test_the_tools_moves_are_what_the_model_learns():
    there, tool = path(20), np.eye(4)
    tool[:3] = np.reshape(TOOL, (3, 4))
    card = robot(Recorded("hand", column="pose", form="transform", tool=TOOL))
    action = made_actions({"pose": there.reshape(-1, 16)}, card, "log")
    assert np.allclose(action, poses.moves_between(there @ tool), atol=1e-5)


def test_values_grippers_and_states():
    card = robot(
        Recorded("joint", "values", "action.joints[0:7]", next=True, unit="radian", state="state.joints[0:7]"),
        Recorded("gripper", "gripper", "action.gripper", closed=1.0, open=0.0, next=True, state="state.gripper"),
        state_row=True,
    )
    random = np.random.default_rng(0)
    columns = {name: random.uniform(size=(6, 7)) for name in ("action.joints", "state.joints")}
    columns |= {name: random.uniform(size=(6, 1)) for name in ("action.gripper", "state.gripper")}
    assert recorded_columns(card) == ["action.joints", "action.gripper", "state.joints", "state.gripper"]
    assert [channel.name for channel in card.action][5:] == ["joint_5", "joint_6", "gripper"]
    action, state = made_actions(columns, card, "log"), made_states(columns, card, "log")
    assert np.allclose(action[:, :7], columns["action.joints"][1:]) and action.shape == (5, 8)
    assert np.allclose(action[:, 7:], 1 - columns["action.gripper"][1:])
    assert np.allclose(state, np.concatenate([columns["state.joints"], 1 - columns["state.gripper"]], axis=1))


# ------------------------------------------------------------------------------------------------ prepared


def arm_log(folder, lengths=(9, 12), **options):
    states, grips = [], []
    for episode, length in enumerate(lengths):
        there = path(length, seed=episode)[:length]
        states.append(
            np.concatenate([there[:, :3, 3], poses.from_matrices(there[:, :3, :3], "euler")], axis=1).astype(np.float32)
        )
        grips.append(np.arange(length, dtype=np.float32)[:, None] / length)
    extra = {"state": [list(part) for part in states], "grip": [list(part) for part in grips]}
    log = make_log(folder, lengths, extra=extra, **options)
    info = json.loads((log / "meta/info.json").read_text())
    info["features"]["state"]["shape"] = [6]
    (log / "meta/info.json").write_text(json.dumps(info))
    return log, states, grips


def arm(**changes):
    hand = Recorded("hand", column="state[0:3]", rotation="state[3:6]", form="euler")
    return robot(hand, Recorded("grip", "gripper", "grip", closed=1.0, open=0.0), **{"cameras": [CAMERA], **changes})


def test_prepare_makes_the_actions_of_every_window(tmp_path):
    log, states, grips = arm_log(tmp_path / "log")
    card = arm()
    summary = prepare(dataset_card(), card, log, tmp_path / "out", progress=False)
    assert sum(summary.windows.values()) == 5 + 8
    dataset = PreparedDataset(tmp_path / "out", card)
    for row in dataset.iter_rows():
        episode, rows = row["episode_index"], slice(row["start"], row["start"] + 4)
        there = poses.to_poses(states[episode][:, :3], poses.to_matrices(states[episode][:, 3:], "euler"))
        assert np.allclose(np.array(row["action"])[:, :9], poses.moves_between(there)[rows], atol=1e-5)
        assert np.allclose(np.array(row["action"])[:, 9:], 1 - grips[episode][rows], atol=1e-6)
    train = {0: 8, 1: 11}[next(row["episode_index"] for row in dataset.iter_rows() if row["split"] == "train")]
    assert dataset.statistics.action.count == train, "the last row of an episode has no action"
    assert np.allclose(still(card, [0.5] * 10), [*poses.STILL, 0.5])


def test_a_move_over_a_gap_in_time_counts_for_nothing(tmp_path):
    times = np.arange(12) / 10
    times[6:] += 5
    log, _, _ = arm_log(tmp_path / "log", lengths=(12,), timestamps={0: times})
    make_log(tmp_path / "longer", [62])
    video = f"videos/{CAMERA}/chunk-000/file-000.mp4"
    (tmp_path / "longer" / video).replace(log / video)
    summary = prepare(dataset_card(), arm(), log, tmp_path / "out", progress=False)
    assert summary.windows["train"] == 4 and sum(summary.dropped.values()) == 4
    assert PreparedDataset(tmp_path / "out", arm()).statistics.action.count == 10


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        ({"column": "state[0:3]", "rotation": "state[3:6]", "form": "quaternion_wxyz"}, r"takes 3 numbers .* has 4"),
        ({"column": "state[0:3]", "rotation": "state[3:7]"}, r"takes state\[3:7\], but 'state' has 6 numbers"),
        ({"column": "stat[0:3]", "rotation": "state[3:6]", "form": "euler"}, "no column 'stat'.* Did you mean 'state'"),
        ({"column": ""}, "does not say which column of the log recorded 'hand' comes from"),
        ({"column": "state[2:6]", "kind": "gripper"}, r"takes 4 numbers from state\[2:6\]; a gripper has 1 there"),
        ({"column": "state[0:3]", "rotation": "state[0:6]", "form": "rot6d"}, "is no rotation written as rot6d"),
    ],
)
def test_a_card_that_does_not_fit_its_log_is_told_before_anything_is_made(tmp_path, piece, words):
    log, _, _ = arm_log(tmp_path / "log")
    with pytest.raises(UserError, match=words):
        prepare(
            dataset_card(), robot(Recorded("hand", **piece), cameras=[CAMERA]), log, tmp_path / "out", progress=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        ({"column": "a[0:3]", "rotation": "a[3:7]", "order": "xxz"}, "order is 'xxz'"),
        ({"column": "a[0:3]", "rotation": "a[3:7]", "tool": [1.0] * 16}, "tool has 16 numbers"),
        ({"column": "a[3:1]", "rotation": "b"}, "the part is empty"),
        ({"column": "a[0:3", "rotation": "b"}, r"a part of a column is written NAME\[3\]"),
        ({"column": "a[0:3]"}, "a pose has a rotation column"),
        ({"column": "a", "kind": "values"}, r"say which of its numbers, such as a\[0:7\]"),
        ({"column": "a", "kind": "gripper", "open": 0.0}, "closed and open are both 0"),
    ],
)
def test_pieces_that_contradict_themselves(piece, words):
    with pytest.raises(UserError, match=words):
        Recorded("hand", **piece)


def test_three_views_with_the_smaller_two_below():
    full = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    side = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    expected = torch.nn.functional.interpolate(side.float(), size=(4, 6), mode="bilinear", align_corners=False)
    canvas = compose([full, side, torch.full((2, 3, 4, 6), 7, dtype=torch.uint8)], "over_two")
    assert canvas.shape == (2, 3, 12, 12) and torch.equal(canvas[:, :, :8], full)
    assert (canvas[:, :, 8:, :6].float() - expected).abs().max() <= 0.5, "as upstream halves them"
    assert (canvas[:, :, 8:, 6:] == 7).all()
    with pytest.raises(UserError, match="layout is 'over_two' but views are 8x12 and 6x6"):
        compose([full, side, torch.zeros((2, 3, 6, 6), dtype=torch.uint8)], "over_two")


def test_bridges_card_makes_upstreams_actions():
    """Upstream corrects its recorded poses three times; the card's tool is all three."""
    card = load_embodiment("bridge_orig_lerobot", Path(__file__).parents[2])
    there, shift = path(30), np.eye(4)
    shift[0, 3] = -0.093575
    corrected = there.copy()
    corrected[:, :3, :3] = corrected[:, :3, :3] @ [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]
    corrected = corrected @ shift
    corrected[:, :3, :3] = corrected[:, :3, :3] @ [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    angles = poses.from_matrices(there[:, :3, :3], "euler", "xyz")
    state = np.concatenate([there[:, :3, 3], angles], axis=1)
    grip = np.random.default_rng(0).uniform(size=(len(there), 7))
    action = made_actions({"observation.state": state, "action": grip}, card, "log")
    assert np.abs(action[:, :9] - poses.moves_between(corrected)).max() <= 1e-5
    assert np.allclose(action[:, 9], grip[:-1, 6])
