"""Videos in tar shards and loose folders, read in place, beside captions that lie elsewhere."""

import os
from random import Random

import pytest

from cosmos3_train.config import UserError
from cosmos3_train.data.archives import Part, list_members
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_clips
from cosmos3_train.data.sources.clips import BAD_TEXT, NO_CAPTION, UNREADABLE
from cosmos3_train.data.video import close
from tests.data.clips import mp4, numbers, video_card, window, write_files, write_tar
from tests.data.test_prepare import same_files

LONG = "a_folder_with_a_long_name/" * 6


def shards_card(mapping=None, **changes):
    return video_card(format="webdataset", **{"captions": ["caption"], "mapping": mapping or {}, **changes})


def prepared(source, output, card, **options):
    return prepare(card, card.clips(), source, output, progress=False, **{"heldout_fraction": 0.0, **options})


def rows_of(folder):
    dataset = PreparedDataset(folder, None)
    return dataset, list(dataset.iter_rows())


def test_a_shard_with_its_captions(tmp_path):
    """Two shards whose members have the same names: each video has the caption of its own shard."""
    source = tmp_path / "source"
    for place in range(2):
        members = {"000/clip.json": {"caption": f"shard {place}"}, "000/clip.mp4": mp4(9, 100 * place)}
        members |= {f"{LONG}x.y.mp4": mp4(10, 50), f"{LONG}x.json": {"caption": "long"}, "000/clip.npz": b"\0" * 700}
        write_tar(source / "data" / "collision" / "lab" / f"shard-{place}.tar", members)
    summary = prepared(source, tmp_path / "out", shards_card())
    dataset, rows = rows_of(tmp_path / "out")
    assert [row["instruction"] for row in rows] == ["shard 0", "long", "shard 1", "long"]
    assert [numbers(dataset.frames(row))[0] for row in rows] == [0, 50, 100, 50]
    assert numbers(dataset.frames(rows[2])) == list(range(100, 109))
    path = rows[0]["video"][0]["path"]
    assert path.startswith("data/collision/lab/shard-0.tar#000/clip.mp4@")
    assert summary.windows["train"] == 4
    left = {file.name for file in tmp_path.rglob("*") if file.is_file() and "out" not in file.parts}
    assert left == {"shard-0.tar", "shard-1.tar"}, "nothing is unpacked"
    prepared(source, tmp_path / "two", shards_card(), workers=2)
    assert same_files(tmp_path / "out", tmp_path / "two")


def physics(source):
    """Captions in shards of other numbers; colourised videos without any."""
    runs = [f"dominoes_{n:08x}_{n}" for n in range(4)]
    for place, few in enumerate((runs[:2], runs[2:])):
        videos = {f"{run}/camera_{c}.mp4": mp4(9, 10 * runs.index(run) + i) for run in few for i, c in enumerate("en")}
        videos |= {f"{run}/camera_e_colours.mp4": mp4(9) for run in few}
        write_tar(source / "videos" / "dominoes" / f"videos-dominoes-{place:05d}.tar", videos)
    for place, run in enumerate(runs[::-1][:3]):
        said = {f"{run}/camera_{c}.json": {"B": {"long": f"{run} {c}"}} for c in "en"}
        said[f"{run}/camera_e.json"]["A"] = {"long": f"{run} e, better"}
        write_tar(source / "captions" / "dominoes" / f"captions-dominoes-{place:05d}.tar", said)
    return runs


PHYSICS = {"videos": "videos/*/*.tar", "captions": "captions/*/*.tar", "group": "([^/]+)/"}


def test_captions_in_shards_of_other_numbers(tmp_path):
    runs = physics(tmp_path / "source")
    card = shards_card(PHYSICS, captions=["A.long", "B.long"])
    summary = prepared(tmp_path / "source", tmp_path / "out", card, heldout_fraction=0.3)
    dataset, rows = rows_of(tmp_path / "out")
    found = {row["instruction"]: numbers(dataset.frames(row))[0] for row in rows}
    assert found == {
        f"{run} {words}": 10 * place + i
        for place, run in enumerate(runs)
        if place  # nothing is said of the first run
        for i, words in enumerate(("e, better", "n"))
    }
    assert summary.dropped == {NO_CAPTION: 2 + 4}
    assert "it has no text at all" in summary.examples[NO_CAPTION]
    sides = {}
    for row in rows:
        sides.setdefault(row["video"][0]["path"].partition("#")[2].partition("/")[0], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values()), "cameras of one run are held out together"


def test_two_shards_that_say_different_things(tmp_path):
    source = tmp_path / "source"
    physics(source)
    again = {"dominoes_00000001_1/camera_e.json": {"A": {"long": "something else"}}}
    write_tar(source / "captions" / "dominoes" / "captions-dominoes-00009.tar", again)
    summary = prepared(source, tmp_path / "out", shards_card(PHYSICS, captions=["A.long", "B.long"]))
    assert summary.dropped[BAD_TEXT] == 1 and "they differ" in summary.examples[BAD_TEXT]


