"""Captioned video without a robot: windows, captions, what is left out and why; killed, resumed and in parallel."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest

from cosmos3_train.config import Clips, Dataset, UserError
from cosmos3_train.data import blocks
from cosmos3_train.data.index import GAP, REST, SHORT_CLIP, clip_windows
from cosmos3_train.data.mixture import Mixture
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources.clips import (
    NO_CAPTION,
    NO_VIDEO,
    OUTSIDE,
    TOO_LARGE,
    UNREADABLE,
    Segment,
    Unusable,
    fill_template,
    look_up,
)
from cosmos3_train.data.video import reading_size, video_times
from tests.data.clips import mp4, numbers, row, video_card, window, write_files, write_rows
from tests.data.test_prepare import same_files

LENGTHS = {"a": 30, "b": 9, "c": 40, "d": 8, "e": 21, "f": 12}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Clips of 30, 9, 40, 8, 21 and 12 frames; the video of place p begins with number 100·p."""
    root = tmp_path_factory.mktemp("scenes")
    videos = {f"videos/{stem}.mp4": mp4(n, 100 * place) for place, (stem, n) in enumerate(LENGTHS.items())}
    write_files(root, videos)
    structured = {"subjects": ["a cart"], "actions": "rolls – slowly"}
    write_rows(
        root / "train.jsonl",
        [
            row("a", 30, None, window(2, 19, "first", caption_json=structured), window(20, 29, "second")),
            row("b", 9, "whole"),
            row("c", 40, "of the row", window(0, 39, temporal_interval=2)),
            row("d", 8, "too short"),
            row("e", 21, None, window(0, 20), window(30, 40, "beyond")),
            row("f", 12, "words"),
        ],
    )
    return root


def prepared(source, output, card=None, **options):
    card = card or video_card()
    return prepare(card, card.clips(), source, output, progress=False, **options)


def test_windows_frames_and_captions(scenes, tmp_path):
    summary = prepared(scenes, tmp_path / "out")
    dataset = PreparedDataset(tmp_path / "out", None)
    rows = list(dataset.iter_rows())
    assert not dataset.has_robot and dataset.contract == Clips(frames=9)
    found = [(r["episode_index"], r["start"], r["instruction"]) for r in rows]
    structured = '{"subjects": ["a cart"], "actions": "rolls – slowly"}'
    expected = [(0, 2, structured), (0, 11, structured), (0, 20, "second"), (1, 0, "whole")]
    assert found == [*expected, (2, 0, "of the row"), (2, 18, "of the row"), (5, 0, "words")]
    for one in rows:
        first, step = 100 * one["episode_index"] + one["start"], 2 if one["episode_index"] == 2 else 1
        assert numbers(dataset.frames(one)) == list(range(first, first + 9 * step, step))
        assert (one["fps"], one["height"], one["width"], one["action"]) == (24 / step, 96, 160, None)
    assert summary.dropped == {SHORT_CLIP: 1, REST: 1 + 2 + 3, NO_CAPTION: 1, OUTSIDE: 1}
    assert summary.examples[NO_CAPTION].startswith("e, t2w_windows[0]: asked for caption_json, caption; it has ")
    assert "beyond" not in str(found) and summary.examples[OUTSIDE] == "e, t2w_windows[1]: frames 30 to 40 of 21"
    assert not (tmp_path / "out" / "statistics.json").exists()


def test_a_sample_of_each_task(scenes, tmp_path):
    prepared(scenes, tmp_path / "out")
    dataset = PreparedDataset(tmp_path / "out", None)
    tasks = {"text_to_image": 1.0, "text_to_video": 1.0, "image_to_video": 1.0, "video_to_video": 1.0}
    mixture = Mixture({"scenes": (dataset, Dataset(prepared="out", tasks=tasks))}, seed=0)
    seen = {}
    for number in range(24):
        sample = mixture.sample(number)
        seen[sample.task] = sample
        assert sample.frames.shape[0] == (1 if sample.task == "text_to_image" else 9)
        assert sample.action is None and sample.embodiment is None and sample.tier == 256
        assert sample.size == tuple(sample.frames.shape[-2:]) and sample.caption
    assert set(seen) == set(tasks)
    for task in ("policy", "forward_dynamics"):
        with pytest.raises(UserError, match=f"'{task}' needs a robot's actions, and this is video without a robot"):
            Mixture({"scenes": (dataset, Dataset(prepared="out", tasks={task: 1.0}))}, seed=0)


