"""Scanning: a clean log finds nothing; a log made faulty in one way finds that, with file and row, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import av
import h5py
import numpy as np
import pytest

from cosmos3_train.config import Channel, Recorded
from cosmos3_train.data import faults
from cosmos3_train.data.faults import without_frame
from cosmos3_train.data.hdf5 import close_all
from cosmos3_train.data.index import check_log
from cosmos3_train.data.scan import Scan, scan_clips, scan_log
from cosmos3_train.data.sound import sound_fault, track_of
from cosmos3_train.data.sources import clips as clip_reasons
from cosmos3_train.data.sources import open_clips, open_log
from tests.data.clips import mp4, row, video_card, window, write_files, write_rows, write_tar
from tests.data.logs import CAMERA, dataset_card, embodiment, make_log, numbered_frame, write_video
from tests.data.sounds import sounding
from tests.data.sources.test_hdf5 import make_aloha

LENGTHS = [20, 24, 16, 30, 18]
STILL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

ROBOT = embodiment(
    action=[
        Channel("x", unit="px", low=0.0, high=512.0),
        Channel("y"),
        *(Channel(f"r{number}", rotation=True) for number in range(6)),
        Channel("hand", "gripper, 0 closed, 1 open"),
    ]
)


def clean_actions(episode: int, length: int) -> np.ndarray:
    """[length, 9]: a place, a turn about z, and a gripper that closes."""
    rng = np.random.default_rng(episode)
    angle = np.linspace(0, 1 + 0.1 * episode, length)
    turn = [np.cos(angle), np.sin(angle), 0 * angle, -np.sin(angle), np.cos(angle), 0 * angle]
    # The third row of a turn about z never changes, which the card does not promise: tilt it a little.
    tilt = 0.05 * np.sin(np.arange(length) + episode)
    turn[0], turn[1], turn[2] = turn[0] * np.cos(tilt), turn[1] * np.cos(tilt), np.sin(tilt)
    first = np.stack(turn[:3], 1)
    second = np.stack([-np.sin(angle), np.cos(angle), tilt], 1)
    second -= first * (first * second).sum(1, keepdims=True)
    second /= np.linalg.norm(second, axis=1, keepdims=True)
    hand = np.arange(length) < length // 2
    place = rng.uniform(100, 400, (length, 2))
    return np.concatenate([place, first, second, hand[:, None]], axis=1).astype(np.float32)


def found(log, robot=ROBOT, **changes):
    """(kind, file, where) of every finding."""
    card = dataset_card(**changes)
    opened = open_log(card, log)
    check_log(opened, card, robot)
    scan = Scan()
    findings = list(scan_log(opened, card, robot, scan))
    assert scan.items == len(opened.episodes)
    return [(finding.kind, finding.file, finding.where) for finding in findings]


def make(root, change=None, episode=3, **options):
    """A log of clean actions, but for those of one episode or, with None, of all."""
    actions = {number: clean_actions(number, length) for number, length in enumerate(LENGTHS)}
    for number in actions if episode is None else [episode]:
        if change is not None:
            change(actions[number])
    return make_log(root / "log", LENGTHS, actions=actions, **options)


FIRST, SECOND = "data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-001.mp4"


def test_a_clean_log_finds_nothing(tmp_path):
    assert found(make(tmp_path)) == []


@pytest.mark.parametrize(
    ("at", "value", "kind"),
    [
        ((7, 1), np.nan, faults.NOT_FINITE),
        ((7, 1), -np.inf, faults.NOT_FINITE),
        ((7, 1), 9000.0, faults.OUT_OF_RANGE),  # far from the others
        ((7, 0), 513.0, faults.OUT_OF_RANGE),  # outside the card's range
        ((7, 3), 0.7, faults.ROTATION),
    ],
)
def test_one_wrong_number(tmp_path, at, value, kind):
    log = make(tmp_path, lambda action: action.__setitem__(at, value))
    assert set(found(log)) == {(kind, SECOND, "episode 3, row 7")}


def test_raw_units_are_not_far(tmp_path):
    """Without a normaliser values are in their own unit, in which hundreds are ordinary."""
    robot = replace(ROBOT, normaliser="none")
    assert found(make(tmp_path / "clean"), robot) == []
    log = make(tmp_path / "far", lambda action: action.__setitem__((7, 1), 9000.0))
    assert found(log, robot) == [(faults.OUT_OF_RANGE, SECOND, "episode 3, row 7")]


def test_frozen_channels(tmp_path):
    def freeze(action):
        action[:, 1] = 250.0

    log = make(tmp_path / "all", freeze, episode=None)
    assert found(log) == [(faults.FROZEN, FIRST, "episode 0")]
    constant = [replace(channel, low=250.0, high=250.0) if channel.name == "y" else channel for channel in ROBOT.action]
    assert found(log, replace(ROBOT, action=constant)) == [], "its card says that it does not move"
    actions = {number: clean_actions(number, 8) for number in range(12)}
    freeze(actions[4])
    assert found(make_log(tmp_path / "one", [8] * 12, actions=actions)) == [(faults.FROZEN, SECOND, "episode 4")]


TWO = embodiment(action=[Channel("x"), Channel("y")])


def teeth(episode: int, length: int) -> np.ndarray:
    """[length, 2]: y climbs in ten rows from 100 to 370, is 310 in the eighth, and falls back; x is never still."""
    x, jitter = np.random.default_rng(episode).uniform(0, 1, (2, length))
    return np.stack([400 * x, 100 + 30 * (np.arange(length) % 10) + jitter], axis=1).astype(np.float32)


def make_teeth(root, change=lambda action: None, lengths=LENGTHS, only=None):
    """A log of such actions, changed in each episode or in `only` one."""
    actions = {number: teeth(number, length) for number, length in enumerate(lengths)}
    for number in actions if only is None else [only]:
        change(actions[number])
    return make_log(root / "log", lengths, actions=actions)


def clip(action, low=None, high=300.0):
    action[:, 1] = action[:, 1].clip(low, high)


def test_clipped_channels(tmp_path):
    """Rows 8 and 9 of ten stand as the row before them did, but not where the episode ends so, as two here do."""
    assert found(make_teeth(tmp_path / "whole"), TWO) == []
    log = make_teeth(tmp_path / "cut", clip)
    assert found(log, TWO) == [(faults.CLIPPED, FIRST, "episode 0, row 8")]
    (finding,) = scan_log(open_log(dataset_card(), log), dataset_card(), TWO, Scan())
    # Two rows in each of 7 stands (1, 2, 1, 2 and 1 an episode), of the 103 that have one before them.
    assert finding.words.startswith("y stands at its largest value 300 in 13.6% of the rows that move, in 5 of 5 ep")
    assert "as the channel's high in the embodiment card" in finding.words

    log = make_teeth(tmp_path / "both", lambda action: clip(action, 170.0))
    places = [(faults.CLIPPED, FIRST, f"episode 0, row {row}") for row in (8, 11)]
    assert found(log, TWO) == places, "rows 10 to 12 are at the smallest; so is row 0, where the episode begins"


def test_clipping_in_short_logs(tmp_path):
    """Of one episode too, but not by standing there once or twice."""
    cut = make_teeth(tmp_path / "one", clip, [65])
    assert found(cut, TWO) == [(faults.CLIPPED, FIRST, "episode 0, row 8")]

    def twice(action):
        action[:, 1] *= 0.5
        action[10:16, 1] = action[30:38, 1] = 300.0

    assert found(make_teeth(tmp_path / "twice", lambda action: twice(action), [65]), TWO) == []


def idle(action):
    clip(action)
    same = np.flatnonzero(action[1:, 1] == action[:-1, 1]) + 1
    for at in same:
        action[at, 0] = action[at - 1, 0]


def parked(action):
    action[:6, 1] = action[-6:, 1] = 400.0


def one_row_a_time(action):
    action[4::5, 1] = 400.0


def ends_at_zero(action):
    action[:, 1] = np.minimum(action[:, 1] - 300, 0)


def open_or_shut(action):
    action[:, 1] = np.where(action[:, 1] > 300, 300, 0.01 * action[:, 1])


def eight_steps(action):
    action[:, 1] = (action[:, 1] // 30).clip(3, 10)


@pytest.mark.parametrize(
    ("change", "channel"),
    [
        (idle, {}),
        (parked, {}),
        (one_row_a_time, {}),
        (ends_at_zero, {}),
        (open_or_shut, {}),
        (eight_steps, {}),
        (clip, {"high": 300.0}),
        (clip, {"name": "gripper_width"}),
        (clip, {"meaning": "hand, 0 closed, 300 open"}),
        (clip, {"rotation": True}),
    ],
)
def test_an_end_that_is_no_clipping(tmp_path, change, channel):
    robot = replace(TWO, action=[TWO.action[0], replace(TWO.action[1], **channel)])
    assert found(make_teeth(tmp_path, change), robot) == []


def test_standing_at_the_end_seldom_is_no_clipping(tmp_path):
    def rarely(action):
        action[50:53, 1] = 400.0

    def in_one(action):
        action[:, 1] = action[:, 1].clip(None, 200.0) + 200.0

    assert found(make_teeth(tmp_path / "rows", lambda action: clip(action, high=330.0)), TWO) == [], "7 rows"
    assert found(make_teeth(tmp_path / "share", rarely, [120] * 5), TWO) == [], "10 of 595 rows"
    assert found(make_teeth(tmp_path / "one", in_one, [20, 24, 16, 65, 18], only=3), TWO) == [], "one episode of five"


def test_time_stamps(tmp_path):
    times = np.arange(30) / 10
    times[12:] += 0.2
    log = make(tmp_path / "gap", timestamps={3: times})
    assert found(log) == [(faults.GAPS, SECOND, "episode 3, row 12")]
    log = make(tmp_path / "rate", timestamps={1: np.arange(24) / 12})
    assert found(log)[0] == (faults.RATE, FIRST, "episode 1")


def test_videos(tmp_path):
    log = make(tmp_path / "missing")
    write_video(log / VIDEO, [numbered_frame(number) for number in range(40)], 10)
    assert found(log) == [(faults.MISSING, VIDEO, f"episode 4, camera {CAMERA!r}, row 10")]
    log = make(tmp_path / "rate")
    write_video(log / VIDEO, [numbered_frame(number) for number in range(96)], 20)
    assert found(log) == [(faults.RATE, VIDEO, f"episode {episode}, camera {CAMERA!r}") for episode in (3, 4)]
    log = make(tmp_path / "damaged")
    content = bytearray((log / VIDEO).read_bytes())
    start = content.find(b"mdat") + 4
    middle = start + (len(content) - start) // 4
    content[middle : middle + 60] = bytes(60)
    (log / VIDEO).write_bytes(content)
    kinds = found(log)
    (where,) = [where for kind, file, where in kinds if kind == faults.VIDEO and file == VIDEO]
    hurt = re.fullmatch(rf"episode 3, camera '{CAMERA}', row (\d+)", where)
    assert hurt and 0 < int(hurt[1]) < 30, where
    assert {kind for kind, *_ in kinds} <= {faults.VIDEO, faults.MISSING}
    (log / VIDEO).unlink()
    gone = [place for place in found(log) if place[0] == faults.VIDEO]
    assert gone == [(faults.VIDEO, VIDEO, f"episode {episode}, camera {CAMERA!r}") for episode in (3, 4)]
    assert {kind for kind, *_ in found(log)} == {faults.VIDEO, faults.MISSING}


def test_a_gripper_the_wrong_way_round(tmp_path):
    def swap(action):
        action[:, 8] = 1 - action[:, 8]

    assert found(make(tmp_path / "swapped", swap, episode=None)) == [(faults.GRIPPER, FIRST, "episode 0, row 0")]
    signed = [replace(c, meaning="gripper, -1 open, 1 closed") if c.name == "hand" else c for c in ROBOT.action]
    log = make(tmp_path / "other", swap, episode=None)
    assert found(log, replace(ROBOT, action=signed)) == [(faults.GRIPPER, FIRST, "episode 0")]


def test_duplicate_episodes(tmp_path):
    actions = {number: clean_actions(number, 20) for number in range(4)}
    actions[3] = actions[1]
    assert found(make_log(tmp_path / "log", [20] * 4, actions=actions)) == [(faults.DUPLICATE, SECOND, "episode 3")]


def test_recorded_rotations(tmp_path):
    """An action that is made from poses: a quaternion that is none, and NaN in a column that it is made from."""
    poses = [np.tile(np.float32([0, 0, 0, 1]), (length, 1)) for length in LENGTHS]
    places = [
        np.random.default_rng(n).uniform(0, 1, (length, 3)).astype(np.float32) for n, length in enumerate(LENGTHS)
    ]
    poses[2][5] = [0, 0, 0, 2]
    places[4][3, 1] = np.nan
    log = make_log(tmp_path / "log", LENGTHS, extra={"place": places, "turn": poses})
    info = log / "meta" / "info.json"
    info.write_text(info.read_text().replace('"place": {"dtype": "float32", "shape": [1]}', '"place": {"shape": [3]}'))
    info.write_text(info.read_text().replace('"turn": {"dtype": "float32", "shape": [1]}', '"turn": {"shape": [4]}'))
    robot = replace(ROBOT, action=[], recorded=[Recorded("hand", column="place", rotation="turn")], state_key=None)
    expected = [
        (faults.ROTATION, FIRST, "episode 2"),
        (faults.NOT_FINITE, SECOND, "episode 4, row 3"),
        *((faults.FROZEN, FIRST, "episode 0") for _ in range(6)),  # this hand never turns
    ]
    assert found(log, robot) == expected


def test_rows_are_the_episodes_own(tmp_path):
    """An action that is made of two rows has none before a gap; rows behind it keep their numbers."""
    times = np.arange(30) / 10
    times[12:] += 0.2
    places = [
        np.random.default_rng(n).uniform(0, 1, (length, 1)).astype(np.float32) for n, length in enumerate(LENGTHS)
    ]
    places[3][21] = 900.0
    log = make_log(tmp_path / "log", LENGTHS, extra={"place": places}, timestamps={3: times})
    follower = Recorded("place", kind="values", column="place[0]", next=True)
    robot = replace(ROBOT, action=[], recorded=[follower], state_key=None)
    gap, far = (faults.GAPS, SECOND, "episode 3, row 12"), (faults.OUT_OF_RANGE, SECOND, "episode 3, row 20")
    assert found(log, robot) == [gap, far]


def test_an_unreadable_episode_does_not_hide_the_others(tmp_path):
    log = make(tmp_path, lambda action: action.__setitem__((7, 1), np.nan))
    (log / FIRST).write_bytes(b"no Parquet")
    kinds = found(log)
    assert kinds[:3] == [(faults.UNREADABLE, FIRST, f"episode {episode}") for episode in range(3)]
    assert set(kinds[3:]) == {(faults.NOT_FINITE, SECOND, "episode 3, row 7")}


def test_pictures_that_are_stored_one_by_one(tmp_path):
    source = make_aloha(tmp_path / "log", (7, 9))
    robot = embodiment(cameras=["observation.images.cam_high"])
    aloha = {"format": "hdf5", "rate_hz": 10.0, "mapping": {"preset": "aloha"}, "constant_caption": "do it"}
    assert found(source, robot, **aloha) == []
    close_all()
    with h5py.File(source / "episode_1.hdf5", "a") as file:
        file["observations/images/cam_high"][8, :20] = 0
    where = "episode 1, camera 'observation.images.cam_high', rows from 0"
    assert found(source, robot, **aloha) == [(faults.VIDEO, "episode_1.hdf5", where)]


def test_without_frame():
    times = np.array([0.0, 0.1, 0.2])
    assert without_frame(times, np.array([0.0, 0.1, 0.2]), 10).tolist() == [False] * 3
    assert without_frame(times, np.array([0.1]), 10).tolist() == [True, False, True]
    assert without_frame(times, np.array([]), 10).tolist() == [True] * 3


# ------------------------------------------------------------------------------------------------ clips


def found_in_clips(card, source):
    scan = Scan()
    findings = list(scan_clips(open_clips(card, source), scan, threads=2))
    return [(finding.kind, finding.file, finding.where) for finding in findings], scan


def test_clips(tmp_path):
    videos = {f"videos/{name}.mp4": mp4(20, 100 * place) for place, name in enumerate("abcd")}
    write_files(tmp_path, videos)
    rows = [row(name, 20, f"clip {name}") for name in "abcd"]
    write_rows(tmp_path / "rows.jsonl", rows)
    kinds, scan = found_in_clips(video_card(), tmp_path)
    assert kinds == [] and scan.items == 4 and scan.frames == 80 and len(scan.captions) == 4

    damaged = bytearray(videos["videos/b.mp4"])
    at = damaged.find(b"mdat") + 1000
    damaged[at : at + 40] = bytes(40)
    write_files(tmp_path, {"videos/b.mp4": bytes(damaged), "videos/c.mp4": videos["videos/a.mp4"]})
    (tmp_path / "videos" / "d.mp4").unlink()
    rows += [row("a", 20, None, window(0, 30, "too long")), row("a", 20), rows[0] | {"framerate": 12, "nb_frames": 21}]
    write_rows(tmp_path / "rows.jsonl", rows)
    kinds, _ = found_in_clips(video_card(), tmp_path)
    assert [(kind, file) for kind, file, _ in kinds] == [
        (faults.VIDEO, "videos/b.mp4"),
        (faults.DUPLICATE, "videos/c.mp4"),
        (clip_reasons.NO_VIDEO, "videos/d.mp4"),
        (faults.MISSING, "videos/a.mp4"),
        (clip_reasons.NO_CAPTION, "videos/a.mp4"),
        (faults.MISSING, "videos/a.mp4"),
        (faults.RATE, "videos/a.mp4"),
    ]


def test_the_sound_of_clips_is_decoded_to_its_end(tmp_path):
    """Also where its first moment, which preparing listens to, is whole."""
    sound = sounding(96)
    (tmp_path / "whole.mp4").write_bytes(sound)
    cut = bytearray(sound)
    with av.open(str(tmp_path / "whole.mp4")) as container:
        late = [packet for packet in container.demux(audio=0) if packet.size and packet.pts * packet.time_base > 2]
        for packet in late:
            cut[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    videos = {"a": sound, "b": bytes(cut), "c": mp4(20), "d": sounding(48, seconds=1.5), "e": sounding(48, late=0.5)}
    write_files(tmp_path, {f"videos/{name}.mp4": content for name, content in videos.items()})
    write_rows(tmp_path / "rows.jsonl", [row(name, 20, name) for name in videos])
    findings = list(scan_clips(open_clips(video_card(), tmp_path), Scan(), threads=2))
    assert [(one.kind, one.file) for one in findings] == [(faults.SOUND, "videos/b.mp4")]
    assert re.match(r"no sound can be decoded after (1\.9|2\.0)\d+ s", findings[0].words), findings[0].words


@pytest.mark.parametrize("codec, form", [("flac", "matroska"), ("libopus", "matroska"), ("aac", "matroska"),
                                         ("pcm_s16le", "mov")])  # fmt: skip
def test_a_whole_sound_of_any_codec_is_no_finding(tmp_path, codec, form):
    (tmp_path / "a").write_bytes(sounding(60, codec=codec, form=form))
    track = track_of(tmp_path, "a")
    assert track is not None and sound_fault(tmp_path, "a", track) == ""
    assert "the file says 9.000 s" in sound_fault(tmp_path, "a", track._replace(end=9.0))


def test_clips_in_shards(tmp_path):
    members = {"a.mp4": mp4(12), "a.json": {"caption": "a"}, "b.mp4": mp4(12, 50), "b.json": {"caption": "b"}}
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "y.tar", {"c.mp4": members["a.mp4"], "c.json": {"caption": "again"}})
    kinds, scan = found_in_clips(video_card(format="webdataset"), tmp_path)
    assert [kind for kind, *_ in kinds] == [faults.DUPLICATE] and kinds[0][1].startswith("y.tar#c.mp4")
    assert scan.frames == 36
