"""cosmos3 plan EXPERIMENT --gpu KEY: memory, time and what would make it fit, before a run and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cosmos3_train.commands.check_model import reasoner_prompts
from cosmos3_train.commands.console import FINISHED, say, say_table
from cosmos3_train.commands.plan_data import read_kinds
from cosmos3_train.config import Loaded, UserError
from cosmos3_train.model.attention import BACKENDS, obstacle_on
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import DTYPES, config_folder, fetched_folder, load_parts
from cosmos3_train.model.vision import vision_numbers
from cosmos3_train.training.datamodule import caches_reasoner
from cosmos3_train.training.gpus import TAKEN_MIB, Gpu, gpu_called
from cosmos3_train.training.measured import MEASURED
from cosmos3_train.training.plan import GIB, Plan, Workload, attention_on, predict, remedies
from cosmos3_train.training.plan_memory import read_architecture

NANO_TOKENIZER = 705_000_000
"""Weights of the published checkpoints' video tokenizer, about."""


@dataclass(frozen=True)
class Opened:
    """A workload, and what the table says of its data."""

    workload: Workload
    rows: list[tuple[str, str]]


def run(loaded: Loaded, *, gpu: str, gpus: int | None) -> int:
    """Print what the run would take.

    Args:
        gpu: a key of the table of GPUs;  gpus: how many of them; None takes the experiment's.

    Raises:
        UserError: there is no such GPU, or a run would refuse the settings too.
    """
    if gpus is not None and gpus < 1:
        raise UserError(f"--gpus {gpus}: a run has at least 1")
    opened = open_workload(loaded, gpu_called(gpu), gpus or loaded.experiment.strategy.devices)
    workload, plan = opened.workload, predict(opened.workload)
    say(f"{loaded.experiment.name} on {workload.gpus} × {workload.gpu.key}: nothing is loaded, all is predicted")
    say()
    say_table([*opened.rows, ("a step", _step(workload)), ("attention", _attention(workload))])
    say()
    memory = [(item.what, item.bytes) for item in plan.memory.items]
    memory.append(("the run, on each GPU", sum(size for _, size in memory)))
    if plan.memory.making:
        memory.append(("before it, the tower that makes the reasoner cache", plan.memory.making))
    say_table([(what, f"{size / GIB:7.2f} GiB") for what, size in memory])
    word = "it fits" if plan.fits else "IT DOES NOT FIT"
    say(f"{word}: {_needed(plan) / GIB:.1f} of {workload.gpu.bytes / GIB:.1f} GiB")
    if not plan.tower_fits:
        say(
            "THE TOWER BEFORE IT DOES NOT FIT: make the reasoner cache on a larger GPU, or on the CPU, by 'cosmos3 "
            "prepare --cache reasoner' with CUDA_VISIBLE_DEVICES empty"
        )
    say()
    seconds = plan.seconds
    parts = {"products": seconds.linear, "attention": seconds.attention, "element-wise": seconds.elementwise}
    if workload.gpus > 1:
        parts["between GPUs"] = seconds.told
    say_table([(what, f"{number:8.3f} s") for what, number in parts.items()])
    say(f"{_rate(plan)}, {plan.mfu:.0%} MFU by the yardstick's count; compilation and waiting for data not counted")
    others = remedies(workload)
    if others:
        say()
        say_table(_others(plan, {remedy.words: remedy.plan for remedy in others}), widest=100)
    say()
    for note in _notes(workload.gpu, workload.gpus, any("--gpus" in remedy.words for remedy in others)):
        say(note)
    return FINISHED


