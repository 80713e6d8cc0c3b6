"""Everything that a user's files may have wrong, by the command line: code 2, one line that says where and what to do,
and not a file that was not there before."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cosmos3_train.commands import check_data
from cosmos3_train.commands.check import Findings, _check_disk
from cosmos3_train.commands.check_model import CheckedModel
from cosmos3_train.commands.prepare import _check_tasks
from cosmos3_train.config import Loaded, UserError, load_experiment
from cosmos3_train.data.index import assign_splits
from cosmos3_train.model.packing import Layout
from tests.data.logs import CAMERA, default_actions, make_log
from tests.disk import small_files
from tests.training.project import robot, write, write_project

TRAIN = (
    "train",
    "experiments/small.yaml",
    "export=none",
    "evaluation.heldout_samples=2",
    "evaluation.action_samples=0",
)
PREPARE = ("prepare", "cards/moves.yaml", "--embodiment", "mover", "--output", "rows", "--heldout", "0.2")
VIDEO = f"log/videos/{CAMERA}/chunk-000/file-000.mp4"
ROWS = "log/data/chunk-000/file-000.parquet"
SHARD = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return write_project(tmp_path_factory.mktemp("mistakes") / "root")


@pytest.fixture
def root(template, tmp_path, cosmos3, monkeypatch) -> Path:
    """A project of the test's own, and its folder the working folder. The model lies in the template, to be copied."""
    made = tmp_path / "root"
    shutil.copytree(template, made, ignore=shutil.ignore_patterns("model", "runs", "prepared"))
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def refused(root, cosmos3, capsys) -> Callable[..., None]:
    """Runs a line and asserts that it is refused with these words and leaves everything as it was."""

    def run(line: tuple[str, ...], *words: str) -> None:
        before = everything(root)
        capsys.readouterr()
        assert cosmos3(*line) == 2
        told = capsys.readouterr().err
        errors = [text for text in told.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in told, told
        assert all(word in errors[0] for word in words), errors[0]
        assert everything(root) == before

    return run


def everything(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, hidden ones too; of files their size and when they were written."""
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)
        for path in root.rglob("*")
        if path.suffix != ".lock"
    }


def own_model(template: Path, root: Path) -> str:
    """A copy of the model to be damaged; the override that names it."""
    shutil.copytree(template / "model", root / "model")
    return f"model.path={root / 'model'}"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"nothing of the kind")


# ------------------------------------------------------------------------------------------------ logs


@pytest.mark.parametrize("line", [TRAIN, PREPARE], ids=["train", "prepare"])
@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (Path.unlink, VIDEO, ["file-000.mp4: the ", " is missing", "copy the log again"]),
        (truncate, VIDEO, ["file-000.mp4: ", "copy the log again"]),
        (garble, VIDEO, ["file-000.mp4: not a readable video", "copy the log again"]),
        (Path.unlink, ROWS, ["file-000.parquet: the ", " is missing", "copy the log again"]),
        (truncate, ROWS, ["file-000.parquet: not a readable Parquet file", "copy the log again"]),
        (Path.unlink, "log/meta/tasks.parquet", ["tasks.parquet: the Parquet file is missing"]),
        (garble, "log/meta/episodes/chunk-000/file-000.parquet", ["file-000.parquet: not a readable Parquet file"]),
        (garble, "log/meta/info.json", ["info.json: not valid JSON"]),
    ],
)
def test_a_log_that_is_damaged(root, refused, line, damage, name, words):
    damage(root / name)
    refused(line, *words)


@pytest.mark.parametrize("line", [TRAIN, PREPARE], ids=["train", "prepare"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "channel 'y' of 'action' is nan; every value must be a finite number"),
        (np.inf, "channel 'y' of 'action' is inf; every value must be a finite number"),
        (600, "action channel 'y' is 600, outside its range 0 to 512 px; correct the log or the embodiment card"),
    ],
)
def test_actions_that_cannot_be(root, refused, line, value, words):
    shutil.rmtree(root / "log")
    actions = {episode: default_actions(episode, 12) for episode in range(4)}
    for spoilt in actions.values():  # whichever episodes train
        spoilt[7, 1] = value
    make_log(root / "log", [12] * 4, cameras={CAMERA: (32, 48)}, actions=actions)
    refused(line, "row 7", words)


def test_episodes_shorter_than_a_chunk_are_left_out_and_counted(root, cosmos3, capsys):
    shutil.rmtree(root / "log")
    make_log(root / "log", [12, 4, 14, 1, 13], cameras={CAMERA: (32, 48)})
    assert cosmos3("check", *TRAIN[1:]) == 0
    assert "2 too short" in capsys.readouterr().out
    assert cosmos3(*PREPARE) == 0
    assert "left out: 2 × episode shorter than chunk + 1 frames" in capsys.readouterr().out
    shutil.rmtree(root / "log")
    make_log(root / "log", [4, 3, 2], cameras={CAMERA: (32, 48)})
    assert cosmos3(*PREPARE[:-3], "none") == 2
    assert "none of 3 episodes has the 5 frames of a window" in capsys.readouterr().err


def test_a_sparse_filter_is_refused_only_where_all_episodes_were_read(root, cosmos3, refused, capsys, monkeypatch):
    """The one episode that succeeds is none of those that `check` reads of a long log."""
    shutil.rmtree(root / "log")
    success = [np.zeros((12, 1), np.float32) for _ in range(8)]
    splits = assign_splits("moves", range(8), 0.2, 0)
    trained = [number for number, split in splits.items() if split == "train"]
    success[trained[1]][:] = 1
    make_log(root / "log", [12] * 8, cameras={CAMERA: (32, 48)}, extra={"next.success": success})
    with (root / "cards" / "moves.yaml").open("a") as card:
        card.write("filters: {success: next.success}\n")
    line = (*TRAIN[1:], "data.heldout_fraction=0.2")
    assert cosmos3("check", *line) == 0
    assert "windows" in capsys.readouterr().out
    monkeypatch.setattr(check_data, "FRAMES", 12 * len(trained) // 2)
    assert cosmos3("check", *line) == 0
    said = capsys.readouterr().out
    assert f"of {len(trained)} episodes to train on that were looked at" in said
    monkeypatch.setattr(check_data, "FRAMES", 10_000)
    (root / "log" / "keep.json").write_text("{}")
    text = (root / "cards" / "moves.yaml").read_text()
    (root / "cards" / "moves.yaml").write_text(text.replace("success: next.success", "keep_ranges: keep.json"))
    refused(("check", *line), f"no window in {len(trained)} of {len(trained)} episodes", "outside the ranges to keep")


# ------------------------------------------------------------------------------------------------ cards and keys


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rat=1", ["unknown key 'optimizer.learning_rat'", "Did you mean 'learning_rate'"]),
        ("embodiments.mover.action=[{name: x}]", ["'action' has 2 numbers a row", "'mover' has 1 channels", "card"]),
        (
            f"embodiments.mover.action=[{', '.join(f'{{name: c{n}}}' for n in range(65))}]",
            ["embodiment 'mover': action has 65 channels; a robot has 1 to 64"],
        ),
        (
            "embodiments.mover.domain_id=4",
            ["embodiments.mover.domain_id is 4", "upstream's 'pusht'", "such as 31", "shares_domain: pusht"],
        ),
        ("embodiments.mover.control_hz=20", ["10 frames a second", "control_hz 20", "set control_hz"]),
        ("training.tokens_per_micro_batch=40", ["tokens", "training.tokens_per_micro_batch = 40", "raise it to"]),
    ],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) else "",
)
def test_a_value_that_does_not_fit(refused, override, words):
    refused((*TRAIN, override), *words)


def test_a_slot_that_another_robot_of_the_experiment_has(root, refused):
    card = robot(name="other")
    write(root / "configs" / "embodiment" / "other.yaml", {**vars(card), "action": [{"name": "x"}, {"name": "y"}]})
    more = "data.datasets.more={prepared: prepared/more, card: cards/moves.yaml, embodiment: other}"
    refused(
        (*TRAIN, more), "embodiments.other.domain_id is 24", "taken by 'mover'", "such as 31", "shares_domain: mover"
    )


def test_a_card_of_another_width_than_the_log_s_is_refused_by_prepare(root, refused):
    card = root / "configs" / "embodiment" / "mover.yaml"
    card.write_text(card.read_text().replace("control_hz: 10.0", "control_hz: 20.0"))
    refused(PREPARE, "10 frames a second", "control_hz 20", "set control_hz")
    write(card, {**vars(robot()), "action": [{"name": "x"}]})
    refused(PREPARE, "'action' has 2 numbers a row", "'mover' has 1 channels")


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, ["statistics.json: the statistics are missing", "cosmos3 prepare"]),
        (garble, ["statistics.json: not a statistics file", "cosmos3 prepare"]),
        (
            lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": "elsewhere"})),
            ["statistics of dataset 'elsewhere'", "'moves'", "cosmos3 prepare"],
        ),
        (
            lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "embodiment": "arm"})),
            ["statistics of embodiment 'arm'", "'mover'", "cosmos3 prepare"],
        ),
    ],
    ids=["missing", "garbled", "another dataset's", "another robot's"],
)
def test_statistics_missing_or_another_s(root, cosmos3, refused, spoil, words):
    assert cosmos3(*PREPARE, "--stride", "4") == 0
    spoil(root / "rows" / "statistics.json")
    refused((*TRAIN, "data.datasets.moves.prepared=rows"), *words)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (Path.unlink, SHARD, ["transformer: safetensors files missing", "fetch it again"]),
        (truncate, SHARD, ["diffusion_pytorch_model.safetensors: damaged", "fetch it again"]),
        (garble, SHARD, ["diffusion_pytorch_model.safetensors: damaged", "fetch it again"]),
        (Path.unlink, "transformer/config.json", ["no transformer/config.json in it"]),
        (garble, "transformer/config.json", ["transformer/config.json", "fetch it again"]),
        (garble, "model_index.json", ["model_index.json", "cannot be read", "fetch it again"]),
        (garble, "text_tokenizer/tokenizer.json", ["tokenizer", "cannot be read", "fetch it again"]),
        (garble, "scheduler/scheduler_config.json", ["scheduler", "cannot be read", "fetch it again"]),
        (garble, "vae/config.json", ["vae", "cannot be read", "fetch it again"]),
        (truncate, "vae/diffusion_pytorch_model.safetensors", ["vae", "damaged", "fetch it again"]),
        (Path.unlink, "vae/diffusion_pytorch_model.safetensors", ["vae: safetensors files missing", "fetch it again"]),
    ],
)
def test_a_model_that_is_damaged(root, template, refused, damage, name, words):
    override = own_model(template, root)
    damage(root / "model" / name)
    refused((*TRAIN, override), *words)


@pytest.fixture(scope="module")
def finished(template, tmp_path_factory) -> Path:
    """A project with a finished run of two steps on a model of its own."""
    from cosmos3_train.training.run import train
    from tests.training.project import load

    made = tmp_path_factory.mktemp("finished") / "root"
    shutil.copytree(template, made)
    experiment = (made / "experiments" / "small.yaml").read_text()
    (made / "experiments" / "small.yaml").write_text(experiment.replace(str(template), str(made)))
    train(load(made, "training.steps=2", "training.checkpoint_every_n_steps=1"))
    return made


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_base_other_than_the_run_s(finished, tmp_path, root, refused, monkeypatch, form):
    monkeypatch.chdir(finished)
    shard = finished / "model" / SHARD
    whole = shard.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(shard).items()}
    tensors["proj_in.weight"] += 1
    save_file(tensors, shard, {"format": "pt"})
    before = everything(finished)
    try:
        refused(("export", "small", "--to", form), "it was trained on", "now has weights", "give the base that it was")
    finally:
        assert everything(finished) == before
        shard.write_bytes(whole)


@pytest.mark.parametrize("name", ["state.json", "average/whole.safetensors"])
def test_a_run_s_checkpoint_that_is_damaged(finished, refused, monkeypatch, name):
    monkeypatch.chdir(finished)
    path = finished / "runs" / "small" / "checkpoints" / "step_000002" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    before = everything(finished)
    try:
        refused(("export", "small", "--to", "merged"), "step_000002: damaged checkpoint", "remove the folder to go on")
    finally:
        assert everything(finished) == before
        path.write_bytes(whole)


# ------------------------------------------------------------------------------------------------ a full disk


def test_a_disk_that_is_full_while_preparing(root, cosmos3, capsys):
    with small_files(2000):
        assert cosmos3(*PREPARE) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "rows: the disk is full" in errors[0] and "free some space" in errors[0]
    assert not (root / "rows").exists() and not list(root.rglob("*.writing"))
    assert cosmos3(*PREPARE) == 0


def test_a_disk_that_is_full_at_a_checkpoint(root, cosmos3, capsys):
    assert cosmos3("prepare", *PREPARE[1:], "--stride", "4") == 0
    line = (*TRAIN, "data.datasets.moves.prepared=rows", "data.datasets.moves.cache_latents=false")
    assert cosmos3("check", *line[1:]) == 0
    capsys.readouterr()
    with small_files(20_000):
        assert cosmos3(*line) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and "the checkpoint could not be written" in errors[0] and "free some space" in errors[0]
    assert not list((root / "runs" / "small" / "checkpoints").iterdir())
    assert cosmos3(*line) == 0


def test_tasks_whose_prompts_a_dataset_cannot_have():
    _check_tasks(["policy"], robot=True)
    for task, robotic, words in (("policy", False, "needs a robot"), ("video_to_sound", True, "needs sound")):
        with pytest.raises(UserError, match=words):
            _check_tasks([task], robot=robotic)


def test_an_interrupted_run_is_not_asked_again_for_the_room_it_has_taken(tmp_path, monkeypatch):
    layout = Layout(2, 48, 64, 64, 15000, 24.0, 25.0, True, True)
    findings = Findings(model=CheckedModel(rows=[], trained=10**6, stored_bytes=0, layout=layout))  # 16 MB a checkpoint
    experiment = load_experiment(Path(__file__).parents[2] / "experiments" / "quickstart.yaml").experiment
    loaded = Loaded(replace(experiment, name="r"), {}, tmp_path)
    free = {"bytes": 60_000_000}
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free["bytes"]))
    _check_disk(loaded, findings)
    checkpoint = loaded.run_folder / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(32_000_000))
    free["bytes"] -= 32_000_000
    _check_disk(loaded, findings)
    free["bytes"] = 1_000_000
    with pytest.raises(UserError, match="free some space"):
        _check_disk(loaded, findings)


def test_a_file_that_may_not_be_read(root, cosmos3, capsys):
    info = root / "log/meta/info.json"
    info.chmod(0)
    if os.access(info, os.R_OK):
        pytest.skip("root may read everything")
    for line in (TRAIN, PREPARE):
        assert cosmos3(*line) == 2
        assert re.search(r"error: .*info\.json: Permission denied; give yourself", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (("devices=8",), "training.samples_per_step is 6, fewer than the 8 ranks"),
        (("name=hsdp", "devices=6", "shards=4"), "strategy.shards is 4, which does not divide the 6 processes"),
        (("devices=5", "context_parallel=2"), "strategy.context_parallel is 2, which does not divide the 5 processes"),
    ],
)
def test_processes_that_cannot_share_a_step_are_told_before_they_are_started(refused, strategy, told):
    refused(("check", *TRAIN[1:], "training.samples_per_step=6", *(f"strategy.{words}" for words in strategy)), told)
