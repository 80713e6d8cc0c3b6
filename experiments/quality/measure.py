"""Do an FP8 base and the caches cost quality? python experiments/quality/measure.py SIZE, from the project's root.

SIZE is pico (quality_pico.yaml), nano2 (quality_nano2.yaml: two random layers of Nano's width) or nano (its 36 layers,
gradients alone). Key=value pairs after it change the experiment. What is done, each in a process of its own:

    plain_0 plain_1 plain_2    the experiment as it stands, by three seeds: no FP8, no caches
    fp8_0 ...                  with its base in FP8, by the same seeds
    caches_0 ...               with cached latents and cached keys and values of the reasoner
    both_0 ...                 with all of it
    gradients                  of LoRA before the first step, of one batch with one noise, each way against plain

`--only NAME` does one of them, so that several GPUs can do several at a time (CUDA_VISIBLE_DEVICES). What is finished
is not done again, unless by `--fresh`. `--report` gathers what is finished, says what holds, and writes
quality_SIZE.json and quality_SIZE.png beside this file.

A seed draws everything that is random: the order of the data, noise, LoRA, new heads, and a random base too. Held-out
losses are of the same windows, noise levels and noise for every run and seed. A run with FP8 is measured with it, and
one with cached latents by them: as they are trained. A way holds where the mean of its seeds is no worse than the worst
of the plain ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cosmos3_train.commands.console import FAILED, FINISHED, USER_ERROR, say, say_error
from cosmos3_train.config import Loaded, UserError, load_experiment
from cosmos3_train.data.files import write_whole
from cosmos3_train.data.mixture import Mixture, StepDataset
from cosmos3_train.evaluation.pictures import make_panels, read_metrics, save_figure
from cosmos3_train.evaluation.protocol import measure_loss
from cosmos3_train.runtime import draw, offline_hub, set_up_logging
from cosmos3_train.training.run import (
    Run,
    TrainingFailed,
    build,
    claim_folder,
    is_finished,
    quieten_lightning,
    train,
)

HERE = Path(__file__).resolve().parent
SIZES = {
    "pico": ("quality_pico.yaml", []),
    "nano2": ("quality_nano2.yaml", []),
    "nano": ("quality_nano2.yaml", ["model.random.num_hidden_layers=36"]),
}
FP8 = ["model.base_precision=fp8"]
CACHES = ["data.datasets.moves.cache_latents=true", "data.datasets.moves.cache_reasoner=true"]
WAYS = {"plain": [], "fp8": FP8, "caches": CACHES, "both": FP8 + CACHES}
RUNS = tuple(f"{way}_{seed}" for way in WAYS for seed in range(3))
GRADIENTS = "gradients"

HELDOUT_SEED = 0
"""Of the held-out order, noise levels and noise, whatever the run's seed."""
LORA_B_STD = 0.02
"""LoRA starts with B = 0, where A has no gradient."""
LEAST_FALL, LEAST_COSINE = 0.30, 0.99

COLOURS = {"plain": "#9aa1a9", "fp8": "#c8541c", "caches": "#1f6fb2", "both": "#7a4fa3"}
TITLES = {"plain": "plain, three seeds", "fp8": "FP8 base", "caches": "caches", "both": "FP8 base and caches"}


def load(size: str, name: str, overrides: Sequence[str]) -> Loaded:
    """The experiment of a size as the run of that name, WAY_SEED, has it.

    Raises:
        UserError: no such name, or the experiment is wrong.
    """
    way, _, seed = name.partition("_")
    if way not in WAYS or not seed.isdigit():
        known = f"{GRADIENTS}, or one of {', '.join(WAYS)} and a seed, as in {RUNS[-1]}"
        raise UserError(f"--only is {name!r}; it is {known}")
    file, own = SIZES[size]
    as_named = [f"name=quality_{size}_{name}", f"training.seed={seed}"]
    if size != "pico":  # each base has its own keys and values
        as_named += [f"model.random_seed={seed}", f"data.datasets.moves.prepared=prepared/quality_{size}_{seed}"]
    return load_experiment(HERE / file, [*own, *WAYS[way], *overrides, *as_named])


