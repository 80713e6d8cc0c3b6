"""Finding a run again: its folder by name or path, its experiment as it was started, its trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cosmos3_train.config import Loaded, Strategy, UserError, nearest, project_root, read_experiment

if TYPE_CHECKING:
    from cosmos3_train.training.run import Run

EXPERIMENT = "experiment.yaml"


def find_run(name_or_path: str) -> Loaded:
    """The experiment of a run that was started, to be carried out by this process alone.

    Raises:
        UserError: there is no such run.
    """
    folder = run_folder(name_or_path)
    if folder is None:
        runs = project_root(Path.cwd() / "x") / "runs"
        known = [path.parent.name for path in runs.glob(f"*/{EXPERIMENT}")]
        raise UserError(
            f"{name_or_path}: no run of that name or folder ({EXPERIMENT} is missing).{nearest(name_or_path, known)}"
        )
    path = folder / EXPERIMENT
    experiment = read_experiment(path)
    alone = replace(experiment, strategy=Strategy(accelerator=experiment.strategy.accelerator))
    loaded = Loaded(experiment=alone, origin={}, root=project_root(path))
    if loaded.run_folder.resolve() != folder.resolve():
        raise UserError(
            f"{path}: its name is {experiment.name!r}, so it must lie in runs/{experiment.name}; move it there"
        )
    return loaded


def run_folder(name_or_path: str) -> Path | None:
    """The folder of a run, given as a path or as a name under runs/; None where there is none."""
    root = project_root(Path.cwd() / "x")
    for folder in (Path(name_or_path), root / "runs" / name_or_path):
        if (folder / EXPERIMENT).is_file():
            return folder
    return None


@contextmanager
def whole(run: Run) -> Iterator[None]:
    """Within the block the run has its understanding tower, also where it trained without, and the base's own weights,
    also where it rounded them: exports are compared so.

    What is lacking is read from the base into the host's memory, where the comparison is made, and the rest moves
    beside it.
    """
    import torch

    from cosmos3_train.model.loading import forget_understanding, read_understanding, unrounded
    from cosmos3_train.model.projections import part_shared
    from cosmos3_train.model.trainable import arrange_frozen

    backbone, model = run.backbone, run.loaded.model
    half = not backbone.understands
    if not half and model.base_precision == "dtype":
        yield
        return
    exact = replace(model, base_precision="dtype")
    place = backbone.proj_in.weight.device
    kept = {name: getattr(backbone, name) for name in ("recall", "attention_backend", "compiler")}
    part_shared(backbone)
    cast(Any, backbone).to("cpu")
    backbone.recall, backbone.attention_backend, backbone.compiler = None, "sdpa", None
    try:
        if half:
            read_understanding(backbone, exact, torch.device("cpu"))
        with unrounded(backbone, exact):
            yield
    finally:
        if half:
            forget_understanding(backbone)
        for name, value in kept.items():
            setattr(backbone, name, value)
        cast(Any, backbone).to(place)
        arrange_frozen(backbone, model.fp8_copies)


@contextmanager
def trained(run: Run) -> Iterator[None]:
    """Within the block the run holds the weights that are evaluated and exported: the average, where it keeps one."""
    average = run.module.average
    run.backbone.eval()
    with nullcontext() if average is None else average.in_place_of(run.trainables.parameters):
        yield
