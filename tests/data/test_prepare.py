"""Preparing: windows, splits, what is dropped, what is refused; killed, resumed and in parallel."""

import errno
import fcntl
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cosmos3_train.config import Channel, UserError
from cosmos3_train.data import blocks
from cosmos3_train.data.files import exclusive
from cosmos3_train.data.index import assign_splits, window_starts
from cosmos3_train.data.lerobot_writer import LeRobotWriter
from cosmos3_train.data.prepare import GAP, SHORT, prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.statistics import Statistics
from tests.data.logs import CAMERA, dataset_card, default_actions, embodiment, frame_number, make_log

LENGTHS = [12, 4, 9, 15, 5, 20, 7]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("source") / "log", LENGTHS)


def prepared(log, output, card=None, robot=None, **options):
    return prepare(card or dataset_card(), robot or embodiment(), log, output, progress=False, **options)


def rows_of(folder):
    return list(PreparedDataset(folder, None).iter_rows())


def test_windows(log, tmp_path):
    summary = prepared(log, tmp_path / "out")
    assert summary.dropped == {SHORT: 1, GAP: 0}
    rows = rows_of(tmp_path / "out")
    expected = [(e, s) for e, length in enumerate(LENGTHS) for s in range(length - 4) if length >= 5]
    assert [(row["episode_index"], row["start"]) for row in rows] == expected
    assert sum(summary.windows.values()) == len(rows)
    assert sum(summary.episodes.values()) == len(LENGTHS) - 1
    for row in rows:
        start, length = row["start"], LENGTHS[row["episode_index"]]
        assert start + 4 < length, "a window never leaves its episode"
        actions = default_actions(row["episode_index"], length)
        assert np.array_equal(np.float32(row["action"]), actions[start : start + 4])
        assert np.array_equal(np.float32(row["state"]), actions[start] + 1)
        assert np.allclose(row["timestamps"], np.arange(start, start + 5) / 10)
        assert row["instruction"] == f"do task {row['episode_index'] % 2}"
        assert (row["height"], row["width"], row["fps"]) == (96, 96, 10)
        (video,) = row["video"]
        assert video["end_time"] - video["start_time"] == pytest.approx(0.4)
        assert not Path(video["path"]).is_absolute()


def test_frames_are_the_windows_own(log, tmp_path):
    """Several episodes share an mp4: every frame of every window shows its own number."""
    prepared(log, tmp_path / "out", window_stride=3)
    dataset = PreparedDataset(tmp_path / "out", None)
    for row in dataset.iter_rows():
        first = 100 * row["episode_index"] + row["start"]
        assert [frame_number(frame.numpy()) for frame in dataset.frames(row)] == list(range(first, first + 5))


def test_log_of_the_projects_own_writer(tmp_path):
    rng = np.random.default_rng(0)
    writer = LeRobotWriter(
        tmp_path / "log", fps=10, cameras={CAMERA: (96, 96)},
        columns={"action": ["x", "y"], "observation.state": ["x", "y"]}, robot_type="mover",
    )  # fmt: skip
    actions = [rng.uniform(0, 512, (length, 2)).astype(np.float32) for length in (8, 11)]
    for values in actions:
        frames = {CAMERA: np.zeros((len(values), 96, 96, 3), np.uint8)}
        writer.add_episode(frames, {"action": values, "observation.state": values}, task="push")
    writer.close()
    summary = prepared(tmp_path / "log", tmp_path / "out")
    assert summary.windows["train"] + summary.windows["heldout"] == 4 + 7
    for row in rows_of(tmp_path / "out"):
        start = row["start"]
        assert np.array_equal(np.float32(row["action"]), actions[row["episode_index"]][start : start + 4])
        assert row["instruction"] == "push"


def test_stride_counts_from_each_episodes_start(log, tmp_path):
    prepared(log, tmp_path / "out", window_stride=4)
    starts = {}
    for row in rows_of(tmp_path / "out"):
        starts.setdefault(row["episode_index"], []).append(row["start"])
    assert starts == {e: list(range(0, n - 4, 4)) for e, n in enumerate(LENGTHS) if n >= 5}


