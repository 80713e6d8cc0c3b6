"""On a CUDA device: every attention backend that runs there agrees with the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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


def test_flash4_is_an_operator_that_selective_checkpointing_keeps():
    obstacle = _obstacle("flash4", DEVICE, torch.bfloat16)
    if obstacle:
        pytest.skip(obstacle)
    spans = Spans.of([100, 28])
    spans = Spans(spans.offsets.to(DEVICE), spans.lengths)
    q, k, v = (torch.randn(128, 4, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    calls = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return attend(x * 2, k, v, spans, spans, causal=False, backend="flash4") * 3

    def keep(_, operator, *arguments, **named) -> CheckpointPolicy:
        flash = operator is torch.ops.cosmos3_train.flash4.default
        return CheckpointPolicy.MUST_SAVE if flash else CheckpointPolicy.PREFER_RECOMPUTE

    found = []
    for options in ({}, {"context_fn": partial(create_selective_checkpoint_contexts, keep)}):
        checkpoint(layer, q, use_reentrant=False, **options).float().square().sum().backward()
        found.append([x.grad.clone() for x in (q, k, v)])
        q.grad = k.grad = v.grad = None
    assert len(calls) == 4
    for ours, theirs in zip(*found, strict=True):
        assert difference(ours, theirs) < 1e-2
