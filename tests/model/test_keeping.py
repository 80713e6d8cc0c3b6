"""What a layer keeps for backward and what it computes again changes no gradient."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_train.config import Tuning
from cosmos3_train.model.keeping import PRODUCT_OPERATORS
from tests.model.test_projections import adapted, difference, outputs
from tests.parity.upstream import TINY


def counted(backbone):
    """(outputs and gradients, products that were computed, norms that were, layers that were called)."""
    products, norms, layers = Counter(), [], []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            products[str(function)] += str(function) in PRODUCT_OPERATORS
            return function(*arguments, **(named or {}))

    for layer in backbone.layers:
        layer.register_forward_pre_hook(lambda *_: layers.append(1))
        layer.input_layernorm_moe_gen.register_forward_pre_hook(lambda *_: norms.append(1))
    with Counting():
        return outputs(backbone), products, len(norms), len(layers)


@pytest.mark.parametrize(
    "tuning", [Tuning(rank=3), Tuning(method="tower", towers=["generation"])], ids=["lora", "tower"]
)
def test_lean_layers_compute_norms_again_and_no_product(tuning):
    plain, lean = adapted(TINY, tuning), adapted(TINY, tuning)
    lean.lean = True
    before, products, norms, layers = counted(plain)
    after, same_products, twice, same_layers = counted(lean)
    assert same_products == products and same_layers == layers
    assert twice == 2 * norms == 2 * len(plain.layers)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert difference(after[name], value) <= 1e-12, name


def test_the_last_layers_keep_theirs_and_the_others_are_called_again():
    backbone = adapted(TINY, Tuning(rank=3))
    plain, _, _, layers = counted(backbone)
    for kept, lean in ((0, False), (1, False), (2, True), (3, True)):
        backbone = adapted(TINY, Tuning(rank=3))
        backbone.gradient_checkpointing, backbone.keep_attention = True, True
        backbone.kept_layers, backbone.lean = kept, lean
        found, _, _, calls = counted(backbone)
        assert calls == layers + backbone.recomputed_layers == layers + 3 - kept
        for name, value in plain.items():
            assert difference(found[name], value) <= 1e-12, name


def test_a_layer_of_both_towers_remembers_the_attention_of_each():
    both = Tuning(method="full")
    plain, again = adapted(TINY, both), adapted(TINY, both)
    for backbone in (plain, again):
        backbone.joint_layers = True
    again.gradient_checkpointing, again.keep_attention = True, True
    before, after = outputs(plain), outputs(again)
    assert before.keys() == after.keys() and any("self_attn.to_q" in name for name in before)
    for name, value in before.items():
        assert difference(after[name], value) <= 1e-12, name


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_lean_layers_keep_less_and_compute_the_same(compiler):
    found = {}
    for lean in (False, True):
        backbone = adapted(TINY, Tuning(rank=3))
        backbone.compiler, backbone.lean = compiler, lean
        sizes = {}

        def hold(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            result = outputs(backbone)
        found[lean] = (result, sum(sizes.values()))
    assert found[True][1] < 0.9 * found[False][1]
    for name, value in found[False][0].items():
        assert difference(found[True][0][name], value) <= (1e-12 if compiler == "aot_eager" else 1e-5), name