# ------------------------------------------------------------------------------------------------ runs


def carry_out(loaded: Loaded, *, fresh: bool) -> bool:
    """The run, or what is left of it. Returns whether it is finished."""
    return train(loaded, fresh=fresh, evaluate=heldout) == "finished"


def heldout(run: Run) -> dict[str, float]:
    """The held-out loss where a run stands, by one draw for all seeds."""
    experiment = run.experiment
    alike = replace(experiment, training=replace(experiment.training, seed=HELDOUT_SEED))
    loss = measure_loss(run.backbone, run.encoder.plain(), run.opened, alike)
    assert loss is not None, "the experiments hold episodes out"
    return loss.metrics()


# ------------------------------------------------------------------------------------------------ gradients


def compare_gradients(size: str, overrides: Sequence[str], *, fresh: bool) -> None:
    """Write gradients.json: for each way the cosine with plain's gradient of every layer, and of the worst matrix."""
    plain = load(size, "plain_0", overrides)
    path = _gradients_path(plain, size)
    if path.is_file() and not fresh:
        return
    exact = first_gradients(plain)
    found: dict[str, Any] = {"machine": _machine(plain), "ways": {}}
    for way in (way for way in WAYS if way != "plain"):
        gradients = first_gradients(load(size, f"{way}_0", overrides))
        assert gradients.keys() == exact.keys()
        matrices = {name: _cosine([gradients[name]], [value]) for name, value in exact.items()}
        layers: dict[int, list[str]] = {}
        for name in exact:
            layers.setdefault(int(name.split(".")[1]), []).append(name)
        cosines = [_cosine([gradients[n] for n in layers[at]], [exact[n] for n in layers[at]]) for at in sorted(layers)]
        worst = min(matrices, key=lambda name: matrices[name])
        found["ways"][way] = {"layers": cosines, "worst_matrix": [worst, matrices[worst]]}
        say(f"{way}: cosine of LoRA's gradients with plain's, by layer: {' '.join(f'{c:.5f}' for c in cosines)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(found, indent=1) + "\n").encode())


def first_gradients(loaded: Loaded) -> dict[str, Tensor]:
    """float32 on the CPU, by name: of LoRA's A and B, both random, of the first step. The device is left empty."""
    found = _first_gradients(loaded)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _first_gradients(loaded: Loaded) -> dict[str, Tensor]:
    # Under a name that no run has: a finished run's would be put where its last checkpoint stands.
    name = f"{loaded.experiment.name}_{GRADIENTS}"
    run = build(replace(loaded, experiment=replace(loaded.experiment, name=name)))
    lora = {name: p for name, p in run.trainables.parameters.items() if "lora_" in name}
    for name, parameter in lora.items():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=draw(0, "quality", name))
            parameter.data.copy_(drawn * LORA_B_STD)
    training = run.experiment.training
    first = StepDataset(Mixture(run.opened, training.seed), training.samples_per_step, 0, 1, 1)[0]
    step = run.module.packer(first)
    counts = run.module.step_counts(step)
    for pack in step.packs:
        run.module.weighted(run.module.pack_losses(pack.to(run.device)), counts).backward()
    found = {}
    for name, parameter in lora.items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.float().cpu()
    return found


