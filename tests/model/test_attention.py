"""FlashAttention-4 behind `attend`: an operator whose shapes are known without the package, and with gradients."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos3_train.model.attention import attend
from cosmos3_train.types import Spans


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
