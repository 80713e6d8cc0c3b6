"""On a CUDA device that multiplies FP8: it gives what the emulation on a CPU gives, also compiled."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from cosmos3_train.config import Model, Tuning
from cosmos3_train.model import fp8
from cosmos3_train.model.fp8 import E4M3, round_rows
from cosmos3_train.model.loading import load_backbone
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.model.trainable import arrange_frozen, make_trainable
from tests.gpu.test_reasoner_cache_on_a_gpu import SIZES
from tests.model.test_fp8 import by_layer, cosine
from tests.parity.upstream import make_sample, noise_it
from tests.training.project import PICO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp8.CAPABILITY, reason="no FP8 here"
    ),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("tokens", [1, 37, 512])
def test_products_are_the_emulated_ones(tokens):
    torch.manual_seed(0)
    (a, a_scale), (b, b_scale) = round_rows(torch.randn(tokens, 512)), round_rows(torch.randn(768, 512) * 0.02)
    exact = (a.double() * a_scale) @ (b.double() * b_scale).t()
    found = fp8._product(*(x.to(DEVICE) for x in (a, a_scale, b, b_scale.flatten())), torch.bfloat16)
    assert float((found.cpu().double() - exact).norm() / exact.norm()) < 4e-3
    codes, scale = round_rows(torch.randn(tokens, 512, device=DEVICE, dtype=torch.bfloat16))
    compiled = torch.compile(round_rows, dynamic=True)(torch.ones(tokens, 512, device=DEVICE, dtype=torch.bfloat16))
    assert codes.dtype == compiled[0].dtype == E4M3 and scale.shape == compiled[1].shape == (tokens, 1)


def outputs(precision: Literal["dtype", "fp8"], *, compile: bool = False, copies: int = 2) -> dict[str, torch.Tensor]:
    """Velocities and LoRA gradients of a pack, by layer."""
    model = Model(path=str(PICO), random=SIZES, checkpoint_activations=False, compile=compile, base_precision=precision)
    backbone = load_backbone(model, DEVICE, text_logits=False)
    made = make_trainable(backbone, Tuning(rank=8), [], seed=0)
    arrange_frozen(backbone, copies)
    for name, parameter in sorted(made.parameters.items()):
        generator = torch.Generator().manual_seed(len(name))
        parameter.data += torch.randn(parameter.shape, generator=generator).to(DEVICE) * 0.02
    samples = [make_sample("policy", number, text=40 + number, latent=(5, 16, 16)) for number in range(4)]
    parts = [noise_it(s, 0.5) for s in samples]
    packed = pack(samples, [p[1] for p in parts], [p[2] for p in parts], Layout.of(backbone.config)).to(DEVICE)
    found = backbone(packed)
    (found.video.float().square().mean() + found.action.float().square().mean()).backward()
    gradients = {name: p.grad for name, p in made.parameters.items() if p.grad is not None}
    return by_layer({"video": found.video.detach(), "action": found.action.detach()} | gradients)


@pytest.mark.parametrize("compile", [False, True], ids=["written", "compiled"])
def test_gradients_have_the_direction_of_the_exact_base_s(compile):
    exact, found = outputs("dtype"), outputs("fp8", compile=compile)
    assert found.keys() == exact.keys() and len(found) == 2 + 4
    cosines = {name: cosine(found[name], value) for name, value in exact.items()}
    assert min(cosines.values()) >= 0.99, cosines


def test_one_copy_gives_the_numbers_of_two():
    one, two = outputs("fp8", copies=1), outputs("fp8", copies=2)
    for name, value in two.items():
        assert float((one[name] - value).norm() / value.norm()) < 1e-2, name
