"""The vision encoder of a model folder: whether there is one, and its frozen weights, in transformers' own class.

It is never part of the backbone: what trains, is sharded and is saved stays upstream's transformer. It is loaded where
a dataset shows pictures, and runs once a pack, over all pictures of it end to end, without gradient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from cosmos3_train.config import Model, UserError, first_line
from cosmos3_train.model.attention import Backend, attend, can_run
from cosmos3_train.model.base_identity import check_shards
from cosmos3_train.model.loading import DTYPES, fill_from_shards, layer_count, model_folder, read_config
from cosmos3_train.model.omni import Seen
from cosmos3_train.types import PictureTokens, Spans

VISION = "vision_encoder"
"""Its folder, beside the transformer's."""

PACKED = "cosmos3_flash_packed"
"""Our attention's name in transformers' table. It says "flash", for what is not is called picture by picture there."""


def read_vision_config(folder: Path, model: Model, what: str) -> Qwen3VLVisionConfig:
    """Look at a folder's vision encoder as a run would meet it. Reads no weight.

    Args:
        folder: the model's, on this disk;  model: of the experiment, for its sizes and for messages.
        what: shows pictures, for messages.

    Raises:
        UserError: the folder has none, or one that is damaged, of another transformer, or Edge's.
    """
    place, where = folder / VISION, f"{what} shows pictures, but model.path {model.path!r}"
    remedy = "take Cosmos3-Nano or Cosmos3-Super (parts.model=cosmos3_nano), or leave the dataset out"
    if not place.is_dir():
        raise UserError(f"{where} has no vision encoder ({VISION}/); {remedy}")
    sizes = model.random or read_config(folder / "transformer")
    if sizes.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where} is of Cosmos3-Edge, whose vision encoder is another one and is not read; {remedy}")
    try:
        content = json.loads((place / "config.json").read_text(encoding="utf-8"))
        config = cast(Qwen3VLVisionConfig, Qwen3VLVisionConfig.from_dict(content))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(f"{place}/config.json cannot be read ({reason}); fetch it again") from None
    check_shards(place)
    deep = len(config.deepstack_visual_indexes)
    if config.out_hidden_size != sizes.get("hidden_size") or deep > layer_count(sizes):
        raise UserError(
            f"{where} has a vision encoder of width {config.out_hidden_size} for {deep} layers, and a transformer of "
            f"width {sizes.get('hidden_size')} with {layer_count(sizes)}; they are not of one model: fetch it again"
        )
    return config


def vision_numbers(config: Qwen3VLVisionConfig) -> int:
    """Weights of a vision encoder."""
    with init_empty_weights():
        return sum(parameter.numel() for parameter in Qwen3VLVisionModel(config).parameters())


def load_eyes(model: Model, device: torch.device, what: str) -> Eyes:
    """The folder's vision encoder with its weights, meta first, in the run's dtype, on its device.

    Raises:
        UserError: as `read_vision_config`, or a tensor is missing or damaged.
    """
    folder, dtype = model_folder(model), DTYPES[model.dtype]
    config = read_vision_config(folder, model, what)
    with init_empty_weights():
        encoder = Qwen3VLVisionModel(config)
    fill_from_shards(encoder, folder / VISION, dtype, device)
    # Its rotary frequencies are buffers that no file holds, made off the meta device in float32, as they stay.
    return Eyes(cast(Any, encoder).to(device), "flash2" if can_run("flash2", device, dtype) else "sdpa")


class Eyes:
    """A frozen vision encoder as `Cosmos3PackedTransformer.see` takes one. No module, so no module adopts it."""

    def __init__(self, encoder: Qwen3VLVisionModel, backend: Backend) -> None:
        encoder.config._attn_implementation = PACKED
        self.encoder = cast(Any, encoder.requires_grad_(False).eval())
        self.backend = backend

    @torch.no_grad()
    def __call__(self, pictures: PictureTokens) -> Seen:
        """What stands at the pictures' tokens, in one pass over all of them."""
        found = self.encoder(
            pictures.patches,
            grid_thw=pictures.grids,
            position_ids=pictures.cells,
            interp_indices=pictures.taps,
            interp_weights=pictures.tap_weights,
            cu_seqlens=pictures.frames.offsets,
            max_seqlen=pictures.frames.longest,
            frames=pictures.frames,
            backend=self.backend,
        )
        rows = pictures.rows
        deep = tuple(part.index_select(0, rows) for part in found.deepstack_features)
        return Seen(found.pooler_output.index_select(0, rows), deep)


def _attend_packed(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, frames: Spans, backend: Backend, **__: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface, [1, heads, n, width] in and [1, n, heads, width] out, by `attend`."""
    q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
    return attend(q, k, v, frames, frames, causal=False, backend=backend)[None], None


AttentionInterface.register(PACKED, _attend_packed)
