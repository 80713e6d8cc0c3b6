"""Every experiment on published video, from files of the set's layout to a finished run and its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosmos3_train.config import load_experiment
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources.clips import NO_CAPTION, NO_VIDEO
from tests.commands.tiny import QUICK, ROOT, numbers_of_two_steps
from tests.data.clips import mp4, row, window, write_files, write_rows, write_tar


def robots(source: Path) -> None:
    for family in ("motion", "collision"):
        members = {f"{run:03d}/clip.mp4": mp4(9 + run) for run in range(3)}
        members |= {f"{run:03d}/clip.json": {"caption": f"{family} {run}", "nb_frames": 9} for run in range(2)}
        members["002/clip.json"] = {"task": f"{family} task", "joint_state": {"position": [0.0]}}
        write_tar(source / "data" / family / "isaaclab" / "shard.tar", members)


def physics(source: Path) -> None:
    runs = [f"dominoes_{n:08x}_{n}" for n in range(3)]
    videos = {f"{run}/camera_{side}.mp4": mp4(10) for run in runs for side in ("e", "n", "e_rot_colours")}
    write_tar(source / "videos" / "dominoes" / "videos-dominoes-00000.tar", videos)
    for place, run in enumerate(runs):
        said = {f"{run}/camera_e.json": {"Qwen3-VL-30B-A3B-Instruct": {"short": "d", "long": "dominoes fall"}}}
        said |= {f"{run}/camera_n.json": {"caption_physics": {"long": "momentum is passed on"}}}
        write_tar(source / "captions" / "dominoes" / f"captions-dominoes-{place:05d}.tar", said)


def spatial(source: Path) -> None:
    members = {f"{n}.mp4": mp4(9) for n in range(3)} | {f"{n}.json": {"caption": f"shelf {n}"} for n in range(3)}
    write_tar(source / "train-00000.tar", members)


def humans(source: Path) -> None:
    ids = [f"0b5f{n}a2c-11aa" for n in range(3)]
    members = {f"video/{name}.mp4": mp4(13) for name in ids} | {f"depth/{name}.mkv": b"depth" for name in ids}
    members |= {f"meta/{name}_camera.json": {"frames": []} for name in ids}
    members |= {f"metas/{name}.json": {"environment": "loft"} for name in ids}
    members |= {f"description/{name}.json": {"assets": []} for name in ids}
    write_tar(source / "shards" / "000000.tar", members)


def driving(source: Path) -> None:
    files = {}
    for run in range(3):
        for camera in ("front_wide", "rear_left"):
            windows = [window(0, 8, qwen2p5_7b_caption=f"a car cuts in {run}"), window(9, 19, qwen2p5_7b_caption="wet")]
            said = {"framerate": 24, "nb_frames": 20, "t2w_windows": windows, "weather": "rain", "region": "US"}
            files |= {f"cut_in/run_{run}/video/{camera}.mp4": mp4(20)}
            files |= {f"cut_in/run_{run}/description/{camera}.json": said}
    write_files(source, files)


def warehouse(source: Path) -> None:
    run = "fd7cc35596b247b16b0b_run_{}_seed_864110064"
    members = {f"{run.format(r)}.{camera}.rgb.mp4": mp4(9) for r in range(3) for camera in ("ceiling_00", "eye_01")}
    members |= {f"{run.format(r)}.meta.json": {"seed": 1} for r in range(3)}
    members |= {f"{run.format(r)}.metadata.txt": "metadata" for r in range(3)}
    write_tar(source / "rgb" / "warehouse_fire" / "fire-rgb-00000.tar", members)


def bridge(source: Path) -> None:
    write_files(source, {f"videos/{n}.mp4": mp4(12, fps=5, size=(96, 96)) for n in range(3)})
    structured = {"subjects": ["a robot arm"], "fps": 5, "duration": "2s"}
    rows = [row(str(n), 12, None, window(0, 11, "plain", caption_json=structured), fps=5) for n in range(4)]
    write_rows(source / "video_dataset_file.jsonl", rows)


SETS = {
    "embodied_robot_scenes": (robots, {"motion 0", "collision 1", "motion task"}, {}),
    "physical_interaction_scenes": (physics, {"dominoes fall", "momentum is passed on"}, {NO_CAPTION: 3}),
    "spatial_reasoning": (spatial, {"shelf 0", "shelf 1", "shelf 2"}, {}),
    "digital_human_scenes": (humans, {"A person moves through a synthetic scene before a moving camera."}, {}),
    "autonomous_driving_scenarios": (driving, {"a car cuts in 0", "wet"}, {}),
    "warehouse_operations_scenes": (warehouse, {"A camera watches a warehouse: warehouse fire."}, {}),
    "bridge_synthetic_captions": (
        bridge, {'{"subjects": ["a robot arm"], "fps": 5, "duration": "2s"}'}, {NO_VIDEO: 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_published_set_from_its_files_to_its_evaluation(name, cosmos3, project, tiny_model, capsys):
    make, captions, dropped = SETS[name]
    card, experiment = f"data/published/{name}.yaml", f"experiments/nano_video_{name}.yaml"
    entry = load_experiment(ROOT / experiment).experiment.data.datasets[name]
    source = project / "downloads" / name
    source = source / "sft_dataset_bridge" / "train" if name.startswith("bridge") else source
    make(source)
    key = f"data.datasets.{name}"
    settings = [f"model.path={tiny_model}", *QUICK, "data.heldout_fraction=0.2", "export=none"]
    settings += [f"{key}.frames=9", f"{key}.least_frames=5", f"{key}.resolution_tier=256", f"{key}.stride=9"]
    assert cosmos3("check", experiment, *settings) == 0
    told = capsys.readouterr().out
    assert "clips readable, prepared at the first run" in told and "tier 256: canvas" in told
    assert cosmos3("train", experiment, *settings) == 0
    run = project / "runs" / f"nano_video_{name}"
    numbers = numbers_of_two_steps(run)
    assert not any("action" in number for number in numbers)
    dataset = PreparedDataset(project / entry.prepared, None)
    assert captions <= {found["instruction"] for found in dataset.iter_rows()}
    found = json.loads((dataset.folder / "card.json").read_text())["dropped"]
    assert {reason: count for reason, count in found.items() if "frame at the end" not in reason} == dropped
    assert cosmos3("check", experiment, *settings) == 0
    assert "prepared: " in capsys.readouterr().out
    if name == "bridge_synthetic_captions":  # once is enough: it is the same for all
        assert cosmos3("evaluate", f"nano_video_{name}", "--on", card) == 0
        assert "heldout/loss: " in capsys.readouterr().out
        assert cosmos3("export", f"nano_video_{name}", "--to", "adapter") == 0


def test_latents_and_prompts_of_a_set_are_cached(cosmos3, project, tiny_model, capsys):
    name = "spatial_reasoning"
    spatial(project / "downloads" / name)
    key, experiment = f"data.datasets.{name}", f"experiments/nano_video_{name}.yaml"
    settings = [f"model.path={tiny_model}", *QUICK, "data.heldout_fraction=0.2", "export=none", "name=cached_video"]
    settings += [f"{key}.frames=9", f"{key}.resolution_tier=256", f"{key}.prepared=prepared/cached_video"]
    settings += [f"{key}.cache_latents=true", f"{key}.cache_reasoner=true"]
    assert cosmos3("train", experiment, *settings) == 0
    prepared = project / "prepared" / "cached_video"
    assert (prepared / "caches" / "latents" / "card.json").is_file()
    dataset = PreparedDataset(prepared, None)
    sample = dataset.sample("train", 0, "video_to_video", 0, pixels=False, latents=True)
    assert sample.latent.shape[1:] == (3, 12, 20)


def test_prepare_says_what_it_left_out(cosmos3, project, capsys):
    source = project / "downloads" / "spatial_reasoning"
    spatial(source)
    card = "data/published/spatial_reasoning.yaml"
    line = ("prepare", card, "--source", source, "--output", "prepared/short")
    assert cosmos3(*line) == 2
    said = capsys.readouterr().err
    assert "left out: 3 × clip or caption window shorter than the least frames of a window (train-00000.tar#0" in said
    assert said.splitlines()[-1].startswith("error: dataset ") and "Traceback" not in said
    assert cosmos3(*line, "--embodiment", "pusht") == 2
    assert "webdataset has no robot; leave it out" in capsys.readouterr().err
    policy = "data.datasets.spatial_reasoning.tasks.policy=1"
    assert cosmos3("check", "experiments/nano_video_spatial_reasoning.yaml", policy) == 2
    assert "'policy' needs a robot's actions" in capsys.readouterr().err
    shorter = project / "shorter.yaml"
    shorter.write_text((ROOT / card).read_text().replace("frames: 61", "frames: 5"))
    assert cosmos3("prepare", shorter, "--source", source, "--output", "prepared/five", "--heldout", "0") == 0
    told = capsys.readouterr().out
    assert "train: 3 windows of 3 clips" in told and "heldout: 0 windows of 0 clips" in told
    assert "left out: 12 × frame at the end of a clip or caption window" in told
