"""What a run would take, before it: memory of each GPU, seconds of a step, and which settings would change them.

Nothing is loaded: sizes come from the checkpoint's config.json, tokens from the settings, rates from a small measured
table. Predictions for several GPUs add an estimate of what these tell each other, from a few runs of `fsdp2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cosmos3_train.config import Experiment, UserError, fail
from cosmos3_train.data.mixture import refuse_few_samples
from cosmos3_train.model.attention import BACKENDS, Backend, obstacle_on, repeats_heads
from cosmos3_train.training.gpus import Gpu
from cosmos3_train.training.plan_memory import MASTER, Architecture, Memory, Pack, predict_memory
from cosmos3_train.training.plan_time import Kind, Seconds, predict_seconds
from cosmos3_train.training.recompute import MARGIN, MARGIN_TOGETHER
from cosmos3_train.training.strategy import refuse_remainders
from cosmos3_train.training.throughput import Arithmetic

GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """What a run trains on, and on what.

    kinds:      samples of the mixture, by expected share
    one_prompt: all samples have the same prompt
    cached:     the understanding tower's keys and values are, so a run does not load it
    makes_cache: they are not on disk yet, so that a run loads it before
    tokenizer_bytes: of the video tokenizer
    vision_bytes: of the vision encoder, 0 where no conversation shows pictures
    """

    experiment: Experiment
    gpu: Gpu
    gpus: int
    kinds: Sequence[Kind]
    one_prompt: bool
    cached: bool
    makes_cache: bool
    tokenizer_bytes: int
    architecture: Architecture
    vision_bytes: int = 0

    def __post_init__(self) -> None:
        dtype = self.experiment.model.dtype
        if dtype != "bfloat16":
            fail(f"model.dtype is {dtype!r}; the plan's rates are of bfloat16, so plan with model.dtype=bfloat16")

    @property
    def arithmetic(self) -> Arithmetic:
        """Of the model, nothing cached."""
        return self.architecture.arithmetic

    @property
    def talks(self) -> bool:
        """Whether the mixture has conversations."""
        return any(kind.labelled for kind in self.kinds)

    @property
    def encodes(self) -> bool:
        """Whether the tokenizers stay on the device."""
        datasets, episodes = self.experiment.data.datasets, self.experiment.evaluation.closed_loop_episodes
        return episodes > 0 or not all(entry.cache_latents for entry in datasets.values())


@dataclass(frozen=True)
class Plan:
    """memory: of each GPU;  seconds: of a step;  samples_per_second: over all GPUs;  mfu: by the yardstick's count

    fits:       the run does
    tower_fits: and so does the tower that makes the reasoner cache before it, where it is not made yet
    """

    memory: Memory
    seconds: Seconds
    samples_per_second: float
    mfu: float
    fits: bool
    tower_fits: bool


@dataclass(frozen=True)
class Remedy:
    """What changes, as it is typed, and what the run takes then."""

    words: str
    plan: Plan


def predict(workload: Workload, repeated: bool | None = None) -> Plan:
    """What the run takes.

    Args:
        repeated: whether the attention kernel wants keys repeated for all heads; None asks the torch that is here.

    Raises:
        UserError: a sample alone is larger than a micro-batch, or there are more GPUs than samples.
    """
    experiment, gpu, ranks = workload.experiment, workload.gpu, workload.gpus
    training, model = experiment.training, experiment.model
    shards = _shards(experiment, ranks)
    refuse_few_samples(training.samples_per_step, ranks, "GPU")
    if model.base_precision == "fp8" and gpu.fp8 is None:
        raise UserError(f"model.base_precision is 'fp8', but {gpu.key} has no FP8; use 'dtype'")
    done = workload.arithmetic.cached() if workload.cached else workload.arithmetic
    samples = math.ceil(training.samples_per_step / ranks)
    packs = [_fullest(kind, samples, training.tokens_per_micro_batch) for kind in workload.kinds]
    shares = sum(kind.share / count for kind, count in zip(workload.kinds, packs, strict=True))
    micro_batches = max(1, math.ceil(samples * shares))
    everything, loads_head = workload.architecture.weights, workload.talks or experiment.tuning.method == "full"
    tower = [w for w in everything if w.understanding and not w.output_layer]
    tokenizer = workload.tokenizer_bytes if workload.encodes else 0
    makes = workload.cached and workload.makes_cache
    making = 2 * sum(w.numbers for w in tower) + workload.tokenizer_bytes if makes else 0
    weights = [
        w for w in everything if not (workload.cached and w.understanding) and (loads_head or not w.output_layer)
    ]
    backend = attention_on(gpu, model.attention)
    repeated = repeats_heads(backend) if repeated is None else repeated

    def memory_of(kept: int, lean: bool) -> Memory:
        """The largest over the kinds of samples, with so many layers keeping their activations."""
        found = [
            predict_memory(
                experiment,
                weights,
                workload.arithmetic,
                Pack(
                    count * kind.text,
                    count * kind.generation,
                    count * kind.labelled,
                    kind.text if workload.one_prompt else None,
                    micro_batches == 1,
                ),
                cached=workload.cached,
                shards=shards,
                ranks=ranks,
                compiled=model.compile is not False,
                repeated=repeated,
                tokenizer_bytes=tokenizer,
                making=making,
                kept=kept,
                lean=lean,
                vision_bytes=workload.vision_bytes,
            )
            for kind, count in zip(workload.kinds, packs, strict=True)
        ]
        return max(found, key=lambda one: one.run)

    layers, how = workload.arithmetic.layers, model.checkpoint_activations
    kept, lean = layers if how in (False, "but_products") else 0, how == "but_products"
    if how == "auto":  # as `recompute.settle`
        within = gpu.bytes * (1 - (MARGIN_TOGETHER if experiment.strategy.is_sharded else MARGIN))
        lean = memory_of(layers, lean=False).run > within
        kept = next((count for count in range(layers, 0, -1) if memory_of(count, lean).run <= within), 0)
    memory = memory_of(kept, lean)
    trained = sum(w.numbers for w in weights if w.trains)
    seconds = predict_seconds(
        experiment,
        done,
        gpu,
        workload.kinds,
        backend=backend,
        compiled=model.compile is not False,
        recomputed=1 - kept / layers,
        lean=lean,
        trained=trained,
        samples=samples,
        packs=micro_batches,
        gathered=2 * sum(w.numbers for w in weights if w.large) if shards > 1 else 0,
        summed=MASTER * trained,
        ranks=ranks,
    )
    must = sum(
        kind.share * samples * workload.arithmetic.flops([kind.text], [kind.generation], kind.labelled)
        for kind in workload.kinds
    )
    return Plan(
        memory=memory,
        seconds=seconds,
        samples_per_second=training.samples_per_step / seconds.total,
        mfu=must / seconds.total / (gpu.bfloat16 * 1e12),
        fits=memory.run <= gpu.bytes,
        tower_fits=memory.making <= gpu.bytes,
    )


def attention_on(gpu: Gpu, wanted: Backend | Literal["auto"]) -> Backend:
    """The attention that a run takes there, if what is installed here is installed there."""
    return next(b for b in BACKENDS if obstacle_on(b, gpu.major) is None) if wanted == "auto" else wanted


def _shards(experiment: Experiment, gpus: int) -> int:
    """Processes that share one copy of the large weights."""
    strategy = experiment.strategy
    if strategy.context_parallel > 1:
        raise UserError(
            f"strategy.context_parallel is {strategy.context_parallel}, which the plan does not know; plan with 1, "
            "whose activations are that many times as large"
        )
    if strategy.is_zero:
        raise UserError(
            f"strategy.name is {strategy.name!r}, which the plan does not know; plan with fsdp2, or with ddp for what "
            "deepspeed_zero2 holds at most"
        )
    if strategy.name == "single" and gpus > 1:
        raise UserError(f"strategy.name is 'single', but the plan is for {gpus} GPUs; use strategy.name=ddp")
    if strategy.name == "hsdp":
        shards = strategy.shards or gpus
        refuse_remainders(strategy, gpus, shards)
        return shards
    return gpus if strategy.name == "fsdp2" else 1


def _fullest(kind: Kind, samples: int, budget: int) -> int:
    """How many samples of a kind a micro-batch has at most."""
    tokens = kind.text + kind.generation
    if tokens > budget:
        raise UserError(
            f"a sample has {tokens:,} tokens, over training.tokens_per_micro_batch = {budget}; raise it to at least "
            f"{tokens}"
        )
    return max(1, min(samples, budget // tokens))


# ------------------------------------------------------------------------------------------------ what else


CHECKPOINTS = (False, "auto", "but_products", "but_attention", True)
"""Of `model.checkpoint_activations`, by what they save; of those in the middle, `auto` alone is proposed."""

Change = Callable[[Workload], Workload | None]
"""The workload with a setting changed, None where that is so already or cannot be."""


def remedies(workload: Workload, repeated: bool | None = None) -> list[Remedy]:
    """What each setting that saves memory would change, one at a time. Where the run does not fit and none alone makes
    it, several together, in their order, until it does; where it fits, also those that spend memory for speed."""
    found = [
        Remedy(words, predict(changed, repeated))
        for _, words, change in _changes(workload)
        if (changed := change(workload)) is not None
    ]
    if predict(workload, repeated).fits:
        for words, changes in _SPEED.items():
            if (changed := _speed(workload, changes)) is not None:
                found.append(Remedy(words, predict(changed, repeated)))
        return found
    if any(remedy.plan.fits for remedy in found):
        return found
    together: dict[str, str] = {}
    for setting, words, change in _changes(workload):
        changed = change(workload)
        if changed is None:
            continue
        workload, together[setting] = changed, words
        if setting == "gpus":
            together.pop("fp8", None)
        plan = predict(workload, repeated)
        if plan.fits:
            return [*found, Remedy(" ".join(together.values()), plan)]
    return found


def _changes(workload: Workload) -> Iterator[tuple[str, str, Change]]:
    """(setting, words, change), the dearest last."""
    names = list(workload.experiment.data.datasets)
    yield "reasoner", " ".join(f"data.datasets.{name}.cache_reasoner=true" for name in names), _cache_reasoner
    yield "fp8", "model.base_precision=fp8 model.fp8_copies=1", _fp8
    longest = max(kind.text + kind.generation for kind in workload.kinds)
    yield "budget", f"training.tokens_per_micro_batch={longest}", lambda w: _budget(w, longest)
    for how in ("auto", "true"):
        words = f"model.checkpoint_activations={how}"
        yield "checkpoint", words, lambda w, how=how: _checkpoint(w, True if how == "true" else how)
    spread = "strategy.name=fsdp2"
    if workload.experiment.strategy.shards:
        spread += " strategy.shards=0"
    if workload.experiment.model.base_precision == "fp8":
        spread += " model.base_precision=dtype"
    for gpus in (2, 4, 8):
        yield "gpus", f"--gpus {gpus} {spread}", lambda w, gpus=gpus: _spread(w, gpus)


def _cache_reasoner(w: Workload) -> Workload | None:
    return None if w.cached or w.talks or w.experiment.tuning.trains_understanding else replace(w, cached=True)


def _checkpoint(w: Workload, how: Any) -> Workload | None:
    if CHECKPOINTS.index(how) <= CHECKPOINTS.index(w.experiment.model.checkpoint_activations):
        return None
    return _with_model(w, checkpoint_activations=how)


def _budget(w: Workload, tokens: int) -> Workload | None:
    if w.experiment.training.tokens_per_micro_batch <= tokens or w.experiment.training.samples_per_step <= w.gpus:
        return None
    training = replace(w.experiment.training, tokens_per_micro_batch=tokens)
    return replace(w, experiment=replace(w.experiment, training=training))


def _fp8(w: Workload) -> Workload | None:
    model = w.experiment.model
    if not _takes_fp8(w) or (model.base_precision, model.fp8_copies) == ("fp8", 1):
        return None
    return _with_model(w, base_precision="fp8", fp8_copies=1)


def _takes_fp8(w: Workload) -> bool:
    """Whether the schema lets the run round its frozen weights, and the GPU multiplies such."""
    return w.gpu.fp8 is not None and w.experiment.fp8_is_refused() is None


def _spread(w: Workload, gpus: int) -> Workload | None:
    if gpus <= w.gpus or w.experiment.training.samples_per_step < gpus:
        return None
    # FP8 weights are not sharded.
    strategy = replace(w.experiment.strategy, name="fsdp2", shards=0)
    model = replace(w.experiment.model, base_precision="dtype")
    return replace(w, gpus=gpus, experiment=replace(w.experiment, strategy=strategy, model=model))


_SPEED: dict[str, dict[str, Any]] = {
    "model.checkpoint_activations=auto": {"checkpoint_activations": "auto"},
    "model.base_precision=fp8 model.fp8_copies=2": {"base_precision": "fp8", "fp8_copies": 2},
}


def _speed(w: Workload, changes: dict[str, Any]) -> Workload | None:
    model = w.experiment.model
    if "fp8_copies" in changes:
        if not _takes_fp8(w) or (model.base_precision, model.fp8_copies) == ("fp8", 2):
            return None
    elif CHECKPOINTS.index(changes["checkpoint_activations"]) >= CHECKPOINTS.index(model.checkpoint_activations):
        return None
    return _with_model(w, **changes)


def _with_model(w: Workload, **changes: Any) -> Workload:
    return replace(w, experiment=replace(w.experiment, model=replace(w.experiment.model, **changes)))
