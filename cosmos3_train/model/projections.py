"""Frozen linear layers with LoRA in as few passes over memory as their arithmetic allows.

    y = x·Wᵀ + b + (x·Aᵀ)·(s·B)ᵀ

PEFT's own forward writes x·Wᵀ, (x·Aᵀ)·Bᵀ and their sum, and three projections of one input do all that three times; at
rank 32 the adapters then cost a tenth of the step for one percent of its arithmetic. Here layers that share an input
(queries, keys and values; gate and up) are one product with all their A, one with the frozen weights, and one with all
their B, added in place; their input's gradient is one product too. The modules, names and parameters stay PEFT's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from cosmos3_train.model import fp8
from cosmos3_train.model.fp8 import Fp8Linear

logger = logging.getLogger(__name__)

ADAPTER = "default"
"""PEFT's name of the one adapter that a run injects."""

SHARING = (
    ("self_attn.to_q", "self_attn.to_k", "self_attn.to_v"),
    ("self_attn.add_q_proj", "self_attn.add_k_proj", "self_attn.add_v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp_moe_gen.gate_proj", "mlp_moe_gen.up_proj"),
)
"""Layers of a decoder layer that share an input."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return ".lora_" in name


class FusedLora(lora.Linear):
    """PEFT's LoRA layer with our arithmetic; with adapters switched off, merged or several, PEFT's own.

    joined: on the first of layers that share an input, their frozen weights as one tensor, of which each layer's own
        is a view;  joined_scale, joined_transposed: the same of what an `Fp8Linear` has
    """

    joined: Tensor | None = None
    joined_scale: Tensor | None = None
    joined_transposed: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the one adapter is there, on and not merged."""
        return len(self.lora_A) == 1 and not self.disable_adapters and not self.merged_adapters

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if arguments or named or not self.plain:
            return super().forward(x, *arguments, **named)
        return _project((self,), x)


