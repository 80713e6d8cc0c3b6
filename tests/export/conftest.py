from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cosmos3_train.export import verify, verify_upstream


@pytest.fixture
def upstream_here(monkeypatch) -> None:
    """The comparison runs in this process, which saves the seconds that upstream takes to import. What blocks this
    package guards a name that nobody has; everything else is as it runs alone."""

    def run_here(scratch: Path, job: dict[str, Any]) -> verify.Rows:
        file = scratch / "job.json"
        file.write_text(json.dumps(job | {"blocked": "no_such_package"}), encoding="utf-8")
        verify_upstream.main(str(file))
        return json.loads(Path(job["result"]).read_text(encoding="utf-8"))

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(verify, "_run_alone", run_here)
