"""The reasoner cache as a user meets it: prepared, checked, trained with, measured, exported both ways, evaluated."""

from __future__ import annotations

import json
import shutil

import pytest

from cosmos3_train.evaluation.simulators.pusht import PushTMoves
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from tests.commands.tiny import QUICK

HYBRID = ("experiments/nano_policy_hybrid.yaml", "data.datasets.pusht_moves.cache_latents=false")
CACHED = "data.datasets.pusht_moves.cache_reasoner=true"


def rows(name: str) -> str:
    return f"data.datasets.pusht_moves.prepared=prepared/{name}"


@pytest.mark.slow
def test_a_run_without_its_tower_is_measured_exported_and_evaluated(cosmos3, project, tiny_model, capsys, monkeypatch):
    towers: list[bool] = []
    understand = Cosmos3PackedTransformer.understand

    def watched(self, pack):
        towers.append(self.recall is None)
        return understand(self, pack)

    monkeypatch.setattr(Cosmos3PackedTransformer, "understand", watched)
    loop = "evaluation.closed_loop_episodes=1"
    line = (*HYBRID, *QUICK, rows("cached"), CACHED, loop, f"model.path={tiny_model}", "name=recalled")
    assert cosmos3("check", *line) == 0
    told = capsys.readouterr().out
    assert "reasoner pusht_moves" in told and "once the log is prepared" in told
    assert cosmos3("train", *line, "training.ema_decay=0.5") == 0
    run = project / "runs" / "recalled"
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["export_relative_difference"] <= 1e-5
    assert "coverage_after" in numbers and "action_error_after" in numbers
    cache = project / "prepared" / "cached" / "caches" / "reasoner"
    written = len(list(cache.glob("*.safetensors")))
    # The tower ran to write the cache, and then only where the export was compared with upstream.
    assert written and towers == sorted(towers[:written]) + sorted(towers[written:])
    assert all(towers[:written]) and towers.index(False) == written and towers[-1] is True
    capsys.readouterr()
    assert cosmos3("check", *line) == 0
    told = capsys.readouterr().out
    assert "2 of 2 prompts cached" in told and "the understanding tower's keys and values are cached" in told
    assert cosmos3("export", "recalled", "--to", "merged") == 0
    assert json.loads((run / "export" / "merged" / "verification.json").read_text())["relative_difference"] <= 1e-5
    assert cosmos3("evaluate", "recalled", "--on", "data/pusht/moves_log.yaml", "--episodes", "0") == 0
    found = json.loads((run / "evaluations" / "pusht_moves_step_000002" / "report.json").read_text())
    assert found["action_error_model"] == pytest.approx(numbers["action_error_after"], rel=1e-5)


def test_check_tells_how_much_a_prepared_folder_lacks_and_of_whom_its_cache_is(
    cosmos3, project, tiny_model, capsys, monkeypatch
):
    robots = "pusht_moves"
    card = project / "tiny.yaml"
    card.write_text(f"path: {tiny_model}\ndtype: float32\nvae_dtype: float32\n")
    line = ("prepare", "data/pusht/moves_log.yaml", "--output", "prepared/apart", "--stride", "40")
    cached = (*line, "--cache", "reasoner", "--model", str(card))
    assert cosmos3(*line) == 0
    options = (*HYBRID, *QUICK, rows("apart"), CACHED, f"model.path={tiny_model}", "name=apart")
    capsys.readouterr()
    assert cosmos3("check", *options) == 0
    assert f"reasoner {robots}" in (told := capsys.readouterr().out) and "0 of 2 prompts cached; the run" in told
    assert "cached keys and values" in told, "the disk that they need"
    assert cosmos3(*cached) == 0
    assert "keys and values of 2 prompts by " in capsys.readouterr().out
    shards = sorted((project / "prepared" / "apart" / "caches" / "reasoner").iterdir())
    before = [shard.stat().st_mtime_ns for shard in shards]
    assert cosmos3(*cached) == 0
    assert [shard.stat().st_mtime_ns for shard in shards] == before, "made once"
    capsys.readouterr()
    assert cosmos3("check", *options) == 0
    assert "2 of 2 prompts cached" in capsys.readouterr().out
    assert cosmos3("check", *options, "model.dtype=bfloat16") == 2
    assert "these keys and values are of" in capsys.readouterr().err
    assert cosmos3("check", *options, "tuning.method=full", "export=none") == 2
    assert "trains the tower whose keys would be cached" in capsys.readouterr().err
    encoded = []
    monkeypatch.setattr("cosmos3_train.model.caches.ensure_latents", lambda *arguments, **_: encoded.append(arguments))
    assert cosmos3(*line, "--cache", "latents,reasoner", "--model", str(card), "--tasks", "policy,image_to_video") == 0
    told = capsys.readouterr().out
    assert "keys and values of 3 prompts" in told and "latents of" in told and len(encoded) == 1
    shutil.rmtree(project / "prepared" / "apart")


def test_a_plan_counts_the_tower_until_its_cache_is_made(cosmos3, project, tiny_model, capsys):
    card = project / "tiny_16.yaml"
    card.write_text(f"path: {tiny_model}\ndtype: bfloat16\n")
    line = ("prepare", "data/pusht/moves_log.yaml", "--output", "prepared/planned", "--stride", "40")
    options = (*HYBRID, *QUICK, rows("planned"), CACHED, f"model.path={tiny_model}", "model.dtype=bfloat16")
    plan = ("plan", *options, "name=planned", "--gpu", "h100-80g")
    for cache, counted in (((), True), (("--cache", "reasoner", "--model", str(card)), False)):
        assert cosmos3(*line, *cache) == 0
        capsys.readouterr()
        assert cosmos3(*plan) == 0
        assert ("before it, the tower that makes the reasoner cache" in capsys.readouterr().out) == counted


def test_the_closed_loops_prompt_is_cached_also_where_the_simulator_draws_another_size(
    cosmos3, project, tiny_model, capsys, monkeypatch
):
    reset, step = PushTMoves.reset, PushTMoves.step
    for name, function in (("reset", reset), ("step", step)):

        def wide(self, *arguments, function=function):
            seen = function(self, *arguments)
            return seen._replace(image=seen.image[: seen.image.shape[0] // 2])

        monkeypatch.setattr(PushTMoves, name, wide)
    loop = "evaluation.closed_loop_episodes=1"
    line = (*HYBRID, *QUICK, rows("wide"), CACHED, loop, f"model.path={tiny_model}", "name=wide", "export=none")
    assert cosmos3("train", *line) == 0
    capsys.readouterr()
    assert cosmos3("check", *line) == 0
    assert "3 of 3 prompts cached" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("--cache", "reasoners", "--model", "cosmos3_pico"),
            "--cache: 'reasoners' is unknown. Did you mean 'reasoner'?",
        ),
        (("--cache", "latents,reasoner"), "--cache latents,reasoner needs --model PART"),
        (("--tasks", "polcy"), "--tasks: 'polcy' is not a task. Did you mean 'policy'?"),
    ],
)
def test_mistakes_of_the_line_are_told(cosmos3, capsys, words, message):
    assert cosmos3("prepare", "data/pusht/log.yaml", "--output", "x", *words) == 2
    assert message in capsys.readouterr().err
