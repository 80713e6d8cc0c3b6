"""Commands as a user types them: what they leave behind, and how mistakes are told."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cosmos3_train.commands import evaluate, train
from cosmos3_train.config import load_experiment
from cosmos3_train.data import blocks
from cosmos3_train.data import prepare as prepare_rows
from cosmos3_train.data.card import load_card
from cosmos3_train.data.statistics import Statistics, compute_moments
from tests.commands.tiny import QUICK
from tests.data.logs import make_log

HYBRID = ("experiments/nano_policy_hybrid.yaml", "data.datasets.pusht_moves.cache_latents=false")
ROWS = "data.datasets.pusht_moves.prepared=prepared/quick_pusht_moves"


def test_a_run_is_exported_and_reported_and_said_to_be_finished(cosmos3, project, tiny_model, capsys):
    line = (*HYBRID, *QUICK, ROWS, f"model.path={tiny_model}", "name=delivered", "training.ema_decay=0.5")
    assert cosmos3("train", *line) == 0
    run = project / "runs" / "delivered"
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["export_relative_difference"] <= 1e-5
    assert {"action_error_before", "action_error_after", "action_error_constant", "seconds"} <= numbers.keys()
    assert (run / "export" / "adapter" / "cosmos3_adapter.safetensors").is_file()
    capsys.readouterr()
    before = (run / "report.json").read_bytes()
    assert cosmos3("train", *line) == 0
    assert "runs/delivered/report.html" in capsys.readouterr().out
    assert (run / "report.json").read_bytes() == before
    assert cosmos3("check", *line, "data.window_stride=39") == 2  # the run would refuse its prepared folder
    assert "window_stride 40" in capsys.readouterr().err


def test_a_report_that_a_kill_prevented_is_made_by_the_same_command(cosmos3, project, tiny_model):
    line = (*HYBRID, *QUICK, ROWS, f"model.path={tiny_model}", "name=killed", "export=none")
    assert cosmos3("train", *line) == 0
    (project / "runs" / "killed" / "report.html").unlink()
    assert cosmos3("train", *line) == 0
    assert (project / "runs" / "killed" / "report.html").is_file()


def test_evaluate_measures_a_run_with_the_statistics_it_was_trained_with(cosmos3, project, tiny_model, capsys):
    line = (*HYBRID, *QUICK, ROWS, f"model.path={tiny_model}", "name=measured", "export=none")
    assert cosmos3("train", *line) == 0
    capsys.readouterr()
    assert cosmos3("evaluate", "measured", "--on", "data/pusht/moves_log.yaml", "--episodes", "0") == 0
    assert "action_error_model" in capsys.readouterr().out
    folder = project / "runs" / "measured" / "evaluations" / "pusht_moves_step_000002"
    found, report = (json.loads((path / "report.json").read_text()) for path in (folder, project / "runs" / "measured"))
    assert found["action_error_model"] == pytest.approx(report["action_error_after"], rel=1e-6)
    assert found["facts"]["normalised by"] == "the statistics it was trained with"


def test_evaluate_measures_of_a_folder_every_error_that_the_dataset_allows(cosmos3, project, tiny_model, capsys):
    moves = {
        episode: np.random.default_rng(episode).uniform(-9, 9, (10, 2)).astype(np.float32) for episode in range(16)
    }
    make_log(project / "few", [10] * 16, fps=5, actions=moves, cameras={"observation.images.top": (96, 96)})
    card = project / "few.yaml"
    names = {"name": "few", "embodiment": "pusht_moves", "tasks": ["policy", "inverse_dynamics"]}
    card.write_text(json.dumps(names | {"format": "lerobot_v3", "source": str(project / "few")}))
    assert cosmos3("evaluate", tiny_model, "--on", card, "--episodes", "0") == 0
    said = capsys.readouterr().out
    assert "action_error_model" in said and "policy_error" in said
    # Beside another robot's, as a folder that was trained on several holds them.
    served = shutil.copytree(tiny_model, project / "served")
    Statistics("log", "pusht", "0", compute_moments([moves[0]], 2)).save(served / "statistics.json")
    own = Statistics("log", "pusht_moves", "0", compute_moments([10 * moves[0]], 2))
    own.save(served / "statistics.pusht_moves.json")
    own_error = json.loads((tiny_model.parent / f"{tiny_model.name}_evaluations/few/report.json").read_text())
    assert cosmos3("evaluate", served, "--on", card, "--episodes", "0") == 0
    found = json.loads((project / "served_evaluations" / "few" / "report.json").read_text())
    assert found["facts"]["normalised by"] == "the statistics it was trained with"
    assert found["action_error_model"] > 2 * own_error["action_error_model"]


def test_what_is_measured_of_a_run_with_cached_variants_is_not_changed(project):
    entry = "data.datasets.pusht_moves"
    changed = [f"{entry}.cache_latents=true", f"{entry}.augment.crop=0.9", f"{entry}.augment.variants=2"]
    loaded = load_experiment(HYBRID[0], changed)
    card = project / "data" / "pusht" / "moves_log.yaml"
    measured = evaluate._with_dataset(loaded, load_card(card), card, loaded.experiment.embodiments["pusht_moves"])
    (found,) = measured.experiment.data.datasets.values()
    assert not found.augment.changes and not found.augment.variants and not found.cache_latents


def test_a_command_may_be_given_from_another_folder(cosmos3, project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = (str(project / HYBRID[0]), *HYBRID[1:], "model.path=data/cosmos3_pico", ROWS, *QUICK, "name=from_elsewhere")
    assert cosmos3("check", *line) == 0
    assert "data/cosmos3_pico: " in capsys.readouterr().out


def test_prepare_says_what_it_made_and_does_it_once(cosmos3, tmp_path, capsys):
    line = ("prepare", "data/pusht/log.yaml", "--output", str(tmp_path / "rows"), "--stride", "20")
    assert cosmos3(*line) == 0
    said, bar = capsys.readouterr()
    assert "train: " in said and re.search(r"preparing \w+: 100%.* 60/60 \[\S+<00:00, .*episode/s\]", bar), (
        "rate, time left"
    )
    assert cosmos3(*line) == 0
    assert "was prepared already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, words",
    [
        (("train", "experiments/quickstart.yaml", "trainning.steps=2"), ["trainning", "Did you mean 'training'"]),
        (("train", "experiments/quikstart.yaml"), ["quikstart.yaml", "Did you mean 'quickstart'"]),
        (("train", *HYBRID, "tuning.method=full"), ["export", "merged"]),
        (("export", "no_such_run", "--to", "merged"), ["no_such_run", "no run"]),
        (("evaluate", "configs", "--on", "data/pusht/log.yaml"), ["configs", "neither a run"]),
        (("prepare", "data/pusht/log.yaml", "--output", "x", "--embodiment", "pusht_move"), ["pusht_moves"]),
        (("prepare", "data/pusht/log.yaml", "--output", "x", "--embodiment", "pusht_moves"), ["control_hz"]),
        (("prepare", "data/pusht/log.yaml", "--output", "x", "--cache", "latents"), ["--model"]),
        (
            ("check", *HYBRID, "model.path=data/cosmos3_pico", "tuning.learning_rate_multipliers={'lyers*': 2.0}"),
            ["lyers"],
        ),
        (("check", *HYBRID, "model.path=data/cosmos3_pico", "training.tokens_per_micro_batch=50"), ["raise it to"]),
        (("check", *HYBRID, "data.datasets.pusht_moves.source=nowhere"), ["nowhere", "no such folder"]),
        (("check", *HYBRID, "model.path=data/cosmos3_pic"), ["Did you mean 'data/cosmos3_pico'"]),
        (("check", *HYBRID, "tuning.method=lora", "model.path=data/cosmos3_pico"), ["domain 24", "hybrid"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_code_2(line, words, cosmos3, project, capsys):
    assert cosmos3(*line) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), errors[0]
    assert not (project / "x").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.datasets.pusht_moves.tasks={polcy: 1}", ["data.datasets.pusht_moves.tasks", "Did you mean 'policy'"]),
        ("data.datasets.pusht_moves.tasks={video_to_sound: 1}", ["video_to_sound", "needs sound"]),
        ("data.datasets.pusht_moves.weight=0", ["data.datasets.pusht_moves.weight is 0", "above 0"]),
        ("evaluation.solver_steps=0", ["evaluation.solver_steps is 0", "at least 1"]),
        ("training.keep_every_n_steps=77", ["training.keep_every_n_steps is 77", "a multiple of"]),
        ("tuning.learning_rate_multipliers={'lyers*': 2.0}", ["lyers"]),
        ("training.tokens_per_micro_batch=50", ["sample 'pusht_moves: policy", "tokens, over", "raise it to"]),
        ("strategy.devices=0", ["strategy.devices is 0"]),
    ],
)
def test_train_looks_before_it_begins(override, words, cosmos3, project, capsys):
    """A mistake that `check` knows costs no weight read, no row prepared, and leaves no folder."""
    rows = "data.datasets.pusht_moves.prepared=prepared/never"
    line = (*HYBRID, *QUICK, rows, "model.path=data/cosmos3_pico", "name=never", override)
    assert cosmos3("train", *line) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), errors
    assert not (project / "runs" / "never").exists()
    assert not list((project / "prepared").glob("*never*"))


def test_a_signal_while_preparing_ends_with_75_and_the_same_command_goes_on(
    cosmos3, project, tiny_model, monkeypatch, capsys
):
    monkeypatch.setattr(blocks, "BLOCK_FRAMES", 150)  # the log in some forty blocks
    rows = "data.datasets.pusht_moves.prepared=prepared/stopped"
    line = (*HYBRID, *QUICK, rows, f"model.path={tiny_model}", "name=stopped", "export=none", "evaluation.before=false")
    done, work = project / "prepared" / ".stopped.preparing" / "blocks", project / "prepared" / ".stopped.preparing"

    def signal_after_two_blocks() -> None:
        while len(list(done.glob("*.json"))) < 2:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=signal_after_two_blocks)
    watcher.start()
    assert cosmos3("train", *line) == 75
    watcher.join()
    status = project / "runs" / "stopped" / "status.json"
    assert json.loads(status.read_text()) == {"state": "interrupted", "step": 0, "steps": 2}
    kept = {path.name: path.stat().st_mtime_ns for path in done.glob("*.json")}
    assert 2 <= len(kept) < 40 and not (project / "prepared" / "stopped").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    seen = {}
    finish = prepare_rows._finish

    def look(*arguments, **named):
        seen.update({path.name: path.stat().st_mtime_ns for path in done.glob("*.json")})
        return finish(*arguments, **named)

    monkeypatch.setattr(prepare_rows, "_finish", look)
    assert cosmos3("train", *line) == 0
    assert kept.items() < seen.items(), "finished blocks are not made again"
    assert json.loads(status.read_text())["state"] == "finished" and not work.exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_finished_run_asked_for_another_export_carries_it_out(cosmos3, project, tiny_model, capsys):
    line = (*HYBRID, *QUICK, ROWS, f"model.path={tiny_model}", "name=twice", "evaluation.before=false")
    assert cosmos3("train", *line, "export=none") == 0
    run = project / "runs" / "twice"
    assert not (run / "export").exists()
    report, weights = (run / "report.json").read_bytes(), sorted((run / "checkpoints").rglob("*.safetensors"))
    made = {path: path.stat().st_mtime_ns for path in weights}
    for form, file in (("adapter", "cosmos3_adapter.safetensors"), ("merged", "model_index.json")):
        capsys.readouterr()
        assert cosmos3("train", *line, f"export={form}") == 0
        told = capsys.readouterr().out
        assert f"runs/twice/export/{form}" in told and "export differs by" in told
        assert (run / "export" / form / file).is_file() and (run / "export" / form / "verification.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in weights} == made, "nothing was trained again"
    assert (run / "report.json").read_bytes() == report
    assert cosmos3("train", *line, "export=merged") == 0


def test_check_tells_every_problem(cosmos3, capsys):
    line = ("data.datasets.pusht_moves.source=nowhere", "model.path=data/cosmos3_pico", "tuning.method=lora")
    assert cosmos3("check", *HYBRID, *line) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_show_names_the_layer_of_each_value(cosmos3, capsys):
    assert cosmos3("show", *HYBRID, "training.seed=5") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["training.seed"].endswith("# command line")
    assert lines["tuning.method"].endswith("# configs/tuning/hybrid.yaml")
    assert lines["embodiments.pusht_moves.control_hz"].endswith("# configs/embodiment/pusht_moves.yaml")
    assert "#" not in lines["optimizer.eps"]


def test_pairs_may_stand_after_flags_and_strays_are_refused(cosmos3, capsys):
    assert cosmos3("train", *HYBRID, "--fresh", "trainning.steps=2") == 2
    assert "trainning" in capsys.readouterr().err
    assert cosmos3("train", *HYBRID, "--frsh") == 2
    assert "--frsh" in capsys.readouterr().err


def test_ctrl_c_is_quiet(cosmos3, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", stop)
    assert cosmos3("train", *HYBRID) == 130
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_is_quiet(project):
    line = f"{sys.executable} -m cosmos3_train.cli show experiments/nano_policy_hybrid.yaml | head -n 1"
    script = f"set -o pipefail; {line}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=project, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("# ")
    assert done.returncode in (0, 130)  # 0 where all of it fitted into the pipe before head was done
