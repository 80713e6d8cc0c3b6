"""cosmos3 check DATASET_CARD --scan, by its command line: what it says and its exit code."""

import numpy as np
import pytest
import yaml

from cosmos3_train.config import to_plain
from tests.data.clips import mp4, row, write_files, write_rows
from tests.data.logs import default_actions, embodiment, make_log
from tests.data.sounds import sounding


@pytest.fixture
def card(project):
    (project / "configs" / "embodiment" / "mover.yaml").write_text(yaml.safe_dump(to_plain(embodiment())))
    path = project / "scanned.yaml"

    def write(log, **changes):
        path.write_text(yaml.safe_dump({"name": "moves", "format": "lerobot_v3", "source": str(log), **changes}))
        return str(path)

    yield write
    path.unlink()


def test_scan(cosmos3, card, tmp_path, capsys):
    clean = make_log(tmp_path / "clean", [20, 24, 16])
    line = ["check", card(clean, embodiment="mover"), "--scan", "--model", "cosmos3_pico"]
    assert cosmos3(*line) == 0
    said, bar = capsys.readouterr()
    assert "scanned 3 episodes, 60 frames, 2 different captions" in said and "nothing wrong was found" in said
    assert "scanning moves: 100%" in bar and "3/3" in bar and "episode/s" in bar

    actions = {1: default_actions(1, 24)}
    actions[1][7, 1] = np.nan
    log = make_log(tmp_path / "log", [20, 24, 16], actions=actions)
    line[1] = card(log, constant_caption="very " * 4000 + "long")
    assert cosmos3(*line, "--embodiment", "mover") == 2
    said = capsys.readouterr().out
    assert "NaN or infinite: data/chunk-000/file-000.parquet, episode 1, row 7: action, y is nan" in said
    assert "caption over the token cap: data/chunk-000/file-000.parquet, episode 0: its prompt has" in said
    assert "found: 2 × NaN or infinite, 1 × caption over the token cap" in said


def test_scan_of_clips(cosmos3, card, tmp_path, capsys):
    write_files(tmp_path, {f"videos/{name}.mp4": mp4(12, 50 * place) for place, name in enumerate("ab")})
    write_rows(tmp_path / "rows.jsonl", [row("a", 12, "one"), row("b", 12, "two")])
    path = card(tmp_path, format="jsonl_video", captions=["caption"], frames=9)
    assert cosmos3("check", path, "--scan", "--model", "cosmos3_pico") == 0
    assert "scanned 2 clips, 24 frames, 2 different captions" in capsys.readouterr().out
    assert cosmos3("check", path, "--scan", "--model", "cosmos3_pico", "--caption-tokens", "10") == 2
    said = capsys.readouterr().out
    assert "caption over the token cap: videos/a.mp4, frames 0 to 11: its prompt has" in said
    (tmp_path / "videos" / "b.mp4").unlink()  # or the file that this process keeps open would be changed
    (tmp_path / "videos" / "b.mp4").write_bytes(b"no video")
    assert cosmos3("check", path, "--scan", "--workers", "1") == 2
    said = capsys.readouterr().out
    assert "clip whose video cannot be read: videos/b.mp4" in said and "tokens were not counted: hf download" in said


def test_scan_of_clips_with_sound(cosmos3, card, tmp_path, capsys):
    """Words of sound count, though a clip before it has the same caption; a track that cannot be read is told."""
    unknown = sounding(12).replace(b"mp4a", b"xxxx").replace(b"esds", b"xxxx")  # both names of its codec
    write_files(tmp_path, {"videos/a.mp4": mp4(12), "videos/b.mp4": sounding(12), "videos/c.mp4": unknown})
    rows = [row(name, 12, "one") for name in "abc"]
    write_rows(tmp_path / "rows.jsonl", [rows[0], rows[1] | {"heard": "very " * 2000 + "loud"}, rows[2]])
    path = card(tmp_path, format="jsonl_video", captions=["caption"], sound_captions=["heard"], frames=9)
    assert cosmos3("check", path, "--scan", "--model", "cosmos3_pico") == 2
    said = capsys.readouterr().out
    assert "scanned 3 clips, 36 frames, 2 different captions" in said
    assert "unreadable sound: videos/c.mp4: " in said and "the sound's codec is not known" in said
    assert "caption over the token cap: videos/b.mp4, frames 0 to 11: its prompt has" in said
    assert "found: 1 × unreadable sound, 1 × caption over the token cap" in said


def test_a_published_set_that_is_not_here_and_a_card_for_an_experiment(cosmos3, project, capsys):
    for name in ("libero_lerobot", "warehouse_operations_scenes", "llava_onevision"):
        card = f"data/published/{name}.yaml"
        assert cosmos3("check", card, "--scan", "--source", "nowhere") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: nowhere: not there; ") and "; subset: hf download " in line
        assert cosmos3("check", card) == 2
        assert f"{card}: a dataset card, where an experiment is expected; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["data.workers=1"], "--scan looks at a dataset card, which has no overrides"),
        (["--workers", "0"], "--workers is 0"),
        (["--embodiment", "movr"], "Did you mean 'mover'"),
        (["--source", "nowhere"], "no such folder"),
        (["--source", "card"], "--source card: goes with --scan alone"),
    ],
)
def test_mistakes(cosmos3, card, tmp_path, capsys, more, words):
    line = ["check", card(tmp_path, embodiment="mover"), *([] if more[-1] == "card" else ["--scan"]), *more]
    assert cosmos3(*line) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
