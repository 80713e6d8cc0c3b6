"""LoRA in our arithmetic gives PEFT's outputs and gradients, under PEFT's names, in as many compiled graphs."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners import lora

from cosmos3_train.config import Tuning
from cosmos3_train.model import compiling
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import pack
from cosmos3_train.model.projections import FusedLora, join_shared, joined_weights
from cosmos3_train.model.trainable import make_trainable
from tests.parity.upstream import EDGE, TINY, layout_of, make_sample, noise_it, randomise

BOTH = ["understanding", "generation"]
TUNINGS = {
    "generation": Tuning(rank=3, alpha=5),
    "both towers": Tuning(rank=3, alpha=5, towers=BOTH),
    "attention": Tuning(rank=4, modules=["attention"]),
    "mlp": Tuning(rank=4, modules=["mlp"]),
    "rslora": Tuning(rank=3, alpha=5, rslora=True, towers=BOTH),
    "dora": Tuning(rank=3, alpha=5, dora=True),
    "dropout": Tuning(rank=3, alpha=5, dropout=0.3),
}
LENGTHS = (0, 3, 5)
"""First samples of packs of different lengths."""
COUNTING = compiling._Counting
CONFIGS = {"qwen": TINY, "edge": EDGE, "bias": {**TINY, "attention_bias": True}}


def adapted(config: dict[str, Any], tuning: Tuning, *, peft: bool = False) -> Cosmos3PackedTransformer:
    """A model whose factors are all random, in float64, where sums in another order are no excuse; PEFT's own forward
    where asked."""
    backbone = Cosmos3PackedTransformer(**config)
    randomise(backbone)
    make_trainable(backbone, tuning, [], seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    for module in backbone.modules():
        if peft and isinstance(module, FusedLora):
            module.__class__ = lora.Linear
    return backbone.double()


def packed(backbone: Cosmos3PackedTransformer, first: int = 0):
    samples = [make_sample(task, first + place) for place, task in enumerate(("policy", "text_to_video_sound"))]
    parts = [noise_it(sample, 0.4) for sample in samples]
    return pack(samples, [p[1] for p in parts], [p[2] for p in parts], layout_of(backbone), [p[0] for p in parts])


def outputs(backbone: Cosmos3PackedTransformer) -> dict[str, torch.Tensor]:
    """Velocities, and the gradients of everything that trains."""
    torch.manual_seed(1)
    found = backbone(packed(backbone))
    sum(part.square().sum() for part in (found.video, found.sound, found.action)).backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return {name: getattr(found, name).detach() for name in ("video", "sound", "action")} | gradients


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def fused(backbone: Cosmos3PackedTransformer) -> int:
    return sum(isinstance(module, FusedLora) for module in backbone.modules())


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize(
    ("config", "tuning"), [*(("qwen", name) for name in TUNINGS), ("edge", "both towers"), ("bias", "both towers")]
)
def test_outputs_and_gradients_are_pefts(config, tuning, joined):
    ours, theirs = (adapted(CONFIGS[config], TUNINGS[tuning], peft=peft).train() for peft in (False, True))
    if joined:
        join_shared(ours)
    assert (fused(ours) > 0) == (tuning not in ("dora", "dropout")) and fused(theirs) == 0
    found, expected = outputs(ours), outputs(theirs)
    assert sum("lora_" in name for name in expected) >= 3 * 3 and found.keys() >= expected.keys()
    for name, value in found.items():
        if name in expected:
            assert difference(value, expected[name]) <= 1e-12, name
        else:  # the last layer's queries of the text feed nothing, but share a product with what feeds generation
            assert name.startswith("layers.2.self_attn.to_q.") and not value.any()


def test_what_the_fused_path_cannot_serve_is_said(caplog):
    with caplog.at_level(logging.INFO, "cosmos3_train"):
        adapted(TINY, TUNINGS["dropout"])
        adapted(TINY, TUNINGS["generation"])
    (said,) = [message for message in caplog.messages if "as PEFT writes it" in message]
    assert said == (
        "LoRA runs as PEFT writes it in 21 layers, which is slower: tuning.dropout drops out other inputs in every "
        "layer"
    )


def test_names_and_adapter_are_pefts_and_adapters_can_be_switched_off():
    ours, theirs = (adapted(TINY, TUNINGS["both towers"], peft=peft).eval() for peft in (False, True))
    join_shared(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    found, expected = get_peft_model_state_dict(ours), get_peft_model_state_dict(theirs)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    ours.disable_adapters()
    bare = Cosmos3PackedTransformer(**TINY)
    randomise(bare)
    bare.double()
    with torch.no_grad():
        assert torch.equal(ours(packed(ours)).video, bare(packed(bare)).video)


def test_joined_weights_are_the_parameters_and_stay_joined_where_the_model_moves():
    backbone = adapted(TINY, TUNINGS["both towers"])
    assert not joined_weights(backbone)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    join_shared(backbone)
    assert len(joined_weights(backbone)) == 3 * 4
    for dtype in (torch.float64, torch.float32):
        backbone.to(dtype)
        attention = backbone.layers[0].self_attn
        whole = joined_weights(backbone)[0]
        assert whole.dtype == dtype and whole.shape == (64 + 32 + 32, 48)
        for name, start in (("to_q", 0), ("to_k", 64), ("to_v", 96)):
            weight = getattr(attention, name).base_layer.weight
            assert weight.data_ptr() == whole[start].data_ptr()
    assert all(torch.equal(p, before[name].float()) for name, p in backbone.named_parameters())


def graphs(backbone: Cosmos3PackedTransformer, monkeypatch) -> dict[str, int]:
    """How often each function is compiled for packs of three lengths, with and without gradient."""
    counted: dict[str, int] = {}

    class Counting(COUNTING):
        def __call__(self, graph, inputs):
            counted[self.name] = counted.get(self.name, 0) + 1
            return super().__call__(graph, inputs)

    monkeypatch.setattr(compiling, "_Counting", Counting)
    compiling._compiled.cache_clear()
    torch._dynamo.reset()
    backbone.compiler = "aot_eager"
    for first in LENGTHS:
        backbone(packed(backbone, first)).video.sum().backward()
    with torch.no_grad():
        backbone(packed(backbone))
    compiling._compiled.cache_clear()
    torch._dynamo.reset()
    return counted


def test_compiled_it_gives_the_same_in_as_few_graphs_as_peft(monkeypatch):
    ours, written = (adapted(TINY, TUNINGS["generation"]).train() for _ in range(2))
    join_shared(ours)
    found = graphs(ours, monkeypatch)
    assert found == {  # as PEFT's own forward has: the understanding tower is frozen
        "_understanding_before": 1,
        "_understanding_after": 1,
        "_generation_before": 2,
        "_generation_after": 2,
    }
    for first in LENGTHS:
        written(packed(written, first)).video.sum().backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), written.named_parameters(), strict=True):
        if q.grad is not None:
            assert difference(cast(torch.Tensor, p.grad), q.grad) <= 1e-12, name
