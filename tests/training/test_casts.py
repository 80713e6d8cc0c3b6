"""Lightning's precision plugins cast every float that they reach in a batch; ours they do not reach."""

from __future__ import annotations

from dataclasses import replace

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, HalfPrecision, MixedPrecision

from cosmos3_train.training.loop import RunLoop
from cosmos3_train.training.run import make_trainer
from cosmos3_train.types import StepBatch
from tests.training.steps import CPU, gradients, make_module, make_steps, mixed_samples

POSITION = 15001.0


@pytest.fixture(params=["lightning", "deepspeed"])
def plugin(request) -> HalfPrecision | DeepSpeedPrecision:
    return HalfPrecision("bf16-true") if request.param == "lightning" else DeepSpeedPrecision("bf16-true")


def test_what_the_plugins_do_to_a_batch_in_the_open(plugin):
    cast = plugin.convert_input({"positions": torch.tensor([POSITION])})
    assert float(cast["positions"]) == 14976.0


def test_a_step_s_samples_and_packs_are_out_of_their_reach(plugin, project):
    module = make_module(project / "model")
    batch = StepBatch(0, mixed_samples())
    packed = module.packer(batch)
    before = [pack.positions.clone() for pack in packed.packs]
    assert max(float(p.max()) for p in before) > 14_000
    assert plugin.convert_input(batch) is batch and plugin.convert_input(packed) is packed
    for pack, positions in zip(packed.packs, before, strict=True):
        for value in (pack.positions, pack.text_positions, pack.levels, pack.video, pack.video_target.velocity):
            assert value.dtype == torch.float32
        assert torch.equal(pack.positions, positions)
    for sample in batch.samples:
        assert sample.latent is None or sample.latent.dtype == torch.float32


def test_a_trainer_in_bf16_hands_the_step_its_positions_as_they_are(project):
    module = make_module(project / "model")
    trainer = lightning.Trainer(accelerator="cpu", precision="bf16-true", logger=False, enable_checkpointing=False)
    packed = module.packer(StepBatch(0, mixed_samples()))
    moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(packed), CPU)
    assert moved.packs[0].positions.dtype == torch.float32


@pytest.mark.parametrize("field", ["positions", "text_positions", "levels"])
def test_the_backbone_refuses_what_was_cast_all_the_same(project, field):
    module = make_module(project / "model")
    pack = module.packer(StepBatch(0, mixed_samples())).packs[0]
    with pytest.raises(AssertionError, match="were cast"):
        module.backbone(replace(pack, **{field: getattr(pack, field).to(torch.bfloat16)}))


def test_the_run_s_own_trainer_casts_nothing(project, tmp_path):
    module = make_module(project / "model", dtype="bfloat16")
    before = {name: p.dtype for name, p in module.named_parameters()}
    trainer = make_trainer(module.experiment, CPU, RunLoop(module, tmp_path))
    assert trainer.precision == "32-true"
    trainer.precision_plugin.convert_module(module)
    assert {name: p.dtype for name, p in module.named_parameters()} == before
    assert module.backbone.rotary_emb.inv_freq.dtype == torch.float32


def test_why_the_run_s_precision_is_not_bf16_mixed(project, tmp_path):
    """Lightning's mixed precision refuses to clip for a fused optimizer; ours is fused, and is clipped by us."""
    module = make_module(project / "model", dtype="bfloat16", clip=0.01)
    assert all(group["fused"] for group in module.optimizer.param_groups)
    with pytest.raises(RuntimeError, match="'fused' optimizer"):
        MixedPrecision("bf16-mixed", "cpu").clip_gradients(module.optimizer, 0.01)
    make_steps(module, [StepBatch(0, mixed_samples())], tmp_path)
    assert module.report.gradient_norm > 0.1
    total = torch.stack([gradient.norm() for gradient in gradients(module).values()]).norm()
    assert float(total) == pytest.approx(0.01, rel=1e-3)