def test_several_cameras_under_one_key_and_no_captions(tmp_path):
    members = {f"run_{r}.eye_0{c}.rgb.mp4": mp4(9, 10 * r + c) for r in range(2) for c in range(2)}
    members |= {f"run_{r}.meta.json": {"scenario": "near_miss", "seed": r} for r in range(2)}
    members |= {"run_0.eye_00.depth.mp4": mp4(9)}
    write_tar(tmp_path / "source" / "rgb" / "warehouse_fire" / "fire-rgb-00000.tar", members)
    mapping = {"videos": "rgb/*/*.tar", "video": "*.rgb.mp4", "text": "*.meta.json"}
    card = shards_card(mapping, captions=[], caption_template="{scenario} {seed}, {folder}")
    prepared(tmp_path / "source", tmp_path / "out", card)
    dataset, rows = rows_of(tmp_path / "out")
    assert [row["instruction"] for row in rows] == [f"near miss {r}, warehouse fire" for r in (0, 0, 1, 1)]
    assert [numbers(dataset.frames(row))[0] for row in rows] == [0, 1, 10, 11]
    assert [clip.group for clip in open_clips(card, tmp_path / "source").clips] == ["run_0", "run_0", "run_1", "run_1"]


def test_loose_files_with_caption_windows(tmp_path):
    """As the driving scenarios lie: video/CAMERA.mp4 beside description/CAMERA.json, which has the windows."""
    files = {}
    for run in range(2):
        where = f"cut_in/run_{run}"
        windows = [window(0, 8, qwen=f"run {run} begins"), window(9, 19, qwen="goes on")]
        files[f"{where}/video/front.mp4"] = mp4(20, 100 * run)
        files[f"{where}/description/front.json"] = {"nb_frames": 20, "t2w_windows": windows, "weather": "rain"}
    write_files(tmp_path / "source", files)
    mapping = {
        "videos": "*/*/video/*.mp4",
        "captions": "*/*/description/*.json",
        "key": r"(.+)/(?:video|description)/([^/.]+)\.",
        "group": "(.+)/",
    }
    card = shards_card(mapping, captions=["qwen"])
    prepared(tmp_path / "source", tmp_path / "out", card)
    dataset, rows = rows_of(tmp_path / "out")
    assert [row["instruction"] for row in rows] == ["run 0 begins", "goes on", "run 1 begins", "goes on"]
    assert [numbers(dataset.frames(row))[0] for row in rows] == [0, 9, 100, 109]
    assert [clip.group for clip in open_clips(card, tmp_path / "source").clips] == ["cut_in/run_0", "cut_in/run_1"]


def test_damaged_members_are_counted_and_damaged_archives_are_refused(tmp_path):
    source, video = tmp_path / "source", mp4(9)
    noise = bytes(range(256)) * (len(video) // 256)
    members = {"a.mp4": video, "a.json": {"caption": "a"}, "b.mp4": noise, "b.json": {"caption": "b"}}
    members |= {"c.mp4": video, "c.json": "{not json", "d.mp4": video, "d.json": "[1]"}
    path = write_tar(source / "shard.tar", members)
    summary = prepared(source, tmp_path / "out", shards_card())
    assert summary.windows["train"] == 1 and summary.dropped == {UNREADABLE: 1, BAD_TEXT: 2}
    assert "shard.tar#c.mp4: c.json is not valid JSON" in summary.examples[BAD_TEXT]
    whole = path.read_bytes()
    third = list_members(path)[2].offset - 512
    for content, words in (
        (whole[:third] + b"\x07" * 512 + whole[third + 512 :], f"the header at byte {third:,} is damaged"),
        (whole[: third + 700], "unexpected end of data"),
        (b"", "empty file"),
        (b"hello" * 300, "not a readable uncompressed tar archive"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            prepared(source, tmp_path / "again", shards_card())
        assert "\n" not in str(error.value) and "shard.tar" in str(error.value)


def test_names_that_would_leave_the_folder_are_only_names(tmp_path):
    source = tmp_path / "in" / "source"
    members = {"../../evil.mp4": mp4(9), "../../evil.json": {"caption": "x"}, "/tmp/evil2.json": {"caption": "y"}}
    write_tar(source / "shard.tar", members)
    prepared(source, tmp_path / "out", shards_card())
    assert [row["instruction"] for row in rows_of(tmp_path / "out")[1]] == ["x"]
    assert not list(tmp_path.glob("evil*")) and not list((tmp_path / "in").glob("evil*"))


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"video": "*.mkv"}, r"no video by mapping.videos \*\*/\*\.tar and mapping.video \*\.mkv"),
        ({"vidoes": "x"}, r"mapping\.vidoes is not known here\. Did you mean 'videos'"),
        ({"key": "("}, r"mapping\.key is not a regular expression"),
        ({"key": "x"}, r"mapping\.key has no group"),
        ({"text": "*.txt"}, r"no window to train on; left out: 1 × clip .* without a caption"),
    ],
)
def test_mappings_that_do_not_fit(tmp_path, mapping, words):
    write_tar(tmp_path / "source" / "shard.tar", {"a.mp4": mp4(9), "a.json": {"caption": "a"}})
    with pytest.raises(UserError, match=words):
        prepared(tmp_path / "source", tmp_path / "out", shards_card(mapping))


