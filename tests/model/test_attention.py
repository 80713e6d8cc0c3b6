"""Attention as operators: what shapes FlashAttention-4 has, and what is kept where layers are computed again."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_train.config import Tuning
from cosmos3_train.model.attention import KERNEL_OPERATORS, _not_importable, attend
from cosmos3_train.types import Spans
from tests.model.test_projections import adapted, difference, outputs
from tests.parity.upstream import TINY


def test_flash4_s_shapes_are_the_reference_s():
    queries, keys = Spans.of([3, 5]), Spans.of([4, 9])
    shapes = {}
    for backend in ("sdpa", "flash4"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            q = torch.empty(8, 4, 16, dtype=torch.bfloat16, requires_grad=True)
            k, v = (torch.empty(13, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
            out = attend(q, k, v, queries, keys, causal=False, backend=backend)
            out.sum().backward()
        shapes[backend] = [(x.shape, x.dtype) for x in (out, q.grad, k.grad, v.grad) if x is not None]
    assert shapes["flash4"] == shapes["sdpa"] and len(shapes["sdpa"]) == 4


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_what_attention_has_computed_is_kept_while_its_layer_is_computed_again(compiler):
    """The layer runs twice, its attention once, and the gradients are those of a layer that is not recomputed."""
    found = []
    for recomputed, kept in ((False, False), (True, False), (True, True)):
        backbone = adapted(TINY, Tuning(rank=3))
        backbone.gradient_checkpointing, backbone.keep_attention, backbone.compiler = recomputed, kept, compiler
        attended = []

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), named=None, attended=attended):
                if str(function) in KERNEL_OPERATORS:
                    attended.append(function)
                return function(*arguments, **(named or {}))

        layers = []
        for layer in backbone.layers:
            layer.register_forward_pre_hook(lambda *_, layers=layers: layers.append(1))
        with Counting() if compiler is None else nullcontext():
            result = outputs(backbone)
        found.append((result, len(layers), len(attended)))
    (plain, layers, attended), (_, twice, again), (kept, also_twice, once) = found
    assert (twice, also_twice) == (layers + 3, layers + 3), "the generation tower's, three layers"
    if compiler is None:
        assert again > attended == once > 0
    for name, value in plain.items():
        assert difference(kept[name], value) <= 1e-12, name


def test_a_kernel_whose_package_is_broken_is_no_kernel(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, line in (
        ("whole", ""),
        ("lacks", "raise ImportError('libx.so: no such file\\nmore')"),
        ("needs", "import nowhere"),
    ):
        (tmp_path / f"kernels_{name}").mkdir()
        (tmp_path / f"kernels_{name}" / "__init__.py").write_text("")
        (tmp_path / f"kernels_{name}" / "cute.py").write_text(line)
    assert _not_importable("kernels_whole.cute", "K") is None
    assert _not_importable("kernels_whole.cute", "K", "run") == "K is installed in a version without run"
    assert _not_importable("kernels_lacks.cute", "K") == "K is installed and does not import (libx.so: no such file)"
    assert (
        _not_importable("kernels_needs.cute", "K") == "K is installed and does not import (No module named 'nowhere')"
    )
    assert (
        _not_importable("kernels_absent.cute", "K")
        == _not_importable("kernels_whole.other", "K")
        == "K is not installed"
    )
