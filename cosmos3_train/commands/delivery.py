"""What a finished run hands over: the export, verified, and the report of everything that was measured on the way."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cosmos3_train.commands.runs import trained, whole
from cosmos3_train.config import Experiment, UserError
from cosmos3_train.data.mixture import Mixture
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.evaluation.pictures import draw_coverage, draw_loss_by_band, draw_loss_curve, read_metrics
from cosmos3_train.evaluation.protocol import FILMED
from cosmos3_train.evaluation.report import Picture, write_report
from cosmos3_train.export.adapter import write_adapter
from cosmos3_train.export.merged import write_merged
from cosmos3_train.export.upstream_inputs import make_probes
from cosmos3_train.export.usage import Robot
from cosmos3_train.export.verify import VerifyReport, read_report, verify_adapter, verify_merged
from cosmos3_train.model.loading import model_folder
from cosmos3_train.model.packing import Layout, pack
from cosmos3_train.training.measures import episodes_of, film_path, loss_of, read_evaluation
from cosmos3_train.training.run import Run
from cosmos3_train.types import TokenSample

Form = Literal["adapter", "merged"]
VERIFIED = 4
"""Samples at most that an export is verified with: one of each dataset and task, the first ones of the run."""
LOOKED_AT = 256
PICTURES = "pictures"


def export(run: Run, form: Form, output: Path | None = None) -> tuple[Path, VerifyReport]:
    """Write the run's result, load it with upstream's classes, and only then let it have its name.

    Args:
        output: the folder to be made; None takes runs/NAME/export/FORM.

    Returns:
        The folder, and how far upstream's numbers with it are from the trained model's.

    Raises:
        UserError: this run has no such form, or the folder, the disk or the memory does not allow it.
        VerificationError: the numbers differ; an earlier export stays, see `export.folder.whole_folder`.
    """
    experiment = run.experiment
    refuse_form(experiment, form)
    folder = output if output is not None else run.folder / "export" / form
    base = model_folder(run.loaded.model)
    names = {"run": experiment.name, "base_name": experiment.model.path, "robots": robots_of(run)}
    samples, backbone = probe_samples(run), run.backbone
    with trained(run):
        rounded = _velocities(run, samples) if run.loaded.model.base_precision == "fp8" else []
        with whole(run):
            moved = _largest_difference(rounded, _velocities(run, samples)) if rounded else None

            def verify(new: Path) -> VerifyReport:
                compare = verify_adapter if form == "adapter" else verify_merged
                return compare(new, base, backbone, samples, rounded_base=moved)

            if form == "adapter":
                write_adapter(backbone, folder, base, **names, verify=verify)
            else:
                write_merged(backbone, base, folder, **names, verify=verify)
    return folder, read_report(folder)


@torch.no_grad()
def _velocities(run: Run, samples: Sequence[TokenSample]) -> list[Tensor]:
    """Of each sample's modalities, as the run computes them."""
    backbone, layout, found = run.backbone, Layout.of(run.backbone.config), []
    for probe in make_probes(samples, layout):
        packed = pack([probe.sample], [probe.values], [probe.levels], layout)
        unread = replace(packed, text_out=packed.text_out[:0], labels=packed.labels[:0])  # a cache holds no text's end
        velocities = backbone(unread.to(backbone.proj_in.weight.device))
        found += [part.float().cpu() for part in (velocities.video, velocities.sound, velocities.action)]
    return found


def _largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True) if b.numel())


def refuse_form(experiment: Experiment, form: str) -> None:
    """Raise `UserError` where the run's result cannot be written in that form."""
    if form != "none" and experiment.model.random:
        raise UserError(f"export is {form!r}, but model.random draws the weights: nothing to deploy; use export=none")
    if form == "adapter" and experiment.tuning.method in ("tower", "full"):
        raise UserError(
            f"export is 'adapter', but tuning.method {experiment.tuning.method!r} trains whole weights, which are no "
            "adapter; use merged (export: merged in the experiment, --to merged on the command line)"
        )


def robots_of(run: Run) -> list[Robot]:
    """The robots of the run's logs, in the order of the experiment; one for each embodiment."""
    found: dict[str, Robot] = {}
    for dataset, _ in run.opened.values():
        if isinstance(dataset, PreparedDataset) and dataset.has_robot:
            card = dataset.embodiment
            found.setdefault(card.name, Robot(card, dataset.statistics, dataset.row(0)["instruction"]))
    return list(found.values())


def probe_samples(run: Run) -> list[TokenSample]:
    """The first sample of each dataset and task that the run trains on."""
    mixture = Mixture(run.opened, run.experiment.training.seed)
    kinds: dict[tuple[str, str], int] = {}
    for number in range(LOOKED_AT):
        pick = mixture.pick(number)
        kinds.setdefault((pick.dataset, pick.task), number)
    return run.encoder.plain().encode([mixture.sample(number) for number in sorted(kinds.values())[:VERIFIED]])


# ------------------------------------------------------------------------------------------------ the report


def report(run: Run, verified: VerifyReport | None, seconds: float) -> Path:
    """Write report.json and report.html into the run's folder.

    Args:
        verified: of the export, None where the experiment asks for none.
        seconds: since the command began.

    Returns:
        The path of report.html.
    """
    experiment = run.experiment
    before = read_evaluation(run.folder, 0) if experiment.evaluation.before else None
    after = read_evaluation(run.folder, experiment.training.steps) or {}
    numbers = measured_numbers(before, after)
    numbers |= {} if verified is None else {"export_relative_difference": verified.relative_difference}
    return write_report(
        run.folder,
        numbers | {"seconds": seconds},
        _pictures(run, before, after),
        title=f"Run {experiment.name}",
        summary=experiment.question,
        facts=_facts(run, verified, before or {}, after),
        units=_units(after),
    )


