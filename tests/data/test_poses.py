import numpy as np
import pytest

from cosmos3_train.config import Embodiment, Recorded, UserError
from cosmos3_train.data import poses
from cosmos3_train.data.recorded import made_actions, made_states, recorded_columns, targets

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
