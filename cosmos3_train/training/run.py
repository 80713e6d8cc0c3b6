"""A run, from its folder to its last checkpoint: the table of contents of training.

    claim the folder → open the data → load the model → choose what trains → resume → fit → say how it ended

The same command again resumes an interrupted run, reports a finished one, and refuses a changed configuration by key.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

import lightning
import torch

from cosmos3_train.config import (
    Experiment,
    Loaded,
    UserError,
    first_line,
    flatten,
    read_experiment,
    to_plain,
    to_yaml,
)
from cosmos3_train.data.conversations import ConversationDataset
from cosmos3_train.data.files import alone_in, write_whole
from cosmos3_train.data.mixture import refuse_few_samples
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.model.base_identity import identify_base
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.fp8 import require_fp8
from cosmos3_train.model.loading import DTYPES, empty_backbone, load_backbone, load_parts, model_folder
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.reasoner_cache import CachedPrompts, Reasoner, ReasonerCache, remember
from cosmos3_train.model.sound import add_sound_tokenizer
from cosmos3_train.model.trainable import Trainables, arrange_frozen, make_trainable
from cosmos3_train.model.vision import load_eyes
from cosmos3_train.runtime import Interrupted, is_first_rank, node_count, rank, seed_everything, world_size
from cosmos3_train.training.batching import Packer
from cosmos3_train.training.budget import refuse_over_budget
from cosmos3_train.training.checkpoints import (
    Checkpoint,
    check_names,
    list_checkpoints,
    load_checkpoint,
    load_result,
)
from cosmos3_train.training.datamodule import (
    DATA,
    Opened,
    StepData,
    caches_reasoner,
    heard_task,
    open_datasets,
    pictures_in,
    reasoner_is_needed,
)
from cosmos3_train.training.loop import RunLoop
from cosmos3_train.training.module import PostTraining, TrainingFailed
from cosmos3_train.training.optimizer import load_optimizer_tensors
from cosmos3_train.training.progress import read_status, tell_failed, write_status
from cosmos3_train.training.room import with_room
from cosmos3_train.training.sharding import own_part, own_rows, shard, write_own_parts
from cosmos3_train.training.strategy import (
    PeerLost,
    connect,
    context_group,
    data_rank,
    device_for,
    device_mesh,
    make_strategy,
    shards_weights,
    zero_stage,
)
from cosmos3_train.training.throughput import StepTime
from cosmos3_train.training.zero import Zero, partition

logger = logging.getLogger(__name__)

EXPERIMENT = "experiment.yaml"
BASE = "base.json"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
"""What ranks but the first print, a file a rank."""

FREE = (
    "question",
    "hardware",
    "duration",
    "parts",
    "strategy",
    "logging",
    "benchmark",
    "evaluation",
    "export",
    "data.workers",
    "data.datasets.*.cache_latents",
    "data.datasets.*.cache_reasoner",
    "model.attention",
    "model.compile",
    "model.cuda_graphs",
    "model.fp8_copies",
    "model.checkpoint_activations",
    "training.tokens_per_micro_batch",
    "training.log_every_n_steps",
    "training.checkpoint_every_n_steps",
    "training.keep_checkpoints",
    "training.keep_every_n_steps",
    "optimizer.spike",
    "optimizer.patience",
)
"""Keys (* is any name) that may differ when a run goes on: they change how it is carried out, not what it computes; and
those of skipped steps, with which a run that was stopped for them may go on."""

Ended = Literal["finished", "interrupted"]


@dataclass(frozen=True)
class Run:
    """Everything of a run, built and ready: on its device, trainables in place, at the position of its checkpoint."""

    loaded: Loaded
    device: torch.device
    opened: Opened
    encoder: Encoder
    backbone: Cosmos3PackedTransformer
    trainables: Trainables
    module: PostTraining

    @property
    def experiment(self) -> Experiment:
        return self.loaded.experiment

    @property
    def folder(self) -> Path:
        return self.loaded.run_folder


Evaluate = Callable[[Run], Mapping[str, float]]
"""Measures a run where it stands; called on the first rank alone."""

Deliver = Callable[[Run], None]
"""Takes a run that has just finished; called on the first rank alone, with the whole model where something is to be
exported."""

Purpose = Literal["train", "replay", "evaluate", "export"]

Watch = Callable[[Run, StepTime], None]
"""Sees every step's time as soon as it is made, and the run as that step left it."""


