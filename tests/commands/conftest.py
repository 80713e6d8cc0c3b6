from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos3_train import cli
from tests.commands.tiny import make_model, make_project


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def cosmos3(project, monkeypatch) -> Callable[..., int]:
    """Runs a command line in the project's folder, in this process; gives its exit code."""
    monkeypatch.chdir(project)

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        code = ended.value.code
        assert isinstance(code, int)
        return code

    return run
