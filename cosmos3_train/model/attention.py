"""One function, `attend`, over flat streams whose sample borders are arguments; four backends behind it.

flash4  FlashAttention-4 (package flash-attn-4), the fastest on Hopper and Blackwell
flash3  FlashAttention-3 (package flash_attn_3, interface flash_attn_interface)
flash2  torch's own variable-length FlashAttention-2 kernel, present in every CUDA build of torch
sdpa    torch's scaled_dot_product_attention, sample by sample: CPU, float32, and the reference of the tests
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_train.config import UserError, first_line
from cosmos3_train.types import Spans

logger = logging.getLogger(__name__)

Backend = Literal["flash4", "flash3", "flash2", "sdpa"]
KERNEL_OPERATORS = frozenset(
    (
        "cosmos3_train.flash4.default",
        "flash_attn_3._flash_attn_forward.default",
        "torch_attn._varlen_attn.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
    )
)
"""What the backends' forward passes are to PyTorch's dispatcher."""
BACKENDS: tuple[Backend, ...] = ("flash4", "flash3", "flash2", "sdpa")

around_kernel: ContextVar[Callable[[], AbstractContextManager[Any]]] = ContextVar("around_kernel", default=nullcontext)
"""Makes what the next kernel runs within, in this thread: `model.keeping` has it remember what it has computed."""


def attend(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, *, causal: bool, backend: Backend) -> Tensor:
    """Attention of every sample's queries to the same sample's keys, and to no other.

    Args:
        q: [Q, heads, head_dim], samples end to end as `queries` says.
        k, v: [K, key/value heads, head_dim], as `keys` says; heads is a multiple of key/value heads.
        causal: query i of a sample sees keys 0 .. i (then the two spans are equal).
        backend: what `choose_backend` returned.

    Returns:
        [Q, heads, head_dim] in q's dtype.
    """
    with around_kernel.get()():
        return _KERNELS[backend](q, k, v, queries, keys, causal)


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend to use, with one log line that says which and why.

    Raises:
        UserError: the wanted backend cannot run here; names what is missing.
    """
    if wanted != "auto":
        obstacle = _obstacle(wanted, device, dtype)
        if obstacle:
            raise UserError(f"model.attention is {wanted!r}, but {obstacle}; use 'auto'")
        return next(b for b in BACKENDS if b == wanted)
    reasons = []
    for backend in BACKENDS:
        obstacle = _obstacle(backend, device, dtype)
        if obstacle is None:
            logger.info("attention: %s%s", backend, f" ({'; '.join(reasons)})" if reasons else "")
            return backend
        reasons.append(f"not {backend}: {obstacle}")
    raise AssertionError("sdpa has no obstacle")


