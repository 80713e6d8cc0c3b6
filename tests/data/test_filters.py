"""Filters of a dataset card: what each leaves out, that it is counted by reason, and that statistics follow."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cosmos3_train.config import Channel, Recorded, UserError, from_plain
from cosmos3_train.data.card import DatasetCard, Filters
from cosmos3_train.data.filters import FAILED, IDLE, NOT_KEPT, cut_episode
from cosmos3_train.data.index import GAP, assign_splits
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_log
from tests.data.clips import video_card
from tests.data.logs import dataset_card, default_actions, embodiment, make_log

LENGTHS = [12, 10, 14]
RELATIVE = [Channel("x", relative=True), Channel("y", relative=True)]


def prepared(root, robot=None, log=None, actions=None, extra=None, **filters):
    log = log or make_log(root / "log", LENGTHS, actions=actions, extra=extra)
    card = dataset_card(filters=Filters(**filters))
    summary = prepare(card, robot or embodiment(), log, root / "out", heldout_fraction=0, progress=False)
    dataset = PreparedDataset(root / "out", None)
    starts = {episode: [] for episode in range(len(LENGTHS))}
    for row in dataset.iter_rows():
        starts[row["episode_index"]].append(row["start"])
    return summary, starts, dataset


def test_success_only(tmp_path):
    success = [np.zeros((length, 1), np.float32) for length in LENGTHS]
    success[0][-1] = success[2][5] = 1
    summary, starts, dataset = prepared(tmp_path, extra={"next.success": success}, success="next.success")
    assert summary.dropped[FAILED] == 1 and summary.examples[FAILED] == "episode 1"
    assert summary.episodes["train"] == 2 and starts[1] == [] and len(starts[0]) == 8
    used = np.concatenate([default_actions(0, 12), default_actions(2, 14)])
    assert dataset.statistics.action.max[1] == pytest.approx(used[:, 1].max())
    assert dataset.statistics.action.count == 12 + 14 - 2, "each episode's last row is in no window's actions"
    with pytest.raises(UserError, match=r"Did you mean 'next\.success'"):
        prepared(tmp_path, log=tmp_path / "log", success="next.succes")


def test_ranges_to_keep(tmp_path):
    """Windows have five frames: all of them lie in one range. An episode that is not named keeps nothing."""
    actions = {2: default_actions(2, 14)}
    actions[2][0] = np.nan  # outside the ranges, so nothing to correct
    log = make_log(tmp_path / "log", LENGTHS, actions=actions)
    (log / "keep.json").write_text(json.dumps({"0": [[0, 5], [6, 12]], "2": [[1, 8]]}))
    summary, starts, _ = prepared(tmp_path, log=log, keep_ranges="keep.json")
    assert starts == {0: [0, 6, 7], 1: [], 2: [1, 2, 3]}
    assert summary.dropped[NOT_KEPT] == 5 + 6 + 7
    (log / "keep.json").write_text(json.dumps({"0": [[0, 12]]}))
    with pytest.raises(UserError, match=r"prepared with filters\.ranges"):
        prepared(tmp_path, log=log, keep_ranges="keep.json")


RECORDING = "gs://raw/{episode_id}/recordings/MP4--gs://raw/{episode_id}/trajectory.h5"


def test_ranges_to_keep_by_recording(tmp_path):
    """As DROID's file has them: of other recordings too, and a key that is made of the episode's own name twice."""
    said = [{"episode_id": f"lab/success/{day}"} for day in ("mon", "tue", "wed")]
    log = make_log(tmp_path / "log", LENGTHS, said=said)
    keep = {"lab/success/mon": [[0, 5], [6, 12]], "lab/success/wed": [[1, 8]], "lab/success/sun": [[0, 9]]}
    content = {RECORDING.replace("{episode_id}", name): pairs for name, pairs in keep.items()}
    (log / "keep.json").write_text(json.dumps(content))
    filters = {"keep_ranges": "keep.json", "keep_key": RECORDING}
    summary, starts, _ = prepared(tmp_path, log=log, **filters)
    assert starts == {0: [0, 6, 7], 1: [], 2: [1, 2, 3]} and summary.dropped[NOT_KEPT] == 5 + 6 + 7
    with pytest.raises(
        UserError, match=r"says no 'episode_ip' of episode 0, only episode_id\. Did you mean 'episode_id'"
    ):
        prepared(tmp_path, log=log, keep_ranges="keep.json", keep_key="{episode_ip}")
    with pytest.raises(UserError, match=r"names no episode of .*'lab/success/mon'.* such as 'gs://raw/lab"):
        prepared(tmp_path, log=log, keep_ranges="keep.json", keep_key="{episode_id}")
    with pytest.raises(UserError, match=r"keys that are no numbers, the card's filters\.keep_key"):
        prepared(tmp_path, log=log, keep_ranges="keep.json")
    with pytest.raises(UserError, match=r"filters\.keep_key .* names no file"):
        Filters(keep_key=RECORDING)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "keep.json: the file is missing"),
        ("[1]", "not of the form"),
        ('{"a": [[0, 1]]}', "not of the form"),
        ('{"0": [[3]]}', "not of the form"),
        ('{"0": [[3, 3]]}', r"episode 0: \[3, 3\] holds no row"),
    ],
)
def test_wrong_ranges(tmp_path, content, words):
    log = make_log(tmp_path / "log", LENGTHS)
    if content is not None:
        (log / "keep.json").write_text(content)
    with pytest.raises(UserError, match=words):
        prepared(tmp_path, log=log, keep_ranges="keep.json")


@pytest.mark.parametrize("relative", [False, True])
def test_idle_rows(tmp_path, relative):
    """Rows 3 to 7 of episode 0 stand still, which is enough; rows 2 and 3 of episode 1 are too few."""
    actions = {number: default_actions(number, length) + 1 for number, length in enumerate(LENGTHS)}
    if relative:
        actions[0][3:8], actions[1][2:4] = 0, 0
    else:
        actions[0][3:8], actions[1][2:4] = actions[0][2], actions[1][1]
    robot = embodiment(action=RELATIVE) if relative else embodiment()
    summary, starts, _ = prepared(tmp_path, robot=robot, actions=actions, idle_rows=4)
    assert starts == {0: [0, 1, 2], 1: list(range(6)), 2: list(range(10))}
    assert summary.dropped[IDLE] == 5


def test_an_episode_without_actions(tmp_path):
    """Of one frame, whose action would be made of two: it gives no window, and the others theirs."""
    log = make_log(tmp_path / "log", [12, 1, 14])
    follower = Recorded("place", kind="values", column="observation.state[0]", next=True)
    opened = open_log(dataset_card(), log)
    records = opened.records(opened.episodes, ["observation.state"])
    robot = embodiment(action=[], recorded=[follower], state_key=None)
    cuts = [cut_episode(one, dataset_card(filters=Filters(idle_rows=2)), robot, 1, None) for one in records]
    assert [len(cut.starts) for cut in cuts] == [8, 0, 10] and len(cuts[1].rows) == 0


def test_nothing_left(tmp_path):
    with pytest.raises(
        UserError, match=r"no window to train on; left out: .* × window that begins where nothing moves"
    ):
        prepared(tmp_path, idle_rows=1, idle_below=1000.0)


def test_nothing_left_to_hold_out(tmp_path):
    """What is held out is chosen before it is read: filters that leave none of it are told."""
    splits = assign_splits("moves", range(8), 0.2, 0)
    lost = [number for number, split in splits.items() if split == "heldout"]
    success = [np.full((8, 1), number not in lost, np.float32) for number in range(8)]
    log = make_log(tmp_path / "log", [8] * 8, extra={"next.success": success})
    card = dataset_card(filters=Filters(success="next.success"))

    def windows(fraction):
        return prepare(card, embodiment(), log, tmp_path / "out", heldout_fraction=fraction, progress=False).windows

    with pytest.raises(
        UserError,
        match=rf"filters \(success\) leave no window of {len(lost)} episodes to hold out; make heldout_fraction 0.2 "
        rf"larger, or 0 .*; left out: {len(lost)} × episode without success \(episode {lost[0]}\)",
    ):
        windows(0.2)
    assert not (tmp_path / "out").exists()
    assert windows(0) == {"train": 4 * (8 - len(lost)), "heldout": 0}


def test_cards():
    with pytest.raises(UserError, match="filters are of robots' logs"):
        video_card(filters=Filters(success="x"))
    with pytest.raises(UserError, match=r"filters\.idle_rows is 0"):
        Filters(idle_rows=0)
    with pytest.raises(UserError, match="idle_rows"):
        from_plain(DatasetCard, {"name": "a", "format": "lerobot_v3", "filters": {"idle_row": 1}}, "card.yaml")


def test_gaps_leave_nothing_to_hold_out(tmp_path):
    splits = assign_splits("moves", range(8), 0.2, 0)
    lost = [number for number, split in splits.items() if split == "heldout"]
    times = np.arange(8) / 10 - 0.09 * (np.arange(8) >= 4)  # four rows on each side, and a window has five
    log = make_log(tmp_path / "log", [8] * 8, timestamps=dict.fromkeys(lost, times))

    def windows(fraction):
        out, card = tmp_path / "out", dataset_card()
        return prepare(card, embodiment(), log, out, heldout_fraction=fraction, progress=False).windows

    with pytest.raises(
        UserError,
        match=rf"gaps and faults leave no window of {len(lost)} episodes to hold out; make heldout_fraction 0.2 "
        rf"larger, or 0 to hold out nothing; left out: {4 * len(lost)} × {GAP} \(episode {lost[0]}\)",
    ):
        windows(0.2)
    assert windows(0) == {"train": 4 * (8 - len(lost)), "heldout": 0}
