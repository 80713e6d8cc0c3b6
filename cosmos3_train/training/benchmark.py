"""How fast an experiment trains here: the run itself, the bare step beside it, and stock diffusers with PEFT.

The run is `training.run.train` with everything that a run has: Lightning, the loader, packing, cached latents, the
optimizer, the log. The bare step is the same arithmetic on packs that lie on the device already. Counted is what a step
must do (`throughput.Arithmetic`), the same for all three. Where the reasoner is cached, the bare step is timed with the
understanding tower in the cache's place too.
"""

from __future__ import annotations

import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from cosmos3_train.config import Loaded, UserError, read_experiment
from cosmos3_train.data.mixture import Mixture, StepDataset
from cosmos3_train.model.fp8 import describe_fp8
from cosmos3_train.model.loading import forget_understanding, read_understanding
from cosmos3_train.model.reasoner_cache import CachedPrompts
from cosmos3_train.runtime import world_size
from cosmos3_train.training.benchmark_log import ensure_benchmark_data, forget_other_models, only_dataset, only_task
from cosmos3_train.training.gpus import find_gpu
from cosmos3_train.training.optimizer import clip_gradients
from cosmos3_train.training.recompute import describe_recomputed
from cosmos3_train.training.run import EXPERIMENT, Run, train
from cosmos3_train.training.stock import time_stock
from cosmos3_train.training.strategy import device_for
from cosmos3_train.training.throughput import StepTime
from cosmos3_train.types import TokenSample

logger = logging.getLogger(__name__)

BARE_PACKED = 4
"""Steps of different data that the bare step goes through in turn."""
BARE_ROUNDS, BARE_STEPS, BARE_SECONDS = 3, 8, 5.0
"""The bare step's seconds are the median of this many rounds, each the mean of so many steps without a wait between, or
of as many as take so many seconds; but two at least."""

GIB = 2**30


@dataclass(frozen=True)
class Rate:
    """One way of making the steps. None where the way or the machine has no such number.

    way:               in words;  steps: measured
    step_seconds:      median
    tokens_per_second: of both streams
    mfu:               of the GPU's bf16 peak
    peak_memory_gib:   of the whole of it, from loading on, or from when `auto` had chosen what is recomputed
    data_wait_share:   of the measured seconds, waiting for the loader
    warm_up_seconds:   compilation, mostly: what the steps before the measured ones took above the median
    to_bare, to_stock: samples a second over those of the bare step, and of stock
    """

    way: str
    steps: int
    step_seconds: float
    samples_per_second: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_gib: float | None
    data_wait_share: float | None = None
    warm_up_seconds: float | None = None
    to_bare: float | None = None
    to_stock: float | None = None


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    gpu:   as torch calls it, 'cpu' without;  torch: its version
    text_tokens, generation_tokens, samples, flops: of one step, which all rates share
    done_flops: of these, what the run does: less where the understanding tower's keys and values are cached
    reasoner_cached: whether they are
    attention, compiler, recomputed: how the run was carried out;  frozen: in what its frozen weights were
    launched_as_one: whether its passes were, as CUDA graphs
    memory_gib: the cap that was set on what the process may allocate; None: the whole GPU
    stock_tried: samples a second of every setting of stock, by a few samples
    """

    workload: str
    gpu: str
    torch: str
    samples: int
    text_tokens: int
    generation_tokens: int
    flops: int
    done_flops: int
    reasoner_cached: bool
    attention: str
    compiler: str | None
    recomputed: str
    launched_as_one: bool
    frozen: str
    memory_gib: float | None
    rates: list[Rate]
    stock_tried: dict[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class _Watcher:
    """Gathers the run's step times; after the last step it times the bare one, where everything is in place still."""

    def __init__(self) -> None:
        self.times: list[StepTime] = []
        self.bare = (0.0, 0)
        self.whole: tuple[float, int] | None = None
        self.whole_way = "bare step without the reasoner cache"
        self.run_peak = self.bare_peak = self.whole_peak = 0
        self.done_flops = 0
        self.reasoner_cached = False
        self.samples: list[TokenSample] = []
        self.how: tuple[str, str | None, str, bool] = ("", None, "", False)

    def __call__(self, run: Run, step: StepTime) -> None:
        self.times.append(step)
        if run.module.position.step < run.experiment.training.steps:
            return
        self.run_peak = _peak(run.device)
        backbone = run.backbone
        as_one = bool(run.module.captured)
        self.how = (backbone.attention_backend, backbone.compiler, describe_recomputed(backbone), as_one)
        steps = _steps(run)
        self.samples = run.encoder.encode(steps[0].samples)
        self.bare = time_bare_step(run, steps)
        self.bare_peak = _peak(run.device)
        self.reasoner_cached = backbone.recall is not None
        arithmetic = run.module.arithmetic.cached() if self.reasoner_cached else run.module.arithmetic
        self.done_flops = arithmetic.step_flops(run.module.packer(steps[0]).packs)
        if self.reasoner_cached:
            self._time_whole(run, steps)

    def _time_whole(self, run: Run, steps: Sequence[Any]) -> None:
        """The bare step once more with the understanding tower instead of its cache, where the device holds it: with as
        much recomputed as a run without the cache would."""
        backbone, recall = run.backbone, run.backbone.recall
        kept = backbone.kept_layers, backbone.lean
        try:
            if run.module.captured is not None:
                run.module.captured.begin_anew()
            read_understanding(backbone, run.loaded.model, run.device)
            backbone.recall = None
            run.module.settle_anew(run.module.packer(steps[0]))
            self.whole = time_bare_step(run, steps)
            self.whole_peak = _peak(run.device)
            if kept != (backbone.kept_layers, backbone.lean):
                self.whole_way += f" ({describe_recomputed(backbone)})"
        except torch.OutOfMemoryError:
            logger.warning("without the reasoner cache the step does not fit on this device, so it is not timed")
        finally:
            backbone.recall = recall
            backbone.kept_layers, backbone.lean = kept
            if run.module.captured is not None:
                run.module.captured.begin_anew()
            forget_understanding(backbone)


