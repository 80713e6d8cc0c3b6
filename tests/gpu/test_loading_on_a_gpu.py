"""On a CUDA device: weights of true size are made there, and the host's memory is not asked for them."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from tests.model.test_loading_memory import ROOT, grown

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("name", "towers", "base_precision", "gigabytes"),
    [("nano", "both", "dtype", 28), ("super", "generation", "fp8", 31)],
)
def test_the_host_holds_nothing_of_weights_that_are_made_on_the_gpu(name, towers, base_precision, gigabytes):
    if torch.cuda.get_device_properties(0).total_memory < 1.3 * gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB and some more")
    if base_precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs products of 8 bits")
    file = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "model" / f"{name}_random.yaml"))
    model = {
        "path": str(ROOT / file["path"]),
        "random": file["random"],
        "base_precision": base_precision,
        "fp8_copies": 1,
    }
    small = {**model, "random": {**file["random"], "num_hidden_layers": 1}}
    found = grown(small, model, towers, "cuda", ["RssAnon"])
    print(f"\n{name}, {towers}: {found['used'] / 1e9:.1f} GB on the GPU, {found['grown'] / 1e9:.3f} GB on the host")
    assert found["used"] > gigabytes * 1e9
    assert found["grown"] < 0.05 * found["used"]
