"""What several tests of this folder read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.project import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model's folder, as it is published."""
    root = tmp_path_factory.mktemp("model") / "small"
    root.mkdir()
    return write_model(root)
