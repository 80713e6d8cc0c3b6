"""`cosmos3 plan` by the command line: what it prints, for which data, and how it refuses."""

from __future__ import annotations

import re

import pytest

MADE = "data.datasets.made"
BUDGET = "training.tokens_per_micro_batch"
NANO = ("parts.model=nano_random", "export=none")


@pytest.fixture
def plan(cosmos3, capsys):
    def run(experiment: str, *words: str) -> tuple[int, str, str]:
        code = cosmos3("plan", f"experiments/{experiment}.yaml", *words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_run_that_does_not_fit_is_told_what_would_make_it_fit(plan, tmp_path):
    # A folder of its own: where the repository's has been made, by `cosmos3 benchmark`, the plan reads it.
    code, out, _ = plan("benchmark_policy256", "--gpu", "rtx4090-24g", f"{MADE}.prepared={tmp_path / 'none'}")
    assert code == 0 and "IT DOES NOT FIT: " in out and "of 23.0 GiB" in out
    assert "policy: 336 generation and 180 text tokens (not on this disk: as cosmos3 benchmark would make it)" in out
    for item in ("generation tower's layers, bf16", "Adam's two moments", "gradients", "activations kept for backward"):
        assert item in out
    assert "understanding tower's layers" not in out, "its keys and values are cached"
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["as it is"][-1] == "no"
    assert rows["model.checkpoint_activations=true"][-1] == "yes"
    assert rows["training.tokens_per_micro_batch=516"][-1] == "yes"
    assert "rates were measured on h100-80g, h200-141g; these are the same shares of rtx4090-24g's peaks" in out
    assert "of several GPUs they are estimates, from four runs of fsdp2" in out


def test_what_a_run_of_the_published_model_takes_is_counted_for_a_random_one_too(plan, tmp_path):
    """Whose own tokenizer is Pico's; and prompts of many instructions stay on the GPU, as far as there is room."""
    code, out, _ = plan("nano_policy_hybrid", "--gpu", "rtx4090-24g", *NANO)
    assert code == 0 and re.search(r"video tokenizer +1\.31 GiB", out)
    many = f"{MADE}.prepared={tmp_path / 'none'}", "benchmark.instructions=256"
    code, out, _ = plan("benchmark_policy256", "--gpu", "h100-80g", *many)
    assert code == 0 and re.search(r"keys and values of prompts +1\.40 GiB", out)


def test_a_run_fits_where_the_tower_that_makes_its_cache_does_not(plan, tmp_path):
    small = ("model.base_precision=fp8", "model.fp8_copies=1", "model.checkpoint_activations=true")
    words = ("parts.model=super_random", *small, f"{MADE}.prepared={tmp_path / 'none'}", f"{BUDGET}=4128")
    code, out, _ = plan("benchmark_policy256", "--gpu", "l40s-48g", *words)
    assert code == 0 and "it fits: 36.0 of 44.0 GiB\nTHE TOWER BEFORE IT DOES NOT FIT: make the" in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert rows["as it is"].endswith("with the cache made elsewhere")
    assert rows["model.base_precision=fp8 model.fp8_copies=2"].endswith("no")


def test_a_robots_log_is_looked_at_and_a_set_that_is_not_here_fills_the_canvas(plan):
    code, out, _ = plan("nano_policy_lora", "--gpu", "h100-80g", *NANO)
    assert code == 0 and "it fits: " in out
    assert "policy: 62 generation and 46 text tokens (its longest)" in out, "5 × 3 × 3 video and 17 action tokens"
    assert "understanding tower's layers, bf16" in out and "layers recomputed" not in out
    code, out, _ = plan("nano_video_warehouse_operations_scenes", "--gpu", "h100-80g", "--gpus", "2", *NANO)
    assert code == 0 and "between GPUs" in out
    assert "6,240 generation and 180 text tokens (not on this disk: frames of 16:9)" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("--gpu", "h100-80g", f"{MADE}.tasks.polcy=1"),
            f"{MADE}.tasks: 'polcy' is not a task. Did you mean 'policy'?",
        ),
        (("--gpu", "h100-80g", f"{MADE}.weight=0"), f"{MADE}.weight is 0.0; it is above 0"),
        (("--gpu", "h100-80g", f"{MADE}.tasks.policy=0"), f"{MADE}.tasks has no weight above 0"),
        (("--gpu", "h100-80g", f"{MADE}.tasks.text_to_video_sound=1"), "needs sound, which is not read from a robot's"),
        (("--gpu", "h100"), "error: --gpu h100: not in the table of GPUs. Did you mean 'h100-80g'?"),
        (("--gpu", "tpu"), "error: --gpu tpu: not in the table of GPUs. Known: a100-40g, a100-80g, a6000-48g"),
        (("--gpu", "h100-80g", "--gpus", "17"), "error: training.samples_per_step is 16, fewer than the 17 GPUs"),
        (
            ("--gpu", "a100-80g", "model.base_precision=fp8"),
            "error: model.base_precision is 'fp8', but a100-80g has no",
        ),
        (("--gpu", "h100-80g", "model.random.hidden=8"), "error: model.random: 'hidden' is no size of the transformer"),
        (
            (
                "--gpu",
                "h100-80g",
                "--gpus",
                "2",
                "strategy.name=ddp",
                "strategy.context_parallel=2",
                "training.samples_per_step=1",
            ),
            "error: strategy.context_parallel is 2, which the plan does not know; plan with 1",
        ),
        (("--gpu", "h100-80g", "--gpus", "0"), "error: --gpus 0: a run has at least 1"),
        (
            ("--gpu", "h100-80g", "tuning.towers=[understanding]"),
            "cache_reasoner is true, but tuning.towers with 'understanding' trains the tower",
        ),
        ((), "the following arguments are required: --gpu"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(plan, words, message):
    code, out, err = plan("benchmark_policy256", *words)
    assert code == 2 and message in err and not out
    assert err.splitlines()[-1].count("error: ") == 1
