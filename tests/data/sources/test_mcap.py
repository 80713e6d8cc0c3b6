import numpy as np
import pytest

from cosmos3_train.config import Channel, Recorded, UserError
from cosmos3_train.data import poses
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.index import GAP
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_log
from cosmos3_train.data.sources.mcap import ENDS, INCOMPLETE, REPEATED, SHIFTED
from cosmos3_train.data.video import frames_at
from tests.data.bags import Sent, compressed, joints, numbers, pose, raw, write_bag
from tests.data.logs import embodiment, frame_number, numbered_frame

CAMERA, JOINTS, COMMAND, HAND = "/front/image/compressed", "/joint_states", "/command", "/hand_pose"
KINDS = {
    CAMERA: "sensor_msgs/msg/CompressedImage",
    "/side/image": "sensor_msgs/msg/Image",
    JOINTS: "sensor_msgs/msg/JointState",
    COMMAND: "std_msgs/msg/Float64MultiArray",
    HAND: "geometry_msgs/msg/PoseStamped",
}
MAPPING = {
    "cameras": {"front": CAMERA},
    "columns": {
        "observation.state": {"topic": JOINTS, "field": "position", "names": ["elbow", "wrist"]},
        "action": f"{COMMAND}:data",
    },
}


def card(**mapping):
    caption = None if "instruction" in mapping else "tidy up"
    return DatasetCard(name="bags", format="mcap", rate_hz=10, constant_caption=caption, mapping={**MAPPING, **mapping})


def turned(time):
    return [0.0, 0.0, np.sin(time / 2), np.cos(time / 2)]


def camera(times, first=0, topic=CAMERA, delay=0.02, offset=0.0):
    """A picture at each time, which shows its number."""
    for number, time in enumerate(times):
        picture = numbered_frame(first + number, 48, 64)
        fields = compressed(picture) if topic == CAMERA else raw(picture, "bgr8", padding=5)
        yield Sent(topic, KINDS[topic], time + offset, time + delay, fields)


def arm(times, offset=0.0):
    """Joints in an order that changes, of values that say the time; commands without a header; the hand's pose."""
    for number, time in enumerate(times):
        order = ["wrist", "elbow", "other"] if number % 2 else ["elbow", "other", "wrist"]
        values = {"elbow": time, "wrist": -time, "other": 7.0}
        fields = joints(order, [values[name] for name in order])
        yield Sent(JOINTS, KINDS[JOINTS], time + offset, time + 0.003, fields)
        yield Sent(COMMAND, KINDS[COMMAND], time, time, numbers([time, 2 * time]))
        yield Sent(HAND, KINDS[HAND], time, time + 0.001, pose([time, 0, 0], turned(time)))


def frames_of(log, record, name="front"):
    path, start = record.video[name]
    return [frame_number(frame.numpy()) for frame in frames_at(log.root, path, start + record.timestamps)]


def only(log, columns=("observation.state", "action")):
    (record,) = log.records(log.episodes, columns)
    return record


def test_pictures_joints_and_times_come_back(tmp_path):
    write_bag(
        tmp_path / "day" / "run.mcap",
        [*camera(np.arange(20) / 10), *camera(np.arange(60) / 30, topic="/side/image"), *arm(np.arange(200) / 100)],
    )
    mapping = {"cameras": {"front": CAMERA, "side": "/side/image"}}
    mapping["columns"] = MAPPING["columns"] | {"hand": [f"{HAND}:pose.position", f"{HAND}:pose.orientation"]}
    log = open_log(card(**mapping), tmp_path)
    assert (log.fps, log.cameras, log.columns) == (10, ("front", "side"), ("observation.state", "action", "hand"))
    assert [log.width(name) for name in log.columns] == [2, 2, 7]
    record = only(log, log.columns)
    assert record.length == log.episodes[0].length == 20 and record.faults == log.left_out == {}
    assert np.allclose(record.timestamps, np.arange(20) / 10)
    assert np.allclose(record.columns["observation.state"], np.outer(record.timestamps, [1, -1]), atol=0.011)
    assert np.allclose(record.columns["action"], np.outer(record.timestamps, [1, 2]), atol=0.011)
    expected = [[time, 0, 0, *turned(time)] for time in record.timestamps]
    assert np.allclose(record.columns["hand"], expected, atol=0.011)
    assert frames_of(log, record) == list(range(20))
    assert frames_of(log, record, "side") == list(range(0, 60, 3)), "bgr8 with padded rows, three times as fast"


