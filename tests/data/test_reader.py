"""Prepared rows as samples: what a task holds, the card's check, cached latents, reading speed."""

import json
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cosmos3_train.config import Channel, UserError
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import LATENTS, PreparedDataset
from tests.data.logs import dataset_card, default_actions, embodiment, frame_number, make_log


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("source") / "log", [12, 9, 15, 20])


@pytest.fixture
def folder(log, tmp_path):
    prepare(dataset_card(), embodiment(), log, tmp_path / "out", progress=False)
    return tmp_path / "out"


@pytest.fixture
def dataset(folder):
    return PreparedDataset(folder, embodiment())


def test_a_policy_sample(dataset):
    index = dataset.count("train") - 1
    row = dataset.window("train", index)
    sample = dataset.sample("train", index, "policy", number=77)
    episode, start = row["episode_index"], row["start"]
    assert sample.key == f"moves/episode_{episode:06d}/{start:06d}"
    assert (sample.number, sample.task, sample.embodiment, sample.fps) == (77, "policy", "mover", 10.0)
    assert sample.caption == f"do task {episode % 2}"
    assert sample.frames.shape == (5, 3, 96, 96) and sample.size == (96, 96)
    assert [frame_number(f.numpy()) for f in sample.frames] == [100 * episode + start + i for i in range(5)]
    actions = default_actions(episode, 20)[start : start + 4]
    assert sample.action.dtype == torch.float32
    assert torch.allclose(dataset.normaliser.denormalise(sample.action), torch.from_numpy(actions), atol=1e-3)
    assert sample.state is None, "the embodiment has no state row"


def test_tasks_without_a_robot_have_no_actions(dataset):
    video = dataset.sample("train", 0, "image_to_video", 0)
    assert video.action is None and video.state is None and video.embodiment == "mover"  # it frames the clip
    assert video.frames.shape[0] == 5
    image = dataset.sample("train", 0, "text_to_image", 0)
    assert image.frames.shape[0] == 1
    assert torch.equal(image.frames[0], video.frames[0])


def test_state_row(log, tmp_path):
    robot = embodiment(state_row=True)
    prepare(dataset_card(), robot, log, tmp_path / "out", progress=False)
    dataset = PreparedDataset(tmp_path / "out", robot)
    row = dataset.window("heldout", 0)
    sample = dataset.sample("heldout", 0, "inverse_dynamics", 0)
    assert torch.allclose(sample.state, dataset.normaliser.normalise(torch.tensor(row["state"])))
    assert dataset.sample("heldout", 0, "image_to_video", 0).state is None


def test_splits_share_no_episode(dataset):
    rows = {s: [dataset.window(s, i) for i in range(dataset.count(s))] for s in ("train", "heldout")}
    assert all(row["split"] == split for split, found in rows.items() for row in found)
    episodes = {split: {row["episode_index"] for row in found} for split, found in rows.items()}
    assert not episodes["train"] & episodes["heldout"]
    assert dataset.count("train") + dataset.count("heldout") == dataset.rows == 40
    keys = [dataset.key(row) for row in dataset.iter_rows()]
    assert len(set(keys)) == 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk": 8}, "with chunk 4, the run has chunk 8; prepare it again"),
        ({"name": "arm"}, "with name 'mover', the run has name 'arm'"),
        ({"normaliser": "minmax"}, "with normaliser 'quantile', the run has normaliser 'minmax'"),
        ({"action": [Channel("x", unit="cm"), Channel("y")]}, r"with action\.0\.unit 'px', the run has .* 'cm'"),
    ],
)
def test_another_embodiment_card(folder, changes, words):
    with pytest.raises(UserError, match=words):
        PreparedDataset(folder, embodiment(**changes))


def test_what_rows_do_not_depend_on_may_change(folder):
    robot = embodiment(execute=3, domain_id=9, simulator="pusht")
    assert PreparedDataset(folder, robot).embodiment is robot
    assert PreparedDataset(folder, None).embodiment == embodiment()


