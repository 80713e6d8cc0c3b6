"""The schedule's values, AdamW's state from the start, clipping, and the average that does not drift."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cosmos3_train.config import Optimizer
from cosmos3_train.training.ema import Average
from cosmos3_train.training.optimizer import (
    clip_gradients,
    learning_rate_factor,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from cosmos3_train.types import StepBatch
from tests.training.steps import make_module, make_steps, mixed_samples


def factors(steps: int, **changes) -> list[float]:
    return [learning_rate_factor(step, steps, Optimizer(**changes)) for step in range(steps)]


def test_warmup_rises_linearly_and_the_first_step_is_not_lost():
    assert factors(5, warmup_steps=4, schedule="constant") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors(3, warmup_steps=0, schedule="constant") == [1.0, 1.0, 1.0]


def test_cosine_and_linear_fall_to_their_final_fraction():
    cosine = factors(6, warmup_steps=2, schedule="cosine", final_fraction=0.2)
    assert cosine[2:] == pytest.approx([0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)])
    linear = factors(6, warmup_steps=2, schedule="linear", final_fraction=0.2)
    assert linear[2:] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    end = Optimizer(warmup_steps=2, schedule="linear", final_fraction=0.2)
    assert learning_rate_factor(6, 6, end) == learning_rate_factor(60, 6, end) == pytest.approx(0.2)


def test_a_warmup_longer_than_the_run_is_not_an_error():
    assert factors(2, warmup_steps=9) == pytest.approx([0.1, 0.2])


def test_every_group_gets_the_rate_times_its_factor():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "factor": f} for f in (1.0, 5.0)]
    optimizer = torch.optim.AdamW(groups)
    rate = set_learning_rate(optimizer, 0, 10, Optimizer(learning_rate=0.1, warmup_steps=1))
    assert rate == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.25])


def test_clipping_scales_the_joint_norm_and_returns_the_norm_before():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]

    def give() -> None:
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])

    give()
    assert float(clip_gradients(parameters, 0.0)) == 5.0
    assert parameters[1].grad.tolist() == [4.0]
    assert float(clip_gradients(parameters, 1.0)) == 5.0
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]), rtol=1e-5, atol=0)
    give()
    clip_gradients(parameters, 10.0)
    assert parameters[0].grad.tolist() == [3.0, 0.0], "a small gradient is left alone"


def test_state_exists_for_every_trainable_before_the_first_step_and_is_put_back(project, tmp_path):
    module = make_module(project / "model")
    names = module.trainables.parameters.keys()
    fresh = optimizer_tensors(module.optimizer, module.trainables.parameters)
    assert fresh.keys() == {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    robots = [s for s in mixed_samples() if s.task == "image_to_video"]
    make_steps(module, [StepBatch(0, robots)], tmp_path)
    after = optimizer_tensors(module.optimizer, module.trainables.parameters)
    unreached = {name for name in names if float(after[f"{name}.step"]) == 0}
    assert any("action_proj" in name for name in unreached), "heads without a gradient still have their state"
    assert after.keys() == fresh.keys()
    other = make_module(project / "model")
    load_optimizer_tensors(other.optimizer, other.trainables.parameters, after)
    found = optimizer_tensors(other.optimizer, other.trainables.parameters)
    assert all(torch.equal(found[name], after[name]) for name in after)


def test_the_average_of_what_does_not_move_keeps_its_bits_and_the_naive_form_drifts():
    weight = nn.Parameter(torch.randn(4096, generator=torch.Generator().manual_seed(0)))
    average, naive = Average({"w": weight}, decay=0.999), weight.detach().clone()
    for _ in range(1000):
        average.update({"w": weight})
        naive = 0.999 * naive + (1 - 0.999) * weight.detach()
    assert torch.equal(average.values["w"], weight)
    assert not torch.equal(naive, weight)


def test_the_average_follows_and_takes_the_place_of_the_weights_for_a_while():
    weight = nn.Parameter(torch.zeros(3))
    average = Average({"w": weight}, decay=0.75)
    with torch.no_grad():
        weight += 4.0
    average.update({"w": weight})
    assert average.values["w"].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(KeyboardInterrupt), average.in_place_of({"w": weight}):
        assert weight.tolist() == [1.0, 1.0, 1.0]
        raise KeyboardInterrupt
    assert weight.tolist() == [4.0, 4.0, 4.0]
