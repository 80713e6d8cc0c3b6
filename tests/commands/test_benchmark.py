"""`cosmos3 benchmark` from end to end on a CPU, with a transformer of two tiny layers in place of Nano's."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from cosmos3_train.commands.benchmark import HEAD
from cosmos3_train.config import Tuning, UserError, load_experiment, to_yaml
from cosmos3_train.data.prepare import LAYOUT_VERSION
from cosmos3_train.data.texts import distinct_texts
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.training import stock
from cosmos3_train.training.benchmark import Rate
from cosmos3_train.training.benchmark_log import _require_own
from cosmos3_train.training.throughput import Arithmetic
from tests.commands.tiny import ROOT

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1152,
}
QUICK = (
    *(f"model.random.{key}={value}" for key, value in TINY.items()),
    "model.random.rope_axes_dim=[4,2,2]",
    "model.dtype=float32",
    "tuning.rank=4",
    "data.workers=0",
    "training.steps=4",
    "training.samples_per_step=2",
    "training.tokens_per_micro_batch=1000",
    "benchmark.first_step=2",
    "benchmark.height=32",
    "benchmark.width=64",
    "benchmark.windows=3",
    "strategy.accelerator=cpu",
)
TEXT, GENERATION = 180, 5 * 1 * 2 + 16
"""Tokens of a sample: 17 frames of 32×64 are 5 latent frames of 2×4 cells."""


def stock_baseline_flops(cfg, n_text: int, n_gen: int) -> float:
    """The yardstick's count, as it stands there."""
    H, M, L = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers
    kv = cfg.num_key_value_heads * cfg.head_dim
    q = cfg.num_attention_heads * cfg.head_dim
    per = L * (2 * H * q + 2 * H * kv + 3 * H * M)
    lin = 4 * per * n_gen + 2 * per * n_text
    att_gen = L * 4 * q * n_gen * (n_gen + n_text)
    att_und = L * 2 * q * n_text * n_text
    return lin + 3 * att_gen + att_und


@pytest.fixture
def policy(cosmos3):
    def run(*words: str) -> int:
        return cosmos3("benchmark", "experiments/benchmark_policy256.yaml", *QUICK, *words)

    return run


def test_a_benchmark_measures_the_run_the_bare_step_and_stock(policy, project, tmp_path, capsys):
    numbers, before_stock = tmp_path / "benchmark.json", []

    def read_once_it_is_there() -> None:
        while not numbers.exists():
            time.sleep(0.01)
        before_stock.append(json.loads(numbers.read_text()))

    reader = threading.Thread(target=read_once_it_is_there, daemon=True)
    reader.start()
    assert policy("--against", "stock", "--output", str(tmp_path)) == 0
    reader.join()
    found = json.loads(numbers.read_text())
    assert found["workload"] == "benchmark_policy256" and found["gpu"] == "cpu"
    assert (found["samples"], found["text_tokens"], found["generation_tokens"]) == (2, 2 * TEXT, 2 * GENERATION)
    assert found["flops"] == 2 * stock_baseline_flops(SimpleNamespace(**TINY), TEXT, GENERATION)
    text_only = stock_baseline_flops(SimpleNamespace(**TINY), TEXT, 0)
    assert found["reasoner_cached"] and found["done_flops"] == found["flops"] - 2 * text_only
    run, bare, whole, stock = found["rates"]
    assert (run["way"], bare["way"]) == ("cosmos3 train", "bare step")
    assert whole["way"] == "bare step without the reasoner cache"
    assert stock["way"].startswith("diffusers + PEFT: native, with")
    assert run["steps"] == 3, "steps 2 to 4"
    for rate in found["rates"]:
        assert set(rate) == {field.name for field in fields(Rate)}
        assert rate["step_seconds"] > 0
        assert rate["samples_per_second"] == pytest.approx(2 / rate["step_seconds"])
        assert rate["tokens_per_second"] == pytest.approx(2 * (TEXT + GENERATION) / rate["step_seconds"])
        assert rate["mfu"] is None, "a CPU has no peak to compare with"
        assert rate["to_bare"] == pytest.approx(bare["step_seconds"] / rate["step_seconds"])
        assert rate["to_stock"] == pytest.approx(stock["step_seconds"] / rate["step_seconds"])
    assert 0 <= run["data_wait_share"] <= 1 and run["warm_up_seconds"] >= 0
    assert set(found["stock_tried"]) == {"native, with checkpointing", "native, without checkpointing"}
    markdown, printed = (tmp_path / "benchmark.md").read_text(), capsys.readouterr().out
    for text in (markdown, printed):
        assert all(title in text for title in HEAD)
        assert all(rate["way"] in text for rate in found["rates"])
    assert (project / "runs" / "benchmark_policy256" / "metrics.csv").is_file(), "the run wrote its log"
    (without,) = before_stock
    assert without == {**found, "rates": [{**rate, "to_stock": None} for rate in (run, bare, whole)], "stock_tried": {}}