@pytest.mark.parametrize(
    ("settings", "total", "windows"),
    [
        ({"frames": 9}, 8, []),
        ({"frames": 9}, 20, [(0, 9), (9, 9)]),
        ({"frames": 9, "stride": 4}, 18, [(0, 9), (4, 9), (8, 9)]),
        ({"frames": 9, "stride": 20}, 40, [(0, 9), (20, 9)]),
        ({"frames": 9, "least_frames": 5}, 25, [(0, 9), (9, 9), (18, 5)]),
        ({"frames": 9, "least_frames": 5}, 7, [(0, 5)]),
        ({"frames": 1}, 3, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_how_a_clip_is_cut(settings, total, windows):
    assert clip_windows(Segment(0, total - 1, 1, ""), Clips(**settings)) == windows


def test_rests_and_lengths_from_the_card_or_the_entry(scenes, tmp_path):
    card = video_card(frames=13, least_frames=5)
    summary = prepared(scenes, tmp_path / "out", card)
    lengths = {}
    for one in PreparedDataset(tmp_path / "out", None).iter_rows():
        lengths.setdefault(one["episode_index"], []).append(len(one["timestamps"]))
    assert lengths == {0: [13, 5, 9], 1: [9], 2: [13, 5], 3: [5], 5: [9]}
    assert SHORT_CLIP not in summary.dropped
    entry = Dataset(prepared="x", frames=93, resolution_tier=480)
    assert card.clips(entry) == Clips(frames=93, least_frames=5, resolution_tier=480)
    with pytest.raises(UserError, match=r"dataset 'scenes': frames is 60; a window has 4k \+ 1 frames"):
        video_card(frames=60).clips()


def test_times_come_from_the_files_index(tmp_path):
    for b_frames in (0, 2):
        (tmp_path / "x.mp4").write_bytes(mp4(20, b_frames=b_frames))
        times, fps = video_times(tmp_path / "x.mp4")
        with av.open(str(tmp_path / "x.mp4")) as container:
            assert times.tolist() == pytest.approx([frame.time for frame in container.decode(video=0)])
        assert fps == 24


def test_large_frames_are_shrunk_while_reading(tmp_path):
    assert reading_size((2160, 3840), 480) == (640, 1138)
    assert reading_size((3840, 2160), 256) == (607 + 1, 342)
    assert reading_size((480, 832), 480) == (480, 832)
    write_files(tmp_path, {"videos/a.mp4": mp4(9, 7, size=(720, 1280))})
    write_rows(tmp_path / "rows.jsonl", [row("a", 9, "a street")])
    prepared(tmp_path, tmp_path / "out", heldout_fraction=0.0)
    dataset = PreparedDataset(tmp_path / "out", None)
    one = dataset.row(0)
    assert (one["height"], one["width"]) == (342, 608)
    assert dataset.frames(one).shape == (9, 3, 342, 608)
    assert numbers(dataset.frames(one)) == list(range(7, 16))


def test_pictures_that_lie_on_their_side_are_turned(tmp_path):
    upright = tmp_path / "videos" / "a.mp4"
    write_files(tmp_path, {"videos/a.mp4": mp4(9)})
    turned = tmp_path / "turned.mp4"
    with av.open(str(upright)) as given, av.open(str(turned), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        stream.set_display_rotation(90)
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    turned.replace(upright)
    write_rows(tmp_path / "rows.jsonl", [row("a", 9, "a phone's")])
    prepared(tmp_path, tmp_path / "out", heldout_fraction=0.0)
    dataset = PreparedDataset(tmp_path / "out", None)
    frames = dataset.frames(dataset.row(0))
    assert frames.shape == (9, 3, 160, 96) == (9, 3, dataset.row(0)["height"], dataset.row(0)["width"])
    assert numbers(frames.rot90(-1, (2, 3))) == list(range(9)), "turned counter-clockwise"


def test_videos_that_are_missing_or_broken_are_counted(tmp_path):
    broken = mp4(30)
    files = {"videos/a.mp4": mp4(12), "videos/b.mp4": b"no video", "videos/c.mp4": broken[: len(broken) // 2]}
    write_files(tmp_path, files)
    write_rows(tmp_path / "rows.jsonl", [row(stem, 12, "words") for stem in "abcd"])
    summary = prepared(tmp_path, tmp_path / "out", heldout_fraction=0.0)
    assert summary.windows["train"] == 1
    assert summary.dropped == {REST: 3, UNREADABLE: 2, NO_VIDEO: 1}
    assert "videos/d.mp4 is missing" in summary.examples[NO_VIDEO]
    assert json.loads((tmp_path / "out" / "card.json").read_text())["examples"] == summary.examples


def test_names_that_hold_what_sets_places_in_archives_apart(tmp_path):
    files = {"videos/a#2.mp4": mp4(9, 200), "videos/b#1@0+4.mp4": mp4(9, 100), "videos/a/notes.txt": b"a folder"}
    write_files(tmp_path, files)
    write_rows(tmp_path / "rows.jsonl", [row(stem, 9, "words") for stem in ("a#2", "b#1@0+4", "n" * 300)])
    summary = prepared(tmp_path, tmp_path / "out", heldout_fraction=0.0)
    assert summary.windows["train"] == 2 and summary.dropped == {NO_VIDEO: 1}
    dataset = PreparedDataset(tmp_path / "out", None)
    assert [numbers(dataset.frames(row))[0] for row in dataset.iter_rows()] == [200, 100]
    (tmp_path / "videos" / "a#2.mp4").write_bytes(mp4(10, 200))
    with pytest.raises(UserError, match="the log has changed since"):
        prepared(tmp_path, tmp_path / "out", heldout_fraction=0.0)
    (tmp_path / "rows.jsonl").rename(tmp_path / "rows#1.jsonl")
    with pytest.raises(UserError, match=r"rows#1\.jsonl: '#' in its name .*; rename it"):
        prepared(tmp_path, tmp_path / "out", heldout_fraction=0.0)


def test_frames_of_too_many_pixels_are_counted_and_never_decoded(tmp_path):
    black = av.VideoFrame(8208, 8192, "yuv420p")
    for plane in black.planes:
        plane.update(bytes(plane.buffer_size))
    bomb = io.BytesIO()
    with av.open(bomb, "w", format="mp4") as made:
        stream = made.add_stream("libx264", rate=24, options={"preset": "ultrafast", "qp": "40"})
        stream.width, stream.height, stream.pix_fmt = 8208, 8192, "yuv420p"
        made.mux([*stream.encode(black), *stream.encode()])
    assert len(bomb.getvalue()) < 200_000
    write_files(tmp_path, {"videos/a.mp4": mp4(9), "videos/b.mp4": bomb.getvalue()})
    write_rows(tmp_path / "rows.jsonl", [row(stem, 9, "words") for stem in "ab"])
    summary = prepared(tmp_path, tmp_path / "out", heldout_fraction=0.0)
    assert summary.windows["train"] == 1 and summary.dropped == {TOO_LARGE: 1}
    assert "b.mp4: 8192 x 8208 pixels, over 67,108,864" in summary.examples[TOO_LARGE]
    dataset = PreparedDataset(tmp_path / "out", None)
    (tmp_path / "videos" / "b.mp4").replace(tmp_path / "videos" / "a.mp4")
    with pytest.raises(UserError, match=r"a\.mp4: 8192 x 8208 pixels, over"):
        dataset.sample("train", 0, "text_to_video", 0)


def test_a_gap_in_a_clips_times(tmp_path):
    frames, file = mp4(13), tmp_path / "videos" / "a.mp4"
    write_files(tmp_path, {"videos/whole.mp4": frames})
    with av.open(str(tmp_path / "videos" / "whole.mp4")) as given, av.open(str(file), "w") as made:
        stream = made.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        for place, frame in enumerate(given.decode(video=0)):
            frame.pict_type = 0
            frame.pts = frame.pts + (2048 if place >= 10 else 0)
            made.mux(stream.encode(frame))
        made.mux(stream.encode())
    write_rows(tmp_path / "rows.jsonl", [row("a", 12, "words")])
    summary = prepared(tmp_path, tmp_path / "out", video_card(frames=5, stride=4), heldout_fraction=0.0)
    assert summary.dropped == {GAP: 1} and summary.windows["train"] == 2


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([row("a", 12, None)], {}, r"no window to train on; left out: 1 × clip .* asked for caption_json, caption; it"),
        ([row("a", 12, "x")], {"frames": 61}, r"left out: 1 × clip or caption window shorter .*\(a: 12 frames\)"),
        ([row("a", 12, "x")], {"captions": []}, r"asked for nothing \(the dataset card names no captions\)"),
        ([{"path": "videos/a.mp4"}], {}, r"rows\.jsonl, line 1: no 'vision_path', the path of its video"),
        (
            [row("a", 12, "x")],
            {"mapping": {"video": 5}},
            r"mapping\.video is 5; the key of the video's",
        ),
        ([row("a", 12, "x")], {"mapping": {"rows": 5}}, r"mapping\.rows is 5, no pattern of files below the source"),
        ([row("a", 12, "x")], {"mapping": {"rows": "/*"}}, r"mapping\.rows is '/\*', no pattern of files below"),
        ([row("a", 12, "x")], {"mapping": {"rows": "../*"}}, r"mapping\.rows is '\.\./\*', no pattern .*leads out"),
        ([{"a": 1}], {"mapping": {"vidoe": "a"}}, r"mapping\.vidoe is not known here\. Did you mean 'video'"),
    ],
)
def test_what_is_wrong_with_all_of_a_set_is_one_line(tmp_path, rows, changes, words):
    write_files(tmp_path, {"videos/a.mp4": mp4(12)})
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=words) as error:
        prepared(tmp_path, tmp_path / "out", video_card(**changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_words_and_paths_that_are_no_unicode(tmp_path):
    write_files(tmp_path, {"videos/a.mp4": mp4(12)})
    for given, words in (
        (row("a", 12, "\ud800"), "left out: 1 × clip whose caption file cannot be read .a: its words are not valid"),
        (row("\ud800", 12, "x"), r"rows\.jsonl, line 1: the path of its video, or its uuid, is not valid Unicode"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(given))
        with pytest.raises(UserError, match=words):
            prepared(tmp_path, tmp_path / "out")


def test_lines_that_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"vision_path": "a.mp4"}\n{"vision\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not valid JSON"):
        prepared(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"no file of rows \(\*\.jsonl\) is there"):
        prepared(tmp_path / "elsewhere", tmp_path / "out")


def test_any_key_names_the_video_and_the_caption(tmp_path):
    write_files(tmp_path, {"mine/x.mp4": mp4(9, 5), "lists/one.jsonl": ""})
    listed = {"file": {"path": str(tmp_path / "mine" / "x.mp4")}, "notes": {"v1.5": {"long": "a cat"}}, "place": "yard"}
    path = write_rows(tmp_path / "lists" / "one.jsonl", [listed])
    card = video_card(captions=["notes.v2.long", "notes.v1.5.long"], mapping={"video": "file.path"})
    prepared(path, tmp_path / "out", card, heldout_fraction=0.0)
    dataset = PreparedDataset(tmp_path / "out", None)
    assert dataset.row(0)["instruction"] == "a cat"
    assert numbers(dataset.frames(dataset.row(0)))[0] == 5
    for changes, words in (
        ({"caption_template": "a {place} at night"}, "a yard at night"),
        ({"constant_caption": "anything"}, "anything"),
    ):
        card = video_card(captions=["missing"], mapping={"video": "file.path"}, **changes)
        prepared(path, tmp_path / words, card, heldout_fraction=0.0)
        assert PreparedDataset(tmp_path / words, None).row(0)["instruction"] == words


def test_keys_and_templates():
    document = {"a.b": {"c": 1}, "a": {"b": {"d": "near_miss"}}}
    assert (look_up(document, "a.b.c"), look_up(document, "a.b.d"), look_up(document, "x.y")) == (1, "near_miss", None)
    assert look_up({"a": {"b.c": 2}}, "a.b.c") == 2
    assert fill_template("{s} by {n}", [{"n": 2}, {"s": "near_miss"}]) == "near miss by 2"
    with pytest.raises(Unusable, match="no value 'q'"):
        fill_template("{q}", [{}])


def test_groups_are_held_out_together(tmp_path):
    write_files(tmp_path, {"videos/a.mp4": mp4(9)})
    rows = [{**row("a", 9, f"view {i}"), "scene": f"scene {i // 4}"} for i in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    prepared(tmp_path, tmp_path / "out", video_card(mapping={"group": "scene"}), heldout_fraction=0.4)
    sides = {}
    for one in PreparedDataset(tmp_path / "out", None).iter_rows():
        sides.setdefault(one["episode_index"] // 4, set()).add(one["split"])
    assert all(len(found) == 1 for found in sides.values())
    assert set.union(*sides.values()) == {"train", "heldout"}


def test_prepared_already_or_otherwise(scenes, tmp_path):
    prepared(scenes, tmp_path / "out")
    assert prepared(scenes, tmp_path / "out").reused
    for changes, words in (({"frames": 5}, r"clips\.frames 9, now 5"), ({"captions": ["caption"]}, "captions")):
        with pytest.raises(UserError, match=words):
            prepared(scenes, tmp_path / "out", video_card(**changes))


PREPARE = """
import sys
from cosmos3_train.data import blocks
from cosmos3_train.data.prepare import prepare
from tests.data.clips import video_card

if __name__ == "__main__":
    blocks.BLOCK_CLIPS = 3
    prepare(video_card(), video_card().clips(), sys.argv[1], sys.argv[2], progress=False)
"""


def test_killed_resumed_and_in_parallel(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CLIPS", 3)
    source = tmp_path / "source"
    write_files(source, {f"videos/{i}.mp4": mp4(9 + i) for i in range(4)})
    rows = [row(str(i % 4), 9, f"caption {i}") if i % 5 else row("gone", 9, "x") for i in range(48)]
    write_rows(source / "rows.jsonl", rows)
    undisturbed = prepared(source, tmp_path / "undisturbed")
    assert undisturbed.dropped[NO_VIDEO] == 10
    prepared(source, tmp_path / "parallel", workers=3)
    assert same_files(tmp_path / "undisturbed", tmp_path / "parallel")
    (tmp_path / "run.py").write_text(PREPARE)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(source), str(tmp_path / "out")],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    reports = tmp_path / ".out.preparing" / "blocks"
    deadline = time.monotonic() + 60
    while not (reports / "00002.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before it ended"
    assert 3 <= len(list(reports.glob("*.json"))) < 16
    assert prepared(source, tmp_path / "out").dropped == undisturbed.dropped
    assert same_files(tmp_path / "undisturbed", tmp_path / "out")


def test_something_is_held_out_whatever_is_left_out(tmp_path):
    """The one clip that the hash holds out of a small set may be one that cannot be used."""
    write_files(tmp_path, {f"videos/{i}.mp4": mp4(9 if i % 2 else 5) for i in range(12)})
    for count in range(3, 12):
        write_rows(tmp_path / "rows.jsonl", [row(str(i), 9, "words") for i in range(count)])
        summary = prepared(tmp_path, tmp_path / f"out{count}", heldout_fraction=0.001)
        usable = count // 2
        assert summary.windows == summary.episodes
        assert summary.windows == ({"train": usable - 1, "heldout": 1} if usable > 1 else {"train": 1, "heldout": 0})
        dataset = PreparedDataset(tmp_path / f"out{count}", None)
        assert (dataset.count("train"), dataset.count("heldout")) == tuple(summary.windows.values())