def open_workload(loaded: Loaded, gpu: Gpu, gpus: int) -> Opened:
    """Everything that a prediction is made of.

    Raises:
        UserError: a run would refuse the settings too, or the data cannot be read.
    """
    model, experiment = loaded.model, loaded.experiment
    folder = config_folder(model)
    whole = all((folder / part).is_dir() for part in ("text_tokenizer", "vae"))
    parts = load_parts(model, torch.device("cpu"), vae_weights=False) if whole else None
    architecture = read_architecture(folder / "transformer", experiment, model)
    encoder = None if parts is None else Encoder(parts, experiment.embodiments)
    data = read_kinds(loaded, architecture.layout, encoder)
    sight = None if encoder is None else encoder.sight
    # A random model stands for one of its size, but for the tokenizer that it is given.
    own = None if parts is None or model.random else parts.vae
    tokenizer = NANO_TOKENIZER if own is None else sum(p.numel() for p in own.parameters())
    cached = caches_reasoner(loaded)
    workload = Workload(
        experiment=experiment,
        gpu=gpu,
        gpus=gpus,
        kinds=data.kinds,
        one_prompt=data.one_prompt,
        cached=cached,
        makes_cache=not (cached and encoder is not None and _cache_is_made(loaded, encoder)),
        tokenizer_bytes=tokenizer * DTYPES[model.vae_dtype].itemsize,
        architecture=architecture,
        vision_bytes=0 if sight is None else vision_numbers(sight.config) * DTYPES[model.dtype].itemsize,
    )
    return Opened(workload, data.rows)


def _cache_is_made(loaded: Loaded, encoder: Encoder) -> bool:
    """Whether keys and values of every prompt are on disk. Random weights are drawn anew on each kind of device, so
    what a GPU would find here is not told."""
    folder = fetched_folder(loaded.model)
    if loaded.model.random or folder is None:
        return False
    prompts = reasoner_prompts(folder, loaded, loaded.experiment.data.datasets, encoder)
    return all(found is not None and not found.missing for found in prompts.values())


def _step(workload: Workload) -> str:
    training = workload.experiment.training
    count, budget = training.samples_per_step, training.tokens_per_micro_batch
    return f"{count} {'sample' if count == 1 else 'samples'}, micro-batches of up to {budget:,} tokens"


def _attention(workload: Workload) -> str:
    wanted = workload.experiment.model.attention
    taken = attention_on(workload.gpu, wanted)
    if wanted != "auto":
        return taken
    better = BACKENDS[: BACKENDS.index(taken)]
    lacking = "; ".join(f"not {backend}: {obstacle_on(backend, workload.gpu.major)}" for backend in better)
    return f"{taken}, as installed here ({lacking})" if lacking else f"{taken}, as installed here"


def _rate(plan: Plan) -> str:
    return f"{plan.seconds.total:.3g} s a step, {plan.samples_per_second:.3g} samples/s"


def _others(plan: Plan, others: Mapping[str, Plan]) -> list[tuple[str, ...]]:
    rows = [("instead", "GiB", "samples/s", "fits")]
    for words, other in {"as it is": plan, **others}.items():
        fits = "no" if not other.fits else "yes" if other.tower_fits else "with the cache made elsewhere"
        rows.append((words, f"{_needed(other) / GIB:.1f}", f"{other.samples_per_second:.3g}", fits))
    return rows


def _needed(plan: Plan) -> float:
    """Bytes of each GPU: the run's alone, where the cache is made elsewhere."""
    return plan.memory.peak if plan.tower_fits else plan.memory.run


def _notes(gpu: Gpu, gpus: int, several: bool) -> list[str]:
    measured = sorted({row.gpu for row in MEASURED})
    found = [
        f"memory: {TAKEN_MIB / 1024:g} GiB is left to the driver and the CUDA context; not counted are what the "
        "allocator keeps beyond what is used, and measuring between steps"
    ]
    if gpu.key not in measured:
        found.append(
            f"times: rates were measured on {', '.join(measured)}; these are the same shares of {gpu.key}'s peaks"
        )
    if gpus > 1 or several:
        found.append("times: of several GPUs they are estimates, from four runs of fsdp2 on two and four H200")
    return found
