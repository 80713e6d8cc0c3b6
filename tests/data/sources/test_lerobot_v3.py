"""The LeRobot v3 reader against logs of the tests' own writer, whole and broken."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosmos3_train.config import UserError
from cosmos3_train.data.sources.lerobot_v3 import open_lerobot
from tests.data.logs import CAMERA, default_actions, make_log


@pytest.fixture
def log(tmp_path):
    return make_log(tmp_path / "log", [6, 9, 4, 7, 5])


def change_info(log, **changes):
    path = log / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_opens_metadata(log):
    opened = open_lerobot(log)
    assert opened.fps == 10
    assert opened.cameras == (CAMERA,)
    assert [episode.length for episode in opened.episodes] == [6, 9, 4, 7, 5]
    place = opened.episodes[4].video[CAMERA]
    assert place.path == f"videos/{CAMERA}/chunk-000/file-001.mp4"
    assert place.from_timestamp == pytest.approx(0.7)


def test_reads_only_what_is_asked_for(log):
    opened = open_lerobot(log)
    records = list(opened.records(opened.episodes[1:4], ["action"]))
    assert [record.index for record in records] == [1, 2, 3]
    for record in records:
        assert set(record.columns) == {"action"}
        assert record.columns["action"].dtype == np.float32
        assert np.array_equal(record.columns["action"], default_actions(record.index, record.length))
        assert np.allclose(record.timestamps, np.arange(record.length) / 10)
        assert record.task == f"do task {record.index % 2}"


@pytest.mark.parametrize("kind", ["fixed", "scalar", "large"])
def test_column_kinds(log, kind):
    path = log / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    values = np.stack(table.column("action").to_pylist()).astype(np.float32)
    column = {
        "fixed": lambda: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 2),
        "large": lambda: pa.array(list(values), pa.large_list(pa.float64())),
        "scalar": lambda: pa.array(values[:, 0]),
    }[kind]()
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path, row_group_size=5)
    opened = open_lerobot(log)
    record = list(opened.records(opened.episodes[:3], ["action"]))[1]
    expected = default_actions(1, 9)
    assert np.array_equal(record.columns["action"], expected[:, :1] if kind == "scalar" else expected)


def test_task_words_in_a_column(log):
    words = pa.table({"task": ["push", "pull"], "task_index": [0, 1]})
    pq.write_table(words, log / "meta" / "tasks.parquet")
    opened = open_lerobot(log)
    assert next(opened.records(opened.episodes[:1], [])).task == "push"


def test_not_a_log(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_lerobot(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a LeRobot log"):
        open_lerobot(tmp_path)


def test_other_version(log):
    change_info(log, codebase_version="v2.1")
    with pytest.raises(UserError, match=r"codebase_version is v2\.1, but .* write format: lerobot_v2"):
        open_lerobot(log)


def test_broken_info(log):
    (log / "meta" / "info.json").write_text("{")
    with pytest.raises(UserError, match=r"info\.json: not valid JSON"):
        open_lerobot(log)


def test_missing_and_corrupt_metadata(log):
    (log / "meta" / "tasks.parquet").unlink()
    with pytest.raises(UserError, match=r"tasks\.parquet: the Parquet file is missing"):
        open_lerobot(log)


@pytest.mark.parametrize("name", ["meta/episodes/chunk-000/file-001.parquet", "meta/tasks.parquet"])
def test_corrupt_metadata(log, name):
    (log / name).write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(UserError, match=f"{name}: not a readable Parquet file"):
        open_lerobot(log)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("length", None), ("length", "x"), ("length", -4), ("episode_index", 0.5), ("data/chunk_index", None),
        (f"videos/{CAMERA}/from_timestamp", float("nan")), (f"videos/{CAMERA}/from_timestamp", None), ("tasks", 5),
    ],
)  # fmt: skip
def test_cells_of_the_table_of_episodes_that_cannot_be(log, column, value):
    path = log / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    cells = pa.array([value] * len(table))
    pq.write_table(table.set_column(table.column_names.index(column), column, cells), path)
    with pytest.raises(UserError, match=rf"file-000\.parquet: episode .*: {column} is {value!r}; .* expected"):
        open_lerobot(log)


def test_a_path_template_that_fills_the_memory(log):
    change_info(log, video_path="{chunk_index:99999999999}")
    with pytest.raises(UserError, match=r"path template .* is not of this version"):
        open_lerobot(log)


def test_missing_data_file(log):
    (log / "data/chunk-000/file-001.parquet").unlink()
    opened = open_lerobot(log)
    with pytest.raises(UserError, match=r"file-001\.parquet: the Parquet file is missing"):
        list(opened.records(opened.episodes, ["action"]))


def test_truncated_data_file(log):
    path = log / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    opened = open_lerobot(log)
    with pytest.raises(UserError, match=r"file-000\.parquet: not a readable Parquet file"):
        list(opened.records(opened.episodes, ["action"]))


def test_a_name_that_is_not_text(log):
    path = log / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes().replace(b"observation.state", b"observ\xeation.state"))
    opened = open_lerobot(log)
    with pytest.raises(UserError, match=r"file-000\.parquet: not a readable Parquet file"):
        list(opened.records(opened.episodes, ["action"]))


def test_rows_are_missing(log):
    path = log / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 8), path)
    opened = open_lerobot(log)
    with pytest.raises(UserError, match=r"episode 1 has 2 rows, but meta/episodes says 9"):
        list(opened.records(opened.episodes, ["action"]))


def test_times_that_do_not_rise(tmp_path):
    log = make_log(tmp_path / "log", [5], timestamps={0: np.array([0, 0.1, 0.1, 0.3, 0.4])})
    opened = open_lerobot(log)
    with pytest.raises(UserError, match="timestamp of row 2"):
        list(opened.records(opened.episodes, ["action"]))


def test_wrong_names(log):
    opened = open_lerobot(log)
    with pytest.raises(UserError, match=r"no camera 'observation\.imag' .* Did you mean 'observation\.image'"):
        opened.check_camera("observation.imag")
    with pytest.raises(UserError, match=r"no column 'actions' .* Did you mean 'action'"):
        opened.check_column("actions")
