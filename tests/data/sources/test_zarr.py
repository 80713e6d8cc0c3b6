"""Zarr replay buffers as diffusion_policy and UMI lay them out, written here with zarr: opened, prepared, read back."""

import json
import os
import shutil
import sys
import zipfile
from dataclasses import replace

import numcodecs
import numpy as np
import pytest
import yaml
import zarr

from cosmos3_train import cli
from cosmos3_train.config import UserError, to_plain
from cosmos3_train.data import blocks, zarr_v2
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_log
from cosmos3_train.data.zarr_v2 import ZarrStore
from tests.data.logs import dataset_card, default_actions, embodiment, frame_number, numbered_frame

CAMERA = "observation.images.top"
LENGTHS = [7, 6, 9]
ROBOT = embodiment(cameras=[CAMERA])
WORDS = "Push the T-shaped block onto the T-shaped target."


def card(preset="diffusion_policy_pusht", **changes):
    given = {"preset": preset, **changes.pop("mapping", {})}
    return dataset_card(**{"format": "zarr", "rate_hz": 10.0, "mapping": given, **changes})


def pictures(lengths=LENGTHS):
    """Frame i of episode e shows number 100·e + i."""
    return np.stack([numbered_frame(100 * e + i, 48, 64) for e, length in enumerate(lengths) for i in range(length)])


def put(group, name, values, chunks=None, codec=None, empty=False, **more):
    codec = codec or numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE)
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=chunks or values.shape, compressors=codec,
        config={"write_empty_chunks": not empty}, **more,
    )  # fmt: skip
    array[...] = values
    return array


def make_pusht(path, lengths=LENGTHS, images=np.float32, white=255, zipped=False, chunk_rows=5, **more):
    """A replay buffer; chunks straddle the borders of episodes."""
    store = zarr.storage.ZipStore(path, mode="w") if zipped else path
    group = zarr.open_group(store, mode="w", zarr_format=2)
    values = np.concatenate([default_actions(episode, length) for episode, length in enumerate(lengths)])
    shown = pictures(lengths)
    if images != np.uint8:
        shown = (shown * (white / 255)).astype(images)
    put(group, "data/img", shown, (chunk_rows, 48, 64, 3), **more)
    put(group, "data/action", values, (4, 2))
    put(group, "data/state", values + 1, (161, 1))
    put(group, "data/n_contacts", np.zeros((len(values), 1), np.float32))
    put(group, "meta/episode_ends", np.cumsum(lengths))
    if zipped:
        store.close()
    return path.parent


def make_umi(path, codec=None):
    """A zip whose poses and gripper have UMI's names, a picture a chunk."""
    values = np.concatenate([default_actions(episode, length) for episode, length in enumerate(LENGTHS)])
    with zarr.storage.ZipStore(path, mode="w") as store:
        group = zarr.open_group(store, mode="w", zarr_format=2)
        put(group, "data/camera0_rgb", pictures(), (1, 48, 64, 3), codec)
        put(group, "data/robot0_eef_pos", values, codec=numcodecs.Zstd())
        put(group, "data/robot0_eef_rot_axis_angle", values + 1, codec=numcodecs.GZip())
        put(group, "data/robot0_gripper_width", values[:, :1])
        put(group, "meta/episode_ends", np.cumsum(LENGTHS))
    return path.parent


def read_back(source, output, dataset, robot=ROBOT, words=WORDS):
    """Prepare, and check every window: numbers in the pixels, actions, states, words."""
    prepare(dataset, robot, source, output, progress=False)
    prepared = PreparedDataset(output, robot)
    for row in prepared.iter_rows():
        episode, start = row["episode_index"], row["start"]
        shown = [frame_number(frame.numpy()) for frame in prepared.frames(row)]
        assert shown == list(range(100 * episode + start, 100 * episode + start + 5))
        actions = default_actions(episode, LENGTHS[episode])[start : start + 4]
        assert np.array_equal(np.array(row["action"], np.float32), actions)
        assert np.array_equal(np.array(row["state"], np.float32), actions[0] + 1)
        assert row["instruction"] == words
    assert prepared.rows == sum(length - 4 for length in LENGTHS)
    return prepared