def _cosine(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    a, b = (torch.cat([part.flatten() for part in parts]).double() for parts in (found, exact))
    return float(cosine_similarity(a, b, dim=0))


def _gradients_path(plain: Loaded, size: str) -> Path:
    return plain.run_folder.with_name(f"quality_{size}_{GRADIENTS}") / "gradients.json"


def _machine(loaded: Loaded) -> dict[str, str]:
    gpu = torch.cuda.is_available() and loaded.experiment.strategy.accelerator != "cpu"
    device = torch.cuda.get_device_name() if gpu else "cpu"
    return {"device": device, "torch": torch.__version__, "dtype": loaded.experiment.model.dtype}


# ------------------------------------------------------------------------------------------------ the report


def report(size: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Gather what is finished, say what holds, and write it down.

    Raises:
        UserError: nothing is finished, or a run was carried out with other settings than these.
    """
    plain = load(size, "plain_0", overrides)
    experiment = plain.experiment
    names = sorted(
        folder.name.removeprefix(f"quality_{size}_")
        for way in WAYS
        for folder in plain.run_folder.parent.glob(f"quality_{size}_{way}_*")
        if is_finished(folder)
    )
    runs = {name: load(size, name, overrides) for name in names}
    for loaded in runs.values():
        claim_folder(loaded, fresh=False)  # refuses a run that was carried out with other settings
    metrics = {name: read_metrics(loaded.run_folder / "metrics.csv") for name, loaded in runs.items()}
    path = _gradients_path(plain, size)
    gradients = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not metrics and gradients is None:
        raise UserError(f"{plain.run_folder.parent}: no run of {size} is finished there")
    curves = {name: found["heldout/loss"] for name, found in metrics.items()}
    content = {
        "size": size,
        "machine": _machine(plain),
        "learning_rate": experiment.optimizer.learning_rate,
        "steps": experiment.training.steps,
        "samples_per_step": experiment.training.samples_per_step,
        "heldout_loss": {name: {"steps": steps, "values": values} for name, (steps, values) in curves.items()},
        "parts": {name: _first_and_last(found) for name, found in metrics.items()},
        "gradients": gradients,
        "lines": _loss_lines({name: values for name, (_, values) in curves.items()}) + _gradient_lines(gradients),
    }
    say(f"{size}, {experiment.model.dtype}, learning rate {experiment.optimizer.learning_rate:g}")
    missing = [name for name in (*RUNS, GRADIENTS) if name not in names and not (name == GRADIENTS and gradients)]
    if missing and size != "nano":
        say(f"  not finished: {', '.join(missing)}")
    for line in content["lines"]:
        say(f"  {'holds' if line['holds'] else 'DOES NOT HOLD'}: {line['text']}")
    write_whole(HERE / f"quality_{size}.json", (json.dumps(content, indent=1) + "\n").encode())
    picture = draw_quality(HERE / f"quality_{size}.png", size, curves, gradients)
    say(f"  {picture}")
    return content


def _first_and_last(metrics: Mapping[str, tuple[list[int], list[float]]]) -> dict[str, list[float]]:
    """Of each modality's held-out loss."""
    return {
        name.rpartition("/")[2]: [values[0], values[-1]]
        for name, (_, values) in metrics.items()
        if name.startswith("heldout/loss/") and "band" not in name
    }


def _loss_lines(losses: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """What is claimed of the runs that are there, each with whether it holds. The losses are a run's, first to last."""
    found: list[dict[str, Any]] = []
    seeds = {name: values for name, values in losses.items() if name.startswith("plain_")}
    for name, values in seeds.items():
        fall = 1 - values[-1] / values[0]
        text = f"{name}: held-out loss {values[0]:.4f} → {values[-1]:.4f}, a fall of {fall:.1%} (30 % at least)"
        found.append({"name": name, "fall": fall, "text": text, "holds": fall >= LEAST_FALL})
    if len(seeds) < 3:
        return found
    last = {name: values[-1] for name, values in losses.items()}
    low, high = (choose(last[name] for name in seeds) for choose in (min, max))
    for way in (way for way in WAYS if way != "plain"):
        ours = {name.partition("_")[2]: value for name, value in last.items() if name.startswith(f"{way}_")}
        if not ours:
            continue
        mean = statistics.fmean(ours.values())
        where = "above" if mean > high else "below (better than)" if mean < low else "within"
        alike = {seed: last[f"plain_{seed}"] for seed in ours if f"plain_{seed}" in last}
        apart = {seed: (ours[seed] - value) / (high - low) for seed, value in alike.items()}
        text = f"{way}: {' '.join(f'{value:.4f}' for value in ours.values())}, mean {mean:.4f}, is {where} the seeds' "
        text += f"{low:.4f} to {high:.4f} (spread {high - low:.4f}); from the same seeds, in spreads: "
        text += " ".join(f"{value:+.2f}" for value in apart.values())
        line = {"name": way, "low": low, "high": high, "mean": mean, "from_same_seed": apart}
        found.append(line | {"text": text, "holds": mean <= high})
    return found


def _gradient_lines(gradients: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    found = []
    for way, measured in ({} if gradients is None else gradients["ways"]).items():
        least, (worst, cosine) = min(measured["layers"]), measured["worst_matrix"]
        text = f"{way}: cosine of step 0's LoRA gradients in the worst of {len(measured['layers'])} layers {least:.5f}"
        text += f" (0.99 at least); of the worst matrix {cosine:.5f}, {worst.replace('.default.weight', '')}"
        found.append({"name": way, "least_cosine": least, "text": text, "holds": least >= LEAST_COSINE})
    return found


def draw_quality(
    path: Path,
    size: str,
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    gradients: Mapping[str, Any] | None,
) -> Path:
    """Held-out loss over steps, the seeds as a band, and beside it the cosines by layer. Returns `path`."""
    seeds = [curve for name, curve in curves.items() if name.startswith("plain_")]
    figure, panels = make_panels(2 * bool(curves) + bool(gradients))
    if curves:
        whole, end = panels[:2]
        for panel, first in ((whole, 0), (end, -2)):  # the end once more, where the spread can be seen
            if seeds:
                steps, values = seeds[0][0][first:], [curve[1][first:] for curve in seeds]
                low, high = ([choose(at) for at in zip(*values, strict=True)] for choose in (min, max))
                panel.fill_between(steps, low, high, color=COLOURS["plain"], alpha=0.35, linewidth=0)
            for name, (steps, values) in curves.items():
                way, width = name.partition("_")[0], 0.8 if name.startswith("plain") else 1.4
                label = TITLES[way] if name in ("plain_0", "fp8_0", "caches_0", "both_0") else None
                panel.plot(steps[first:], values[first:], color=COLOURS[way], linewidth=width, label=label)
            panel.set_xlabel("step")
        whole.set_ylim(bottom=0)
        whole.set_ylabel("held-out loss")
        whole.set_title(f"{size}: held-out velocity loss")
        whole.legend(frameon=False)
        end.set_title("its end")
    if gradients:
        panel = panels[-1]
        for way, measured in gradients["ways"].items():
            layers = range(len(measured["layers"]))
            panel.plot(layers, measured["layers"], color=COLOURS[way], marker="o", markersize=3, label=TITLES[way])
        panel.axhline(LEAST_COSINE, color="#333333", linestyle="--", linewidth=1)
        panel.set_title(f"{size}: step 0, LoRA's gradients")
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.set_ylabel("cosine with plain's")
        panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize=8)
    return save_figure(figure, path)


# ------------------------------------------------------------------------------------------------ the command


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--only", metavar="NAME", help="one of what is done, in this process, without the report")
    parser.add_argument("--report", action="store_true", help="gather what is finished; measure nothing")
    parser.add_argument("--fresh", action="store_true", help="do again what is finished")
    options = parser.parse_intermixed_args(words)
    offline_hub()
    set_up_logging()
    quieten_lightning()
    try:
        if options.only == GRADIENTS:
            compare_gradients(options.size, options.overrides, fresh=options.fresh)
        elif options.only:
            loaded = load(options.size, options.only, options.overrides)
            return FINISHED if carry_out(loaded, fresh=options.fresh) else FAILED
        elif options.report:
            report(options.size, options.overrides)
        else:
            for name in [GRADIENTS] if options.size == "nano" else [*RUNS, GRADIENTS]:
                command = [sys.executable, __file__, options.size, "--only", name, *options.overrides]
                subprocess.run([*command, *(["--fresh"] if options.fresh else [])], check=True)
            report(options.size, options.overrides)
    except UserError as error:
        say_error(error)
        return USER_ERROR
    except (TrainingFailed, subprocess.CalledProcessError) as error:
        say_error(error)
        return FAILED
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
