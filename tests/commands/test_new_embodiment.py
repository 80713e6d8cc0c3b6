import sys
from pathlib import Path

import numpy as np
import pytest

from cosmos3_train import cli
from cosmos3_train.commands import new_embodiment
from cosmos3_train.config import UserError, load_embodiment
from cosmos3_train.data import poses
from cosmos3_train.data.draft import draft
from cosmos3_train.data.faults import gripper_ends
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources.lerobot_v3 import open_lerobot
from tests.data.logs import make_log

ROOT = Path(__file__).parents[2]


def cosmos3(*words):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return ended.value.code


def unanswered(question, answers):
    return ""


@pytest.mark.parametrize(
    ("card", "relative", "unit"), [("log", False, "pixel"), ("moves_log", True, "centimetre")], ids=["places", "moves"]
)
def test_the_draft_of_a_shipped_log_prepares_it_once_filled_in(tmp_path, capsys, card, relative, unit):
    log, file, out = ROOT / "data" / "pusht" / f"{card}.yaml", tmp_path / "mine.yaml", tmp_path / "out"
    assert cosmos3("new-embodiment", "--log", log, "--output", file) == 0
    told = capsys.readouterr().out
    assert "to fill in: view_point" in told and told.count(": unit") == 2
    assert cosmos3("prepare", log, "--embodiment", file, "--output", out) == 2, "an open value is refused"
    assert "action.0.unit has no value yet (???); fill it in" in capsys.readouterr().err and not out.exists()
    text = file.read_text()
    text = text.replace('unit: "???"', f"unit: {unit}").replace('view_point: "???"', "view_point: third_person_view")
    assert "???" not in text.replace("of ???", "")
    file.write_text(text)
    robot = load_embodiment(file, ROOT)
    assert (robot.name, robot.width, robot.control_hz) == ("mine", 2, 5 if relative else 10)
    assert [channel.relative for channel in robot.action] == [relative] * 2
    shipped = load_embodiment("pusht_moves" if relative else "pusht", ROOT)
    assert (robot.cameras, robot.state_key) == (shipped.cameras, shipped.state_key)
    taken = {load_embodiment(path, ROOT).domain_id for path in (ROOT / "configs/embodiment").glob("*.yaml")}
    assert robot.domain_id not in taken
    assert cosmos3("prepare", log, "--embodiment", file, "--output", out, "--stride", 8) == 0
    assert PreparedDataset(out, robot).count("train") > 100


def test_a_folder_does_for_a_card_and_a_file_is_never_overwritten(tmp_path, capsys):
    log = make_log(tmp_path / "my log", [20, 21])
    assert cosmos3("new-embodiment", "--log", log, "--output", tmp_path / "arm.yaml") == 0
    made = (tmp_path / "arm.yaml").read_text()
    assert cosmos3("new-embodiment", "--log", log, "--output", tmp_path / "arm.yaml") == 2
    assert "there is a file already" in capsys.readouterr().err and (tmp_path / "arm.yaml").read_text() == made
    assert cosmos3("new-embodiment", "--log", tmp_path, "--output", tmp_path / "leg.yaml") == 2
    assert "meta/info.json is missing" in capsys.readouterr().err
    talk = ROOT / "data" / "conversations" / "pusht_world.yaml"
    assert cosmos3("new-embodiment", "--log", talk, "--output", tmp_path / "leg.yaml") == 2
    assert "format 'conversations' is no robot's log" in capsys.readouterr().err


def test_nothing_is_guessed_in_silence(tmp_path):
    """Noise follows no state, a camera of another size fits no layout: both stay open."""
    log = make_log(tmp_path / "log", [30, 30], cameras={"a": (96, 96), "b": (64, 80)})
    random = np.random.default_rng(0)
    actions = {e: random.normal(size=(30, 2)).astype(np.float32) for e in (0, 1)}
    states = [list(random.normal(size=(30, 2)).astype(np.float32)) for _ in (0, 1)]
    make_log(
        log, [30, 30], cameras={"a": (96, 96), "b": (64, 80)}, actions=actions, extra={"observation.state": states}
    )
    made = draft(open_lerobot(log), "arm", 31, unanswered)
    assert sum("relative" in word for word in made.open) == 2 and "cameras: keep those that fit a layout" in made.open
    assert made.text.count('relative: "???"') == 2
    answers = {"unit of action_0": "metre", "is action_0": "yes", "view": "wrist_view"}
    asked = draft(
        open_lerobot(log), "arm", 31, lambda words, _: next((a for q, a in answers.items() if words.startswith(q)), "")
    )
    assert "view_point: wrist_view" in asked.text and "name: action_0, unit: metre, relative: true" in asked.text
    assert len(asked.open) == len(made.open) - 3


def test_rotations_and_grippers_are_seen(tmp_path):
    turns = poses.to_matrices(np.random.default_rng(0).normal(size=(20, 3)), "axis_angle")
    action = np.concatenate([np.ones((20, 1)), poses.from_matrices(turns, "rot6d"), np.ones((20, 1))], axis=1)
    action[::3, 7] = 0
    log = make_log(tmp_path / "log", [20], actions={0: action.astype(np.float32)})
    made = draft(open_lerobot(log), "arm", 31, unanswered)
    lines = [line for line in made.text.splitlines() if line.startswith("  - {name: action_")]
    assert ["rotation: true" in line for line in lines] == [False] + [True] * 6 + [False]
    assert 'meaning: "???"' in lines[7] and "gripper" not in lines[0]
    assert [word for word in made.open if word.startswith("action_7: meaning (a gripper's ends")]

    asked = []

    def answered(question, answers):
        asked.append(question)
        return answers[0] if "open gripper" in question else ""

    text = draft(open_lerobot(log), "arm", 31, answered).text
    assert 'meaning: "gripper, 1 closed, 0 open"' in text and gripper_ends("gripper, 1 closed, 0 open") == (1, 0)
    assert "action_7 goes from 0 to 1: which is an open gripper" in asked
    units = [question for question in asked if question.startswith("unit of ")]
    assert [question.split()[2] for question in units] == ["action_0", "action_7"], "those of a rotation are known"


def test_what_a_log_shows_is_not_asked():
    """Of the shipped log, whose actions follow its state: neither what is a change, nor rate, cameras or state."""
    asked = []
    draft(open_lerobot(ROOT / "data/pusht/log"), "mine", 31, lambda question, _: asked.append(question) or "")
    about = [question.split(" (")[0] for question in asked]
    assert about == ["unit of target_x_px", "unit of target_y_px", "view point"]


def test_questions_are_asked_on_a_terminal_alone(monkeypatch):
    assert new_embodiment._ask("unit of x", ()) == ""
    typed = iter(["sideways", "ego_view", ""])
    monkeypatch.setattr("builtins.input", lambda words: next(typed))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), {"isatty": lambda self: True})())
    assert new_embodiment._ask("view point", ("ego_view", "wrist_view")) == "ego_view", "asked again until it is one"
    assert new_embodiment._ask("unit of x", ()) == ""


def test_a_log_without_a_camera_or_an_action(tmp_path):
    log = make_log(tmp_path / "log", [20])
    info = (log / "meta/info.json").read_text()
    (log / "meta/info.json").write_text(info.replace('"action"', '"deed"'))
    with pytest.raises(UserError, match="no column whose name begins with 'action'"):
        draft(open_lerobot(log), "arm", 31, unanswered)
