"""HDF5 logs as robomimic, LIBERO and ALOHA lay them out, written here with h5py: opened, prepared and read back."""

import io
import json
import os
from dataclasses import replace

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image

from cosmos3_train import cli
from cosmos3_train.config import UserError, to_plain
from cosmos3_train.data import blocks, hdf5
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_log
from tests.data.logs import dataset_card, default_actions, embodiment, frame_number, numbered_frame

CAMERA = "observation.images.image"
WRIST = "observation.images.wrist_image"
LENGTHS = {"demo_2": 6, "demo_10": 9, "demo_0": 7}
ORDER = ["demo_0", "demo_2", "demo_10"]
ROBOT = embodiment(cameras=[CAMERA])


def pictures(episode, length):
    """Frame i of episode e shows number 100·e + i."""
    return np.stack([numbered_frame(100 * episode + frame, 48, 64) for frame in range(length)])


def card(preset, **changes):
    given = {"preset": preset, **changes.pop("mapping", {})}
    return dataset_card(**{"format": "hdf5", "rate_hz": 10.0, "mapping": given, **changes})


def make_libero(path, lengths=LENGTHS, upside_down=True, instruction="put the bowl on the plate"):
    """One file, a group an episode, in the order in which they were recorded, not by number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"problem_name": "p", "language_instruction": instruction})
        data.attrs["env_args"] = json.dumps({"env_name": "Libero"})
        for episode, name in enumerate(sorted(lengths, key=lambda name: int(name[5:]))):
            length = lengths[name]
            group, values = data.create_group(name), default_actions(episode, length)
            group.attrs["num_samples"] = length
            group["actions"], group["dones"] = values.astype(np.float64), np.zeros(length, np.uint8)
            obs = group.create_group("obs")
            shown = pictures(episode, length)
            stored = shown[:, ::-1, ::-1] if upside_down else shown
            obs.create_dataset("agentview_rgb", data=stored, compression="gzip", chunks=(4, 48, 64, 3))
            obs["eye_in_hand_rgb"] = stored
            obs["ee_pos"], obs["ee_ori"] = values[:, :1] + 1, values[:, 1:] + 1
            obs["gripper_states"] = np.zeros((length, 2))
            obs["joint_states"] = np.ones((length, 7))
    return path.parent


def make_robomimic(path):
    with h5py.File(path, "w") as file:
        for episode, name in enumerate(ORDER):
            length = LENGTHS[name]
            values = default_actions(episode, length)
            file[f"data/{name}/actions"], file[f"data/{name}/states"] = values, values
            file[f"data/{name}/obs/agentview_image"] = pictures(episode, length)
            file[f"data/{name}/obs/robot0_eef_pos"] = values[:, 0] + 1  # [T], no second axis
            file[f"data/{name}/obs/robot0_eef_quat"] = values[:, 1:] + 1
            file[f"data/{name}/obs/robot0_gripper_qpos"] = np.zeros((length, 2))
        file["mask/train"] = np.array([b"demo_10", b"demo_2"])
    return path.parent


def make_aloha(folder, lengths=(6, 9, 7), compress=True, colour="rgb"):
    """A file an episode; JPEGs are padded to the longest of their camera."""
    folder.mkdir(exist_ok=True)
    for episode, length in enumerate(lengths):
        values = default_actions(episode, length)
        with h5py.File(folder / f"episode_{episode}.hdf5", "w") as file:
            file.attrs["sim"], file.attrs["compress"] = False, compress
            file["action"], file["observations/qpos"] = values, values + 1
            file["observations/qvel"] = values
            shown = pictures(episode, length)
            shown[..., 0] //= 2  # so that the order of the channels shows
            if colour == "bgr":
                shown = shown[..., ::-1]
            if compress:
                encoded = [np.frombuffer(jpeg(picture), np.uint8) for picture in shown]
                sizes = [len(row) for row in encoded]
                shown = np.stack([np.pad(row, (0, max(sizes) - len(row))) for row in encoded])
                file["compress_len"] = np.array([sizes], dtype=np.float32)
            file["observations/images/cam_high"] = shown
    return folder


def jpeg(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return file.getvalue()


def read_back(source, output, dataset, robot=ROBOT, instruction="do it"):
    """Prepare, and check every window: numbers in the pixels, actions, states, words."""
    summary = prepare(dataset, robot, source, output, progress=False)
    prepared = PreparedDataset(output, robot)
    for row in prepared.iter_rows():
        episode, start = row["episode_index"], row["start"]
        shown = [frame_number(frame.numpy()) for frame in prepared.frames(row)]
        assert shown == list(range(100 * episode + start, 100 * episode + start + 5))
        actions = default_actions(episode, 12)
        counts = np.arange(start, start + 4)
        assert np.array_equal(np.array(row["action"])[:, 0], actions[counts, 0])
        assert row["state"][0] == start + 1
        assert row["instruction"] == instruction
    assert prepared.rows == sum(length - 4 for length in LENGTHS.values())
    return summary, prepared


def test_libero(tmp_path):
    source = make_libero(tmp_path / "log" / "put_the_bowl_demo.hdf5")
    robot = replace(ROBOT, cameras=[CAMERA, WRIST], layout="row")
    opened = open_log(card("libero"), source)
    assert [episode.length for episode in opened.episodes] == [7, 6, 9], "demo_2 stands before demo_10"
    assert opened.cameras == (CAMERA, WRIST) and opened.fps == 10
    assert opened.width("observation.state") == 4 and opened.width("action") == 2
    assert "observation.joint_states" in opened.columns
    _, prepared = read_back(source, tmp_path / "one", card("libero"), instruction="put the bowl on the plate")
    row = prepared.row(0)
    assert row["action"] == default_actions(0, 7)[:4].tolist()
    assert row["state"] == pytest.approx([1.0, default_actions(0, 7)[0, 1] + 1, 0, 0])
    prepare(card("libero"), robot, source, tmp_path / "two", progress=False)
    frames = PreparedDataset(tmp_path / "two", robot).frames(row | {"video": [*row["video"], *row["video"]]})
    assert frames.shape == (5, 3, 48, 128)


def test_several_files_and_words_in_a_list(tmp_path):
    make_libero(tmp_path / "log" / "suite" / "task_2.hdf5", {"demo_0": 5}, instruction="second")
    make_libero(tmp_path / "log" / "suite" / "task_10.hdf5", {"demo_0": 6}, instruction=["pick", "it", "up"])
    opened = open_log(card("libero", mapping={"files": "**/*.hdf5"}), tmp_path / "log")
    assert [record.task for record in opened.records(opened.episodes, [])] == ["second", "pick it up"]
    assert [episode.length for episode in opened.episodes] == [5, 6]
    with pytest.raises(UserError, match=r"no file matches \*\.h\*5"):
        open_log(card("libero"), tmp_path / "log")


def test_robomimic(tmp_path):
    source = make_robomimic(tmp_path / "low_dim.hdf5")
    read_back(source, tmp_path / "out", card("robomimic", constant_caption="do it"))
    masked = open_log(card("robomimic", constant_caption="x", mapping={"mask": "/mask/train"}), source)
    assert [episode.length for episode in masked.episodes] == [6, 9]
    with pytest.raises(UserError, match=r"no array 'mask/trian'. Did you mean 'mask/train'"):
        open_log(card("robomimic", constant_caption="x", mapping={"mask": "mask/trian"}), source)


@pytest.mark.parametrize("compress", [True, False])
def test_aloha(tmp_path, compress):
    source = make_aloha(tmp_path / "log", (7, 6, 9), compress)
    camera = "observation.images.cam_high"
    aloha = card("aloha", mapping={"instruction": {"constant": "do it"}})
    _, prepared = read_back(source, tmp_path / "out", aloha, replace(ROBOT, cameras=[camera]))
    assert open_log(aloha, source).cameras == (camera,)
    frame = prepared.frames(prepared.row(2)).double().numpy()
    assert frame[:, 0].mean() == pytest.approx(frame[:, 1].mean() / 2, rel=0.1), "red is the dark one"
    assert frame[:, 2].mean() == pytest.approx(frame[:, 1].mean(), rel=0.1)


def test_blue_and_red_swapped(tmp_path):
    make_aloha(tmp_path / "log", (6,), colour="bgr")
    cameras = {"top": {"path": "observations/images/cam_high", "colour": "bgr", "flip_vertical": True}}
    swapped = card("aloha", constant_caption="do it", mapping={"cameras": cameras})
    robot = replace(ROBOT, cameras=["top"])
    prepare(swapped, robot, tmp_path / "log", tmp_path / "out", heldout_fraction=0, progress=False)
    prepared = PreparedDataset(tmp_path / "out", robot)
    frame = prepared.frames(prepared.row(1)).double().numpy()
    assert frame[:, 0].mean() == pytest.approx(frame[:, 1].mean() / 2, rel=0.1)
    assert frame[:, 2].mean() == pytest.approx(frame[:, 1].mean(), rel=0.1)
    assert frame_number(frame[0][1:, ::-1]) == 1


def test_words_in_arrays(tmp_path):
    make_aloha(tmp_path / "log", (6,))
    with h5py.File(tmp_path / "log" / "episode_0.hdf5", "a") as file:
        file["language"] = "close the drawer"
        file["steps"] = [f"step {i}" for i in range(6)]
        file["json"] = json.dumps({"a": {"b": "open it"}})
        file.attrs["task"] = "from an attribute"
        file["note"] = ["x", "y"]
    for instruction, expected in [
        ({"array": "language"}, ["close the drawer"] * 6),
        ({"array": "steps"}, [f"step {i}" for i in range(6)]),
        ({"array": "/json", "key": "a.b"}, ["open it"] * 6),
        ({"attribute": "@task"}, ["from an attribute"] * 6),
    ]:
        opened = open_log(card("aloha", mapping={"instruction": instruction}), tmp_path / "log")
        assert list(next(opened.records(opened.episodes, [])).tasks) == expected
    for instruction, message in [
        ({"array": "langage"}, r"no array 'langage'. Did you mean 'language'"),
        ({"array": "note"}, r"has shape \[2\]; one text for all"),
        ({"attribute": "@tusk"}, r"no attribute 'tusk'. Did you mean 'task'"),
        ({"array": "json", "key": "a.c"}, r"no key 'c' in its JSON. Known: b"),
        ({"array": "language", "key": "a"}, "not valid JSON"),
        ({"array": "action"}, r"has shape \[6, 2\]"),
    ]:
        opened = open_log(card("aloha", mapping={"instruction": instruction}), tmp_path / "log")
        with pytest.raises(UserError, match=message) as caught:
            list(opened.records(opened.episodes, []))
        assert "\n" not in str(caught.value)
    steps = card("aloha", caption_column="steps", mapping={"columns": {"steps": "steps"}})
    prepare(steps, replace(ROBOT, cameras=["observation.images.cam_high"]), tmp_path / "log", tmp_path / "out",
            heldout_fraction=0, progress=False)  # fmt: skip
    assert [row["instruction"] for row in PreparedDataset(tmp_path / "out", None).iter_rows()] == ["step 0", "step 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_hz": None}, "rate_hz is None"),
        ({"mapping": {"preset": "libera"}}, r"mapping.preset is 'libera'. Did you mean 'libero'"),
        ({"mapping": {"colums": {}}}, r"unknown key 'mapping.colums'. Did you mean 'columns'"),
        ({"mapping": {"instruction": {"atribute": "@x"}}}, r"unknown key 'mapping.instruction.atribute'"),
        ({"mapping": {"cameras": {"a": {"path": "obs/x", "rotate": True}}}}, r"unknown key 'rotate'"),
        ({"mapping": {"cameras": {"a": {"rotate_180": True}}}}, "path"),
        ({"mapping": {"cameras": {"a": 3}}}, "mapping.cameras.a is 3"),
        ({"mapping": {"columns": {"a": []}}}, "mapping.columns.a is"),
        ({"mapping": {"files": "../*.hdf5"}}, "a pattern below the source"),
        ({"mapping": {"files": "*.yaml"}}, "no file matches"),
        ({"mapping": {"episodes": "date/demo_*"}}, r"no group matches 'date'.* Did you mean 'data'"),
        ({"mapping": {"episodes": "data/demos_*"}}, "no group matches 'demos_\\*'"),
        ({"mapping": {"instruction": {"constant": "a", "array": "b"}}}, "constant and array"),
        ({"mapping": {"instruction": None}}, "nothing says the instruction"),
    ],
)
def test_cards_that_do_not_fit(tmp_path, changes, message):
    source = make_libero(tmp_path / "log.hdf5", {"demo_0": 6})
    with pytest.raises(UserError, match=message) as caught:
        open_log(card("libero", **changes), source)
    assert "\n" not in str(caught.value)


def test_arrays_that_are_missing(tmp_path):
    source = make_libero(tmp_path / "log.hdf5", {"demo_0": 6})
    given = {"columns": {"action": "action", "rgb": "obs/agentview_rgb"}, "cameras": {CAMERA: "obs/agentview_rgd"}}
    given["cameras"]["flat"] = "obs/joint_states"
    opened = open_log(card("libero", mapping=given), source)
    with pytest.raises(UserError, match=r"demo_0: no array 'action'. Did you mean 'actions'"):
        opened.check_column("action")
    with pytest.raises(UserError, match=r"no array 'obs/agentview_rgd'. Did you mean 'obs/agentview_rgb'"):
        opened.check_camera(CAMERA)
    with pytest.raises(UserError, match=r"no camera 'flt' in the mapping. Did you mean 'flat'"):
        opened.check_camera("flt")
    with pytest.raises(UserError, match=r"pictures are \[T, H, W, 3\]"):
        opened.check_camera("flat")
    with pytest.raises(UserError, match=r"no column 'acton' in the mapping. Did you mean 'action'"):
        opened.check_column("acton")
    with pytest.raises(UserError, match="give the folder that holds it"):
        open_log(card("libero"), tmp_path / "log.hdf5")
    with pytest.raises(UserError, match="no such folder"):
        open_log(card("libero"), tmp_path / "nowhere")


def test_lengths_that_differ(tmp_path):
    source = make_libero(tmp_path / "log.hdf5", {"demo_0": 6})
    with h5py.File(source / "log.hdf5", "a") as file:
        del file["data/demo_0/obs/joint_states"]
        file["data/demo_0/obs/joint_states"] = np.ones((8, 7))
    with pytest.raises(UserError, match=r"demo_0: 'actions' has 6 rows, but 'obs/joint_states' has 8"):
        open_log(card("libero"), source)
    dropped = card("libero", mapping={"columns": {"observation.joint_states": None}})
    assert open_log(dropped, source).episodes[0].length == 6


def test_damaged_files(tmp_path):
    source = make_aloha(tmp_path / "log", (7, 9))
    robot = replace(ROBOT, cameras=["observation.images.cam_high"])
    aloha = card("aloha", constant_caption="do it")
    with h5py.File(source / "episode_1.hdf5", "a") as file:
        file["observations/images/cam_high"][8, :20] = 0
    with pytest.raises(UserError, match=r"episode_1\.hdf5: observations/images/cam_high.* not a readable picture"):
        prepare(aloha, robot, source, tmp_path / "out", progress=False)
    hdf5.close_all()
    with h5py.File(source / "episode_1.hdf5", "a") as file:
        file["action"][3, 1] = np.nan
    with pytest.raises(UserError, match="episode 1"):
        prepare(aloha, robot, source, tmp_path / "out", progress=False)
    hdf5.close_all()
    content = (source / "episode_1.hdf5").read_bytes()
    (source / "episode_1.hdf5").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"episode_1\.hdf5: not a readable HDF5 file") as caught:
        prepare(aloha, robot, source, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    (source / "episode_1.hdf5").write_bytes(b"")
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        open_log(aloha, source)


def test_values_in_another_file_are_not_followed(tmp_path):
    make_aloha(tmp_path / "log", (6,))
    (tmp_path / "secret").write_bytes(np.zeros(12, np.float64).tobytes())
    with h5py.File(tmp_path / "log" / "episode_0.hdf5", "a") as file:
        file.create_dataset("stolen", (6, 2), "f8", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
    opened = open_log(card("aloha", constant_caption="x", mapping={"columns": {"stolen": "stolen"}}), tmp_path / "log")
    with pytest.raises(UserError, match="in another file, which is not followed"):
        list(opened.records(opened.episodes, ["stolen"]))


def test_workers_and_forks(tmp_path, monkeypatch):
    """The same bytes with two workers; no file is open over a fork."""
    monkeypatch.setattr(blocks, "BLOCK_FRAMES", 16)
    source = make_aloha(tmp_path / "log", (9, 10, 11, 12))
    robot = replace(ROBOT, cameras=["observation.images.cam_high"])
    aloha = card("aloha", constant_caption="do it")
    folders = []
    for workers in (1, 2):
        prepare(aloha, robot, source, tmp_path / f"by{workers}", workers=workers, progress=False)
        folders.append({p.name: p.read_bytes() for p in (tmp_path / f"by{workers}").iterdir() if p.is_file()})
    assert len([name for name in folders[0] if name.startswith("windows-")]) == 2
    assert folders[0] == folders[1]
    prepared = PreparedDataset(tmp_path / "by1", robot)
    expected = prepared.frames(prepared.row(3)).numpy()
    assert len(hdf5._files) > 0
    child = os.fork()
    if child == 0:  # pragma: no cover
        same = len(hdf5._files) == 0 and np.array_equal(prepared.frames(prepared.row(3)).numpy(), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(prepared.frames(prepared.row(3)).numpy(), expected)


def test_by_the_command(tmp_path, capsys):
    make_libero(tmp_path / "log" / "log.hdf5")
    (tmp_path / "configs" / "embodiment").mkdir(parents=True)
    (tmp_path / "configs" / "embodiment" / "mover.yaml").write_text(yaml.safe_dump(to_plain(ROBOT)))
    text = "name: bowls\nformat: hdf5\nsource: log\nrate_hz: 10\nmapping: {preset: libero}\n"
    (tmp_path / "card.yaml").write_text(text)
    line = ["prepare", str(tmp_path / "card.yaml"), "--embodiment", "mover", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 0 and PreparedDataset(tmp_path / "out", ROBOT).rows == 10
    (tmp_path / "card.yaml").write_text(text.replace("libero", "liberi"))
    with pytest.raises(SystemExit) as ended:
        cli.main([*line, "--fresh"])
    assert ended.value.code == 2 and "Did you mean 'libero'" in capsys.readouterr().err
