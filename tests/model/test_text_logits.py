"""Text logits are those of transformers' own reasoner on the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration

from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.types import NoiseLevels, TokenSample
from tests.parity.upstream import TINY, make_sample, noise_it, randomise

RENAMED = {
    ".self_attn.to_q.": ".self_attn.q_proj.",
    ".self_attn.to_k.": ".self_attn.k_proj.",
    ".self_attn.to_v.": ".self_attn.v_proj.",
    ".self_attn.to_out.": ".self_attn.o_proj.",
    ".self_attn.norm_q.": ".self_attn.q_norm.",
    ".self_attn.norm_k.": ".self_attn.k_norm.",
}
"""Upstream's own renaming of a published checkpoint (transformers' conversion mapping of `cosmos3_omni`)."""


def reasoner(ours: Cosmos3PackedTransformer) -> Cosmos3OmniForConditionalGeneration:
    """Transformers' class with the same widths and weights; its eyes are as small as they can be and not used."""
    text = {
        "model_type": "qwen3_vl_text",
        **{
            key: TINY[key]
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                        "intermediate_size", "vocab_size")
        },
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": TINY["rope_theta"],
            "mrope_section": TINY["rope_axes_dim"],
            "mrope_interleaved": True,
        },
    }  # fmt: skip
    eyes = {"model_type": "qwen3_vl_vision", "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 48, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    config = Cosmos3OmniConfig(text_config=text, vision_config=eyes)
    config._attn_implementation = "eager"
    made = Cosmos3OmniForConditionalGeneration(config)
    weights = {}
    for name, value in ours.state_dict().items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        weights["lm_head.weight" if name == "lm_head.weight" else f"model.language_model.{name}"] = value
    expected = {name for name in made.state_dict() if ".visual." not in name}
    assert expected <= weights.keys()
    made.load_state_dict({name: weights[name] for name in expected}, strict=False)
    return made.eval()


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
