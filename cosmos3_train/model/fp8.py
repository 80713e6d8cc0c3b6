"""Frozen linear layers in 8 bits: e4m3 weights with a scale a row, activations and gradients rounded on the way.

    y = (s_x·X)·(s_w·W)ᵀ,   X, W in e4m3, s_x a number a token, s_w a number an output

Both are what `torch._scaled_mm` multiplies on a GPU, twice as fast as bfloat16. The gradient of the input sums over
outputs, where s_w varies, so s_w goes into the incoming gradient before that is rounded, and the same codes serve both
products. The GPU wants them in the other layout for the second: kept beside the first, or turned at every use.

On a CPU the rounded operands are multiplied in float32: the same numbers but for the order of sums, and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_train.config import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
LEAST_PEAK = 1e-30
"""A row of zeros needs a scale all the same. Gradients of a mean over millions are small, so this is far smaller."""

CAPABILITY = (8, 9)
"""Of the first GPUs that multiply e4m3 (Ada; then Hopper, Blackwell)."""


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [n, k], scales float32 [n, 1]) of x [n, k], by each row's largest magnitude. NaN and infinity stay
    no numbers."""
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=LEAST_PEAK) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `UserError` where the GPU cannot multiply e4m3 into `dtype`."""
    if device.type == "cuda" and dtype != torch.bfloat16:
        raise UserError("model.base_precision is 'fp8', whose products on a GPU are bfloat16: set model.dtype=bfloat16")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name, have = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise UserError(
            f"model.base_precision is 'fp8', but {name} has no FP8 (compute capability {have[0]}.{have[1]}, it begins "
            "with 8.9: Ada, Hopper); use 'dtype'"
        )


def describe_fp8(copies: int) -> str:
    """For the log and for `cosmos3 check`."""
    layouts = "one layout" if copies == 1 else "both layouts where gradients pass"
    return f"fp8 (e4m3, a scale a row) in the decoder layers, {layouts}"


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose `weight` holds e4m3 codes, as plain bytes: whatever casts floating-point parameters
    (PEFT would make an adapter of their dtype) leaves those alone.

    scale:      float32 [out];  transposed: the codes once more as [in, out], where they are kept
    """

    scale: Tensor
    transposed: Tensor | None

    def set_weight(self, weight: Tensor) -> None:
        """Round a weight [out, in] and keep that of it."""
        codes, scale = round_rows(weight)
        self.weight = nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale.flatten(), persistent=False)
        self.register_buffer("transposed", None, persistent=False)

    def keep_transposed(self) -> None:
        """Keep the codes in the other layout too, for a gradient that passes without turning them at every step."""
        self.transposed = self.weight.t().contiguous()

    def forward(self, input: Tensor) -> Tensor:
        transposed = [] if self.transposed is None else [self.transposed]
        return linear(input, [self.weight], [self.scale], transposed, self.bias)


def use_fp8(layers: nn.Module) -> None:
    """Make every linear layer below one whose weight, not yet there, will be rounded when it is set."""
    for module in layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = Fp8Linear


# ------------------------------------------------------------------------------------------------ the products


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    transposed: Sequence[Tensor],
    bias: Tensor | None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """x [n, in] through frozen layers that share it, and through their LoRA where there is one: [n, sum of out].

    Args:
        weights, scales: codes [out_i, in] and scales [out_i].
        transposed: nothing, or all codes once more, as one tensor [in, sum of out].
        bias: [sum of out];  down [r, in] and up [sum of out, r]: LoRA's factors, its scale in `up`.
    """
    # Outside the operator, so that a compiler can join it with what made x.
    codes, scale = round_rows(x.detach())
    return _fp8_linear(x, codes, scale, weights, scales, transposed, bias, down, up)[0]


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    """float32 [count]: made once, for each time is a launch."""
    return torch.ones(count, device=device)


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a [n, k] · b [m, k]ᵀ in `dtype`, of e4m3 codes with scales [n, 1] and [m]."""
    if a.device.type == "cuda":
        # The faster sums keep 14 bits of each partial result; the operands have 4.
        out = torch._scaled_mm(
            a, b.t(), scale_a=a_scale, scale_b=b_scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out.to(dtype)
    return ((a.float() @ b.float().t()) * a_scale * b_scale).to(dtype)


@torch.library.custom_op("cosmos3_train::fp8_linear", mutates_args=())
def _fp8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    transposed: Sequence[Tensor],
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, x·Aᵀ or nothing): as `linear`, of x and its codes."""
    parts = [
        _product(codes, scale, weight.view(E4M3), own, x.dtype) for weight, own in zip(weights, scales, strict=True)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if bias is not None:
        out += bias
    if down is None or up is None:
        return out, x.new_empty((0,))
    low = x @ down.t()
    return out.addmm_(low, up.t()), low


@_fp8_linear.register_fake
def _(x, codes, scale, weights, scales, transposed, bias, down, up):
    low = x.new_empty((0,)) if down is None else x.new_empty((x.shape[0], down.shape[0]))
    return x.new_empty((x.shape[0], sum(weight.shape[0] for weight in weights))), low


@torch.library.custom_op("cosmos3_train::fp8_input_gradient", mutates_args=())
def _fp8_input_gradient(
    codes: Tensor,
    scale: Tensor,
    weights: Sequence[Tensor],
    transposed: Sequence[Tensor],
    low: Tensor | None,
    down: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[n, in]: a gradient's codes [n, sum of out] through the frozen weights and, as low [n, r], through LoRA."""
    if transposed:
        turned = transposed[0]
    else:
        turned = (weights[0] if len(weights) == 1 else torch.cat(list(weights))).t().contiguous()
    found = _product(codes, scale, turned.view(E4M3), _ones(turned.shape[0], codes.device), dtype)
    return found if low is None or down is None else found.addmm_(low, down)


@_fp8_input_gradient.register_fake
def _(codes, scale, weights, transposed, low, down, dtype):
    return codes.new_empty((codes.shape[0], weights[0].shape[1]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, weights, scales, transposed, _, down, up = inputs
    ctx.dtype = x.dtype
    ctx.counts = (len(weights), len(scales), len(transposed))
    factors = () if down is None else (x, output[1], down, up)
    ctx.save_for_backward(*weights, *scales, *transposed, *factors)


def _fp8_linear_backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    weights, scales, transposed = ctx.counts
    saved = list(ctx.saved_tensors)
    own, saved = saved[:weights], saved[weights:]
    row_scales, saved = saved[:scales], saved[scales:]
    turned, factors = saved[:transposed], saved[transposed:]
    x_gradient = down_gradient = up_gradient = through = down = None
    if factors:
        x, low, down, up = factors
        through = gradient @ up
        down_gradient, up_gradient = through.t() @ x, gradient.t() @ low
    if ctx.needs_input_grad[0]:
        codes, scale = round_rows(gradient * (row_scales[0] if scales == 1 else torch.cat(row_scales)))
        x_gradient = _fp8_input_gradient(codes, scale, own, turned, through, down, ctx.dtype)
    nothing = ([None] * weights, [None] * scales, [None] * transposed)
    return x_gradient, None, None, *nothing, None, down_gradient, up_gradient


_fp8_linear.register_autograd(_fp8_linear_backward, setup_context=_keep)
