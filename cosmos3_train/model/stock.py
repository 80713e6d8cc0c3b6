"""The yardstick of benchmarks: stock diffusers and PEFT as a user would put them together, one sample a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import Cosmos3OmniTransformer
from peft import LoraConfig
from torch import Tensor

from cosmos3_train.config import Model, Tuning
from cosmos3_train.model.loading import DTYPES, KEPT_FLOAT32, model_folder
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.trainable import lora_targets
from cosmos3_train.types import TokenSample

BACKENDS = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")
"""Attention backends of diffusers that are tried; those whose package is missing refuse."""

TIMESTEP = 500.0
"""Of every noisy token: speed does not depend on it."""


def make_stock(model: Model, tuning: Tuning, device: torch.device) -> Cosmos3OmniTransformer:
    """Upstream's transformer on the device with PEFT's LoRA on the run's targets, in PEFT's own dtype."""
    assert tuning.method == "lora"
    made: Any
    if model.random:
        with _default_dtype(DTYPES[model.dtype]), torch.device(device):
            made = Cosmos3OmniTransformer(**cast(dict[str, Any], dict(model.random)))
        rotary = type(made.rotary_emb)
        config = made.config
        made.rotary_emb = rotary(config.head_dim, config.rope_theta, config.rope_axes_dim).float().to(device)
        for name in KEPT_FLOAT32:
            made.get_submodule(name.rstrip(".")).float()
    else:
        folder = model_folder(model) / "transformer"
        made = Cosmos3OmniTransformer.from_pretrained(folder, torch_dtype=DTYPES[model.dtype], use_safetensors=True)
        made = cast(Any, made).to(device)
    made.requires_grad_(False)
    made.add_adapter(
        LoraConfig(
            r=tuning.rank,
            lora_alpha=cast(int, tuning.alpha),
            lora_dropout=tuning.dropout,
            target_modules=lora_targets(made, tuning),
            use_rslora=tuning.rslora,
            use_dora=tuning.dora,
        )
    )
    return made.train()


def set_way(model: Cosmos3OmniTransformer, backend: str, checkpoint: bool) -> None:
    """Choose the attention backend, and whether activations are recomputed.

    Raises:
        Exception: of diffusers, where the backend's package is missing or too old.
    """
    model.set_attention_backend(backend)
    if checkpoint:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()


def stock_inputs(sample: TokenSample, model: Cosmos3OmniTransformer, device: torch.device) -> dict[str, Any]:
    """Arguments of upstream's forward for one sample, on the device."""
    assert sample.video is not None and sample.video_given is not None
    dtype = model.embed_tokens.weight.dtype
    grid = Layout.of(model.config).grid(sample.video)
    text, frame = sample.text.numel(), grid[1] * grid[2]
    video = torch.arange(text, text + grid[0] * frame)
    noisy = torch.nonzero(~sample.video_given).flatten()
    places = video.view(grid[0], frame)[noisy].flatten()
    inputs: dict[str, Any] = {
        "input_ids": sample.text,
        "text_indexes": torch.arange(text),
        "vision_tokens": [sample.video[None].to(dtype)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.full((places.numel(),), TIMESTEP),
        "vision_noisy_frame_indexes": [noisy],
    }
    length = text + video.numel()
    if sample.action is not None:
        assert sample.action_given is not None
        rows = sample.action.shape[0]
        action, noisy = torch.arange(length, length + rows), torch.nonzero(~sample.action_given).flatten()
        inputs |= {
            "action_tokens": [sample.action.to(dtype)],
            "action_sequence_indexes": action,
            "action_mse_loss_indexes": action[noisy],
            "action_timesteps": torch.full((noisy.numel(),), TIMESTEP),
            "action_noisy_frame_indexes": [noisy],
            "action_domain_ids": [torch.tensor([sample.domain])],
        }
        length += rows
    inputs["position_ids"] = torch.arange(length, dtype=torch.float32)[None].expand(3, -1).contiguous()
    moved = {key: _to(value, device) for key, value in inputs.items()}
    shapes: dict[str, Any] = {"vision_token_shapes": [grid], "und_len": text, "sequence_length": length}
    if sample.action is not None:
        shapes["action_token_shapes"] = [(sample.action.shape[0], 1, 1)]
    return moved | shapes


def stock_loss(model: Cosmos3OmniTransformer, inputs: dict[str, Any]) -> Tensor:
    """A float32 scalar of everything that the forward returns, for a backward of the usual cost."""
    out: Any = model(**inputs)
    parts = [*out.sample, *(out.action or [])]
    return torch.stack([part.float().square().mean() for part in parts]).sum()


def _to(value: Any, device: torch.device) -> Any:
    return [item.to(device) for item in value] if isinstance(value, list) else value.to(device)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
