"""cosmos3 evaluate RUN|FOLDER --on DATASET_CARD: what a run, or any pipeline folder, is worth on a dataset.

Held-out loss by noise band, action error beside the two policies without a model, closed loop where the embodiment
names a simulator, and a report of it. Actions are de-normalised by the statistics that the model was trained with,
where they are known: those of the run's own log of that robot, or the ones in the pipeline's folder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cosmos3_train import config
from cosmos3_train.commands.console import FINISHED, say
from cosmos3_train.commands.delivery import device_name
from cosmos3_train.commands.runs import find_run, run_folder, trained
from cosmos3_train.config import Embodiment, Experiment, Loaded, Strategy, UserError, load_embodiment, project_root
from cosmos3_train.data.card import DatasetCard, load_card
from cosmos3_train.data.conversations import ConversationDataset
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.statistics import Statistics
from cosmos3_train.evaluation.closed_loop import mean_coverage, standard_error, still_coverage
from cosmos3_train.evaluation.heldout import action_tasks
from cosmos3_train.evaluation.pictures import draw_coverage, draw_film, draw_loss_by_band
from cosmos3_train.evaluation.protocol import FILMED, measure_actions, measure_closed_loop, measure_loss
from cosmos3_train.evaluation.report import Number, Picture, write_report
from cosmos3_train.export.usage import robot_statistics
from cosmos3_train.flow.tasks import sound_task
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import load_backbone, load_parts
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.sound import add_sound_tokenizer
from cosmos3_train.model.vision import load_eyes
from cosmos3_train.training.datamodule import open_dataset, without_reasoner_cache
from cosmos3_train.training.run import build
from cosmos3_train.training.strategy import device_for

EPISODES = 20


@dataclass(frozen=True)
class Subject:
    """What is measured: a backbone with its parts, and the experiment whose settings hold.

    title: for the report;  output: where it goes;  statistics: with which the robot was trained, None where unknown
    action_tasks: whose actions are measured: those of the run's mixture, or all that the dataset can feed a folder
    """

    title: str
    output: Path
    loaded: Loaded
    device: torch.device
    backbone: Cosmos3PackedTransformer
    encoder: Encoder
    statistics: Statistics | None
    action_tasks: list[str]


def run(name_or_path: str, card_path: Path, embodiment: str | None, episodes: int | None) -> int:
    """Measure, report, and say what was found.

    Args:
        embodiment: card by name or file; None takes the dataset card's.
        episodes: of the closed loop; None takes the run's, or 20.

    Raises:
        UserError: no such run or folder, or the data does not allow it.
    """
    began = time.monotonic()
    card = load_card(card_path)
    root = project_root(card_path)
    name = embodiment or card.embodiment
    robot = None
    of_run = run_folder(name_or_path) is not None
    if (
        name
        and card.format != "conversations"
        and not card.shows_clips
        and not (of_run and name in find_run(name_or_path).experiment.embodiments)
    ):
        robot = load_embodiment(name, root)
    if not of_run and Path(name_or_path).is_dir():
        return _measure(_folder_subject(Path(name_or_path), card, card_path, robot, root), robot, episodes, began)
    loaded = find_run(name_or_path)
    if name in loaded.experiment.embodiments:
        robot = loaded.experiment.embodiments[name]  # the run's own card, whatever the file says by now
    built = build(without_reasoner_cache(loaded), "evaluate")  # another log's prompts are in no cache of the run's
    with trained(built):
        step = built.module.position.step
        measured = _with_dataset(loaded, card, card_path, robot)
        subject = Subject(
            title=f"Run {loaded.experiment.name} at step {step} on {card.name}",
            output=loaded.run_folder / "evaluations" / f"{card.name}_step_{step:06d}",
            loaded=measured,
            device=built.device,
            backbone=built.backbone,
            encoder=_encoder(built.encoder, robot, loaded.experiment),
            statistics=_statistics_of_run(built.opened, robot),
            action_tasks=action_tasks(measured.experiment.data.datasets[card.name].tasks),
        )
        return _measure(subject, robot, episodes, began)


# ------------------------------------------------------------------------------------------------ what is measured


def _folder_subject(folder: Path, card: DatasetCard, card_path: Path, robot: Embodiment | None, root: Path) -> Subject:
    """A pipeline folder, merged or published."""
    if not (folder / "transformer" / "config.json").is_file():
        raise UserError(f"{folder}: neither a run (experiment.yaml) nor a pipeline folder (transformer/config.json)")
    device = device_for(Strategy())
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = config.Model(path=str(folder.resolve()), dtype=dtype, checkpoint_activations=False)
    experiment = Experiment(name=folder.resolve().name, model=model, embodiments={robot.name: robot} if robot else {})
    encoder = Encoder(load_parts(model, device), experiment.embodiments)
    return Subject(
        title=f"{folder.resolve().name} on {card.name}",
        output=folder.resolve().parent / f"{folder.resolve().name}_evaluations" / card.name,
        loaded=_with_dataset(Loaded(experiment, {}, root), card, card_path, robot),
        device=device,
        backbone=load_backbone(model, device),
        encoder=encoder,
        statistics=robot_statistics(folder, robot.name) if robot else None,
        action_tasks=action_tasks(dict.fromkeys(card.tasks, 1.0)) or ["policy"],
    )


def _encoder(trained_with: Encoder, robot: Embodiment | None, experiment: Experiment) -> Encoder:
    cards = experiment.embodiments | ({robot.name: robot} if robot else {})
    for tokenizer in (trained_with.parts.vae, trained_with.parts.sound_tokenizer):
        if tokenizer is not None:
            tokenizer.to(device_for(experiment.strategy))
    return trained_with.plain(cards)


def _with_dataset(loaded: Loaded, card: DatasetCard, card_path: Path, robot: Embodiment | None) -> Loaded:
    """The experiment with that dataset alone: the run's own entry where it has it, so that held-out stays held out."""
    experiment, wanted = loaded.experiment, card_path.resolve()
    own = [
        entry
        for entry in experiment.data.datasets.values()
        if entry.card and (loaded.root / entry.card).resolve() == wanted
        if robot is None or entry.embodiment == robot.name
    ]
    entry = config.Dataset(
        tasks={task: 1.0 for task in card.tasks} if card.shows_clips else {},
        prepared=f"prepared/evaluate_{card.name}_{robot.name}" if robot else f"prepared/{card.name}",
        card=str(wanted),
        embodiment=robot.name if robot else None,
    )
    if own:  # what is measured is never changed, nor cached for one measuring
        entry = replace(
            own[0], statistics=None, cache_latents=False, cache_reasoner=False, augment=config.Augment()
        )  # normalised as the robot was trained all the same
    data = replace(experiment.data, datasets={card.name: entry})
    return replace(loaded, experiment=replace(experiment, data=data, embodiments={robot.name: robot} if robot else {}))


