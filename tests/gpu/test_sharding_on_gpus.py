"""Every strategy on the GPUs of one machine, by NCCL: the curve of one GPU, and less memory on each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosmos3_train.evaluation.pictures import read_metrics
from tests.training.project import NANO_WIDE, PICO, write_project
from tests.training.sharded import carry_out
from tests.training.test_sharding import STEPS, assert_same_curve, on_processes, told, write_moves

COUNT = min(torch.cuda.device_count(), 4)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(COUNT < 2, reason="needs two GPUs"),
    pytest.mark.timeout(1200),
]

GPU = f"{STEPS} training.samples_per_step=5 strategy.accelerator=gpu model.attention=sdpa model.compile=false"
"""Five samples a step: no rank of four is without one."""
TUNINGS = {
    "full": f"small {GPU} tuning.method=full model.checkpoint_activations=true",
    "hybrid": f"small {GPU} tuning.method=hybrid model.checkpoint_activations=but_attention",
    "lora": f"small {GPU} tuning.method=lora embodiments.mover.initialise_from=24",
    "cached": f"moves {GPU} tuning.method=tower tuning.towers=[generation]",
}
FAMILIES = {
    "own": {
        "ddp": "strategy.name=ddp",
        "fsdp2": "strategy.name=fsdp2",
        "hsdp": f"strategy.name=hsdp strategy.shards={COUNT // 2}",
    },
    "zero": {"zero2": "strategy.name=deepspeed_zero2", "zero3": "strategy.name=deepspeed_zero3"},
    "offload": {
        "zero2_offload": "strategy.name=deepspeed_zero2 strategy.offload=true",
        "zero3_offload": "strategy.name=deepspeed_zero3 strategy.offload=true",
    },
    "context": {
        "context_ddp": "strategy.name=ddp strategy.context_parallel=2",
        "context_fsdp2": "strategy.name=fsdp2 strategy.context_parallel=2",
    },
}
"""Strategies that one launch carries out, for a process costs seconds to start."""
RESUMED = {
    "own": {
        "fsdp2_to_ddp": ("full", "strategy.name=ddp <full_fsdp2/10"),
        "single_to_fsdp2": ("full", "strategy.name=fsdp2 <full/10"),
    },
    "zero": {"zero3_to_zero2": ("full", "strategy.name=deepspeed_zero2 <full_zero3/10")},
}

SIZES = {**NANO_WIDE, "num_hidden_layers": 2}
WIDE = (
    f"moves {STEPS} training.samples_per_step=5 strategy.accelerator=gpu model.path={PICO} model.dtype=bfloat16 "
    "tuning.method=tower tuning.towers=[generation] optimizer.learning_rate=0.00001 model.checkpoint_activations=true "
    "training.checkpoint_every_n_steps=0 "
    f"data.datasets.moves.prepared=prepared/nano_wide {' '.join(f'model.random.{k}={v}' for k, v in SIZES.items())}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A project in which one GPU made every tuning."""
    root = write_moves(write_project(tmp_path_factory.mktemp("gpus") / "root"))
    for tuning, job in TUNINGS.items():
        carry_out(root, f"{job} name={tuning}")
    torch.cuda.empty_cache()
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_every_strategy_makes_the_curve_of_one_gpu_in_float32(root, family):
    runs = [(tuning, how) for how in FAMILIES[family] for tuning in TUNINGS]
    resumed = RESUMED.get(family, {})
    jobs = [f"{TUNINGS[tuning]} name={tuning}_{how} {FAMILIES[family][how]}" for tuning, how in runs]
    jobs += [f"{TUNINGS[tuning]} name={name} {words}" for name, (tuning, words) in resumed.items()]
    on_processes(root, COUNT, *jobs)
    for tuning, how in runs:
        one, many = (told(root / "runs" / run, ("loss", "heldout/loss")) for run in (tuning, f"{tuning}_{how}"))
        worst = max(abs(many[key] - value) / abs(value) for key, value in one.items() if value)
        print(f"\n{tuning}, {how}, {COUNT} GPUs: losses within {worst:.1e}")
    for tuning, how in runs:
        assert_same_curve(root, tuning, f"{tuning}_{how}")
    for name, (tuning, _) in resumed.items():
        assert_same_curve(root, tuning, name, first_step=11)


# Of one GPU's memory. Two layers are as many as are gathered at once, by ZeRO as masters and not as copies in bfloat16,
# and the gradients that it holds until the step's last pass are whole and float32: 1.4 of its 8.9 GiB.
@pytest.mark.parametrize("strategy, share", [("fsdp2", 0.75), ("deepspeed_zero3", 0.95)])
def test_two_layers_of_nano_s_width_compiled_in_bfloat16(root, strategy, share):
    job = f"{WIDE} model.compile=true"
    if not (root / "runs" / "nano_wide").is_dir():
        carry_out(root, f"{job} name=nano_wide")
        torch.cuda.empty_cache()
    on_processes(root, COUNT, f"{job} name=nano_wide_{strategy} strategy.name={strategy}")
    runs = [root / "runs" / run for run in ("nano_wide", f"nano_wide_{strategy}")]
    one, many = (told(run, ("loss",)) for run in runs)
    worst = max(abs(many[key] - value) / abs(value) for key, value in one.items() if value)
    peaks = [max(read_metrics(run / "metrics.csv")["peak_memory_gib"][1]) for run in runs]
    print(f"\n{strategy}: losses within {worst:.1e}; peak {peaks[0]:.1f} GiB alone, {peaks[1]:.1f} GiB of {COUNT}")
    assert worst < 0.05 and peaks[1] < share * peaks[0]
