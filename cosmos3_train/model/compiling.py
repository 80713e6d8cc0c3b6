"""Which functions of the backbone are compiled, and how: once for packs of every length, once for all layers.

Functions are compiled, never modules: a compiled module would be a wrapper, and the names of the weights would change.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.config import cpp
from torch.utils._triton import has_triton

from cosmos3_train.config import UserError

logger = logging.getLogger(__name__)

Compiler = Literal["inductor", "aot_eager"]
"""inductor generates kernels; aot_eager only traces forward and backward and runs torch's own (to find a fault)."""

MANY_GRAPHS = 8
"""Graphs of one function that are expected at most: with and without gradient, training and evaluating, and breaks."""

MOST_GRAPHS = 32
"""Graphs of one function after which Dynamo gives up on it and runs it as it is written."""

P = ParamSpec("P")
R = TypeVar("R")


def choose_compiler(wanted: Literal["auto", True, False], device: torch.device) -> Compiler | None:
    """What compiles the backbone's functions, None where they run as written; one log line says which and why.

    Args:
        wanted: True, False, or 'auto': on a GPU where the tools are there.

    Raises:
        UserError: compilation is asked for and cannot be had here; names what is missing.
    """
    if wanted is False:
        reason = "model.compile is false"
    elif wanted == "auto" and device.type != "cuda":
        reason = f"this is {device.type}, where it pays only in long runs"
    else:
        reason = _obstacle(device)
    if wanted is True and reason:
        raise UserError(f"model.compile is true, but {reason}; use 'auto' or false")
    logger.info("compiled layers: %s", f"no ({reason})" if reason else "yes (the first steps wait for it)")
    return None if reason else "inductor"


def compiled(function: Callable[P, R], compiler: Compiler | None) -> Callable[P, R]:
    """The function, compiled for inputs of any length at its first call, or as it is where `compiler` is None.

    Args:
        function: of tensors and modules, without side effects.
    """
    return function if compiler is None else _compiled(function, compiler)


@cache
def _compiled(function: Callable[..., Any], compiler: Compiler) -> Callable[..., Any]:
    # Dynamo's own limit is 8, and past it a function silently runs as written for the rest of the process.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    # Else each float of a layer's modules, a norm's epsilon or LoRA's scale, is handed in as a tensor that every call
    # makes anew: of Nano a thousand a pass, which is host time that a fast GPU waits for.
    torch._dynamo.config.specialize_float = True
    # It warns that a region that is checkpointed must not work in place, which those of `model.keeping` do not.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    return torch.compile(function, dynamic=True, backend=_Counting(function.__name__, compiler))


class _Counting:
    """A compiler that counts what it is given and says once when that is suspiciously often."""

    def __init__(self, name: str, compiler: Compiler) -> None:
        self.name, self.graphs = name, 0
        self._compile: Callable[..., Any] = lookup_backend(compiler)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        if self.graphs == MANY_GRAPHS + 1:
            logger.warning(
                "%s has been compiled %d times, and each time costs seconds; TORCH_LOGS=recompiles says why "
                "(model.compile=false runs without)",
                self.name.strip("_"),
                self.graphs,
            )
        return self._compile(graph, inputs)


def _obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device here, or None."""
    if device.type == "cuda":
        if not has_triton():
            return "Triton is not installed or does not know this GPU"
        # Triton builds a launcher for each kernel.
        return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "there is no C compiler (gcc or clang)"
    known = (cpp.cxx,) if isinstance(cpp.cxx, str) else cpp.cxx
    return None if any(shutil.which(name) for name in known if name) else "there is no C++ compiler (g++)"