def measure(
    loaded: Loaded,
    against: Literal["stock"] | None = None,
    memory_gib: float | None = None,
    before_stock: Callable[[Result], None] = lambda _: None,
) -> Result | None:
    """Make the data, carry out the run anew, and time it; None where a signal interrupted it.

    Args:
        memory_gib: what the process may allocate, as if the GPU had no more.
        before_stock: told what was found of the run, for stock takes minutes more and may be cut off.

    Raises:
        UserError: the experiment is no benchmark, or several processes were started.
        TrainingFailed: the numbers do not allow it.
    """
    experiment = loaded.experiment
    only_task(only_dataset(experiment))
    if experiment.data.caption_dropout > 0:
        raise UserError(
            f"data.caption_dropout is {experiment.data.caption_dropout}; a benchmark's samples have all the same "
            "length, so it is 0"
        )
    if world_size() > 1:
        raise UserError(f"{world_size()} processes were started; a benchmark is of one")
    first, steps = experiment.benchmark.first_step, experiment.training.steps
    if first > steps:
        raise UserError(f"benchmark.first_step is {first}, but training.steps is {steps}; measure at least one step")
    if against == "stock" and experiment.tuning.method != "lora":
        raise UserError(
            f"tuning.method is {experiment.tuning.method!r}; the stock loop that it is compared with trains 'lora'"
        )
    _refuse_other_run(loaded)
    device = device_for(experiment.strategy)
    if memory_gib is not None:
        _cap(device, memory_gib)
    ensure_benchmark_data(loaded)
    forget_other_models(loaded, device)
    watcher = _Watcher()
    if train(loaded, fresh=True, watch=watcher) == "interrupted":
        return None
    _free(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    times = watcher.times[first - 1 :]
    shape = _Shape.of(times, watcher.samples, gpu)
    median = statistics.median(step.seconds for step in times)
    ours = shape.rate(
        "cosmos3 train",
        len(times),
        median,
        watcher.run_peak,
        data_wait_share=sum(step.waited for step in times) / sum(step.seconds for step in times),
        warm_up_seconds=max(0.0, sum(step.seconds for step in watcher.times[: first - 1]) - (first - 1) * median),
    )
    seconds, steps = watcher.bare
    bare = shape.rate("bare step", steps, seconds, watcher.bare_peak)
    rates = [ours, bare]
    if watcher.whole is not None:
        seconds, steps = watcher.whole
        rates.append(shape.rate(watcher.whole_way, steps, seconds, watcher.whole_peak))
    attention, compiler, recomputed, as_one = watcher.how
    model = loaded.model
    result = Result(
        workload=experiment.name,
        gpu=gpu,
        torch=torch.__version__,
        samples=shape.samples,
        text_tokens=sum(sample.text.numel() for sample in watcher.samples),
        generation_tokens=shape.tokens - sum(sample.text.numel() for sample in watcher.samples),
        flops=shape.flops,
        done_flops=watcher.done_flops,
        reasoner_cached=watcher.reasoner_cached,
        attention=attention,
        compiler=compiler,
        recomputed=recomputed,
        launched_as_one=as_one,
        frozen=describe_fp8(model.fp8_copies) if model.base_precision == "fp8" else model.dtype,
        memory_gib=memory_gib,
        rates=_compared(rates, bare, None),
    )
    if against is None:
        return result
    before_stock(result)
    stock = time_stock(model, experiment.tuning, watcher.samples, device)
    if stock is None:
        return result
    theirs = shape.rate(f"diffusers + PEFT: {stock.way}", stock.steps, stock.seconds, stock.peak_bytes)
    return replace(result, rates=_compared([*rates, theirs], bare, theirs), stock_tried=stock.tried)


def _refuse_other_run(loaded: Loaded) -> None:
    """Raise `UserError` where the run's folder holds one that no benchmark made: it would be lost."""
    kept = loaded.run_folder / EXPERIMENT
    if not kept.is_file():
        return
    try:
        only_dataset(read_experiment(kept))
    except UserError:
        raise UserError(
            f"name is {loaded.experiment.name!r}, and {loaded.run_folder} holds a run that is no benchmark's, which "
            "would be lost; give another name"
        ) from None


def time_bare_step(run: Run, steps: Sequence[Any]) -> tuple[float, int]:
    """Seconds of an optimizer step on packs that are on the device (forward, backward, clipping, AdamW), and how many
    were made."""
    module, device = run.module, run.device
    packed = [module.packer(step) for step in steps]
    ready = [([pack.to(device) for pack in step.packs], module.step_counts(step)) for step in packed]
    parameters = list(run.trainables.parameters.values())
    if isinstance(run.backbone.recall, CachedPrompts):
        run.backbone.recall.device_bytes = sys.maxsize  # what the packs recall is there too, once one round is made

    def make_steps(count: int) -> None:
        for number in range(count):
            packs, counts = ready[number % len(ready)]
            module.accumulate(packs, counts)
            clip_gradients(parameters, run.experiment.optimizer.clip)
            module.optimizer.step()
            module.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(count: int) -> float:
        began = time.perf_counter()
        make_steps(count)
        return (time.perf_counter() - began) / count

    make_steps(len(ready))
    count = max(2, min(BARE_STEPS, round(BARE_SECONDS / timed(1))))
    return statistics.median(timed(count) for _ in range(BARE_ROUNDS)), BARE_ROUNDS * count


@dataclass(frozen=True)
class _Shape:
    """What every way does in a step."""

    samples: int
    tokens: int
    flops: int
    peak_flops: float | None

    @staticmethod
    def of(times: Sequence[StepTime], samples: Sequence[TokenSample], gpu: str) -> _Shape:
        (step,) = {(time.samples, time.tokens, time.flops) for time in times}  # all steps of a benchmark are alike
        assert step[0] == len(samples)
        known = find_gpu(gpu)
        return _Shape(*step, peak_flops=known.bfloat16 * 1e12 if known else None)

    def rate(self, way: str, steps: int, seconds: float, peak_bytes: int, **more: float) -> Rate:
        return Rate(
            way=way,
            steps=steps,
            step_seconds=seconds,
            samples_per_second=self.samples / seconds,
            tokens_per_second=self.tokens / seconds,
            mfu=self.flops / seconds / self.peak_flops if self.peak_flops else None,
            peak_memory_gib=peak_bytes / GIB if peak_bytes else None,
            **more,
        )


def _compared(rates: Sequence[Rate], bare: Rate, stock: Rate | None) -> list[Rate]:
    """The rates with their ratios to the bare step's and to stock's."""
    return [
        replace(
            rate,
            to_bare=rate.samples_per_second / bare.samples_per_second,
            to_stock=rate.samples_per_second / stock.samples_per_second if stock else None,
        )
        for rate in rates
    ]


def _steps(run: Run) -> list[Any]:
    """A few steps' samples, as the loader reads them."""
    training = run.experiment.training
    steps = StepDataset(Mixture(run.opened, training.seed), training.samples_per_step, 0, 1, BARE_PACKED)
    return [steps[step] for step in range(BARE_PACKED)]


def _cap(device: torch.device, gib: float) -> None:
    """Let the process allocate so much of the device, and no more."""
    if device.type != "cuda":
        raise UserError(f"--memory {gib:g}: a cap is set on a GPU's memory, and this run is on the {device.type}")
    total = torch.cuda.mem_get_info(device)[1]
    if not 0 < gib * GIB <= total:
        raise UserError(f"--memory {gib:g}: the GPU has {total / GIB:.1f} GiB; give a number above 0 and up to that")
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total, device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _free(device: torch.device) -> None:
    """Give the run's memory back: Lightning has moved the model to the CPU, and cycles hold it there."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