def train(
    loaded: Loaded,
    *,
    fresh: bool = False,
    evaluate: Evaluate | None = None,
    deliver: Deliver | None = None,
    watch: Watch | None = None,
) -> Ended:
    """Carry out an experiment, or go on with it.

    Args:
        fresh: throw away the run that is in the folder.
        evaluate: called before the first step, every `evaluate_every_n_steps`, and after the last one.
        deliver: called once the run has made its last step; not for a run that was finished before.
        watch: called after every step.

    Raises:
        UserError: the configuration, the data or the checkpoint does not allow it.
        TrainingFailed: the numbers do not.
    """
    seed_everything(loaded.experiment.training.seed)
    with alone_in(loaded.run_folder) if is_first_rank() else nullcontext():
        if claim_folder(loaded, fresh):
            return "finished"
        try:
            return _carry_out(loaded, evaluate, deliver, watch)
        except Interrupted:  # before the first step or after the last; between them the loop obeys at a step's border
            _tell_interrupted(loaded)
            return "interrupted"


def _carry_out(loaded: Loaded, evaluate: Evaluate | None, deliver: Deliver | None, watch: Watch | None) -> Ended:
    with _memory_named(loaded, lambda: "while the model was loaded"):
        run = build(loaded)
    if not _fit(run, evaluate, watch):
        return "interrupted"
    if deliver is not None and is_first_rank():
        if not run.module.sharded:
            run.module.to(run.device)  # Lightning's teardown has moved it to the CPU
        elif loaded.experiment.export != "none":
            if run.module.zero is not None:
                run.module.zero.close()
            del run
            gc.collect()  # units refer to each other in circles
            torch.cuda.empty_cache()
            run = build(loaded, "export")
        deliver(run)
    return "finished"


def _fit(run: Run, evaluate: Evaluate | None, watch: Watch | None) -> bool:
    """Make the run's steps. Returns whether all are made, False where a signal ended it before."""
    position = run.module.position
    if not position.drawn:
        budget = run.experiment.training.tokens_per_micro_batch
        refuse_over_budget(run.opened, run.encoder, Layout.of(run.backbone.config), budget)
    logger.info("seed %d", run.experiment.training.seed)
    logger.info("%s", run.trainables.description)
    recall = run.backbone.recall
    expect = partial(recall.expect, device=run.device) if isinstance(recall, CachedPrompts) else None
    data = StepData(run.loaded, run.opened, run.module.packer, run.device, expect)
    data.first_step = position.drawn
    loop = RunLoop(
        run.module,
        run.folder,
        None if evaluate is None else lambda: evaluate(run),
        None if watch is None else lambda time: watch(run, time),
    )
    trainer = make_trainer(run.experiment, run.device, loop)
    try:
        with _memory_named(
            run.loaded, lambda: f"in step {run.module.coming + 1}", recorded=lambda: bool(run.module.captured)
        ):
            trainer.fit(run.module, datamodule=data)
    except PeerLost:
        raise  # why, the rank that went away knows
    except Exception as error:
        if is_first_rank():
            tell_failed(run.folder, run.module.position.step, run.experiment.training.steps, error)
        raise
    return not loop.interrupted


