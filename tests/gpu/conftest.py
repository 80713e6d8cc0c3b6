"""What several tests on a GPU set, put back after them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def capped() -> Iterator[None]:
    """The test may set a cap on what this process allocates."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
