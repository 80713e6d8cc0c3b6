"""Upstream's video and sound tokenizers on the device that runs them; on a CPU by the kernels that are fast there."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def place_tokenizer(tokenizer: Any, device: torch.device) -> None:
    """Put a frozen tokenizer on its device, its weights in `vae_dtype` as they were read.

    A CPU without bfloat16 (AVX2 and no more) takes up to hundreds of times as long for a convolution in it: there these
    same weights run in float32. Latents are kept in `latents_dtype` all the same and differ by their rounding alone, as
    those of two devices do, so a cache made on one is the other's too.
    """
    tokenizer.requires_grad_(False).to(device).eval()
    if device.type != "cpu":
        return
    if tokenizer.dtype == torch.bfloat16 and not cpu_has_bfloat16():
        tokenizer.float().kept_dtype = torch.bfloat16
        logger.info("%s: this CPU has no bfloat16, its bfloat16 weights run in float32", type(tokenizer).__name__)
    if torch.backends.mkldnn.is_available():
        for module in tokenizer.modules():
            if isinstance(module, nn.Conv3d) and module.padding_mode == "zeros":
                _convolve_by_onednn(module)


def latents_dtype(tokenizer: Any) -> torch.dtype:
    """What latents of a placed tokenizer are kept in, and what it is known by: `vae_dtype`."""
    return getattr(tokenizer, "kept_dtype", tokenizer.dtype)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 at all."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _convolve_by_onednn(module: nn.Conv3d) -> None:
    """torch has it do so by its own choice, but not for one clip in float32 of less than some size: there it takes a
    kernel of its own, with which a clip of 17 frames of 256 pixels takes 3.6 times as long."""
    by_choice, padding = module._conv_forward, cast(tuple[int, ...], module.padding)

    def convolve(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if pixels.device.type != "cpu":  # it was moved since
            return by_choice(pixels, weight, bias)
        return torch.mkldnn_convolution(pixels, weight, bias, padding, module.stride, module.dilation, module.groups)

    cast(Any, module)._conv_forward = convolve