def project(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """Each layer's output [n, out] for an input [n, in] that they share."""
    fused = [layer for layer in layers if isinstance(layer, FusedLora) and layer.plain]
    if len(fused) < len(layers):
        return [layer(x) for layer in layers]
    return _project(fused, x).split([layer.out_features for layer in fused], dim=1)


def _project(layers: Sequence[FusedLora], x: Tensor) -> Tensor:
    """[n, sum of out] of layers that are fused."""
    bases = [cast(nn.Linear, layer.get_base_layer()) for layer in layers]
    first = layers[0]
    joined = first.joined if len(layers) > 1 else None
    weights = [base.weight for base in bases] if joined is None else [joined]
    bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
    down = torch.cat([_factor(layer.lora_A).to(x.dtype) for layer in layers])
    # All B on a diagonal of blocks: more zeros to multiply, and one pass over the output instead of one a layer.
    ups = [(_factor(layer.lora_B) * layer.scaling[ADAPTER]).to(x.dtype) for layer in layers]
    place, blocks = 0, []
    for up in ups:
        rank = up.shape[1]
        blocks.append(F.pad(up, (place, down.shape[0] - place - rank)))
        place += rank
    up = torch.cat(blocks)
    if not isinstance(bases[0], Fp8Linear):
        return _lora_linear(x, weights, bias, down, up)[0]
    scales = [cast(Fp8Linear, base).scale for base in bases] if joined is None else [cast(Tensor, first.joined_scale)]
    turned = bases[0].transposed if len(layers) == 1 else first.joined_transposed
    return fp8.linear(x, weights, scales, [] if turned is None else [turned], bias, down, up)


def _factor(factors: nn.ModuleDict) -> Tensor:
    return cast(nn.Linear, factors[ADAPTER]).weight


# ------------------------------------------------------------------------------------------------ the products
#
# Operators of their own, so that the sums in place stay in place: a compiler that sees them would copy first.


@torch.library.custom_op("cosmos3_train::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """(y [n, out], x·Aᵀ [n, r]) of x [n, in], weights of [out_i, in], down [r, in] and up [out, r]."""
    low = x @ down.t()
    if len(weights) == 1:
        out = F.linear(x, weights[0], bias)
    else:
        out = x.new_empty((x.shape[0], up.shape[0]))
        for part, weight in zip(out.split([w.shape[0] for w in weights], dim=1), weights, strict=True):
            torch.mm(x, weight.t(), out=part)
        if bias is not None:
            out += bias
    return out.addmm_(low, up.t()), low


@_lora_linear.register_fake
def _(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], up.shape[0])), x.new_empty((x.shape[0], down.shape[0]))


@torch.library.custom_op("cosmos3_train::lora_input_gradient", mutates_args=())
def _lora_input_gradient(gradient: Tensor, weights: Sequence[Tensor], low: Tensor, down: Tensor) -> Tensor:
    """[n, in]: gradient [n, out] through the frozen weights and, as low [n, r], through the adapters."""
    found = low @ down
    for part, weight in zip(gradient.split([w.shape[0] for w in weights], dim=1), weights, strict=True):
        found.addmm_(part, weight)
    return found


@_lora_input_gradient.register_fake
def _(gradient: Tensor, weights: Sequence[Tensor], low: Tensor, down: Tensor) -> Tensor:
    return gradient.new_empty((gradient.shape[0], down.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, _, down, up = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(x, down, up, output[1], *weights)


def _lora_linear_backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    x, down, up, low, *weights = ctx.saved_tensors
    through = gradient @ up
    x_gradient = _lora_input_gradient(gradient, weights, through, down) if ctx.needs_input_grad[0] else None
    return x_gradient, [None] * ctx.layers, None, through.t() @ x, gradient.t() @ low


_lora_linear.register_autograd(_lora_linear_backward, setup_context=_keep)


# ------------------------------------------------------------------------------------------------ choosing them


def fuse_lora(backbone: nn.Module) -> None:
    """Give the injected LoRA layers our arithmetic where it says the same as PEFT's, and say where it does not."""
    left: dict[str, int] = {}
    for module in backbone.modules():
        if type(module) is lora.Linear:
            obstacle = _obstacle(module)
            if obstacle is None:
                module.__class__ = FusedLora
            else:
                left[obstacle] = left.get(obstacle, 0) + 1
    for obstacle, count in left.items():
        logger.info("LoRA runs as PEFT writes it in %d layers, which is slower: %s", count, obstacle)


def _obstacle(layer: lora.Linear) -> str | None:
    base = layer.get_base_layer()
    if ADAPTER in layer.lora_variant:
        return "it is no plain LoRA (tuning.dora)"
    if not isinstance(layer.lora_dropout[ADAPTER], nn.Identity):
        return "tuning.dropout drops out other inputs in every layer"
    if type(base) not in (nn.Linear, Fp8Linear) or any(p.requires_grad for p in base.parameters()):
        return "its base is no frozen linear layer"
    return None


def join_shared(backbone: Any) -> None:
    """Lay the frozen weights of fused layers that share an input end to end, for one product instead of two or three.

    Parameters stay what they are, as views of the whole. Not for weights that are sharded between ranks.
    """
    for layer in backbone.layers:
        for group in _shared(layer):
            _join(group)
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()  # the weights' former places fit none of the joined


def rejoin_shared(layer: nn.Module) -> None:
    """Join again what a move to another device or dtype has taken apart."""
    for group in _shared(layer):
        joined, weight = group[0].joined, cast(Tensor, group[0].get_base_layer().weight)
        if joined is not None and joined.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            _join(group)


def part_shared(backbone: Any) -> None:
    """Forget what `join_shared` has made; parameters stay as they are."""
    for layer in backbone.layers:
        for first, *_ in _shared(layer):
            first.joined = first.joined_scale = first.joined_transposed = None


def joined_weights(backbone: Any) -> list[Tensor]:
    """What `join_shared` has made beside the parameters and buffers."""
    groups = [group[0] for layer in backbone.layers for group in _shared(layer)]
    found = [part for first in groups for part in (first.joined, first.joined_scale, first.joined_transposed)]
    return [part for part in found if part is not None]


def _shared(layer: nn.Module) -> list[list[FusedLora]]:
    """The groups of a decoder layer's fused layers that share an input."""
    modules = dict(layer.named_modules())
    groups = [[modules.get(name) for name in names] for names in SHARING]
    return [cast(list[FusedLora], group) for group in groups if all(isinstance(m, FusedLora) for m in group)]


def _join(group: Sequence[FusedLora]) -> None:
    first, bases = group[0], [cast(nn.Linear, member.get_base_layer()) for member in group]
    joined = torch.cat([base.weight.data for base in bases])
    for base, part in zip(bases, joined.split([base.weight.shape[0] for base in bases]), strict=True):
        base.weight.data = part
    rounded = [base for base in bases if isinstance(base, Fp8Linear)]
    if rounded:
        first.joined_scale = torch.cat([base.scale for base in rounded])
        if first.joined_transposed is not None or rounded[0].transposed is not None:
            first.joined_transposed = joined.t().contiguous()
        for base in rounded:
            base.transposed = None
    first.joined = joined
