"""What a run hands over stands under its name only once it has been verified."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cosmos3_train.commands import delivery
from cosmos3_train.config import Tuning
from cosmos3_train.export.folder import VerificationError
from cosmos3_train.export.verify import verify_adapter, verify_merged
from tests.export.trained import PICO, robot, token_samples, trained_pico


@pytest.fixture
def run(tmp_path, monkeypatch) -> Any:
    """A finished run, as far as an export looks at it."""
    tuning = Tuning(method="hybrid", rank=4)
    model = SimpleNamespace(path="example/Pico", random={}, base_precision="dtype")
    made = SimpleNamespace(
        experiment=SimpleNamespace(name="a", model=model, tuning=tuning),
        folder=tmp_path / "a",
        loaded=SimpleNamespace(model=model),
        backbone=trained_pico(tuning),
    )
    monkeypatch.setattr(delivery, "model_folder", lambda model: PICO)
    monkeypatch.setattr(delivery, "trained", lambda run: contextlib.nullcontext())
    monkeypatch.setattr(delivery, "robots_of", lambda run: [robot()])
    monkeypatch.setattr(delivery, "probe_samples", lambda run: token_samples(("policy",)))
    return made


VERIFIERS: dict[str, Callable[..., Any]] = {"adapter": verify_adapter, "merged": verify_merged}


@pytest.mark.parametrize("form", VERIFIERS)
def test_an_export_is_verified_before_it_gets_its_name(form, run, monkeypatch, upstream_here):
    named = run.folder / "export" / form
    seen: list[Path] = []

    def look(new: Path, *arguments: Any, **options: Any) -> Any:
        assert not named.exists()
        seen.append(new)
        return VERIFIERS[form](new, *arguments, **options)

    monkeypatch.setattr(delivery, f"verify_{form}", look)
    folder, report = delivery.export(run, cast(delivery.Form, form))
    assert folder == named and len(seen) == 1 and not seen[0].exists()
    assert (named / "verification.json").is_file() and report.forms.keys() >= {form}
    assert [path.name for path in named.parent.iterdir()] == [form]


@pytest.mark.parametrize("form", VERIFIERS)
def test_one_that_fails_never_gets_it(form, run, tmp_path, monkeypatch):
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise VerificationError("other numbers")

    monkeypatch.setattr(delivery, f"verify_{form}", refuse)
    output = tmp_path / "mine"
    with pytest.raises(VerificationError, match=r"^other numbers; the export is kept as .*/mine\.refused"):
        delivery.export(run, cast(delivery.Form, form), output)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.refused"]
