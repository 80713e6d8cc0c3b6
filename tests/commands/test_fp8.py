"""A base in FP8 as a user meets it: checked, trained on, exported both ways for the base as it was published."""

from __future__ import annotations

import json

import pytest

from tests.commands.tiny import QUICK


@pytest.mark.slow
def test_a_run_on_a_rounded_base_is_exported_for_the_base_itself(cosmos3, project, tiny_model, capsys, caplog):
    line = (
        "experiments/nano_policy_hybrid.yaml",
        *QUICK,
        "data.datasets.pusht_moves.cache_latents=false",
        "data.datasets.pusht_moves.cache_reasoner=true",
        "data.datasets.pusht_moves.prepared=prepared/rounded",
        "model.base_precision=fp8",
        f"model.path={tiny_model}",
        "name=rounded",
    )
    assert cosmos3("check", *line) == 0
    assert "fp8 (e4m3, a scale a row) in the decoder layers, both layouts" in capsys.readouterr().out
    assert cosmos3("train", *line, "training.ema_decay=0.5") == 0
    # The logger writes to the stream of whichever test set it up first, and propagates until one has.
    assert "on this CPU they are multiplied in float32" in capsys.readouterr().err + caplog.text
    run = project / "runs" / "rounded"
    assert cosmos3("export", "rounded", "--to", "merged") == 0
    for form in ("adapter", "merged"):
        verified = json.loads((run / "export" / form / "verification.json").read_text())
        assert verified["relative_difference"] <= 1e-5 and 1e-3 < verified["rounded_base"] < 0.5
        assert "rounded to fp8" in (run / "export" / form / "README.md").read_text()
    assert "fp8 in the decoder layers; exported for the base" in (run / "report.html").read_text()
    assert cosmos3("train", *line, "training.ema_decay=0.5", "model.base_precision=dtype") == 2
    assert "model.base_precision is 'dtype', but the run there was started with 'fp8'" in capsys.readouterr().err