def test_where_the_step_does_not_fit_without_the_cache_it_is_said(policy, project, caplog):
    def run_out(module, _) -> None:
        if isinstance(module, Cosmos3PackedTransformer) and module.recall is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with register_module_forward_pre_hook(run_out):
        assert policy() == 0
    found = json.loads((project / "runs" / "benchmark_policy256" / "benchmark.json").read_text())
    assert found["reasoner_cached"] and [rate["way"] for rate in found["rates"]] == ["cosmos3 train", "bare step"]
    assert "without the reasoner cache the step does not fit on this device" in caplog.text


def test_stock_that_runs_in_no_setting_costs_no_result(policy, tmp_path, capsys, monkeypatch):
    """As where memory does not hold it."""
    monkeypatch.setattr(stock, "BACKENDS", ("no such backend",))
    assert policy("--against", "stock", "--output", str(tmp_path), "tuning.dora=true") == 0
    assert "cosmos3 train" in capsys.readouterr().out
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(found["rates"]) == 3 and found["stock_tried"] == {}


def test_the_loader_alone(policy, project, tmp_path, capsys):
    no_gpu = "strategy.accelerator=gpu"  # of which it has no use
    assert policy("--loader", "--output", str(tmp_path), "benchmark.loader_seconds=0.2", no_gpu) == 0
    rates = json.loads((tmp_path / "loader.json").read_text())
    ways = ["cached latents, read", "cached latents, packed with noise", "decoded to uint8"]
    assert [rate["way"] for rate in rates] == [*ways, "decoded, cropped, recoloured"]
    printed = capsys.readouterr().out
    for rate in rates:
        assert rate["windows"] > 0 and rate["a_core"] >= 0.9 * rate["a_second"] > 0, "one thread works at a time"
        assert rate["way"] in printed and f"{rate['a_second']:.1f}" in printed
        assert rate["wanted"] is None, "of windows of another size"
    assert "yes" not in printed
    drawn = project / "prepared" / "benchmark_policy256_loader" / "caches" / "latents" / "card.json"
    assert json.loads(drawn.read_text())["fingerprint"] == "drawn at random", "in a folder that no run reads"
    assert policy("--loader", "--against", "stock") == 2
    assert "nothing to measure it against" in capsys.readouterr().err
    assert policy("--loader", "--memory", "8") == 2
    assert "no use for --memory 8" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    for way in ((), ("--loader",)):
        assert policy(*way, "--output", str(tmp_path / "file")) == 2
        assert "cannot be made (File exists); choose another folder" in capsys.readouterr().err


def test_a_cap_on_memory_needs_a_gpu(policy, project, capsys):
    assert policy("--memory", "23", "data.datasets.made.prepared=prepared/capped") == 2
    assert "--memory 23: a cap is set on a GPU's memory, and this run is on the cpu" in capsys.readouterr().err
    assert not list((project / "prepared").glob("capped*")), "told before anything is made"


