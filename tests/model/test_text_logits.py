"""Text logits are those of transformers' own reasoner on the same weights."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.types import NoiseLevels, TokenSample
from tests.parity.eyes import reasoner
from tests.parity.upstream import TINY, make_sample, noise_it, randomise


@pytest.fixture(scope="module")
def both():
    ours = Cosmos3PackedTransformer(**TINY)
    randomise(ours)
    return ours.eval(), reasoner(ours)


def conversation(number: int, length: int) -> TokenSample:
    text = torch.randint(0, TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(number))
    return TokenSample(f"talk/{number}", number, "conversation", text, labels=text.roll(-1))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def test_packed_conversations_have_transformers_logits(both):
    ours, theirs = both
    samples = [conversation(number, length) for number, length in enumerate((9, 1, 23))]
    still = NoiseLevels(0.0, 0.0, 0.0)
    values = [noise_it(s, 0.5)[1] for s in samples]
    packed = pack(samples, values, [still] * 3, Layout.of(ours.config))
    logits = ours.lm_head(ours(packed).text_hidden).split([9, 1, 23])
    for sample, found in zip(samples, logits, strict=True):
        expected = theirs(input_ids=sample.text[None]).logits[0]
        assert difference(found, expected) <= 1e-5


@torch.no_grad()
def test_a_robot_beside_a_conversation_does_not_reach_its_logits(both):
    ours, theirs = both
    samples = [make_sample("policy", 1), conversation(4, 11), make_sample("inverse_dynamics", 2)]
    parts = [noise_it(s, 0.5) for s in samples]
    packed = pack(samples, [p[1] for p in parts], [p[2] for p in parts], Layout.of(ours.config))
    logits = ours.lm_head(ours(packed).text_hidden)
    assert difference(logits, theirs(input_ids=samples[1].text[None]).logits[0]) <= 1e-5
