"""The LeRobot v3.0 writer: what is written is read back by pyarrow, pandas and PyAV alone."""

import json
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from cosmos3_train.data.lerobot_writer import LeRobotWriter

LENGTHS = (7, 12, 9, 5, 8)
CAMERAS = {"observation.images.top": (48, 64), "observation.images.wrist": (32, 32)}
COLUMNS = {"action": ["x", "y", "grip"], "observation.state": ["x", "y"]}
TASKS = ("push", "push", "pull", "push", "pull")


def _episode(number: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Smooth pictures that differ by episode, frame and camera (noise would not survive H.264)."""
    length, draws = LENGTHS[number], np.random.default_rng(number)
    frames = {}
    for shift, (key, (height, width)) in enumerate(CAMERAS.items()):
        y, x = np.mgrid[:height, :width]
        ramp = (x / width * 60 + y / height * 40)[None, :, :, None]
        level = (20 * number + 6 * np.arange(length) + 30 * shift)[:, None, None, None]
        frames[key] = np.clip(ramp + level + np.array([0, 8, 16]), 0, 255).astype(np.uint8)
    columns = {
        "action": draws.normal(size=(length, 3)).astype(np.float32),
        "observation.state": draws.uniform(0, 512, (length, 2)).astype(np.float32),
    }
    return frames, columns


def _write(root: Path, fps: float = 12, per_file: int | None = None) -> None:
    with LeRobotWriter(
        root,
        fps=fps,
        cameras=CAMERAS,
        columns=COLUMNS,
        robot_type="arm",
        crf=12,
        max_episodes_per_file=per_file,
    ) as writer:
        for number, task in enumerate(TASKS):
            writer.add_episode(*_episode(number), task)


def _episodes(root: Path) -> pd.DataFrame:
    return pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pandas()


@pytest.mark.parametrize("per_file", [None, 2])
@pytest.mark.parametrize("fps", [12, 29.97])
def test_rows_and_frames_read_back(tmp_path: Path, per_file: int | None, fps: float) -> None:
    root = tmp_path / "log"
    _write(root, fps, per_file)
    info = json.loads((root / "meta/info.json").read_text())
    files = {row["data/file_index"] for _, row in _episodes(root).iterrows()}
    assert files == ({0} if per_file is None else {0, 1, 2})
    for number, row in _episodes(root).iterrows():
        assert isinstance(number, int)
        frames, columns = _episode(number)
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        table = pq.read_table(root / info["data_path"].format(**place)).to_pandas()
        table = table[table["episode_index"] == number]
        for name, values in columns.items():
            np.testing.assert_array_equal(np.stack(table[name].to_list()), values)
        assert list(table["index"]) == list(range(row["dataset_from_index"], row["dataset_to_index"]))
        assert list(table["frame_index"]) == list(range(LENGTHS[number])) and row["length"] == LENGTHS[number]
        np.testing.assert_allclose(table["timestamp"], np.arange(LENGTHS[number]) / fps, rtol=1e-6)
        for key, pictures in frames.items():
            place = {k: row[f"videos/{key}/{k}"] for k in ("chunk_index", "file_index")}
            with av.open(str(root / info["video_path"].format(video_key=key, **place))) as container:
                decoded = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
            start = row[f"videos/{key}/from_timestamp"]
            for step, picture in enumerate(pictures):
                time, near = min(decoded, key=lambda found: abs(found[0] - (start + step / fps)))
                assert abs(time - (start + step / fps)) < 0.02 / fps
                assert np.abs(near.astype(int) - picture).mean() < 2.5
            assert row[f"videos/{key}/to_timestamp"] == pytest.approx(start + LENGTHS[number] / fps)


def test_info_and_tasks(tmp_path: Path) -> None:
    root = tmp_path / "log"
    _write(root)
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["robot_type"] == "arm" and info["fps"] == 12
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (5, sum(LENGTHS), 2)
    assert info["splits"] == {"train": "0:5"}
    assert info["features"]["action"] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "grip"]}
    assert info["features"]["observation.images.top"]["shape"] == [48, 64, 3]
    assert info["features"]["observation.images.top"]["dtype"] == "video"
    assert info["features"]["timestamp"]["dtype"] == "float32"
    tasks = pd.read_parquet(root / "meta/tasks.parquet")
    assert list(tasks.index) == ["push", "pull"] and list(tasks["task_index"]) == [0, 1]
    assert [list(t) for t in _episodes(root)["tasks"]] == [[t] for t in TASKS]


def test_statistics(tmp_path: Path) -> None:
    root = tmp_path / "log"
    _write(root)
    statistics = json.loads((root / "meta/stats.json").read_text())
    assert set(statistics) == set(json.loads((root / "meta/info.json").read_text())["features"])
    actions = np.concatenate([_episode(n)[1]["action"] for n in range(5)]).astype(np.float64)
    found = statistics["action"]
    assert found["count"] == [sum(LENGTHS)]
    np.testing.assert_allclose(found["mean"], actions.mean(0))
    np.testing.assert_allclose(found["std"], actions.std(0))
    np.testing.assert_allclose((found["min"], found["max"]), (actions.min(0), actions.max(0)))
    for name, share in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        np.testing.assert_allclose(found[name], np.quantile(actions, share, axis=0))
    pictures = np.concatenate([_episode(n)[0]["observation.images.top"] for n in range(5)]) / 255
    seen = np.array(statistics["observation.images.top"]["mean"])
    assert seen.shape == (3, 1, 1)
    np.testing.assert_allclose(seen.ravel(), pictures.mean((0, 1, 2)), atol=1e-6)
    own = _episodes(root)["stats/action/mean"][2]
    np.testing.assert_allclose(own, _episode(2)[1]["action"].mean(0), rtol=1e-5)


def test_the_same_log_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _write(tmp_path / name)
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert len(files) == 7
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_nothing_is_left_of_a_log_that_failed(tmp_path: Path) -> None:
    frames, columns = _episode(0)
    with (
        pytest.raises(ValueError, match="columns"),
        LeRobotWriter(tmp_path / "log", fps=10, cameras=CAMERAS, columns=COLUMNS, robot_type="arm") as writer,
    ):
        writer.add_episode(frames, columns, "push")
        assert not (tmp_path / "log").exists()
        writer.add_episode(frames, {"action": columns["action"]}, "push")
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_refused(tmp_path: Path) -> None:
    frames, columns = _episode(0)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        LeRobotWriter(tmp_path / "there", fps=10, cameras={}, columns=COLUMNS, robot_type="arm")
    with pytest.raises(ValueError, match="even"):
        LeRobotWriter(tmp_path / "a", fps=10, cameras={"c": (95, 96)}, columns=COLUMNS, robot_type="arm")
    writer = LeRobotWriter(tmp_path / "b", fps=10, cameras=CAMERAS, columns=COLUMNS, robot_type="arm")
    with pytest.raises(ValueError, match="lengths"):
        writer.add_episode(frames, columns | {"action": columns["action"][:-1]}, "push")
    with pytest.raises(ValueError, match="uint8"):
        writer.add_episode({k: v.astype(np.float32) for k, v in frames.items()}, columns, "push")
    with pytest.raises(ValueError, match="no episode"):
        writer.close()
