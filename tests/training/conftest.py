"""One small project for all tests of training; a run's folder in it belongs to the test that names the run."""

from pathlib import Path

import pytest

from tests.training.project import write_project


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    return write_project(tmp_path_factory.mktemp("project") / "root")