@pytest.mark.parametrize("images", [np.float32, np.uint8])
def test_pusht(tmp_path, images):
    source = make_pusht(tmp_path / "log" / "pusht_cchi.zarr", images=images)
    opened = open_log(card(), source)
    assert [episode.length for episode in opened.episodes] == LENGTHS
    assert opened.cameras == (CAMERA,) and opened.columns == ("action", "observation.state")
    assert (opened.width("action"), opened.fps) == (2, 10)
    prepared = read_back(source, tmp_path / "out", card())
    assert set(np.unique(prepared.frames(prepared.row(4)).numpy())) == {0, 255}


@pytest.mark.parametrize("prefix", [False, True])
def test_umi_zip(tmp_path, prefix):
    (tmp_path / "log").mkdir()
    source = make_umi(tmp_path / "log" / "replay.zarr.zip")
    if prefix:  # the folder was zipped, not what is in it
        with zipfile.ZipFile(source / "replay.zarr.zip") as old, zipfile.ZipFile(source / "b.zip", "w") as new:
            for name in old.namelist():
                new.writestr(f"replay.zarr/{name}", old.read(name))
        (source / "b.zip").rename(source / "replay.zarr.zip")
    robot = replace(ROBOT, cameras=["camera0_rgb"], action_key="robot0_eef_pos", state_key="robot0_eef_rot_axis_angle")
    umi = card("umi", constant_caption="pick the cup")
    assert open_log(umi, source).columns == (
        "robot0_eef_pos",
        "robot0_eef_rot_axis_angle",
        "robot0_gripper_width",
    )
    read_back(source, tmp_path / "out", umi, robot, "pick the cup")
    store = ZarrStore(source / "replay.zarr.zip")
    assert store.groups("") == ["data", "meta"]
    assert store.described_by(["data/robot0_eef_pos"]) == []


def test_layouts_of_chunks(tmp_path):
    """Orders, separators, filters, no compressor, a chunk that is larger than the array, and rows far apart."""
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    values = np.arange(11 * 7 * 3, dtype=np.int32).reshape(11, 7, 3)
    put(group, "f", values, (4, 3, 2), order="F")
    put(group, "slashes", values, (4, 3, 2), chunk_key_encoding={"name": "v2", "separator": "/"})
    put(group, "delta", values, (20, 20, 20), filters=[numcodecs.Delta(dtype="<i4")])
    group.create_array("plain", data=values.astype(">f8"), chunks=(3, 7, 3), compressors=None)
    store = ZarrStore(tmp_path / "a.zarr")
    for name in ("f", "slashes", "delta", "plain"):
        assert store.missing_chunk(name) is None
        assert np.array_equal(store.read(name), values)
        assert np.array_equal(store.read(name, np.array([0, 3, 4, 10])), values[[0, 3, 4, 10]])
        assert np.array_equal(store.read(name, slice(3, 9)), values[3:9])
    assert sorted(store.names("")) == ["delta", "f", "plain", "slashes"]


