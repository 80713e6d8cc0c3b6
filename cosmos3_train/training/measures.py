"""What is measured of a run while it trains: held-out loss, action error in the robot's units, closed loop.

Every evaluation is written to `evaluations/step_NNNNNN.json`, films beside it; the report reads them. Closed loop is
run at the first and the last evaluation only, from the same seeds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cosmos3_train.config import Evaluation
from cosmos3_train.data.files import write_whole
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.evaluation.closed_loop import Episode, mean_coverage, standard_error, still_coverage
from cosmos3_train.evaluation.heldout import HeldoutLoss, action_tasks
from cosmos3_train.evaluation.pictures import draw_film
from cosmos3_train.evaluation.protocol import measure_actions, measure_closed_loop, measure_loss
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.training.disk import told_in_one_line
from cosmos3_train.training.run import Run

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations"


def measure(run: Run) -> dict[str, float]:
    """Evaluate a run where it stands, write what was found, and return it as flat metrics."""
    config, step = run.experiment.evaluation, run.module.position.step
    border = step in (0, run.experiment.training.steps)
    encoder = run.encoder.plain()
    found: dict[str, Any] = {"step": step}
    metrics: dict[str, float] = {}
    loss = measure_loss(run.backbone, encoder, run.opened, run.experiment)
    if loss is not None:
        found["loss"] = asdict(loss)
        metrics |= loss.metrics()
    robots = [
        (name, dataset, entry)
        for name, (dataset, entry) in run.opened.items()
        if isinstance(dataset, PreparedDataset) and dataset.has_robot
    ]
    for name, dataset, entry in robots:
        prefix = "heldout" if len(robots) == 1 else f"heldout/{name}"
        tasks = action_tasks(entry.tasks)
        for place, error in enumerate(measure_actions(run.backbone, encoder, dataset, tasks, run.experiment)):
            kind = error.task if place else "action"
            found.setdefault(kind, {})[name] = asdict(error) | {"error": error.error, "constant": error.constant}
            metrics |= error.metrics(prefix) if place == 0 else {f"{prefix}/{kind}_error": error.error}
        if border and config.closed_loop_episodes and dataset.embodiment.simulator:
            closed = _closed_loop(run, encoder, dataset, config, step)
            found.setdefault("closed_loop", {})[name] = closed
            metrics |= {f"closed_loop/{name}/coverage": closed["coverage"]}
    path = run.folder / EVALUATIONS / f"step_{step:06d}.json"
    with _writing(path, "what was measured"):
        write_whole(path, (json.dumps(found, indent=1) + "\n").encode())
    shown = {k: v for k, v in metrics.items() if "/band_" not in k}
    logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    return metrics


def read_evaluation(folder: Path, step: int) -> dict[str, Any] | None:
    """What `measure` wrote at a step, None where it was not measured then."""
    path = folder / EVALUATIONS / f"step_{step:06d}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def loss_of(found: Mapping[str, Any] | None) -> HeldoutLoss | None:
    """The held-out loss of an evaluation that was read back."""
    return HeldoutLoss(**found["loss"]) if found and "loss" in found else None


def episodes_of(closed: Mapping[str, Any], which: str = "episodes") -> list[Episode]:
    """The episodes of a closed loop that was read back, without their films."""
    return [Episode(**row) for row in closed[which]]


def film_path(folder: Path, name: str, step: int, seed: int) -> Path:
    """Where the film strip of an episode lies."""
    return folder / EVALUATIONS / f"{name}_step_{step:06d}_seed_{seed}.png"


# ------------------------------------------------------------------------------------------------ details


@contextmanager
def _writing(path: Path, what: str) -> Iterator[None]:
    with told_in_one_line(f"{path}: {what}"):
        path.parent.mkdir(exist_ok=True)  # no parents: where a mount is gone, they would be made below it
        yield


def _closed_loop(run: Run, encoder: Encoder, dataset: PreparedDataset, config: Evaluation, step: int) -> dict[str, Any]:
    simulator = dataset.embodiment.simulator
    assert simulator is not None
    episodes = measure_closed_loop(run.backbone, encoder, dataset, run.experiment, config.closed_loop_episodes)
    for episode in episodes:
        if episode.frames:
            path = film_path(run.folder, dataset.name, step, episode.seed)
            with _writing(path, "the film"):
                draw_film(path, episode, title=f"seed {episode.seed}, largest coverage {episode.max_coverage:.2f}")
    found = {
        "simulator": simulator,
        "coverage": mean_coverage(episodes),
        "standard_error": standard_error(episodes),
        "episodes": [_without_film(e) for e in episodes],
    }
    if step == 0 or not config.before:
        still = still_coverage(simulator, [episode.seed for episode in episodes], dataset.embodiment)
        found |= {"still": [_without_film(e) for e in still], "still_coverage": mean_coverage(still)}
    return found


def _without_film(episode: Episode) -> dict[str, Any]:
    return asdict(replace(episode, frames=[], times=[]))
