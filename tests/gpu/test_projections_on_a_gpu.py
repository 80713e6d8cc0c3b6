"""On a CUDA device: fused LoRA, joined and compiled, follows float32 within bfloat16; packs are pinned on their way."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.config import Model, Tuning
from cosmos3_train.model.loading import load_backbone
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.model.projections import FusedLora, join_shared
from cosmos3_train.model.trainable import make_trainable
from cosmos3_train.training.batching import PackedStep
from tests.gpu.test_reasoner_cache_on_a_gpu import SIZES
from tests.parity.upstream import make_sample, noise_it
from tests.training.project import PICO

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def outputs(compile: bool, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """Velocities and LoRA gradients of a pack."""
    model = Model(path=str(PICO), random=SIZES, checkpoint_activations=False, compile=compile, dtype=dtype)
    torch.manual_seed(0)
    backbone = load_backbone(model, DEVICE, text_logits=False)
    made = make_trainable(backbone, Tuning(rank=8, towers=["understanding", "generation"]), [], seed=0)
    join_shared(backbone)
    assert sum(isinstance(module, FusedLora) for module in backbone.modules()) == 4 * 2 * 7
    for name, parameter in sorted(made.parameters.items()):
        generator = torch.Generator().manual_seed(len(name))
        parameter.data += torch.randn(parameter.shape, generator=generator).to(DEVICE) * 0.02
    samples = [make_sample("policy", number, text=40 + number, latent=(5, 16, 16)) for number in range(4)]
    parts = [noise_it(s, 0.5) for s in samples]
    step = PackedStep(
        0, [pack(samples, [p[1] for p in parts], [p[2] for p in parts], Layout.of(backbone.config))], {}, 4, []
    ).pin_memory()
    assert step.packs[0].video.is_pinned() and step.packs[0].joint_spans.offsets.is_pinned()
    found = backbone(step.packs[0].to(DEVICE))
    (found.video.float().square().mean() + found.action.float().square().mean()).backward()
    gradients = {name: p.grad for name, p in made.parameters.items() if p.grad is not None}
    return {"video": found.video.detach(), "action": found.action.detach(), **gradients}


@pytest.mark.parametrize("compile", [False, True], ids=["written", "compiled"])
def test_in_bfloat16_it_follows_float32(compile):
    exact, found = outputs(False, "float32"), outputs(compile)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if bool(value.any()):
            assert float((found[name].double() - value.double()).norm() / value.double().norm()) < 5e-2, name
