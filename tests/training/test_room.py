"""A run that is only handed over needs its weights, and the device or the host to hold them; not its moments."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.model.loading import empty_backbone
from cosmos3_train.training.checkpoints import load_checkpoint
from cosmos3_train.training.room import held_bytes, with_room
from cosmos3_train.training.run import build, train
from tests.training.project import load

FULL = ("name=handed_over", "tuning.method=full", "training.steps=2", "evaluation.before=false")
GPU = torch.device("cuda", 0)


def test_what_is_exported_is_the_average_and_no_moments_are_read_or_made(project):
    loaded = load(project, *FULL)
    assert train(loaded) == "finished"
    path = loaded.run_folder / "checkpoints" / "step_000002"
    expected = load_checkpoint(path)
    for part in ("optimizer", "trainables"):
        (path / part / "whole.safetensors").unlink()
    run = build(loaded, "export")
    assert run.module.position == expected.position
    assert run.module.average is None and not hasattr(run.module, "optimizer")
    found = run.trainables.parameters
    assert found.keys() == expected.average.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.average.items())
    assert any(not torch.equal(found[name], value) for name, value in expected.trainables.items())


@pytest.mark.parametrize("method", ["full", "hybrid"])
def test_a_device_without_room_gives_way_to_the_host(project, method):
    loaded = load(project, "name=room", f"tuning.method={method}", "model.dtype=bfloat16", "model.attention=flash2")

    def empty():
        return empty_backbone(loaded.model, text_logits=True, towers="both")

    def place(free: float) -> tuple[str, str]:
        model, device = with_room(loaded.model, loaded.experiment, GPU, empty(), free)
        return device.type, model.attention

    held = build(load(project, "name=room", f"tuning.method={method}", "model.dtype=bfloat16"), "export").backbone
    needed = sum(p.numel() * p.element_size() for p in held.parameters())
    assert place(1.2 * needed) == ("cuda", "flash2")
    assert place(0.9 * needed) == ("cpu", "auto"), "the host has no such kernel"
    told = empty()
    with_room(loaded.model, loaded.experiment, GPU, told, 0.0)
    assert held_bytes(told, loaded.model) == needed
