"""One small project for all tests of training; a run's folder in it belongs to the test that names the run."""

from pathlib import Path

import pytest

from tests.training.project import write_project


@pytest.fixture(scope="session")
def long_too(request) -> bool:
    """Whether the tests that are `long` run."""
    return "long" in request.config.option.markexpr


@pytest.fixture(scope="session")
def curves(tmp_path_factory) -> Path:
    """A project in which every tuning of `test_sharding` was trained by one process, for others to be compared."""
    from tests.training.sharded import carry_out
    from tests.training.test_sharding import TUNINGS, job, write_moves

    root = write_moves(write_project(tmp_path_factory.mktemp("curves") / "root"))
    for tuning in TUNINGS:
        carry_out(root, job(tuning, f"name={tuning}"))
    return root


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    return write_project(tmp_path_factory.mktemp("project") / "root")