def _statistics_of_run(opened, robot: Embodiment | None) -> Statistics | None:
    for dataset, _ in opened.values():
        known = isinstance(dataset, PreparedDataset) and dataset.has_robot
        if robot is not None and known and dataset.embodiment.name == robot.name:
            return dataset.statistics
    return None


# ------------------------------------------------------------------------------------------------ measuring


def _measure(subject: Subject, robot: Embodiment | None, episodes: int | None, began: float) -> int:
    experiment = subject.loaded.experiment
    (name, entry), *_ = experiment.data.datasets.items()
    add_sound_tokenizer(subject.encoder.parts, subject.loaded.model, subject.device, sound_task(entry.tasks))
    dataset = open_dataset(subject.loaded, name, entry, subject.encoder)
    if isinstance(dataset, ConversationDataset) and dataset.shows_pictures and subject.backbone.see is None:
        subject.backbone.see = load_eyes(subject.loaded.model, subject.device, dataset.name)
    if isinstance(dataset, PreparedDataset) and subject.statistics is not None:
        dataset.use_statistics(subject.statistics)  # before anything is measured: all of it on the training's scale
    loss = measure_loss(subject.backbone, subject.encoder, {dataset.name: (dataset, entry)}, experiment)
    pictures, numbers, facts = [], {}, _facts(subject, dataset)
    if loss is not None:
        numbers |= loss.metrics()
        if loss.by_band:
            path = draw_loss_by_band(subject.output / "loss_by_band.png", loss)
            pictures.append(Picture(path, f"Loss on {loss.samples} held-out samples at each noise level."))
    if isinstance(dataset, PreparedDataset) and dataset.has_robot:
        measured = measure_actions(subject.backbone, subject.encoder, dataset, subject.action_tasks, experiment)
        for place, error in enumerate(measured):
            if place:
                numbers["policy_error"] = error.error
                continue
            numbers |= error.metrics() | {f"action_error_{name}": e.overall for name, e in error.rmse.items()}
            facts |= {"held-out windows of the action error": error.windows, "task": error.task}
    count = episodes if episodes is not None else experiment.evaluation.closed_loop_episodes or EPISODES
    if isinstance(dataset, PreparedDataset) and dataset.has_robot and dataset.embodiment.simulator and count:
        numbers |= _closed_loop(subject, dataset, count, pictures)
        facts["closed-loop episodes"] = count
        facts["seeds from"] = experiment.evaluation.closed_loop_first_seed
    numbers["seconds"] = time.monotonic() - began
    page = write_report(subject.output, numbers, pictures, title=subject.title, facts=facts)
    say(subject.title)
    if isinstance(dataset, PreparedDataset) and dataset.has_robot:
        say(f"  normalised by {facts['normalised by']}")
    for key in (
        "heldout/loss",
        "action_error_model",
        "action_error_mean",
        "action_error_hold",
        "policy_error",
        "coverage",
        "coverage_still",
    ):
        if key in numbers:
            say(f"  {key}: {numbers[key]:.4g}")
    say(f"  report: {page}")
    return FINISHED


def _closed_loop(subject: Subject, dataset: PreparedDataset, count: int, pictures: list[Picture]) -> dict[str, float]:
    robot = dataset.embodiment
    assert robot.simulator is not None
    found = measure_closed_loop(subject.backbone, subject.encoder, dataset, subject.loaded.experiment, count)
    still = still_coverage(robot.simulator, [episode.seed for episode in found], robot)
    path = draw_coverage(subject.output / "coverage.png", found, still=still)
    pictures.append(Picture(path, f"The largest coverage of each of {count} episodes."))
    for episode in found[:FILMED]:
        path = draw_film(subject.output / f"seed_{episode.seed}.png", episode)
        pictures.append(Picture(path, f"What the policy saw in episode {episode.seed}."))
    return {
        "coverage": mean_coverage(found),
        "coverage_standard_error": standard_error(found),
        "coverage_still": mean_coverage(still),
    }


def _facts(subject: Subject, dataset: PreparedDataset | ConversationDataset) -> dict[str, Number]:
    experiment = subject.loaded.experiment
    return {
        "model": experiment.model.path,
        "dataset": dataset.name,
        "held-out windows": dataset.count("heldout"),
        "normalised by": "the statistics it was trained with" if subject.statistics else "the dataset's own statistics",
        "solver steps": experiment.evaluation.solver_steps,
        "seed": experiment.training.seed,
        "device": device_name(subject.device),
    }