@contextmanager
def _memory_named(
    loaded: Loaded, when: Callable[[], str], recorded: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Make of a GPU whose memory runs out one line with what helps.

    Args:
        recorded: whether passes are, which takes memory of its own.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(
            f"the GPU's memory ran out {when()} ({torch.cuda.max_memory_allocated() / 2**30:.1f} GiB were in use); "
            f"what helps: {', '.join(_what_saves_memory(loaded, recorded()))}; 'cosmos3 plan' says what fits. "
            f"{first_line(error)}"
        ) from error


def _what_saves_memory(loaded: Loaded, recorded: bool) -> Iterator[str]:
    """Settings that the run would take, the cheapest first, and what would take more GPUs."""
    experiment = loaded.experiment
    model, strategy = experiment.model, experiment.strategy
    if not caches_reasoner(loaded) and reasoner_is_needed(loaded) is None:
        yield " ".join(f"data.datasets.{name}.cache_reasoner=true" for name in experiment.data.datasets)
    if recorded:
        yield "model.cuda_graphs=false"
    if (model.base_precision != "fp8" or model.fp8_copies > 1) and _takes_fp8(experiment):
        yield "model.base_precision=fp8 with model.fp8_copies=1"
    yield f"a smaller training.tokens_per_micro_batch (now {experiment.training.tokens_per_micro_batch})"
    exchanges = strategy.is_sharded or strategy.context_parallel > 1
    if exchanges and model.checkpoint_activations is not True:  # there auto cannot give way within a step
        yield "model.checkpoint_activations=true"
    elif model.checkpoint_activations not in (True, "auto"):
        yield "model.checkpoint_activations=auto"
    if not strategy.is_zero:
        yield "where a single sample is too large, strategy.context_parallel on several GPUs"


def _takes_fp8(experiment: Experiment) -> bool:
    if experiment.fp8_is_refused() is not None:
        return False
    try:
        require_fp8(torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[experiment.model.dtype])
    except UserError:
        return False
    return True


def _tell_interrupted(loaded: Loaded) -> None:
    """Say so in status.json, unless all steps were made and only what follows them was interrupted."""
    found = list_checkpoints(loaded.run_folder / CHECKPOINTS)
    if is_first_rank() and not is_finished(loaded.run_folder):
        step = int(found[-1].name.removeprefix("step_")) if found else 0
        write_status(loaded.run_folder, "interrupted", step, loaded.experiment.training.steps)


def is_finished(folder: Path) -> bool:
    """Whether the run there has made all its steps."""
    status = read_status(folder)
    return status is not None and status["state"] == "finished"


def build(loaded: Loaded, purpose: Purpose = "train") -> Run:
    """Load and prepare everything that a run needs, and put it where its newest checkpoint stands.

    Args:
        purpose: but for training this process holds the whole model, also where others take part in the run and each
            held a part: as it is evaluated and exported, or, to be replayed, as it trains; and without moments. To be
            exported it stands in the host's memory where its device has no room for it.
    """
    experiment = loaded.experiment
    device = device_for(experiment.strategy)
    if purpose == "train":
        refuse_few_samples(experiment.training.samples_per_step, data_rank(experiment.strategy)[1])
    sharded = experiment.strategy.is_sharded and purpose == "train"
    shares = experiment.strategy.context_parallel if purpose == "train" else 1
    if sharded or shares > 1:
        connect(experiment.strategy, device)
    began = time.monotonic()
    _refuse_another_base(loaded)
    reasoner = Reasoner(loaded.model, device) if caches_reasoner(loaded) else None
    encodes = any(not entry.cache_latents for entry in experiment.data.datasets.values())
    parts = load_parts(loaded.model, device, vae_weights=True)
    add_sound_tokenizer(parts, loaded.model, device, heard_task(experiment))
    encoder = Encoder(
        parts,
        experiment.embodiments,
        caption_dropout=experiment.data.caption_dropout,
        seed=experiment.training.seed,
    )
    opened = open_datasets(loaded, encoder, reasoner)
    _refuse_other_data(loaded, opened)
    if not encodes and experiment.evaluation.closed_loop_episodes == 0:
        for tokenizer in (parts.vae, parts.sound_tokenizer):  # every latent is cached, so they leave the GPU
            if tokenizer is not None:
                tokenizer.to("cpu")
    talks = any(isinstance(dataset, ConversationDataset) for dataset, _ in opened.values())
    caches = [] if reasoner is None else _reasoner_caches(opened, reasoner)
    text_logits, towers = talks or experiment.tuning.method == "full", "both" if reasoner is None else "generation"
    model, place = loaded.model, device
    if purpose == "export":
        model, place = with_room(
            model, experiment, device, empty_backbone(model, text_logits=text_logits, towers=towers)
        )
    apart = sharded and shards_weights(experiment.strategy)
    backbone = load_backbone(model, place, text_logits=text_logits, towers=towers, large=not apart)
    if reasoner is not None:
        remember(backbone, caches)
    shown = pictures_in(opened)
    if shown is not None and purpose != "export":
        backbone.see = load_eyes(loaded.model, place, shown)
    robots = list(experiment.embodiments.values())
    trainables = make_trainable(backbone, experiment.tuning, robots, experiment.training.seed)
    stage = zero_stage(experiment.strategy) if sharded else 0
    if apart:
        if stage:
            partition(backbone, loaded.model, device)
        else:
            shard(backbone, experiment.tuning, loaded.model, device, device_mesh())
        trainables = trainables.found_in(backbone)
    else:
        arrange_frozen(backbone, experiment.model.fp8_copies)
    zero = Zero(experiment.strategy, backbone, trainables, experiment.optimizer, device) if stage else None
    if shares > 1:
        backbone.context = context_group(experiment.strategy)
    backbone.train()
    packer = Packer(
        encoder,
        Layout.of(backbone.config),
        experiment.objective,
        experiment.training.tokens_per_micro_batch,
        experiment.training.seed,
        padded=sharded and talks and any(isinstance(dataset, PreparedDataset) for dataset, _ in opened.values()),
        part=(rank() % shares, shares),
    )
    module = PostTraining(experiment, backbone, trainables, packer, to_train=purpose == "train", zero=zero)
    logger.info("loaded %s on %s in %.1f s", experiment.model.path, place, time.monotonic() - began)
    run = Run(loaded, device, opened, encoder, backbone, trainables, module)
    resume(run, averaged=purpose != "replay" and experiment.training.ema_decay > 0)
    return run


def _reasoner_caches(opened: Opened, reasoner: Reasoner) -> list[ReasonerCache]:
    """Every dataset's cache, which `open_datasets` has just completed. The tower that made them leaves the device, for
    the backbone to take its place."""
    reasoner.release()
    found = [
        ReasonerCache.open(dataset.folder, reasoner)
        for dataset, _ in opened.values()
        if isinstance(dataset, PreparedDataset)
    ]
    return [cache for cache in found if cache is not None]


def resume(run: Run, averaged: bool = False) -> None:
    """Put the newest whole checkpoint's state in place, if there is one: all of it to train, else the weights alone, or
    their average."""
    found = list_checkpoints(run.folder / CHECKPOINTS)
    if not found:
        return
    path, parameters = found[-1], run.trainables.parameters
    if run.module.to_train:
        restore(run, load_checkpoint(path, own_rows(parameters)), path)
        logger.info("resumed at step %d from %s", run.module.position.step, path.name)
        return
    run.module.position, values = load_result(path, averaged=averaged)
    _write(parameters, values, path)
    logger.info("read the weights of step %d from %s", run.module.position.step, path.name)


def restore(run: Run, checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint's tensors into the run."""
    parameters = run.trainables.parameters
    _write(parameters, checkpoint.trainables, path)
    if run.module.average is not None:
        for name, value in run.module.average.values.items():
            value.copy_(checkpoint.average[name])
    load_optimizer_tensors(run.module.optimizer, parameters, checkpoint.optimizer)
    run.module.position = checkpoint.position


def _write(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor], path: Path) -> None:
    """Give parameters the values that a checkpoint has for them."""
    check_names(path, values, {name: own_part(p) for name, p in parameters.items()})
    write_own_parts(parameters, values)


def claim_folder(loaded: Loaded, fresh: bool) -> bool:
    """Make or check the run's folder. Returns True where the run is already finished.

    Raises:
        UserError: the folder holds a run with another configuration; names the first key that differs.
    """
    folder, experiment = loaded.run_folder, loaded.experiment
    kept = folder / EXPERIMENT
    if fresh:
        if is_first_rank() and kept.is_file():  # nothing but a run is ever thrown away
            _empty(folder)
    elif kept.is_file():
        # Read by the schema: a run that was started before a key existed has its default, which is what it did.
        _refuse_changes(to_plain(read_experiment(kept)), experiment, folder)
        if is_finished(folder):
            logger.info("%s is finished (%d steps); --fresh starts another", folder.name, experiment.training.steps)
            return True
    if is_first_rank() and not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(".partial")  # so that neither a kill nor another rank meets half a file
        beside.write_text(to_yaml(experiment), encoding="utf-8")
        beside.replace(kept)
    return False


def _empty(folder: Path) -> None:
    """Remove all of a run but its logs, which other ranks have open already. What says that it is a run goes last: a
    kill meanwhile leaves one that `--fresh` empties again."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == EXPERIMENT):
        if path.is_dir() and path.name != LOGS:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file():
            path.unlink()


def _refuse_another_base(loaded: Loaded) -> None:
    """Remember the weights that a run starts from, and refuse to put what it has learnt on others.

    A folder may be replaced and a Hub id may move while a run is interrupted or waits to be exported.
    """
    folder, model = loaded.run_folder, loaded.experiment.model
    if model.random:
        return  # its weights are a function of the sizes, which the experiment's own comparison holds
    found = identify_base(model_folder(loaded.model), model.path).plain()
    path = folder / BASE
    if not path.is_file():
        if is_first_rank() and folder.is_dir():
            write_whole(path, (json.dumps(found, indent=2) + "\n").encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if (before["config"], before["weights"]) != (found["config"], found["weights"]):
        raise UserError(
            f"{folder}: it was trained on {before['name']!r} with weights {before['weights'][:12]}, but model.path "
            f"{model.path!r} now has weights {found['weights'][:12]}; give the base that it was trained on, or --fresh"
        )


def _refuse_other_data(loaded: Loaded, opened: Opened) -> None:
    """Remember what each dataset holds, and refuse to go on with (or to hand over) a run under which one has changed.

    Rows would be drawn in another order, held-out ones might train, and statistics would be others than the trained.
    """
    folder = loaded.run_folder
    if not is_first_rank() or not folder.is_dir():
        return
    path, now = folder / DATA, {name: dataset.fingerprint for name, (dataset, _) in opened.items()}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, fingerprint in now.items():
        if before.get(name, fingerprint) != fingerprint:
            raise UserError(
                f"{folder}: data.datasets.{name} has changed since the run there was started (fingerprint "
                f"{before[name][:12]}, now {fingerprint[:12]}); put the data back to go on, give another name, or use "
                f"--fresh to start over"
            )
    if before != now:
        write_whole(path, (json.dumps(now, indent=2) + "\n").encode())


def _refuse_changes(before: Mapping, experiment: Experiment, folder: Path) -> None:
    old, new = flatten(before), flatten(to_plain(experiment))
    for key in sorted(old.keys() | new.keys()):
        free = any(fnmatchcase(key, name) or key.startswith(f"{name}.") for name in FREE)
        if key.endswith(".cache_reasoner") and experiment.model.base_precision == "fp8":
            free = False  # what a cache holds is not rounded, and what the tower gives is
        if not free and old.get(key) != new.get(key):
            raise UserError(
                f"{folder}: {key} is {new.get(key)!r}, but the run there was started with {old.get(key)!r}; "
                f"set it back to go on, give another name, or use --fresh to start over"
            )


def quieten_lightning() -> None:
    """Lightning advertises and announces devices that we name ourselves; its warnings still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # torchrun starts our processes


def make_trainer(experiment: Experiment, device: torch.device, loop: RunLoop) -> lightning.Trainer:
    """Lightning's Trainer: processes, devices and hooks. What it would otherwise do by itself is turned off.

    precision stays "32-true": the backbone has its own dtypes, and 'bf16-true' would cast rotary frequencies and the
    timestep embedder, while 'bf16-mixed' refuses a fused optimizer with clipping.
    """
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=experiment.strategy.devices if world_size() > 1 else 1,
        num_nodes=node_count(),
        strategy=make_strategy(experiment.strategy, device),
        precision="32-true",
        max_epochs=1,
        max_steps=-1,
        callbacks=[loop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    # Before every step all ranks would tell each other of SIGTERM and the host wait for the device, which `runs_ahead`
    # is there to spare, and its handler would wait for the other ranks wherever a signal finds it. `RunLoop` does both.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing
    trainer._signal_connector.register_signal_handlers = _nothing
    return trainer


def _nothing() -> None:
    pass
