"""LeRobot v2.0 and v2.1 logs, written here file by file: opened, prepared and read back; and pictures in Parquet."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from cosmos3_train import cli
from cosmos3_train.config import UserError, to_plain
from cosmos3_train.data.prepare import GAP, prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_log
from cosmos3_train.data.sources.lerobot_v2 import open_lerobot_v2
from cosmos3_train.data.sources.lerobot_v3 import open_lerobot
from tests.data.logs import (
    CAMERA,
    dataset_card,
    default_actions,
    embodiment,
    frame_number,
    make_log,
    numbered_frame,
    write_video,
)

LENGTHS = [6, 9, 7]
CARD = dataset_card(format="lerobot_v2")


def make_v2(root, lengths=LENGTHS, *, version="v2.1", stored="video", chunk_episodes=2, times=None):
    """A v2 log; frame i of episode e shows number 100·e + i, its task alternates and is numbered from 5.

    Args:
        stored: "video", "bytes" (pictures in Parquet) or "path" (pictures beside it, named in Parquet).
        chunk_episodes: episodes a chunk, so that a small log has several.
        times: of every episode, in place of even ones.
    """
    meta = root / "meta"
    meta.mkdir(parents=True)
    index = 0
    for episode, length in enumerate(lengths):
        values = default_actions(episode, length)
        columns = {
            "action": pa.array(list(values), pa.list_(pa.float32())),
            "observation.state": pa.FixedSizeListArray.from_arrays(pa.array((values + 1).ravel()), 2),
            "annotation.human.action": pa.array([6 - episode % 2] * length, pa.int64()),
            "timestamp": pa.array((np.arange(length) / 10 if times is None else times), pa.float32()),
            "frame_index": pa.array(range(length), pa.int64()),
            "episode_index": pa.array([episode] * length, pa.int64()),
            "index": pa.array(range(index, index + length), pa.int64()),
            "task_index": pa.array([5 + episode % 2] * length, pa.int64()),
        }
        frames = [numbered_frame(100 * episode + frame) for frame in range(length)]
        chunk = f"chunk-{episode // chunk_episodes:03d}"
        if stored == "video":
            write_video(root / f"videos/{chunk}/{CAMERA}/episode_{episode:06d}.mp4", frames, 10)
        else:
            columns[CAMERA] = pa.array([picture_cell(root, stored, episode, i, f) for i, f in enumerate(frames)])
        path = root / f"data/{chunk}/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=4)
        index += length
    features = {
        CAMERA: {"dtype": "video" if stored == "video" else "image", "shape": [96, 96, 3]},
        "action": {"dtype": "float32", "shape": [2]},
        "observation.state": {"dtype": "float32", "shape": [2]},
        "annotation.human.action": {"dtype": "int64", "shape": [1]},
        "timestamp": {"dtype": "float32", "shape": [1]},
    }
    info = {
        "codebase_version": version,
        "fps": 10,
        "chunks_size": chunk_episodes,
        "total_chunks": -(-len(lengths) // chunk_episodes),
        "total_videos": len(lengths),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (meta / "info.json").write_text(json.dumps(info))
    write_lines(meta / "tasks.jsonl", [{"task_index": 5, "task": "push it"}, {"task_index": 6, "task": "pull it"}])
    rows = [{"episode_index": e, "tasks": [f"task {e}"], "length": length} for e, length in enumerate(lengths)]
    write_lines(meta / "episodes.jsonl", rows)
    return root


def picture_cell(root, stored, episode, number, frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    name = f"images/{CAMERA}/episode_{episode:06d}/frame_{number:06d}.png"
    if stored == "path":
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file.getvalue())
    return {"bytes": file.getvalue() if stored == "bytes" else None, "path": name}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_info(log, **changes):
    path = log / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read_back(source, output, card=CARD, robot=None):
    """Prepare, and check every window: numbers in the pixels, actions, states."""
    robot = robot or embodiment()
    summary = prepare(card, robot, source, output, progress=False)
    dataset = PreparedDataset(output, robot)
    for row in dataset.iter_rows():
        episode, start = row["episode_index"], row["start"]
        shown = [frame_number(frame.numpy()) for frame in dataset.frames(row)]
        assert shown == list(range(100 * episode + start, 100 * episode + start + 5))
        actions = default_actions(episode, max(LENGTHS))[start : start + 4]
        if episode < len(LENGTHS):
            actions = default_actions(episode, LENGTHS[episode])[start : start + 4]
        assert np.array_equal(np.float32(row["action"]), actions)
        assert row["state"] == (actions[0] + 1).tolist()
    return summary, list(dataset.iter_rows())


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
@pytest.mark.parametrize("stored", ["video", "bytes", "path"])
def test_windows_are_the_logs(tmp_path, version, stored):
    log = make_v2(tmp_path / "log", version=version, stored=stored)
    summary, rows = read_back(log, tmp_path / "out")
    assert sum(summary.windows.values()) == len(rows) == 2 + 5 + 3
    assert {(row["episode_index"], row["instruction"]) for row in rows} == {
        (0, "push it"), (1, "pull it"), (2, "push it"),
    }  # fmt: skip


def test_statistics_and_modality_are_not_needed_but_tolerated(tmp_path):
    log = make_v2(tmp_path / "log")
    (log / "meta" / "episodes_stats.jsonl").write_text('{"episode_index": 0, "stats": {}}\n')
    modality = {"action": {"arm": {"start": 0, "end": 2, "original_key": "action"}}}
    (log / "meta" / "modality.json").write_text(json.dumps(modality))
    change_info(log, data_path=None, video_path=None)  # the version's own templates
    summary, _ = read_back(log, tmp_path / "out")
    assert sum(summary.windows.values()) == 10
    card = replace(CARD, caption_column="annotation.human.action")  # GR00T: numbers of tasks.jsonl
    _, rows = read_back(log, tmp_path / "annotated", card)
    assert {row["instruction"] for row in rows if row["episode_index"] == 0} == {"pull it"}


@pytest.mark.parametrize("stored", ["bytes", "path"])
def test_pictures_go_by_real_times(tmp_path, stored):
    times = np.concatenate([np.arange(5) / 10, np.arange(5) / 10 + 3.25])  # a pause: later rows are no multiples
    log = make_v2(tmp_path / "log", [10], stored=stored, times=times)
    robot = embodiment()
    summary = prepare(CARD, robot, log, tmp_path / "out", progress=False)
    assert summary.dropped[GAP] == 4 and summary.windows["train"] == 2
    dataset = PreparedDataset(tmp_path / "out", robot)
    assert [frame_number(f.numpy()) for f in dataset.frames(dataset.window("train", 1))] == [5, 6, 7, 8, 9]


def test_pictures_of_a_v3_log(tmp_path):
    """Many episodes in one Parquet file: each shows its own."""
    log = make_log(tmp_path / "log", LENGTHS)
    path = log / "data/chunk-000/file-000.parquet"
    numbers = [100 * episode + frame for episode, length in enumerate(LENGTHS) for frame in range(length)]
    cells = [picture_cell(log, "bytes", 0, 0, numbered_frame(number)) for number in numbers]
    pq.write_table(pq.read_table(path).append_column(CAMERA, pa.array(cells)), path, row_group_size=5)
    features = json.loads((log / "meta" / "info.json").read_text())["features"]
    change_info(log, features={**features, CAMERA: {"dtype": "image", "shape": [96, 96, 3]}})
    summary, _ = read_back(log, tmp_path / "out", dataset_card())
    assert sum(summary.windows.values()) == 10


def test_thousands_of_pictured_episodes_open_at_once(tmp_path):
    log = make_v2(tmp_path / "log", [6], stored="bytes")
    write_lines(log / "meta" / "episodes.jsonl", [{"episode_index": e, "tasks": [], "length": 9} for e in range(20000)])
    opened = open_lerobot_v2(log)
    assert len(opened.episodes) == 20000
    assert opened.episodes[19999].data_file == "data/chunk-9999/episode_019999.parquet"


def test_the_command(tmp_path, monkeypatch, capsys):
    make_v2(tmp_path / "log")
    (tmp_path / "configs" / "embodiment").mkdir(parents=True)
    (tmp_path / "configs" / "embodiment" / "mover.yaml").write_text(yaml.safe_dump(to_plain(embodiment())))
    (tmp_path / "moves.yaml").write_text("name: moves\nformat: lerobot_v2\nsource: log\n")
    monkeypatch.chdir(tmp_path)
    line = ["prepare", "moves.yaml", "--embodiment", "mover", "--output", "out"]
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 0
    assert "windows of" in capsys.readouterr().out
    (tmp_path / "moves.yaml").write_text("name: moves\nformat: lerobot_v3\nsource: log\n")
    with pytest.raises(SystemExit) as ended:
        cli.main([*line[:-1], "other"])
    assert ended.value.code == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and "write format: lerobot_v2" in errors[0]


def test_wrong_version_names_the_format_to_write(tmp_path):
    log = make_v2(tmp_path / "v2", [6], version="v2.0")
    with pytest.raises(UserError, match=r"codebase_version is v2\.0, .* write format: lerobot_v2"):
        open_lerobot(log)
    with pytest.raises(UserError, match=r"codebase_version is v3\.0, .* write format: lerobot_v3"):
        open_log(CARD, make_log(tmp_path / "v3", [6]))
    change_info(log, codebase_version="v1.6")
    with pytest.raises(UserError, match=r"codebase_version is v1\.6; versions 2 and 3"):
        open_lerobot_v2(log)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tasks.jsonl", None, r"tasks\.jsonl: the file is missing"),
        ("episodes.jsonl", None, r"episodes\.jsonl: the file is missing"),
        ("episodes.jsonl", '{"episode_index": 0, "le', r"episodes\.jsonl, line 1: not valid JSON"),
        ("episodes.jsonl", '\n{"episode_index": 0}\n', r"episodes\.jsonl, line 2: length is None"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 6}\n' * 2, r"episode 0 stands twice"),
        ("tasks.jsonl", "[]\n", r"tasks\.jsonl, line 1: holds a list"),
        ("tasks.jsonl", '{"task": "push"}\n', r"line 1: needs task_index and task; it has task"),
        ("info.json", '{"codebase_version": "v2.1", "fps": 10, "features": {"a": 1}}', r"features\.a is 1"),
        ("info.json", '{"codebase_version": "v2.1", "fps": 0, "features": {}}', r"fps is 0"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 6, "tasks": 3.5}', r"line 1: tasks is 3\.5"),
        (
            "info.json",
            '{"codebase_version": "v2.1", "fps": 9, "features": {}, "data_path": "\\u0000"}',
            r"path template",
        ),
        ("info.json", '{"codebase_version": "v2.1", "fps": 9, "features": {"a": {"shape": "x"}}}', r"a\.shape is 'x'"),
    ],
)
def test_damaged_metadata(tmp_path, name, content, message):
    log = make_v2(tmp_path / "log", [6])
    (log / "meta" / name).unlink() if content is None else (log / "meta" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_lerobot_v2(log)


def test_templates_of_another_version(tmp_path):
    log = make_v2(tmp_path / "log", [6])
    change_info(log, data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")
    with pytest.raises(UserError, match=r"path template .* has episode_chunk, episode_index"):
        open_lerobot_v2(log)


@pytest.mark.parametrize(
    "stored, damage, message",
    [
        ("video", lambda log: (log / f"videos/chunk-000/{CAMERA}/episode_000001.mp4").unlink(), "video is missing"),
        ("video", lambda log: (log / "data/chunk-000/episode_000001.parquet").unlink(), "Parquet file is missing"),
        ("video", lambda log: cut(log / f"videos/chunk-000/{CAMERA}/episode_000001.mp4"), "not a readable video"),
        ("bytes", lambda log: cut(log / "data/chunk-000/episode_000001.parquet"), "not a readable Parquet file"),
        (
            "path",
            lambda log: (log / f"images/{CAMERA}/episode_000001/frame_000008.png").unlink(),
            "picture 'images/.*frame_000008.png' is missing",
        ),
        (
            "path",
            lambda log: cut(log / f"images/{CAMERA}/episode_000001/frame_000008.png"),
            "picture 8: not a readable picture",
        ),
    ],
)
def test_damaged_files(tmp_path, stored, damage, message):
    log = make_v2(tmp_path / "log", stored=stored)
    damage(log)
    with pytest.raises(UserError, match=message) as raised:
        prepare(CARD, embodiment(), log, tmp_path / "out", progress=False)
    assert "\n" not in str(raised.value)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_pictures_outside_the_log_are_not_followed(tmp_path):
    log = make_v2(tmp_path / "log", [6], stored="path")
    path = log / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    cells = pa.array([{"bytes": None, "path": "../../secret.png"}] * 6, table.schema.field(CAMERA).type)
    pq.write_table(table.set_column(table.column_names.index(CAMERA), CAMERA, cells), path)
    with pytest.raises(UserError, match="leads out of the log"):
        prepare(CARD, embodiment(), log, tmp_path / "out", progress=False)
