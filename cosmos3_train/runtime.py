"""Where a process stands: rank, seeds, logging. The only reader of the environment.

Every random draw of a run comes from `draw(seed, *place)`, a generator that is a pure function of its arguments,
so that a sample's noise does not depend on the rank, the worker or the micro-batch that happens to hold it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys

import numpy as np
import torch

logger = logging.getLogger("cosmos3_train")


def rank() -> int:
    """This process's global rank, from torchrun's environment (0 where it did not start it)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes take part in the run (1 where no launcher started it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's place on its machine, which is the GPU it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def node_count() -> int:
    """How many machines take part in the run."""
    return max(1, world_size() // max(1, local_world_size()))


def is_first_rank() -> bool:
    return rank() == 0


def launched() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def fold(seed: int, *place: int | str) -> int:
    """A 63-bit seed that depends on every argument: the same on every machine and Python version."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for the draws made at `place`, for example `draw(seed, "noise", sample_number)`."""
    return torch.Generator().manual_seed(fold(seed, *place))


def seed_everything(seed: int) -> None:
    """Seed the global generators. They are a safety net: the project's own draws use `draw`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_up_logging(level: int = logging.INFO) -> None:
    """Rank 0 speaks on standard error, every other rank only from warnings up. Safe to call twice."""
    root = logging.getLogger("cosmos3_train")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if world_size() == 1 else f"[rank {rank()}] "
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        root.addHandler(handler)
    root.propagate = False
    root.setLevel(level if is_first_rank() else logging.WARNING)
    # Progress bars and load reports of the libraries below would break ours; their warnings still come through.
    for noisy in ("httpx", "filelock", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def offline_hub() -> None:
    """Keep the Hub client from looking for a network for folders that are already on disk."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
