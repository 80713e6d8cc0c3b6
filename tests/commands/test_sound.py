"""Sound as a user meets it: checked, prepared, cached, trained on, measured, exported; and told where it is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cosmos3_train.data.index import NO_TRACK
from cosmos3_train.data.reader import LatentCache
from cosmos3_train.evaluation.pictures import read_metrics
from tests.commands.tiny import QUICK, ROOT
from tests.data.clips import mp4, row, write_files, write_rows
from tests.data.sounds import sounding

EXPERIMENT, KEY = "experiments/nano_sound_lora.yaml", "data.datasets.whistle"


@pytest.fixture
def clips(project):
    """Four clips with sound and one without, beside a card whose windows have nine frames."""
    source = project / "downloads" / "sounds"
    shutil.rmtree(source, ignore_errors=True)
    write_files(source, {f"videos/{n}.mp4": sounding(18) for n in range(4)} | {"videos/mute.mp4": mp4(18)})
    rows = [{**row(str(n), 18, f"tones {n}"), "caption_audio": f"they rise {n}"} for n in range(4)]
    write_rows(source / "rows.jsonl", [*rows, row("mute", 18, "nothing")])
    return source


def card_of(project: Path, clips: Path) -> Path:
    """The whistle's dataset card, of these clips instead."""
    text = (ROOT / "data" / "whistle" / "clips.yaml").read_text().replace("frames: 61", "frames: 9")
    path = project / "sounds.yaml"
    path.write_text(text.replace("data/whistle/clips", str(clips)))
    return path


def line(name: str, model, *more: str) -> tuple[str, ...]:
    settings = (f"{KEY}.source=downloads/sounds", f"{KEY}.frames=9", f"{KEY}.prepared=prepared/{name}")
    return (EXPERIMENT, *QUICK, f"model.path={model}", *settings, "data.heldout_fraction=0.3", f"name={name}", *more)


@pytest.mark.slow
def test_a_run_with_sound_from_its_clips_to_its_adapter(clips, cosmos3, project, tiny_model, capsys, caplog):
    words = line("heard", tiny_model, f"{KEY}.cache_reasoner=true")
    assert cosmos3("check", *words) == 0
    told = capsys.readouterr().out
    assert "8 of 10 windows that were looked at have it; the others are left out" in told
    assert f"2 × {NO_TRACK} (mute)" in told and "takes 48,000 Hz, 2 channels" in told and "cached sound" in told
    assert cosmos3("train", *words) == 0
    said = capsys.readouterr().err + caplog.text  # the one where the package's logger has been set up, else the other
    assert "training windows have no sound and are left out, since 'text_to_video_sound' needs it" in said
    run, prepared = project / "runs" / "heard", project / "prepared" / "heard"
    metrics = read_metrics(run / "metrics.csv")
    assert metrics["loss"][0] == [1, 2] and metrics["loss/sound"][0] == [1, 2]
    assert all(value > 0 for value in metrics["loss/sound"][1])
    weighed = [10 * v + 2 * s for v, s in zip(metrics["loss/video"][1], metrics["loss/sound"][1], strict=True)]
    assert metrics["loss"][1] == pytest.approx(weighed, rel=1e-3)
    assert any(key.startswith("heldout/loss/sound/band_") for key in metrics)
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["heldout_loss_before"] != numbers["heldout_loss_after"]
    assert numbers["export_relative_difference"] <= 1e-5
    card = json.loads((prepared / "card.json").read_text())
    assert sum(card["sounding"].values()) == 8 and card["silent"] == {NO_TRACK: 2}
    cache = LatentCache.open(prepared, 10, place=(prepared / "caches" / "sound").relative_to(prepared))
    assert cache is not None and cache.read(0).shape == (2, 64, 10)
    assert cosmos3("check", *words) == 0
    told = capsys.readouterr().out
    assert "prompts cached" in told and "run computes" not in told and "cached sound" not in told
    assert cosmos3("evaluate", "heard", "--on", "data/whistle/clips.yaml") == 0
    capsys.readouterr()
    assert cosmos3("evaluate", tiny_model, "--on", card_of(project, clips)) == 0
    assert "heldout/loss: " in capsys.readouterr().out


def test_cached_and_read_at_every_step_are_one_run(clips, cosmos3, project, tiny_model):
    found = []
    for name, cached in (("kept", "true"), ("online", "false")):
        words = line(name, tiny_model, f"{KEY}.cache_latents={cached}", "export=none", "model.compile=false")
        assert cosmos3("train", *words) == 0
        found.append(read_metrics(project / "runs" / name / "metrics.csv"))
    for key in ("loss", "loss/video", "loss/sound"):
        assert found[0][key][1] == pytest.approx(found[1][key][1], rel=1e-4)


def test_prepare_says_what_has_sound_and_keeps_it(clips, cosmos3, project, tiny_model, capsys):
    card, part = card_of(project, clips), project / "tiny_sound.yaml"
    part.write_text(f"path: {tiny_model}\ndtype: float32\nvae_dtype: float32\n")
    words = ("prepare", card, "--output", "prepared/told", "--heldout", "0")
    assert cosmos3(*words, "--cache", "latents", "--model", part, "--tasks", "text_to_video") == 0
    told = capsys.readouterr().out
    assert "sound: 8 of 10 windows (train)" in told and f"sound: 2 × {NO_TRACK}, such as mute" in told
    assert "latents of sound" not in told
    assert cosmos3(*words, "--cache", "latents", "--model", part) == 0
    assert "latents of sound: prepared/told/caches/sound" in capsys.readouterr().out
    assert cosmos3(*words, "--cache", "latents", "--model", "cosmos3_pico") == 2
    assert "no sound tokenizer is in the folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_model_without_a_sound_tokenizer_is_one_line(command, clips, cosmos3, project, capsys):
    assert cosmos3(command, *line("pico_heard", ROOT / "data" / "cosmos3_pico", f"{KEY}.cache_latents=false")) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert "no sound tokenizer is in the folder (sound_tokenizer/), which the task 'text_to_video_sound'" in errors[0]
    assert not (project / "runs" / "pico_heard").exists() and not (project / "prepared" / "pico_heard").exists()


@pytest.mark.parametrize("command", ["check", "train"])
def test_clips_without_any_sound_are_one_line(command, clips, cosmos3, project, tiny_model, capsys):
    write_rows(clips / "rows.jsonl", [row("mute", 18, "nothing")])
    assert cosmos3(command, *line("silent", tiny_model)) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert (
        len(errors) == 1 and f"'text_to_video_sound' needs sound, but there is only 2 × {NO_TRACK} (mute)" in errors[0]
    )
    assert not (project / "prepared" / "silent").exists()