def test_words_of_each_episode(tmp_path):
    source = make_pusht(tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="a")
    put(group, "meta/words", np.array(["one", "two", "three"]))
    group["data"].attrs["task"] = {"en": "from an attribute"}
    for instruction, expected in [
        ({"array": "meta/words"}, ["one", "two", "three"]),
        ({"attribute": "data@task", "key": "en"}, ["from an attribute"] * 3),
    ]:
        opened = open_log(card(mapping={"instruction": instruction}), source)
        assert [record.task for record in opened.records(opened.episodes, [])] == expected
    before = prepare(card(), ROBOT, source, tmp_path / "out", progress=False).fingerprint
    group["data/action"][0] = 7
    assert prepare(card(), ROBOT, source, tmp_path / "two", progress=False).fingerprint != before, "chunks count"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda log: (log / "data/action/2.0").unlink(), r"chunk 2\.0 of 'data/action' is missing"),
        (lambda log: (log / "data/img/1.0.0.0").unlink(), r"chunk 1\.0\.0\.0 of 'data/img' is missing"),
        (lambda log: (log / "data/action/0.0").write_bytes(b"\x02\x01\x21\x08"), r"chunk data/action/0\.0 is damaged"),
        (lambda log: (log / "data/img/0.0.0.0").write_bytes(b""), r"chunk data/img/0\.0\.0\.0 is damaged"),
        (lambda log: (log / "data/img/.zarray").write_text("{"), r"data/img/\.zarray is not valid JSON"),
        (lambda log: (log / ".zgroup").unlink(), r"not a Zarr store, for \.zgroup is missing"),
        (lambda log: change(log / "data/img/.zarray", chunks=[0, 48, 64, 3]), r"its \.zarray is damaged"),
        (lambda log: change(log / "data/img/.zarray", chunks=[5, 48, 64]), r"its \.zarray is damaged"),
        (lambda log: change(log / "data/img/.zarray", dtype="|V7"), r"holds \|V7; numbers or words are read"),
        (
            lambda log: change(log / "data/img/.zarray", compressor={"id": "pickle"}),
            "codec 'pickle', which is not read",
        ),
        (lambda log: change(log / "data/img/.zarray", compressor={"id": "blosc", "x": 1}), "cannot be made"),
        (lambda log: change(log / "data/action/.zarray", shape=[21, 2]), r"'data/action' has shape \[21, 2\]"),
        (lambda log: shutil.rmtree(log / "meta"), r"no array 'meta/episode_ends'"),
    ],
)
def test_damaged_stores(tmp_path, damage, message):
    source = make_pusht(tmp_path / "log" / "a.zarr")
    damage(tmp_path / "log" / "a.zarr")
    with pytest.raises(UserError, match=message) as caught:
        prepare(card(), ROBOT, source, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)


def test_damaged_zip(tmp_path):
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / "a.zarr.zip"
    source = make_pusht(path, zipped=True)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("data/action/0.0").header_offset + 60
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"a\.zarr\.zip: data/action/0\.0 is damaged"):
        prepare(card(), ROBOT, source, tmp_path / "out", progress=False)
    path.unlink()  # another file in its place, as a copy makes one
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.zarr\.zip: not a readable zip"):
        open_log(card(), source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_hz": None}, "rate_hz is None"),
        ({"mapping": {"preset": "uni"}}, r"mapping.preset is 'uni'. Did you mean 'umi'"),
        ({"mapping": {"end": "meta/ends"}}, r"unknown key 'mapping.end'. Did you mean 'ends'"),
        ({"mapping": {"ends": "meta/episode_end"}}, r"no array 'meta/episode_end'. Did you mean 'meta/episode_ends'"),
        ({"mapping": {"ends": "data/action"}}, "does not rise from above 0"),
        ({"mapping": {"columns": {"action": "data/actions"}}}, r"no array 'data/actions'. Did you mean 'data/action'"),
        ({"mapping": {"cameras": {CAMERA: "data/image"}}}, r"no array 'data/image'. Did you mean 'data/img'"),
        ({"mapping": {"cameras": {CAMERA: "data/state"}}}, r"pictures are \[T, H, W, 3\]"),
        ({"mapping": {"preset": "umi", "instruction": {"constant": "x"}}}, "has none of the arrays of the mapping"),
        ({"mapping": {"files": "*.zip"}}, r"no file matches \*\.zip"),
    ],
)
def test_cards_that_do_not_fit(tmp_path, changes, message):
    source = make_pusht(tmp_path / "log" / "a.zarr")
    with pytest.raises(UserError, match=message) as caught:
        prepare(card(**changes), ROBOT, source, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)


def test_what_white_is(tmp_path):
    source = make_pusht(tmp_path / "log" / "a.zarr", white=1)
    with pytest.raises(UserError, match="give the camera of the mapping white: 1"):
        prepare(card(), ROBOT, source, tmp_path / "out", progress=False)
    ones = {"cameras": {CAMERA: {"path": "data/img", "white": 1}}}
    read_back(source, tmp_path / "out", card(mapping=ones))
    halves = {"cameras": {CAMERA: {"path": "data/img", "white": 0.5}}}
    with pytest.raises(UserError, match=r"values from 0 to 1; the mapping's white is 0\.5"):
        prepare(card(mapping=halves), ROBOT, source, tmp_path / "half", progress=False)


