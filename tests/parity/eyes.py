"""A tiny vision encoder in the published layout, and transformers' reasoner with it on a backbone's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from cosmos3_train.model.omni import Cosmos3PackedTransformer
from tests.parity.upstream import TINY, randomise

EYES = {"model_type": "qwen3_vl_vision", "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
        "out_hidden_size": TINY["hidden_size"], "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 16,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
CUT = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
RENAMED = {
    ".self_attn.to_q.": ".self_attn.q_proj.",
    ".self_attn.to_k.": ".self_attn.k_proj.",
    ".self_attn.to_v.": ".self_attn.v_proj.",
    ".self_attn.to_out.": ".self_attn.o_proj.",
    ".self_attn.norm_q.": ".self_attn.q_norm.",
    ".self_attn.norm_k.": ".self_attn.k_norm.",
}
"""Upstream's own renaming of a published checkpoint (transformers' conversion mapping of `cosmos3_omni`)."""


def add_eyes(folder: Path) -> Path:
    """Give a model folder what the published ones have for the reasoner: `vision_encoder/`, and at the root the
    processor's files, transformers' config and the index of all weights. Returns the folder."""
    encoder = Qwen3VLVisionModel(Qwen3VLVisionConfig(**EYES))
    randomise(encoder, seed=5)
    encoder.save_pretrained(folder / "vision_encoder")
    images = {**CUT, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor",
              "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}}  # fmt: skip
    videos = {**CUT, "video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor",
              "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    tokenizer = json.loads((folder / "text_tokenizer" / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = {f"{kind}_token_id": ids[f"<|{kind}_pad|>"] for kind in ("image", "video")}
    reasoner_config(json.loads((folder / "transformer" / "config.json").read_text()), tokens).save_pretrained(folder)
    places = {}
    for file in [*(folder / "transformer").glob("*.safetensors"), folder / "vision_encoder" / "model.safetensors"]:
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file.relative_to(folder).as_posix())
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def reasoner_config(sizes: Mapping[str, Any], tokens: dict[str, int] | None = None) -> Cosmos3OmniConfig:
    """Transformers' config of a backbone of these sizes with the tiny eyes.

    Args:
        tokens: ids of the tokens that stand for pictures.
    """
    text = {
        "model_type": "qwen3_vl_text",
        **{
            key: sizes[key]
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                        "intermediate_size", "vocab_size")
        },
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": sizes["rope_theta"],
            "mrope_section": list(sizes["rope_axes_dim"]),
            "mrope_interleaved": True,
        },
    }  # fmt: skip
    return Cosmos3OmniConfig(text_config=text, vision_config=dict(EYES), **(tokens or {}))


def reasoner(
    ours: Cosmos3PackedTransformer, tokens: dict[str, int] | None = None, eyes: Qwen3VLVisionModel | None = None
) -> Cosmos3OmniForConditionalGeneration:
    """Transformers' class with the backbone's widths and weights.

    Args:
        tokens: as of `reasoner_config`.
        eyes: its vision encoder's weights; None leaves them as they come, for words alone.
    """
    config = reasoner_config(ours.config, tokens)
    config._attn_implementation = "eager"
    made = Cosmos3OmniForConditionalGeneration(config)
    weights = {}
    for name, value in ours.state_dict().items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        weights["lm_head.weight" if name == "lm_head.weight" else f"model.language_model.{name}"] = value
    if eyes is not None:
        weights |= {f"model.visual.{name}": value for name, value in eyes.state_dict().items()}
    expected = {name for name in made.state_dict() if eyes is not None or ".visual." not in name}
    assert expected <= weights.keys()
    made.load_state_dict({name: weights[name] for name in expected}, strict=eyes is not None)
    return made.eval()


def picture(number: int, height: int, width: int) -> torch.Tensor:
    """uint8 [3, height, width], a random one."""
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(number)).byte()