def test_a_run_that_no_benchmark_made_is_not_thrown_away(policy, project, capsys):
    mine = project / "runs" / "mine"
    mine.mkdir(parents=True)
    (mine / "weights").write_text("mine")
    loaded = load_experiment(ROOT / "experiments" / "quickstart.yaml", [])
    (mine / "experiment.yaml").write_text(to_yaml(loaded.experiment))
    assert policy("name=mine") == 2
    assert "name is 'mine', and " in (error := capsys.readouterr().err) and "give another name" in error
    assert (mine / "weights").read_text() == "mine"


def test_a_model_in_a_folder_of_the_project_takes_the_place_of_random_weights(
    policy, cosmos3, project, tiny_model, tmp_path
):
    """Also in a second benchmark: cached keys and values of the first's model are made anew."""
    (project / "tiny_model").symlink_to(tiny_model)
    card = project / "configs" / "model" / "tiny_here.yaml"
    card.write_text("path: tiny_model\n")
    prepared = "data.datasets.made.prepared=prepared/of_two"
    assert policy(prepared) == 0
    line = [word for word in QUICK if not word.startswith("model.random")]
    words = ("--output", str(tmp_path), "--against", "stock", "parts.model=tiny_here", prepared)
    assert cosmos3("benchmark", POLICIES[0], *line, *words) == 0
    *_, whole, stock = json.loads((tmp_path / "benchmark.json").read_text())["rates"]
    assert whole["way"] == "bare step without the reasoner cache" and stock["way"].startswith("diffusers + PEFT")


@pytest.fixture
def in_turn(cosmos3, monkeypatch, tmp_path):
    def run(*words: str) -> int:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for their processes
        return cosmos3("benchmark", *POLICIES, *QUICK, "--loader", "--output", str(tmp_path), *words)

    return run


POLICIES = ("experiments/benchmark_policy256.yaml", "experiments/benchmark_policy480.yaml")


@pytest.mark.slow
@pytest.mark.long
def test_several_experiments_are_measured_in_turn_whatever_the_first_says(in_turn, tmp_path, capfd):
    """As the shell gives them for experiments/benchmark_*.yaml."""
    (tmp_path / "benchmark_policy256").write_text("mine")
    assert in_turn("benchmark.loader_seconds=0.2") == 2
    out, err = capfd.readouterr()
    assert "benchmark_policy256: cannot be made (File exists); choose another folder" in err
    assert "error: experiments/benchmark_policy256.yaml: its benchmark ended with 2" in err
    assert json.loads((tmp_path / "benchmark_policy480" / "loader.json").read_text()) and "benchmark_policy480" in out


@pytest.mark.slow
def test_a_signal_ends_the_series(in_turn, tmp_path):
    def signal_once_the_first_is_at_work() -> None:
        while not (tmp_path / "benchmark_policy256").is_dir():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_once_the_first_is_at_work).start()
    began = time.monotonic()
    assert in_turn("benchmark.loader_seconds=200") == 75
    assert time.monotonic() - began < 200 and [path.name for path in tmp_path.iterdir()] == ["benchmark_policy256"]


def test_a_series_is_refused_before_its_first_is_measured(cosmos3, tmp_path, capsys):
    line = ("benchmark", POLICIES[0], *QUICK, "--output", str(tmp_path / "none"))  # before flags, and after them
    for word, message in (
        ("experiments/benchmark_policy840.yaml", "benchmark_policy840.yaml: no such file. Did you mean"),
        (POLICIES[0], "its name is 'benchmark_policy256', as that of another before it"),
    ):
        for words in ((*line[:2], word, *line[2:]), (*line, word)):
            assert cosmos3(*words) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("error: ") == 1
    assert not (tmp_path / "none").exists()
    for command in (("train",), ("check",), ("show",), ("plan", "--gpu", "h100-80g")):
        assert cosmos3(command[0], *POLICIES, *command[1:]) == 2
        assert f"error: {POLICIES[1]}: a second experiment, where one is expected" in capsys.readouterr().err