def test_jitter_takes_every_message_once(tmp_path):
    times = np.arange(50) / 10
    jitter = np.random.default_rng(0).uniform(-0.03, 0.03, 50)
    jitter[0] = 0.03  # the first one's share of it must not set the rows' step
    write_bag(tmp_path / "run.mcap", [*camera(times + jitter), *arm(np.arange(1000) / 200 - 0.05)])
    log = open_log(card(), tmp_path)
    record = only(log)
    assert record.length == 50 and frames_of(log, record) == list(range(50)) and INCOMPLETE not in record.faults
    spread = record.columns["observation.state"][:, 0] - times
    assert np.abs(spread - np.median(spread)).max() < 0.006 and abs(np.median(spread)) < 0.01


def test_a_stamp_counts_and_not_when_it_was_received(tmp_path):
    late = [
        sent._replace(received=sent.received + 0.2 * (n % 3 == 0)) for n, sent in enumerate(camera(np.arange(20) / 10))
    ]
    write_bag(tmp_path / "run.mcap", [*late, *arm(np.arange(250) / 100)])
    log = open_log(card(), tmp_path)
    assert frames_of(log, only(log)) == list(range(20))
    log = open_log(card(clock="receive"), tmp_path)
    assert frames_of(log, only(log)) != list(range(20))


def test_a_dropped_message_leaves_out_its_row_and_no_window_reaches_over_it(tmp_path):
    kept = [sent for n, sent in enumerate(camera(np.arange(30) / 10)) if n not in (12, 13)]
    write_bag(tmp_path / "run.mcap", [*kept, *arm(np.arange(300) / 100)])
    log = open_log(card(), tmp_path)
    record = only(log)
    assert record.length == 28 and frames_of(log, record) == [n for n in range(30) if n not in (12, 13)]
    assert np.allclose(record.timestamps, [n / 10 for n in range(30) if n not in (12, 13)])
    count, example = record.faults[INCOMPLETE]
    assert count == 2 and example == f"run.mcap: {CAMERA} 2 rows, the first 1.200 s into it"
    robot = embodiment(cameras=["front"], action=[Channel("x"), Channel("y")])
    summary = prepare(card(), robot, tmp_path, tmp_path / "out", progress=False, heldout_fraction=0)
    assert summary.dropped[INCOMPLETE] == 2 and summary.dropped[GAP] == 4 and summary.windows["train"] == 20
    assert example in summary.examples[INCOMPLETE]
    dataset = PreparedDataset(tmp_path / "out", robot)
    for row in dataset.iter_rows():
        shown = [frame_number(frame.numpy()) for frame in dataset.frames(row)]
        assert shown == list(range(shown[0], shown[0] + 5)) and not {12, 13} & set(shown)
        assert np.allclose(row["action"], np.outer(np.array(shown[:4]) / 10, [1, 2]), atol=0.011)


@pytest.mark.parametrize("offset", [-3600.0, 2.5, 1e6])
def test_a_clock_that_is_not_the_recorders_is_set(tmp_path, offset):
    write_bag(
        tmp_path / "run.mcap", [*camera(np.arange(20) / 10, delay=0.0, offset=offset), *arm(np.arange(200) / 100)]
    )
    log = open_log(card(), tmp_path)
    record = only(log)
    assert frames_of(log, record) == list(range(20))
    assert np.allclose(record.columns["observation.state"][:, 0], record.timestamps, atol=0.011)
    assert record.faults == {} and log.left_out == {SHIFTED: (1, f"run.mcap: {CAMERA} by {-offset:+.3f} s")}


