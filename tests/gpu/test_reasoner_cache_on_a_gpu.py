"""On a CUDA device: cached keys and values give what the tower gives, and it leaves the device's memory."""

from __future__ import annotations

import pytest
import torch

from cosmos3_train.config import Model
from cosmos3_train.model.loading import load_backbone
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.model.reasoner_cache import Reasoner, ReasonerCache, ensure_reasoner, remember
from tests.parity.upstream import make_sample, noise_it
from tests.training.project import PICO

pytestmark = pytest.mark.gpu
SIZES = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 1152, "action_gen": True,
         "action_dim": 64}  # fmt: skip


def test_recalled_velocities_are_the_towers_within_bfloat16(tmp_path):
    device = torch.device("cuda")
    model = Model(path=str(PICO), random=SIZES, checkpoint_activations=False, compile=False)
    whole = load_backbone(model, device, text_logits=False)
    before = torch.cuda.memory_allocated()
    reasoner = Reasoner(model, device)
    samples = [make_sample("policy", number, text=40 + number % 2 * 7) for number in range(4)]
    samples[2:] = [type(s)(**{**vars(s), "text": samples[0].text}) for s in samples[2:]]
    ensure_reasoner(tmp_path, [s.text for s in samples[:2]], reasoner)
    reasoner.release()
    assert torch.cuda.memory_allocated() <= before + 2**20
    half = load_backbone(model, device, towers="generation")
    cache = ReasonerCache.open(tmp_path, reasoner)
    assert cache is not None
    remember(half, [cache])
    parts = [noise_it(s, 0.5) for s in samples]
    packed = pack(samples, [p[1] for p in parts], [p[2] for p in parts], Layout.of(whole.config)).to(device)
    with torch.no_grad():
        ours, theirs = half(packed), whole(packed)
    for name in ("video", "action"):
        a, b = getattr(ours, name).double(), getattr(theirs, name).double()
        assert float((a - b).norm() / b.norm()) < 1e-2, name
