"""Sharded over two GPUs, by NCCL: the curve of one GPU, in less memory on each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosmos3_train.evaluation.pictures import read_metrics
from cosmos3_train.training.checkpoints import load_checkpoint
from tests.training.project import PICO, write_project
from tests.training.sharded import carry_out
from tests.training.test_sharding import STEPS, on_processes, told, write_moves

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(1200),
]

GPU = f"{STEPS} strategy.accelerator=gpu model.attention=sdpa"
JOBS = {
    "full": f"small {GPU} tuning.method=full model.checkpoint_activations=true",
    "hybrid": f"small {GPU} tuning.method=hybrid",
    "cached": f"moves {GPU} tuning.method=tower tuning.towers=[generation]",
}
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1152,
    "action_gen": "true",
    "action_dim": 64,
}
NANO_WIDE = (
    f"moves {STEPS} strategy.accelerator=gpu model.path={PICO} model.dtype=bfloat16 tuning.method=tower "
    "tuning.towers=[generation] optimizer.learning_rate=0.0001 model.checkpoint_activations=true "
    f"data.datasets.moves.prepared=prepared/nano_wide {' '.join(f'model.random.{k}={v}' for k, v in SIZES.items())}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_moves(write_project(tmp_path_factory.mktemp("gpus") / "root"))


def both(root: Path, name: str, job: str) -> list[dict[tuple[str, str], float]]:
    carry_out(root, f"{job} name={name}")
    torch.cuda.empty_cache()
    on_processes(root, 2, f"{job} name={name}_fsdp2 strategy.name=fsdp2")
    return [told(root / "runs" / run, ("loss", "heldout/loss")) for run in (name, f"{name}_fsdp2")]


@pytest.mark.parametrize("tuning", JOBS)
def test_the_curve_of_one_gpu_in_float32(root, tuning):
    one, two = both(root, tuning, JOBS[tuning])
    worst = max(abs(two[key] - value) / abs(value) for key, value in one.items() if value)
    print(f"\n{tuning}: {sum(key[1] == 'loss' for key in one)} steps, losses within {worst:.1e}")
    assert {key: two[key] for key in one} == pytest.approx(one, rel=1e-4, abs=1e-6)
    load_checkpoint(root / "runs" / f"{tuning}_fsdp2" / "checkpoints" / "step_000020")


def test_two_layers_of_nano_s_width_in_bfloat16(root):
    one, two = both(root, "nano_wide", NANO_WIDE)
    losses = {key: value for key, value in one.items() if key[1] == "loss"}
    worst = max(abs(two[key] - value) / abs(value) for key, value in losses.items())
    files = [root / "runs" / run / "metrics.csv" for run in ("nano_wide", "nano_wide_fsdp2")]
    peaks = [max(read_metrics(file)["peak_memory_gib"][1]) for file in files]
    print(f"\nNano's width: losses within {worst:.1e}; peak {peaks[0]:.1f} GiB alone, {peaks[1]:.1f} GiB of two")
    assert worst < 0.05 and peaks[1] < 0.75 * peaks[0]