def test_stamps_that_repeat_are_counted(tmp_path):
    shown = list(camera(np.arange(20) / 10))
    shown.insert(7, shown[7]._replace(received=shown[7].received + 0.01, fields=shown[3].fields))
    write_bag(tmp_path / "run.mcap", [*shown, *arm(np.arange(200) / 100)])
    log = open_log(card(), tmp_path)
    record = only(log)
    assert frames_of(log, record) == list(range(20)) and log.left_out == {REPEATED: (1, f"run.mcap: {CAMERA}")}


def test_rows_before_a_topic_begins_and_after_one_ends_are_counted(tmp_path):
    """Also where no episode is left of it, or only one that is too short for a window."""
    write_bag(tmp_path / "run_1.mcap", [*camera(np.arange(20) / 10), *arm(0.5 + np.arange(200) / 100)])
    write_bag(tmp_path / "run_2.mcap", [*camera(5 + np.arange(20) / 10), *arm(np.arange(200) / 100)])
    robot = embodiment(cameras=["front"], action=[Channel("x"), Channel("y")])
    summary = prepare(card(), robot, tmp_path, tmp_path / "out", progress=False, heldout_fraction=0)
    assert summary.windows["train"] == 11, "of 15 rows from 0.5 s to 1.9 s"
    hand = 0.5 + 1.99 - 1.9  # the camera's last message comes so much before the arm's
    assert summary.dropped[ENDS] == 5 + int(hand * 10) + 50 + 49
    assert summary.examples[ENDS] == f"run_1.mcap: {JOINTS} begins 0.500 s late"
    log = open_log(card(split_gap=1.0), tmp_path)
    assert [episode.length for episode in log.episodes] == [15, 0]
    assert log.left_out[ENDS] == (5 + 20, f"run_1.mcap: {JOINTS} begins 0.500 s late"), "limits are the camera's"


def test_episodes_by_gap_by_topic_and_by_file(tmp_path):
    times = np.concatenate([np.arange(20) / 10, 5 + np.arange(15) / 10])
    messages = [*camera(times), *arm(np.arange(800) / 100)]
    marks = [(-1.0, 0), (0.31, 1), (1.42, 0), (5.0, 2)]
    messages += [Sent("/episode", "std_msgs/msg/Int32", 0, time, {"data": value}) for time, value in marks]
    messages += [
        Sent("/task", "std_msgs/msg/String", 0, time, {"data": text}) for time, text in ((0, "pick"), (4, "put"))
    ]
    write_bag(tmp_path / "run_2.mcap", messages)
    write_bag(
        tmp_path / "run_10.mcap", [*messages[:0], *camera(np.arange(9) / 10), *arm(np.arange(90) / 100), *messages[-6:]]
    )
    gap = open_log(card(split_gap=1.0, instruction="/task:data"), tmp_path)
    assert [episode.length for episode in gap.episodes] == [20, 15, 9], "run_2 before run_10"
    records = list(gap.records(gap.episodes, ["action"]))
    assert [set(record.tasks) for record in records] == [{"pick"}, {"put"}, {"pick"}]
    assert frames_of(gap, records[1]) == list(range(20, 35)) and records[1].timestamps[0] == 0
    topic = open_log(card(split_topic="/episode:data"), tmp_path)
    assert [episode.length for episode in topic.episodes[:2]] == [11, 15]
    assert frames_of(topic, next(iter(topic.records(topic.episodes[:1], ["action"])))) == list(range(4, 15))


def test_words_and_held_values(tmp_path):
    grips = [Sent("/grip", "std_msgs/msg/Int32", 0, time, {"data": value}) for time, value in ((0, 0), (0.55, 1))]
    says = [
        Sent("/task", "std_msgs/msg/String", 0, time, {"data": text}) for time, text in ((0.2, "pick"), (1.05, "put"))
    ]
    write_bag(tmp_path / "run.mcap", [*camera(np.arange(20) / 10), *arm(np.arange(200) / 100), *grips, *says])
    columns = {"action": [f"{COMMAND}:data", {"topic": "/grip", "field": "data", "hold": True}], "words": "/task:data"}
    log = open_log(card(columns=columns), tmp_path)
    record = only(log, ["action", "words"])
    assert record.length == 20 and record.columns["action"][:, 2].tolist() == [0.0] * 6 + [1.0] * 14
    assert record.columns["words"] == ["pick"] * 11 + ["put"] * 9, "the first words also count before they are said"


