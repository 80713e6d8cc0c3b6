"""What sharded ranks add to stay in step: a sample that counts nothing, both towers a layer at a time, late weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosmos3_train.config import Model, Tuning
from cosmos3_train.model.loading import LARGE, load_backbone, read_weights
from cosmos3_train.model.omni import is_understanding, only_speaks
from cosmos3_train.model.trainable import make_trainable, restart_magnitudes
from cosmos3_train.types import StepBatch
from tests.training.project import robot
from tests.training.steps import CPU, HYBRID, difference, make_module, mixed_samples, perturb

FULL = Tuning(method="full")
DORA = replace(HYBRID, dora=True)
GENERATION = replace(HYBRID, towers=["generation"])


def gradients(module, batch: StepBatch) -> dict[str, torch.Tensor | None]:
    module.zero_grad()
    step = module.packer(batch)
    module.manual_backward = torch.Tensor.backward  # Lightning's own asks for a trainer
    module.accumulate(step.packs, module.step_counts(step))
    return {name: p.grad for name, p in module.trainables.parameters.items()}


def padded(module):
    module.packer = replace(module.packer, padded=True)
    return module


@pytest.mark.parametrize("tuning", [HYBRID, FULL], ids=["hybrid", "full"])
def test_padding_changes_no_gradient(project, tuning):
    module = perturb(make_module(project / "model", tuning=tuning, budget=100))
    batch = StepBatch(0, mixed_samples())
    plain, step = gradients(module, batch), module.packer(batch)
    found, with_padding = gradients(padded(module), batch), module.packer(batch)
    assert [p.tokens + 2 for p in step.packs] == [p.tokens for p in with_padding.packs]
    assert (step.counts, step.samples) == (with_padding.counts, with_padding.samples) and step.samples == 6
    for name, value in plain.items():
        ours = found[name]
        assert (value is None) == (ours is None), name
        if value is not None and ours is not None:
            assert difference(ours, value) < 1e-5, name


@pytest.mark.parametrize("tuning", [FULL, HYBRID, DORA], ids=["full", "hybrid", "dora"])
@pytest.mark.parametrize("talks", [False, True], ids=["generates", "speaks"])
def test_with_padding_every_layer_has_a_gradient_and_the_rule_says_which_are_none(project, talks, tuning):
    """Generation alone, or conversations alone: what a single process would leave without a gradient is known."""
    module = perturb(make_module(project / "model", tuning=tuning))
    batch = StepBatch(0, [s for s in mixed_samples() if (s.task == "conversation") == talks])
    plain = gradients(module, batch)
    for name, value in plain.items():
        reached = talks if only_speaks(name, module.backbone) else is_understanding(name) or not talks
        if not name.startswith("audio"):  # no sample has sound
            assert (value is not None) == reached, name
    found = gradients(padded(module), batch)
    for name, value in found.items():
        if name.startswith(LARGE):
            assert value is not None, name
            before = plain[name]
            assert difference(value, before) < 1e-5 if before is not None else float(value.norm()) == 0, name


@pytest.mark.parametrize("tuning", [FULL, GENERATION], ids=["full", "generation"])
@pytest.mark.parametrize("checkpointed", [False, True, "but_attention", "but_products"])
def test_both_towers_a_layer_at_a_time_compute_the_same(project, checkpointed, tuning):
    module = perturb(make_module(project / "model", budget=150, tuning=tuning, checkpoint_activations=checkpointed))
    batch = StepBatch(0, mixed_samples())
    apart = gradients(module, batch)
    module.backbone.joint_layers = True
    together = gradients(module, batch)
    kept = [module.backbone(pack).text_hidden.requires_grad for pack in module.packer(batch).packs]
    assert any(kept) == (tuning is FULL), "a tower that does not train keeps nothing for backward"
    for name, value in apart.items():
        ours = together[name]
        if name.startswith("audio"):  # no sample has sound
            assert value is None and ours is None
        else:
            assert value is not None and ours is not None and difference(ours, value) < 1e-6, name


@pytest.mark.parametrize("tuning", [HYBRID, FULL, DORA], ids=["hybrid", "full", "dora"])
def test_large_weights_read_after_the_adapters_are_in_place_start_the_same(project, tuning):
    model = Model(path=str(project / "model"))
    robots = [robot()] if tuning.method == "hybrid" else []
    whole = load_backbone(model, CPU)
    make_trainable(whole, tuning, robots, seed=0)
    late = load_backbone(model, CPU, large=False)
    assert {name for name, p in late.named_parameters() if p.is_meta} == {
        name for name, _ in late.named_parameters() if name.startswith(LARGE)
    }
    trainables = make_trainable(late, tuning, robots, seed=0)
    for number, layer in enumerate(late.layers):
        read_weights(late, model, CPU, lambda name, prefix=f"layers.{number}.": name.startswith(prefix))
        restart_magnitudes(layer)
    assert {n for n, p in late.named_parameters() if p.is_meta} == {"embed_tokens.weight", "lm_head.weight"}
    read_weights(late, model, CPU)
    expected = dict(whole.named_parameters())
    for name, parameter in late.named_parameters():
        assert parameter.dtype == expected[name].dtype and torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad
    assert trainables.found_in(late).parameters.keys() == trainables.parameters.keys()


def test_weights_read_below_adapters_are_rounded_where_the_base_is_in_fp8(project):
    model = Model(path=str(project / "model"), base_precision="fp8")
    whole, late = load_backbone(model, CPU), load_backbone(model, CPU, large=False)
    make_trainable(late, HYBRID, [robot()], seed=0)
    read_weights(late, model, CPU)
    expected, found = (
        {name.replace(".base_layer", ""): value for name, value in (*made.named_parameters(), *made.named_buffers())}
        for made in (whole.layers, late.layers)
    )
    assert sum(value.dtype == torch.uint8 for value in expected.values()) == 2 * 2 * 7
    assert sum(name.endswith(".scale") for name in expected) == 2 * 2 * 7
    assert all(torch.equal(found[name], value) for name, value in expected.items())