def test_statistics_are_of_the_train_split(log, tmp_path):
    summary = prepared(log, tmp_path / "out", heldout_fraction=0.4)
    statistics = Statistics.load(tmp_path / "out", embodiment="mover", dataset="moves")
    assert statistics.fingerprint == summary.fingerprint
    episodes = {row["episode_index"] for row in rows_of(tmp_path / "out") if row["split"] == "train"}
    assert 0 < len(episodes) < 6
    values = np.concatenate([default_actions(e, LENGTHS[e]) for e in sorted(episodes)]).astype(np.float64)
    assert statistics.action.count == len(values)
    assert np.allclose(statistics.action.mean, values.mean(0), rtol=1e-12)
    assert np.allclose(statistics.action.std, values.std(0), rtol=1e-12)
    assert np.allclose(statistics.action.q99, np.quantile(values, 0.99, axis=0), rtol=1e-12)
    assert statistics.state is not None
    assert np.allclose(statistics.state.min, values.min(0) + 1)
    assert (tmp_path / "out" / "statistics.png").stat().st_size > 1000
    assert statistics.normalised is not None and statistics.normalised.count == len(values)
    assert np.allclose([statistics.normalised.q01, statistics.normalised.q99], [[-1, -1], [1, 1]])


def test_splits():
    many = list(range(4000))
    split = assign_splits("moves", many, 0.1, seed=0)
    share = sum(value == "heldout" for value in split.values()) / 4000
    assert 0.08 < share < 0.12
    assert assign_splits("moves", many[:2000], 0.1, seed=0) == {e: split[e] for e in many[:2000]}
    assert assign_splits("moves", many, 0.1, seed=1) != split
    assert set(assign_splits("moves", many, 0.0, seed=0).values()) == {"train"}
    for count in range(2, 12):
        assert set(assign_splits("moves", list(range(count)), 0.001, 0).values()) == {"train", "heldout"}
        assert set(assign_splits("moves", list(range(count)), 0.999, 0).values()) == {"train", "heldout"}


def test_windows_across_a_gap_are_dropped_and_counted(tmp_path):
    times = np.arange(12) / 10
    times[6:] += 0.1  # one frame is missing between rows 5 and 6
    assert window_starts(times, 4, 1, 10) == ([0, 1, 6, 7], 4)
    log = make_log(tmp_path / "log", [12], timestamps={0: times})
    robot = embodiment()
    (log / f"videos/{CAMERA}/chunk-000/file-000.mp4").unlink()
    make_log(tmp_path / "longer", [13])
    (tmp_path / f"longer/videos/{CAMERA}/chunk-000/file-000.mp4").rename(
        log / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    )
    summary = prepared(log, tmp_path / "out", robot=robot)
    assert summary.dropped == {SHORT: 0, GAP: 4}
    dataset = PreparedDataset(tmp_path / "out", robot)
    assert [frame_number(f.numpy()) for f in dataset.frames(dataset.window("train", 2))] == [7, 8, 9, 10, 11]


def test_captions(log, tmp_path):
    prepared(log, tmp_path / "a", card=dataset_card(constant_caption="tidy up"))
    assert {row["instruction"] for row in rows_of(tmp_path / "a")} == {"tidy up"}
    with pytest.raises(UserError, match=r"caption_column 'observation\.state' holds numbers, not words"):
        prepared(log, tmp_path / "b", card=dataset_card(caption_column="observation.state"))