def test_moves_from_a_pose_topic(tmp_path):
    write_bag(tmp_path / "run.mcap", [*camera(np.arange(20) / 10), *arm(np.arange(200) / 100)])
    columns = {"hand": [f"{HAND}:pose.position", f"{HAND}:pose.orientation"]}
    hand = Recorded("hand", column="hand[0:3]", rotation="hand[3:7]", form="quaternion_xyzw")
    robot = embodiment(cameras=["front"], action=[], recorded=[hand], state_key=None)
    prepare(card(columns=columns), robot, tmp_path, tmp_path / "out", progress=False, heldout_fraction=0)
    action = np.array(PreparedDataset(tmp_path / "out", robot).row(3)["action"])
    there = poses.to_poses(
        np.array([[time, 0, 0] for time in np.arange(3, 8) / 10]),
        poses.to_matrices([turned(time) for time in np.arange(3, 8) / 10], "quaternion_xyzw"),
    )
    assert np.allclose(action, poses.moves_between(there), atol=0.02)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"cameras": {"front": "/front/image"}}, r"no topic '/front/image' .* Did you mean '/front/image/compressed'"),
        ({"columns": {"action": f"{JOINTS}:positon"}}, r"have no 'positon' .* Did you mean 'position'"),
        (
            {"columns": {"action": {"topic": JOINTS, "field": "position", "names": ["elbo"]}}},
            "no joint 'elbo'.*'elbow'",
        ),
        ({"columns": {"action": COMMAND}}, "a field is written TOPIC:FIELD"),
        ({"columns": {"action": {"topic": COMMAND, "feld": "data"}}}, "feld.* Did you mean 'field'"),
        ({"files": "*.bag"}, r"no file matches \*\.bag"),
        ({"files": "../*.mcap"}, "a pattern below the source"),
        ({"split": 3}, "mapping: unknown key 'split'. Did you mean 'split_gap'"),
    ],
)
def test_a_mapping_that_does_not_fit(tmp_path, mapping, words):
    write_bag(tmp_path / "run.mcap", [*camera(np.arange(20) / 10), *arm(np.arange(200) / 100)])
    with pytest.raises(UserError, match=words):
        open_log(card(**mapping), tmp_path)


def test_a_topic_that_is_no_camera_and_a_camera_that_cannot_be_read(tmp_path):
    depth = compressed(numbered_frame(1, 48, 64), "png") | {"format": "16UC1; compressedDepth png"}
    messages = [Sent(CAMERA, KINDS[CAMERA], time, time, depth) for time in np.arange(20) / 10]
    write_bag(tmp_path / "run.mcap", [*messages, *arm(np.arange(200) / 100)])
    with pytest.raises(UserError, match=r"/joint_states holds sensor_msgs/msg/JointState; sensor_msgs/msg/Image and"):
        open_log(card(cameras={"front": JOINTS}), tmp_path).check_camera("front")
    log = open_log(card(), tmp_path)
    log.check_camera("front")
    with pytest.raises(UserError, match="is a compressed depth image"):
        frames_of(log, only(log))
    with pytest.raises(UserError, match=r"no camera 'fornt'.* Did you mean 'front'"):
        log.check_camera("fornt")


def test_damaged_bags_are_told_and_never_crash(tmp_path):
    path = write_bag(tmp_path / "run.mcap", [*camera(np.arange(12) / 10), *arm(np.arange(60) / 50)])
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    told = 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: random.integers(1, len(whole))]
        else:
            for place in random.integers(0, len(whole), 1 + trial % 5):
                damaged[place] ^= 1 << random.integers(8)
        path.unlink()  # another inode: a file that is kept open is not the new one
        path.write_bytes(bytes(damaged))
        try:
            log = open_log(card(), tmp_path)
            for record in log.records(log.episodes, ["observation.state", "action"]):
                frames_of(log, record)
        except UserError as error:
            told += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error)
    assert told >= 40
