"""A layer's frozen weights as one tensor: its numbers, its gradients, and its memory as that tensor comes and goes."""

from __future__ import annotations

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from cosmos3_train.training.frozen import lay_frozen, settle_frozen


def layer() -> nn.Module:
    """Frozen matrices, biases and a norm, of sizes that fill no whole number of places, and one matrix that trains."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.Linear(3, 2, bias=False))
    made[:3].requires_grad_(False)
    return made


def gradients(made: nn.Module, *, moved: bool) -> list[torch.Tensor]:
    """Of the input and of what trains; `moved`: the one tensor goes after the forward, and comes again elsewhere."""
    x = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
    loss = made(x).square().sum()
    if moved:
        whole = made.frozen_weights.data.clone()
        made.frozen_weights.data = torch.empty(0)
        settle_frozen(made)
        assert not any(weight.numel() for part in made[:3] for weight in (part.weight, part.bias))
        made.frozen_weights.data = whole
        settle_frozen(made)
    loss.backward()
    assert x.grad is not None
    return [loss.detach(), x.grad, made[3].weight.grad]


def test_a_layer_computes_the_same_from_one_tensor_that_comes_and_goes():
    expected, made = gradients(layer(), moved=False), layer()
    lay_frozen(made)
    assert [name for name, _ in made.named_parameters()] == ["frozen_weights", "3.weight"]
    for moved in (False, True):
        made.zero_grad()
        assert all(torch.equal(*pair) for pair in zip(gradients(made, moved=moved), expected, strict=True))


def test_memory_goes_when_the_one_tensor_does():
    made = layer()
    lay_frozen(made)
    memory = StorageWeakRef(made.frozen_weights.untyped_storage())
    made.frozen_weights.data = torch.empty(0)
    assert not memory.expired()  # views hold it
    settle_frozen(made)
    assert memory.expired()


def test_a_layer_that_trains_whole_is_left_alone():
    made = nn.Linear(2, 2)
    lay_frozen(made)
    assert [name for name, _ in made.named_parameters()] == ["weight", "bias"]