def test_not_prepared(tmp_path):
    with pytest.raises(UserError, match=r"not a prepared folder \(card\.json is missing\); run `cosmos3 prepare`"):
        PreparedDataset(tmp_path, None)


def test_statistics_gone_or_anothers(folder):
    path = folder / "statistics.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "dataset": "elsewhere"}))
    with pytest.raises(UserError, match="statistics of dataset 'elsewhere'"):
        PreparedDataset(folder, None)
    path.unlink()
    with pytest.raises(UserError, match="statistics are missing"):
        PreparedDataset(folder, None)


def test_the_log_moved(folder, tmp_path):
    log = make_log(tmp_path / "log", [12, 9, 15, 20])
    content = json.loads((folder / "card.json").read_text())
    content["source"] = str(tmp_path / "gone")
    (folder / "card.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="gone is not there; set the dataset's source"):
        PreparedDataset(folder, None)
    assert PreparedDataset(folder, None, source=log).sample("train", 0, "policy", 0).frames is not None


def test_cached_latents(folder):
    dataset = PreparedDataset(folder, None)
    assert dataset.latent_cache is None
    with pytest.raises(UserError, match="no latents are cached"):
        dataset.sample("train", 0, "policy", 0, latents=True)
    (folder / LATENTS).mkdir(parents=True)
    latents = torch.randn(dataset.rows, 48, 2, 6, 6)
    for shard in range(0, dataset.rows, 16):
        rows = {str(row): latents[row] for row in range(shard, min(shard + 16, dataset.rows))}
        save_file(rows, folder / LATENTS / f"{shard // 16:05d}.safetensors")
    card = {"fingerprint": "vae", "windows": dataset.rows, "shard": 16}
    (folder / LATENTS / "card.json").write_text(json.dumps(card))
    dataset = PreparedDataset(folder, None)
    assert dataset.latent_cache.fingerprint == "vae"
    for split, index in (("train", 0), ("train", dataset.count("train") - 1), ("heldout", 3)):
        sample = dataset.sample(split, index, "policy", 0, pixels=False, latents=True)
        assert sample.frames is None and sample.size == (96, 96)
        assert torch.equal(sample.latent, latents[dataset.row_number(split, index)])
    image = dataset.sample("train", 0, "text_to_image", 0, pixels=False, latents=True)
    assert image.latent.shape == (48, 1, 6, 6)
    (folder / LATENTS / "00001.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"00001\.safetensors: cached latents are missing or corrupt"):
        dataset.latent_cache.read(20)
    (folder / LATENTS / "card.json").write_text(json.dumps({**card, "windows": 7}))
    with pytest.raises(UserError, match="latents of 7 windows, but there are 40"):
        PreparedDataset(folder, None)


def _frames_in_a_fork(dataset):
    return [[frame_number(f.numpy()) for f in dataset.frames(dataset.row(row))] for row in range(12)]


def test_forked_readers_do_not_disturb_each_other(dataset):
    """A forked process shares its parent's open files, offset and all, unless it opens its own."""
    here = _frames_in_a_fork(dataset)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_frames_in_a_fork, [dataset] * 4)) == [here] * 4
    assert _frames_in_a_fork(dataset) == here


def test_travels_to_other_processes(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.sample("train", 2, "policy", 0).frames, dataset.sample("train", 2, "policy", 0).frames)


def test_reading_speed(tmp_path, capsys):
    log = make_log(tmp_path / "log", [60] * 6)
    prepare(dataset_card(), embodiment(chunk=16), log, tmp_path / "out", progress=False)
    dataset = PreparedDataset(tmp_path / "out", None)
    order = np.random.default_rng(0).permutation(dataset.count("train"))[:100]
    began = time.perf_counter()
    for index in order:
        dataset.sample("train", int(index), "policy", 0)
    speed = len(order) / (time.perf_counter() - began)
    with capsys.disabled():
        print(f"\nreading: {speed:.0f} windows of 17 frames 96x96 a second, one process")
    assert speed > 20, "a decoder that starts anew for every frame reads 15 windows a second"