def can_run(backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend runs there."""
    return _obstacle(backend, device, dtype) is None


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run here, or None."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16, this is {str(dtype).removeprefix('torch.')}"
    return obstacle_on(backend, torch.cuda.get_device_capability(device)[0])


def obstacle_on(backend: str, major: int) -> str | None:
    """Why a backend cannot run in bfloat16, as installed here, on a GPU of compute capability `major`, or None."""
    if backend == "flash4":
        if major < 9:
            return "it needs a Hopper or Blackwell GPU"
        return _not_importable("flash_attn.cute.interface", "flash-attn-4", "_flash_attn_bwd")
    if backend == "flash3":
        if major != 9:
            return "it needs a Hopper GPU"
        return _not_importable("flash_attn_interface", "flash_attn_interface (FlashAttention-3)")
    if backend == "flash2" and major < 8:
        return "it needs an Ampere GPU or newer"
    return None


@cache
def _not_importable(module: str, package: str, *names: str) -> str | None:
    """Why a kernel's module cannot be used, or None where it imports and has these names of ours."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001  a wheel that lacks a library, or was made for another Python, raises any
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):  # itself or the package around it
            return f"{package} is not installed"
        return f"{package} is installed and does not import ({first_line(error)})"
    lacking = [name for name in names if not hasattr(found, name)]
    return f"{package} is installed in a version without {lacking[0]}" if lacking else None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> Tensor:
    assert len(queries.lengths) == len(keys.lengths)
    out = []
    for q_one, k_one, v_one in zip(q.split(queries.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True):
        # The heads are repeated by hand: with enable_gqa the CUDA kernel may fall back to one that holds S x S scores.
        repeats = q_one.shape[1] // k_one.shape[1]
        out.append(
            F.scaled_dot_product_attention(
                q_one.transpose(0, 1)[None],
                k_one.transpose(0, 1).repeat_interleave(repeats, dim=0)[None],
                v_one.transpose(0, 1).repeat_interleave(repeats, dim=0)[None],
                is_causal=causal,
            )[0].transpose(0, 1)
        )
    return torch.cat(out)


def _flash2(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> Tensor:
    from torch.nn.attention import varlen

    attn: Callable[..., Any] = varlen.varlen_attn
    known = _parameters(attn)
    # torch has changed how it is told: causality by a flag, then by a window; grouped heads by hand, then by a flag.
    options: dict[str, Any] = (
        {"window_size": (-1, 0) if causal else (-1, -1)} if "window_size" in known else {"is_causal": causal}
    )
    if q.shape[1] != k.shape[1]:
        if repeats_heads("flash2"):
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        else:
            options["enable_gqa"] = True
    return attn(q, k, v, queries.offsets, keys.offsets, queries.longest, keys.longest, **options)


def repeats_heads(backend: Backend) -> bool:
    """Whether keys and values are repeated for all query heads before the kernel, and kept so for the backward."""
    from torch.nn.attention import varlen

    return backend == "sdpa" or (backend == "flash2" and "enable_gqa" not in _parameters(varlen.varlen_attn))


@cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _flash3(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    out = flash_attn_varlen_func(q, k, v, queries.offsets, keys.offsets, queries.longest, keys.longest, causal=causal)
    return out[0] if isinstance(out, tuple) else out


def _flash4(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> Tensor:
    return _flash4_forward(q, k, v, queries.offsets, keys.offsets, queries.longest, keys.longest, causal)[0]


# FlashAttention-4 writes into tensors that it has made, which selective checkpointing and compilers take for a mutation
# of what they keep. As an operator it has inputs and outputs alone.


@torch.library.custom_op("cosmos3_train::flash4", mutates_args=())
def _flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, longest_query: int, longest_key: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """(attention as `attend`'s, log-sum-exp float32 [heads, Q])."""
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
        max_seqlen_q=longest_query,
        max_seqlen_k=longest_key,
        causal=causal,
        return_lse=True,
    )


@_flash4_forward.register_fake
def _(q, k, v, queries, keys, longest_query, longest_key, causal):
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("cosmos3_train::flash4_backward", mutates_args=())
def _flash4_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    summed: Tensor,
    queries: Tensor,
    keys: Tensor,
    longest_query: int,
    longest_key: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

    return _flash_attn_bwd(
        q,
        k,
        v,
        out,
        gradient.contiguous(),
        summed,
        causal=causal,
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
        max_seqlen_q=longest_query,
        max_seqlen_k=longest_key,
    )


@_flash4_backward.register_fake
def _(gradient, q, k, v, out, summed, queries, keys, longest_query, longest_key, causal):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest_query, ctx.longest_key, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)


def _through(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, queries, keys, out, summed = ctx.saved_tensors
    sizes = (ctx.longest_query, ctx.longest_key, ctx.causal)
    return *_flash4_backward(gradient, q, k, v, out, summed, queries, keys, *sizes), None, None, None, None, None


_flash4_forward.register_autograd(_through, setup_context=_keep)


_KERNELS: dict[Backend, Callable[[Tensor, Tensor, Tensor, Spans, Spans, bool], Tensor]] = {
    "flash4": _flash4,
    "flash3": _flash3,
    "flash2": _flash2,
    "sdpa": _sdpa,
}