def test_chunks_of_zeros_that_were_not_written(tmp_path):
    source = make_pusht(tmp_path / "log" / "a.zarr", chunk_rows=1, empty=True)  # the very first picture is black
    with pytest.raises(UserError, match=r"chunk 0\.0\.0\.0 of 'data/img' is missing; .* say empty_chunks: true"):
        open_log(card(), source)
    read_back(source, tmp_path / "out", card(mapping={"empty_chunks": True}))


def test_version_three_and_the_store_itself(tmp_path):
    zarr.open_group(tmp_path / "log" / "a.zarr", mode="w", zarr_format=3)
    with pytest.raises(UserError, match=r"is Zarr version 3; .*zarr_format=2"):
        open_log(card(), tmp_path / "log")
    with pytest.raises(UserError, match=r"give the folder that holds it, .*/log, and mapping.files: a\.zarr"):
        open_log(card(), tmp_path / "log" / "a.zarr")


def jpeg_xl(path, codec_id="imagecodecs_jpegxl"):
    """Say that a store's pictures are JPEG-XL, as UMI's are."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    entry = json.loads(content["data/camera0_rgb/.zarray"])
    content["data/camera0_rgb/.zarray"] = json.dumps(entry | {"compressor": {"id": codec_id, "level": 99}}).encode()
    path.unlink()
    return content


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as new:
        for name, part in content.items():
            new.writestr(name, part)


UMI_ROBOT = replace(ROBOT, cameras=["camera0_rgb"], action_key="robot0_eef_pos", state_key="robot0_eef_rot_axis_angle")


def test_jpeg_xl_without_its_codec(tmp_path, monkeypatch):
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / "a.zarr.zip"
    make_umi(path)
    write_zip(path, jpeg_xl(path))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(UserError, match=r"imagecodecs_jpegxl\); install the package imagecodecs"):
        prepare(card("umi", constant_caption="x"), UMI_ROBOT, tmp_path / "log", tmp_path / "out", progress=False)


def test_jpeg_xl(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / "a.zarr.zip"
    make_umi(path)
    content = jpeg_xl(path)
    for row, picture in enumerate(pictures()):
        content[f"data/camera0_rgb/{row}.0.0.0"] = imagecodecs.jpegxl_encode(picture, level=99)
    write_zip(path, content)
    read_back(tmp_path / "log", tmp_path / "out", card("umi", constant_caption="x"), UMI_ROBOT, "x")


def test_workers_and_forks(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_FRAMES", 12)
    (tmp_path / "log").mkdir()
    source = make_pusht(tmp_path / "log" / "a.zarr.zip", zipped=True, images=np.uint8)
    folders = []
    for workers in (1, 2):
        prepare(card(), ROBOT, source, tmp_path / f"by{workers}", workers=workers, progress=False)
        folders.append({p.name: p.read_bytes() for p in (tmp_path / f"by{workers}").iterdir() if p.is_file()})
    assert len([name for name in folders[0] if name.startswith("windows-")]) == 2
    assert folders[0] == folders[1]
    prepared = PreparedDataset(tmp_path / "by1", ROBOT)
    expected = prepared.frames(prepared.row(3)).numpy()
    child = os.fork()
    if child == 0:  # pragma: no cover
        same = np.array_equal(prepared.frames(prepared.row(3)).numpy(), expected)
        os._exit(0 if same and os.getpid() in {key[0] for key in zarr_v2._stores._open} else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_command(tmp_path, monkeypatch, capsys):
    make_pusht(tmp_path / "log" / "a.zarr")
    (tmp_path / "configs" / "embodiment").mkdir(parents=True)
    (tmp_path / "configs" / "embodiment" / "mover.yaml").write_text(yaml.safe_dump(to_plain(ROBOT)))
    text = "name: t\nformat: zarr\nsource: log\nrate_hz: 10\nmapping: {preset: diffusion_policy_pusht}\n"
    (tmp_path / "card.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    line = ["prepare", "card.yaml", "--embodiment", "mover", "--output", "out"]
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 0 and PreparedDataset(tmp_path / "out", ROBOT).rows == 10
    (tmp_path / "card.yaml").write_text(text.replace("rate_hz: 10\n", ""))
    with pytest.raises(SystemExit) as ended:
        cli.main([*line[:-1], "other"])
    assert ended.value.code == 2 and "rate_hz is None" in capsys.readouterr().err
