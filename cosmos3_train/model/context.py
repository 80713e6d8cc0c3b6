"""Context parallelism: what attention needs where the ranks of a group hold a pack in slices (DeepSpeed-Ulysses).

All but attention works token by token, so each rank runs it on a contiguous slice of either stream. Attention needs all
tokens, but of one head at a time: before it the ranks exchange slices of tokens for slices of heads, after it back. The
text's keys and values are kept as heads, in the form in which the generation stream meets them.

An exchange is a collective, in backward too: every rank of the group makes the same ones in the same order, whatever
its slice holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos3_train.config import UserError


class ContextGroup:
    """The ranks that share packs, in the order of their slices."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.place, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: object) -> ContextGroup:
        return self  # a copied model's ranks are the same ones

    def own_heads(self, x: Tensor) -> Tensor:
        """This rank's of [*, heads, head_dim]."""
        return x.unflatten(1, (self.size, -1))[:, self.place]


@dataclass(frozen=True)
class Exchange:
    """Of one stream; lengths: tokens of each rank's slice."""

    group: ContextGroup
    lengths: tuple[int, ...]


def to_heads(exchange: Exchange | None, *parts: Tensor) -> tuple[Tensor, ...]:
    """[own tokens, heads, head_dim] each → [all tokens, own heads, head_dim], in one exchange; without one as they are.

    A rank's heads are neighbours, so that query heads stay with the key/value heads that they share.
    """
    if exchange is None:
        return parts
    size, own = exchange.group.size, exchange.lengths[exchange.group.place]
    dealt = torch.cat([part.unflatten(1, (size, -1)) for part in parts], dim=2)  # [own tokens, rank, its heads, ...]
    blocks = dealt.transpose(0, 1).flatten(0, 1)
    found = _Swap.apply(blocks, (own,) * size, exchange.lengths, exchange.group.group)
    return found.split([part.shape[1] // size for part in parts], dim=1)


def to_tokens(exchange: Exchange | None, x: Tensor) -> Tensor:
    """[all tokens, own heads, head_dim] → [own tokens, heads, head_dim]."""
    if exchange is None:
        return x
    size, own = exchange.group.size, exchange.lengths[exchange.group.place]
    blocks = _Swap.apply(x, exchange.lengths, (own,) * size, exchange.group.group)
    return blocks.unflatten(0, (size, own)).transpose(0, 1).flatten(1, 2)


class _Swap(torch.autograd.Function):
    """Rows to each rank, and the rows of each rank to this one; their gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: Any) -> Tensor:
        ctx.way = (received, sent, group)
        return _swap(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        return _swap(gradient, *ctx.way), None, None, None


def _swap(x: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group)
    return out


def refuse_heads(config: Any, size: int) -> None:
    """Raise `UserError` where a model's key/value heads cannot be dealt out to so many ranks."""
    heads = config.num_key_value_heads
    if heads % size:
        ways = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"strategy.context_parallel is {size}, but the model's {heads} key/value heads must be dealt out evenly; "
            f"use one of {ways}"
        )