def test_a_part_of_a_file_reads_as_a_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    part = Part(tmp_path / "x", 10, 20)
    assert (part.read(5), part.tell(), part.read()) == (bytes(range(10, 15)), 5, bytes(range(15, 30)))
    assert part.read(1) == b"" and part.seek(-3, os.SEEK_END) == 17 and part.read(9) == bytes((27, 28, 29))
    part.close()
    part.close()


WRONG_TYPES = (
    '{"caption": 3}', '{"caption": null}', "null", "[" * 5000, '"words"', '{"t2w_windows": 5, "caption": "c"}',
    '{"t2w_windows": [5, null, {}], "caption": "c"}', '{"t2w_windows": [{"start_frame": "x"}], "caption": "c"}',
    '{"t2w_windows": [{"start_frame": Infinity, "end_frame": NaN}], "caption": "c"}',
    '{"t2w_windows": [{"start_frame": 3, "end_frame": -2, "temporal_interval": -1}], "caption": "c"}',
)  # fmt: skip


def test_corruptions_are_errors_or_counted(tmp_path):
    """Whatever is wrong with a shard: one line, or a count; never anything else, and what is left can be read."""
    members = {f"{n}.mp4": mp4(10, size=(48, 64)) for n in range(3)} | {f"{n}.json": {"caption": "c"} for n in range(3)}
    path = write_tar(tmp_path / "source" / "shard.tar", members)
    whole, random, refused = path.read_bytes(), Random(0), 0
    for turn in range(40):
        content = bytearray(whole)
        if turn < len(WRONG_TYPES):
            content = write_tar(tmp_path / "other.tar", {**members, "1.json": WRONG_TYPES[turn]}).read_bytes()
        elif turn % 3 == 0:
            del content[random.randrange(len(content)) :]
        elif turn % 3 == 1:
            first = random.randrange(len(content))
            content[first : first + 300] = bytes(len(content[first : first + 300]))
        else:
            for _ in range(random.choice((1, 40))):
                content[random.randrange(len(content))] = random.randrange(256)
        path.write_bytes(content)
        close()
        try:
            prepared(tmp_path / "source", tmp_path / "out", shards_card(), fresh=True)
            dataset, rows = rows_of(tmp_path / "out")
            for row in rows:
                dataset.frames(row)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 5 < refused < 30


def test_patterns_and_names_that_cannot_be(tmp_path):
    write_tar(tmp_path / "set" / "a.tar", {"a.mp4": mp4(9)})
    for pattern, words in {5: "a pattern, or a list", "": "no pattern of files", "/x": "no pattern of files"}.items():
        with pytest.raises(UserError, match=rf"mapping\.videos is {pattern!r}.* {words}"):
            open_clips(shards_card({"videos": pattern}), tmp_path / "set")
    for source in ("n" * 300, "n/" * 3000):
        with pytest.raises(UserError, match=r"cannot be looked at \(File name too long\); name another"):
            open_clips(shards_card(), tmp_path / source)
    (tmp_path / "set" / os.fsdecode(b"\xe9.mp4")).write_bytes(mp4(9))
    with pytest.raises(UserError, match=r"the name '\\udce9.mp4' in it is not valid UTF-8; rename it"):
        open_clips(shards_card({"videos": "*.mp4"}), tmp_path / "set")


def test_loose_files_whose_names_hold_what_sets_an_archives_members_apart(tmp_path):
    write_files(tmp_path / "set", {"take#2.mp4": mp4(9, 200), "take#2.json": {"caption": "sharp"}})
    card = shards_card({"videos": "*.mp4", "captions": "*.json"})
    prepared(tmp_path / "set", tmp_path / "out", card)
    dataset, rows = rows_of(tmp_path / "out")
    assert [row["instruction"] for row in rows] == ["sharp"] and numbers(dataset.frames(rows[0]))[0] == 200
    write_tar(tmp_path / "set" / "part#1.tar", {"a.mp4": mp4(9)})
    with pytest.raises(UserError, match=r"part#1\.tar: '#' in an archive's name .*; rename it"):
        prepared(tmp_path / "set", tmp_path / "out", shards_card())