def measured_numbers(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> dict[str, Any]:
    """The headline numbers of two evaluations. The first robot has the plain names, others theirs behind a slash.

    An action error is compared with one of the same task alone: what was measured when a run began may be of another
    version of this package, which took another one first.
    """
    numbers: dict[str, Any] = {}
    for when, found in (("before", before or {}), ("after", after)):
        for place, (name, action) in enumerate(found.get("action", {}).items()):
            tail = f"/{name}" if place else ""
            if action["task"] == after.get("action", {}).get(name, action)["task"]:
                numbers[f"action_error_{when}{tail}"] = action["error"]
            numbers[f"action_error_constant{tail}"] = action["constant"]
            if name in found.get("policy", {}):
                numbers[f"policy_error_{when}{tail}"] = found["policy"][name]["error"]
        for place, (name, closed) in enumerate(found.get("closed_loop", {}).items()):
            tail = f"/{name}" if place else ""
            numbers[f"coverage_{when}{tail}"] = closed["coverage"]
            numbers[f"coverage_{when}_standard_error{tail}"] = closed["standard_error"]
            if "still_coverage" in closed:
                numbers[f"coverage_still{tail}"] = closed["still_coverage"]
        loss = loss_of(found)
        if loss is not None:
            numbers[f"heldout_loss_{when}"] = loss.total
            numbers |= {f"heldout_loss_{when}/{name}": value for name, value in loss.by_modality.items()}
    return numbers


def _pictures(run: Run, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[Picture]:
    folder = run.folder / PICTURES
    metrics = read_metrics(run.folder / "metrics.csv")
    found = [Picture(draw_loss_curve(folder / "loss.png", metrics), "Loss of the training steps, by modality.")]
    loss = loss_of(after)
    if loss is not None and loss.by_band:
        path = draw_loss_by_band(folder / "loss_by_band.png", loss, loss_of(before))
        found.append(Picture(path, f"Loss on {loss.samples} held-out samples at each noise level."))
    for name, closed in after.get("closed_loop", {}).items():
        earlier = (before or {}).get("closed_loop", {}).get(name)
        still = earlier if earlier and "still" in earlier else closed
        path = draw_coverage(
            folder / f"coverage_{name}.png",
            episodes_of(closed),
            episodes_of(earlier) if earlier else None,
            episodes_of(still, "still") if "still" in still else None,
        )
        found.append(Picture(path, f"{name}: the largest coverage of each of {len(closed['episodes'])} episodes."))
        for episode in closed["episodes"][:FILMED]:
            for when, step in (("before", 0), ("after", run.experiment.training.steps)):
                film = film_path(run.folder, _dataset_name(run, name), step, episode["seed"])
                if film.is_file():
                    found.append(Picture(film, f"{name}, seed {episode['seed']}, {when} training."))
    return found


def _dataset_name(run: Run, name: str) -> str:
    """The name that `training.measures` gives its films: the dataset's own, not the mixture entry's."""
    return run.opened[name][0].name


def _units(found: Mapping[str, Any]) -> dict[str, str]:
    """The unit of the action errors, where all channels of the first robot share one."""
    for action in found.get("action", {}).values():
        units = set(action["units"])
        unit = units.pop() if len(units) == 1 else ""
        kinds = ("action", "policy")
        return {f"{kind}_error_{name}": unit for kind in kinds for name in ("before", "after", "constant")}
    return {}


def _facts(
    run: Run, verified: VerifyReport | None, before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, float | int | str | bool | None]:
    experiment, training = run.experiment, run.experiment.training
    parameters = run.trainables.parameters.values()
    facts: dict[str, float | int | str | bool | None] = {
        "model": experiment.model.path,
        "datasets": ", ".join(f"{d.name} ({d.count('train')} train)" for d, _ in run.opened.values()),
        "embodiments": ", ".join(experiment.embodiments) or "none",
        "frozen weights while training": experiment.model.dtype
        if experiment.model.base_precision == "dtype"
        else "fp8 in the decoder layers; exported for the base's own",
        "tuning": experiment.tuning.method,
        "trained parameters": sum(p.numel() for p in parameters),
        "steps": training.steps,
        "samples a step": training.samples_per_step,
        "steps skipped": run.module.position.skipped,
        "seed": training.seed,
        "weights measured and exported": "their average" if training.ema_decay else "the last step's",
        "device": device_name(run.device),
    }
    for name, action in after.get("action", {}).items():
        facts[f"{name}: held-out windows of the action error"] = action["windows"]
        facts[f"{name}: task of the action error"] = action["task"]
    for name, closed in after.get("closed_loop", before.get("closed_loop", {})).items():
        seeds = [episode["seed"] for episode in closed["episodes"]]
        facts[f"{name}: closed-loop episodes"] = len(seeds)
        facts[f"{name}: their seeds"] = f"{min(seeds)} to {max(seeds)}"
    if verified is not None:
        facts |= {"export verified": verified.how, "export changes the base by": verified.change}
        if verified.rounded_base is not None:
            facts["the base in fp8 moves velocities by"] = verified.rounded_base
    return facts


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
