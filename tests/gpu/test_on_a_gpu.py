"""On a CUDA device: every attention backend that runs there agrees with the reference."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.model.attention import BACKENDS, _obstacle, attend
from cosmos3_train.types import Spans

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_backends_agree_with_the_reference(backend, causal):
    obstacle = _obstacle(backend, DEVICE, torch.bfloat16)
    if obstacle:
        pytest.skip(obstacle)
    queries = Spans.of([37, 1, 200, 64])
    keys = queries if causal else Spans.of([50, 30, 333, 64])
    queries, keys = (Spans(s.offsets.to(DEVICE), s.lengths) for s in (queries, keys))
    torch.manual_seed(0)
    q = torch.randn(queries.total, 8, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(keys.total, 2, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.randn(queries.total, 8, 64, device=DEVICE)
    results = {}
    for name, dtype in ((backend, torch.bfloat16), ("sdpa", torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, queries, keys, causal=causal, backend=name)
        (out * weight).sum().backward()
        results[name] = [out.detach(), *(x.grad for x in inputs)]
    for ours, reference in zip(results[backend], results["sdpa"], strict=True):
        assert difference(ours, reference) < 1e-2
