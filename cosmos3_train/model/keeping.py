"""What a layer keeps of its forward for backward, and what it computes again: policies of selective checkpointing.

everything             nothing is computed again
all but cheap things   results of attention and of matrix products stay, norms and gates are computed again: a third
                       less, for a hundredth of the step
attention alone        a layer's input and what attention made of it stay: a forward of the products again
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cosmos3_train.model.attention import KERNEL_OPERATORS, around_kernel

PRODUCT_OPERATORS = frozenset(
    (
        "cosmos3_train.lora_linear.default",
        "cosmos3_train.fp8_linear.default",
        "aten.mm.default",
        "aten.addmm.default",
        "aten.linear.default",
    )
)
"""What the projections of a decoder layer are to PyTorch's dispatcher: fused LoRA, and plain layers."""


def keeping_attention(function: Callable[..., Any], *arguments: Any, draws: bool) -> Any:
    """Call a function of which only what an attention kernel has computed is kept, and compute the rest again.

    draws: the function draws random numbers, and draws the same ones again.
    """
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=_attention, preserve_rng_state=draws)


def keeping_products(function: Callable[..., Any], *arguments: Any) -> Any:
    """The same of matrix products. What the function returns must be a product, or it is computed again too."""
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=_PRODUCTS)


def _policy(
    kept: frozenset[str], context: object, operator: object, *arguments: object, **named: object
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operator) in kept else CheckpointPolicy.PREFER_RECOMPUTE


_KERNELS, _PRODUCTS = (
    functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, kept))
    for kept in (KERNEL_OPERATORS, PRODUCT_OPERATORS)
)


def _attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward, and for when it is computed again. PyTorch's contexts see every operator, by Python: around the
    kernels alone they cost a layer's launches nothing, around all of it twice their time. Each kernel has a pair of its
    own, for one that is entered anew counts from the first operator again."""
    pairs: list[tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] = []

    def first() -> AbstractContextManager[Any]:
        pairs.append(_KERNELS())
        return pairs[-1][0]

    return _around_kernels(first), _around_kernels((again for _, again in pairs).__next__)


@contextmanager
def _around_kernels(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    before = around_kernel.set(context)
    try:
        yield
    finally:
        around_kernel.reset(before)
