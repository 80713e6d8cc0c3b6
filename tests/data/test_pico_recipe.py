"""The recipe of Pico's video tokenizer: its short cuts compute what upstream computes, and its labels are true."""

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cosmos3_train.evaluation.simulators.pusht_camera import LOOKS

RECIPE = Path(__file__).resolve().parents[2] / "experiments" / "pico"


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module("train_vae")
    sys.path.remove(str(RECIPE))


def test_fused_norms_and_flat_convolutions_compute_upstreams_codec(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vae = recipe.build_vae()
    for parameter in vae.parameters():
        if parameter.dim() == 4:  # norms start at one, which would hide them
            parameter.data.uniform_(0.5, 1.5)
    pixels, latents = torch.randn(1, 3, 5, 64, 64), torch.randn(1, 48, 2, 4, 4)
    with torch.no_grad():
        encoded, decoded = recipe.encode_content(vae, pixels, 32)[0], recipe.decode_unclamped(vae, latents)
        fused = copy.deepcopy(vae)
        recipe.fuse_norms(fused)
        monkeypatch.setattr(recipe.WanCausalConv3d, "forward", recipe.convolve_flat)
        torch.testing.assert_close(recipe.encode_content(fused, pixels, 32)[0], encoded, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(recipe.decode_unclamped(fused, latents), decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("look", sorted(LOOKS))
def test_the_head_is_told_where_the_agent_is_in_the_picture(recipe: ModuleType, look: str) -> None:
    generator = torch.Generator().manual_seed(0)
    poses = torch.tensor([[[120.0, 400.0, 300.0, 150.0, 0.7]]])
    drawn = recipe.change_look(recipe.render(poses, recipe.palettes(1, generator, 1.0)), LOOKS[look])
    red, _, blue = drawn.pixels[0, :, 0]
    y, x = divmod(int((blue - red).argmax()), 96)
    found = (torch.tensor([x, y]) + 0.5) / 48 - 1
    torch.testing.assert_close(drawn.places[0, 0, :2], found, rtol=0, atol=0.07)
    turns = LOOKS[look].turns
    angle = torch.atan2(drawn.places[0, 0, 5], drawn.places[0, 0, 4])
    torch.testing.assert_close(angle, torch.tensor((0.7 - turns * torch.pi / 2 + torch.pi) % (2 * torch.pi) - torch.pi))