def test_two_cameras_side_by_side(tmp_path):
    log = make_log(tmp_path / "log", [6, 7], cameras={"left": (96, 96), "right": (96, 64)})
    robot = embodiment(cameras=["left", "right"], layout="row")
    prepared(log, tmp_path / "out", robot=robot)
    dataset = PreparedDataset(tmp_path / "out", robot)
    row = dataset.row(3)
    frames = dataset.frames(row)
    assert frames.shape == (5, 3, 96, 160)
    assert (row["height"], row["width"]) == (96, 160)
    assert [frame_number(frame.numpy()) for frame in frames[..., :96]] == [101, 102, 103, 104, 105]
    with pytest.raises(UserError, match="differ in width"):
        prepared(log, tmp_path / "other", robot=embodiment(cameras=["left", "right"], layout="column"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cameras": ["observation.imge"]}, r"no camera 'observation\.imge'.* Did you mean 'observation\.image'"),
        ({"action_key": "acton"}, "no column 'acton'.* Did you mean 'action'"),
        ({"state_key": "state"}, r"no column 'state' in the log"),
        ({"control_hz": 20.0}, "the log has 10 frames a second, embodiment 'mover' has control_hz 20"),
        ({"action": [Channel("x")]}, "'action' has 2 numbers a row, embodiment 'mover' has 1 channels"),
        ({"action": [Channel("x", high=3.0), Channel("y")]}, "episode 0, row 4: action channel 'x' is 4, outside"),
        ({"chunk": 20}, r"none of 7 episodes has the 21 frames of a window \(chunk \+ 1\); the longest has 20"),
    ],
)
def test_a_card_that_does_not_fit_the_log(log, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        prepared(log, tmp_path / "out", robot=embodiment(**changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_actions_that_are_no_numbers(tmp_path, bad):
    actions = default_actions(1, 9)
    actions[5, 1] = bad
    log = make_log(tmp_path / "log", [8, 9, 8], actions={1: actions})
    with pytest.raises(UserError, match=f"dataset 'moves', episode 1, row 5: channel 'y' of 'action' is {bad}"):
        prepared(log, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["log"], "nothing half-written is left"


def test_state_row_of_another_width(tmp_path):
    log = make_log(tmp_path / "log", [8, 9], extra={"load": [np.zeros(8, np.float32), np.zeros(9, np.float32)]})
    with pytest.raises(UserError, match="'load' has 1 numbers and the embodiment has 2 channels"):
        prepared(log, tmp_path / "out", robot=embodiment(state_key="load", state_row=True))
    prepared(log, tmp_path / "out", robot=embodiment(state_key="load"))
    assert rows_of(tmp_path / "out")[0]["state"] == [0.0]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("workers", [1])
def test_a_broken_video_is_found_while_preparing(tmp_path, damage, workers):
    log = make_log(tmp_path / "log", LENGTHS)
    path = log / f"videos/{CAMERA}/chunk-000/file-001.mp4"
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"file-001\.mp4: "):
        prepared(log, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()
    path.write_bytes(content)
    prepared(log, tmp_path / "out")


def test_a_video_shorter_than_its_episodes(tmp_path):
    log = make_log(tmp_path / "log", [8, 9])
    make_log(tmp_path / "short", [8, 7])
    name = f"videos/{CAMERA}/chunk-000/file-000.mp4"
    (tmp_path / "short" / name).replace(log / name)
    with pytest.raises(UserError, match=r"file-000\.mp4: no frame within half a frame period"):
        prepared(log, tmp_path / "out")


def test_prepared_already(log, tmp_path):
    first = prepared(log, tmp_path / "out")
    made = (tmp_path / "out" / "card.json").stat().st_mtime_ns
    again = prepared(log, tmp_path / "out", robot=embodiment(execute=4, domain_id=7))
    assert again.reused and again.fingerprint == first.fingerprint and again.windows == first.windows
    assert (tmp_path / "out" / "card.json").stat().st_mtime_ns == made
    with pytest.raises(UserError, match=r"prepared with window_stride 1, now 2; prepare it again with --fresh"):
        prepared(log, tmp_path / "out", window_stride=2)
    with pytest.raises(UserError, match=r"prepared with embodiment\.action\.1\.high 512\.0, now 600\.0"):
        prepared(
            log,
            tmp_path / "out",
            robot=embodiment(action=[*embodiment().action[:1], Channel("y", unit="px", low=0.0, high=600.0)]),
        )
    summary = prepared(log, tmp_path / "out", window_stride=2, fresh=True)
    assert not summary.reused and sum(summary.windows.values()) < sum(first.windows.values())
    assert {row["start"] % 2 for row in rows_of(tmp_path / "out")} == {0}
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no work folder is left behind"


def test_the_log_changed(tmp_path):
    log = make_log(tmp_path / "log", [8, 9])
    prepared(log, tmp_path / "out")
    make_log(log, [8, 10])
    with pytest.raises(UserError, match="the log has changed since"):
        prepared(log, tmp_path / "out")


def test_other_peoples_folders_are_left_alone(log, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match="exists and is not a prepared folder"):
            prepared(log, tmp_path / "out", fresh=fresh)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_outputs_that_can_be_no_prepared_folder(log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    Path("cards").mkdir()
    Path("cards", "card.json").write_text('{"mine": 1}')
    Path("cards", "conversations.parquet").write_text("mine")
    longest = "n" * 247  # whose work folder has too long a name
    for output, words in {
        ".": "no name for a prepared folder", "..": "no name for", "/": "no name for",
        "file": "exists and is not", "file/out": "cannot be made", "loop": "exists and is not", "loop/out": "cannot be",
        "cards": "exists and is not", "n" * 300: "cannot be made", longest: "File name too long", "/proc/out": "cannot",
        str(log): "holds the set itself", str(log.parent): "holds the set itself",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words), exclusive(Path(output)):
            prepared(log, output, fresh=True)
    assert json.loads(Path("cards", "card.json").read_text()) == {"mine": 1}
    assert Path("cards", "conversations.parquet").read_text() == "mine" and Path("file").read_text() == "mine"


def test_a_file_system_without_locks_is_refused_in_one_line(tmp_path, monkeypatch):
    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match=r"^.*/out: cannot be locked \(Function not implemented\); .*another one$"),
        exclusive(tmp_path / "out"),
    ):
        pytest.fail("went on without a lock")


def test_a_link_leads_to_the_folder_that_is_made(log, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for fresh in (False, True):
        prepared(log, tmp_path / "out", fresh=fresh)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "card.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_stride": 0}, "window_stride is 0"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction is 1\.0"),
        ({"workers": 0}, "workers is 0"),
        ({"card": dataset_card(format="conversations")}, "format 'conversations' is not prepared"),
    ],
)
def test_settings_out_of_range(log, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        prepared(log, tmp_path / "out", **options)


def test_a_full_disk(log, tmp_path):
    """The largest file allowed stands in for the disk's end: both come as an OSError in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=r"the disk is full .* free some space and run the same command again"):
            prepared(log, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.writing")) and not list(tmp_path.rglob("*.parquet"))
    prepared(log, tmp_path / "out")
    prepared(log, tmp_path / "undisturbed")
    assert same_files(tmp_path / "out", tmp_path / "undisturbed")


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    assert names == sorted(path.name for path in other.iterdir() if path.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


PREPARE = """
import sys
from pathlib import Path
from cosmos3_train.data import blocks
from cosmos3_train.data.prepare import prepare
from tests.data.logs import dataset_card, embodiment

if __name__ == "__main__":
    blocks.BLOCK_FRAMES = 60
    prepare(dataset_card(), embodiment(), sys.argv[1], sys.argv[2], progress=False)
"""


def test_killed_resumed_and_in_parallel(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_FRAMES", 60)
    log = make_log(tmp_path / "log", [20] * 48)
    prepared(log, tmp_path / "undisturbed")
    parallel = prepared(log, tmp_path / "parallel", workers=3)
    assert same_files(tmp_path / "undisturbed", tmp_path / "parallel")
    (tmp_path / "run.py").write_text(PREPARE)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(log), str(tmp_path / "out")],
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    reports = tmp_path / ".out.preparing" / "blocks"
    deadline = time.monotonic() + 60
    while not (reports / "00002.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before it ended"
    done = {path.name: path.stat().st_mtime_ns for path in reports.glob("*.json")}
    assert 3 <= len(done) < 16
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.preparing" / "finished" / "windows-00000.parquet"
    before = kept.stat().st_mtime_ns
    resumed = prepared(log, tmp_path / "out")
    assert (tmp_path / "out" / "windows-00000.parquet").stat().st_mtime_ns == before, "finished blocks are not redone"
    assert resumed.windows == parallel.windows
    assert same_files(tmp_path / "undisturbed", tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "card.json").read_text())["counts"]) == 2


def test_errors_of_a_worker_are_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_FRAMES", 8)
    actions = default_actions(3, 9)
    actions[2, 0] = 600
    log = make_log(tmp_path / "log", [8, 9, 8, 9], actions={3: actions})
    with pytest.raises(UserError, match="episode 3, row 2: action channel 'x' is 600, outside its range 0 to 512 px"):
        prepared(log, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