def test_a_second_benchmark_uses_the_log_of_the_first_and_another_geometry_makes_its_own(policy, project):
    assert policy() == 0
    rows = project / "prepared" / "benchmark_policy256" / "card.json"
    first = rows.stat().st_mtime_ns
    assert policy() == 0
    assert rows.stat().st_mtime_ns == first
    assert policy("benchmark.text_tokens=200", "benchmark.instructions=3", "data.heldout_fraction=0.4") == 0
    second = rows.stat().st_mtime_ns
    assert second != first
    assert len(distinct_texts(rows.parent)) == 3, "each window has an instruction of its own"
    robot = "embodiments.benchmark_policy256"
    assert policy("benchmark.text_tokens=200", "benchmark.instructions=3", f"{robot}.control_hz=20") == 0
    assert rows.stat().st_mtime_ns != second, "the log is one of 20 frames a second"
    found = json.loads((project / "runs" / "benchmark_policy256" / "benchmark.json").read_text())
    assert found["text_tokens"] == 400
    assert [rate["to_stock"] for rate in found["rates"]] == [None, None, None]


def test_without_the_cache_the_count_is_the_same_and_all_of_it_is_done(policy, project):
    assert policy("data.datasets.made.cache_reasoner=false") == 0
    found = json.loads((project / "runs" / "benchmark_policy256" / "benchmark.json").read_text())
    assert found["flops"] == found["done_flops"] == 2 * stock_baseline_flops(SimpleNamespace(**TINY), TEXT, GENERATION)
    assert not found["reasoner_cached"] and len(found["rates"]) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (("benchmark.first_step=5",), "benchmark.first_step is 5, but training.steps is 4"),
        (("data.datasets.made.card=data/pusht/log.yaml",), "data.datasets.made: a benchmark makes its own log"),
        (("data.datasets.made.tasks.inverse_dynamics=1",), "a benchmark's dataset has one task, this has 2"),
        (("benchmark.instructions=4",), "benchmark.instructions is 4; it is from 1 to 3 (windows)"),
        (("benchmark.instructions=2", "benchmark.text_tokens=1"), "0 are words that may differ; ask for at most 1"),
        (("tuning.method=tower", "--against", "stock"), "the stock loop that it is compared with trains 'lora'"),
    ],
)
def test_what_cannot_be_measured_is_said(policy, capsys, words, message):
    assert policy(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name, text, grid, action", [
    ("policy256", 180, (5, 8, 8), 16),
    ("policy480", 250, (9, 17, 23), 32),
    ("video480", 400, (24, 15, 26), 0),
    ("video720", 400, (24, 23, 40), 0),
])  # fmt: skip
def test_the_experiments_are_the_yardsticks_workloads(name, text, grid, action):
    from cosmos3_train.commands.check_data import latent_shape
    from cosmos3_train.config import load_experiment
    from cosmos3_train.flow.tasks import TASKS

    experiment = load_experiment(ROOT / "experiments" / f"benchmark_{name}.yaml").experiment
    benchmark, robot = experiment.benchmark, experiment.embodiments[f"benchmark_{name}"]
    t, h, w = latent_shape(robot, (benchmark.height, benchmark.width))
    assert (t, math.ceil(h / 2), math.ceil(w / 2)) == grid
    (task,) = experiment.data.datasets["made"].tasks
    assert (robot.rows if TASKS[task].has_robot else 0) == action
    assert benchmark.text_tokens == text
    tokens = text + math.prod(grid) + action
    assert experiment.training.tokens_per_micro_batch >= tokens
    nano = SimpleNamespace(**experiment.model.random, hidden_act="silu")
    counted = Arithmetic.of(nano, Tuning()).flops([text], [math.prod(grid) + action])
    assert counted == stock_baseline_flops(nano, text, math.prod(grid) + action)


def test_rows_that_no_benchmark_made_are_not_replaced(tmp_path):
    prepared = tmp_path / "mine"
    prepared.mkdir()
    for source, refused in (("/logs/mine", True), ("/logs/mine_log_256x256", False)):
        card = {"source": source, "settings": {"layout_version": LAYOUT_VERSION}}
        (prepared / "card.json").write_text(json.dumps(card))
        with pytest.raises(UserError, match="holds the rows of /logs/mine") if refused else nullcontext():
            _require_own(prepared)
