"""The step. It reads like the paper: draw σ and ε, predict v = ε − x0, average over the step's samples, descend.

A step's samples are a function of the seed and the step alone. This rank's share of them is cut into packs under the
token budget, one forward and one backward each; the losses' denominators are those of the whole step over all ranks,
known before the first backward, so the gradient does not depend on how the samples were cut. Optimization is manual:
Lightning's own accumulation would divide by a number of micro-batches, and cut a step short at an epoch's end.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cosmos3_train.config import Experiment
from cosmos3_train.model.attention import repeats_heads
from cosmos3_train.model.omni import Cosmos3PackedTransformer, Understood
from cosmos3_train.model.trainable import Trainables
from cosmos3_train.objectives import flow_matching, next_token
from cosmos3_train.runtime import fold, garbage_later, rank
from cosmos3_train.training.batching import LOSSES, TEXT, PackedStep, Packer
from cosmos3_train.training.captured import captures
from cosmos3_train.training.checkpoints import Position
from cosmos3_train.training.ema import Average
from cosmos3_train.training.optimizer import clip_gradients, make_optimizer, set_learning_rate
from cosmos3_train.training.plan_memory import activation_bytes
from cosmos3_train.training.recompute import recompute_more, settle
from cosmos3_train.training.sharding import Reach, part_of, reach, reduce_after_this_pack
from cosmos3_train.training.spikes import largest_norm, looked_at
from cosmos3_train.training.strategy import (
    assert_same_on_all_ranks,
    largest,
    meet,
    on_any_rank,
    peers,
    sum_gradients,
    summed,
)
from cosmos3_train.training.throughput import Arithmetic, OwnTime
from cosmos3_train.training.zero import Zero
from cosmos3_train.types import PackedSequence, StepBatch, Velocities

logger = logging.getLogger(__name__)


class TrainingFailed(RuntimeError):
    """The run cannot go on, for a reason in the numbers rather than in the user's files."""


@dataclass
class StepReport:
    """What a step measured, for the log: mean losses by modality (those that occurred), norm, rate; also tokens and
    samples of this process's share, or of its context group's, and the floating-point operations that it must do.
    Losses, norm and whether it was skipped are known once the device has made it."""

    losses: dict[str, float] = field(default_factory=dict)
    total: float = math.nan
    gradient_norm: float = math.nan
    learning_rate: float = 0.0
    tokens: int = 0
    samples: int = 0
    flops: int = 0
    packs: int = 0
    skipped: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A step that was skipped, with its gradient's norm, and the number of those skipped until then."""

    packed: PackedStep
    norm: float
    skipped: int


@dataclass(frozen=True)
class _Queued:
    """A step that the device is making: what it will have found, and what is kept until then.

    found: the gradient's norm and whether it was skipped, on its way to the host;  ready: when it has come (None: it is
        there)
    """

    packed: PackedStep
    found: Tensor
    ready: torch.cuda.Event | None
    learning_rate: float
    own_time: OwnTime


class PostTraining(lightning.LightningModule):
    """The backbone, what trains of it, and the two objectives.

    Args:
        experiment: the run's configuration.
        backbone: with its trainables injected.
        packer: turns samples into packs; what it holds is no submodule, so nothing casts or saves it.
        to_train: without it there are no moments and no average: no step can be made, and 8 bytes of a trained weight
            are saved, or 12.
        zero: what manages most trainables, under its strategies.
    """

    def __init__(
        self,
        experiment: Experiment,
        backbone: Cosmos3PackedTransformer,
        trainables: Trainables,
        packer: Packer,
        *,
        to_train: bool = True,
        zero: Zero | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone = backbone
        self.trainables = trainables
        self.packer = packer
        self.experiment = experiment
        self.to_train = to_train
        self.zero = zero
        self.sharing = experiment.strategy.context_parallel
        if to_train:
            self.optimizer = make_optimizer(trainables, experiment.optimizer)
        self.arithmetic = Arithmetic.of(backbone.config, experiment.tuning)
        decay = experiment.training.ema_decay
        self.average = Average(trainables.parameters, decay) if decay and to_train else None
        self.position = Position()
        self.report = StepReport()
        self.runs_ahead = zero is None and backbone.device.type == "cuda"
        """Whether a step is left to the device until something asks what it has come to."""
        self.own_seconds = 0.0
        """Of the passes of the last step that was concluded."""
        self.left_out: list[LeftOut] = []
        """Steps that were skipped, until whoever keeps them has taken them."""
        self._queued: _Queued | None = None
        self._compared_ranks = False
        self._unsettled = True
        self._left_out: frozenset[Reach] = frozenset()
        self.captured = captures(experiment, backbone, list(trainables.parameters.values()), self._forward)

    # -------------------------------------------------------------------------------------------- the step

    def training_step(self, batch: StepBatch | PackedStep, batch_idx: int) -> None:
        """One optimizer step on this rank's share of the step's samples. Where it `runs_ahead` it is queued and not
        waited for: while the device makes it, the host prepares the next. `conclude` waits for what it comes to."""
        assert batch.step == self.drawn, "the loader and the run disagree about where they are"
        step = self.packer(batch) if isinstance(batch, StepBatch) else batch
        counts = self.step_counts(step)
        passes = self._passes(step)
        own_time = OwnTime()
        with peers("what ranks exchange in a step") if self._in_step else nullcontext():
            self._settle_once(step, counts, passes)
            own_time.begin(self.device)
            sums = self._accumulate_in_room(step, counts, passes)
        own_time.end()
        self.conclude()  # the step before, which decides the learning rate of this one
        self._queued = self._descend(step, own_time)
        self.report = StepReport(
            learning_rate=self._queued.learning_rate,
            tokens=sum(p.tokens for p in step.packs),
            samples=step.samples,
            flops=self.arithmetic.step_flops(step.packs) // self.sharing,
            packs=len(step.packs),
        )
        self._sums, self._counts = sums, counts
        if not self.runs_ahead:
            self.conclude()

    def conclude(self) -> None:
        """Wait for what the queued step has come to, if there is one, and move the position on."""
        queued, self._queued = self._queued, None
        if queued is None:
            return
        if queued.ready is not None:
            queued.ready.synchronize()
        norm, skipped = queued.found.tolist()
        drawn = self.position.drawn
        if skipped:
            usual, spike = self.position.usual_norm, self.experiment.optimizer.spike
            above = f", over {spike:g} times the usual {usual:.3g} (optimizer.spike)" if math.isfinite(norm) else ""
            words = "step %d: gradient norm is %.3g%s; draw %d is skipped"
            logger.warning(words, self.position.step + 1, norm, above, drawn)
        elif self.average is not None:
            self.average.update(self.trainables.parameters)
        self.position = Position(
            step=self.position.step + int(not skipped),
            drawn=drawn + 1,
            samples=self.position.samples + self.experiment.training.samples_per_step,
            skipped=self.position.skipped + int(skipped),
            skipped_in_a_row=self.position.skipped_in_a_row + 1 if skipped else 0,
            **looked_at(self.position, norm),
        )
        if skipped:
            self.left_out.append(LeftOut(queued.packed, norm, self.position.skipped))
        self.report = replace(self.report, gradient_norm=norm, skipped=bool(skipped))
        self.own_seconds = queued.own_time.seconds

    @property
    def drawn(self) -> int:
        """Steps that were drawn, the queued one among them."""
        return self.position.drawn + (self._queued is not None)

    @property
    def coming(self) -> int:
        """Where the run will stand once the queued step is made, unless that is skipped."""
        return self.position.step + (self._queued is not None)

    def settle_anew(self, step: PackedStep) -> None:
        """See once more, as before the first step, how much the device lets the layers keep, where `auto` asks for it:
        for where what else lies there has changed. Between steps; leaves no gradients."""
        self._unsettled = True
        self._settle_once(step, self.step_counts(step), self._passes(step))

    def _settle_once(self, step: PackedStep, counts: Tensor, passes: int) -> None:
        """Before the first step: see how much the device lets the layers keep, where `auto` asks for it."""
        unsettled, self._unsettled = self._unsettled, False
        asked = self.experiment.model.checkpoint_activations == "auto"
        if unsettled and asked and self.device.type == "cuda" and self.zero is None:
            settle(
                self.backbone,
                self.device,
                lambda packs, passes: self.accumulate(packs, counts, passes, as_written=True),
                step.packs,
                passes,
                self.experiment.training.tokens_per_micro_batch,
                self._keeps if self._in_step else None,
            )
            self.optimizer.zero_grad(set_to_none=True)

    def _keeps(self, pack: PackedSequence, lean: bool) -> int:
        """Bytes that a layer keeps of a pack, by calculation; `lean`: without norms and gates."""
        backbone, generated, text = self.backbone, pack.generation_spans.total, pack.text_spans.total
        token, key = activation_bytes(
            self.arithmetic,
            backbone.compute_dtype.itemsize,
            compiled=backbone.compiler is not None,
            adapted=self.experiment.tuning.method in ("lora", "hybrid"),
            repeated=repeats_heads(backbone.attention_backend),
            lean=lean,
        )
        text *= backbone.understanding_trains
        return (generated + text) * token + (pack.joint_spans.total + text) * key

    def _accumulate_in_room(self, step: PackedStep, counts: Tensor, passes: int) -> dict[str, Tensor]:
        """`accumulate`, made again with more of it recomputed where memory runs out and `auto` may choose."""
        while True:
            torch.manual_seed(fold(self.experiment.training.seed, "dropout", step.step, rank()))
            try:
                return self.accumulate(step.packs, counts, passes)
            except torch.OutOfMemoryError:  # where ranks wait for each other in a step, one cannot begin it again
                chooses = self.experiment.model.checkpoint_activations == "auto" and not self._in_step
                gave_back = self.captured is not None and self.captured.give_back()
                if not (gave_back or (chooses and recompute_more(self.backbone))):
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()  # passes are made without, and here what this one had made has gone with its error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def accumulate(
        self, packs: Sequence[PackedSequence], counts: Tensor, passes: int | None = None, *, as_written: bool = False
    ) -> dict[str, Tensor]:
        """Forward and backward of packs, one after the other; gradients add up. Returns the summed losses by modality.

        Args:
            counts: `step_counts` of the whole step.
            passes: how many forwards to make where that is more than there are packs: the last one counts once.
            as_written: none of them by a graph.
        """
        passes = passes or len(packs)
        sums = dict.fromkeys(LOSSES, torch.zeros((), device=self.device))
        written = as_written
        for number in range(passes):
            counted = number < len(packs)
            last = number == passes - 1
            with garbage_later(), nullcontext() if self.zero is None else self.zero.one_pass(last):
                pack = packs[min(number, len(packs) - 1)].to(self.device)
                understood = self.backbone.recalled(pack)
                captured = None if as_written else self.captured
                losses = None if captured is None else captured(pack, understood, counts, may_record=not written)
                if losses is None:
                    written = True
                    losses, total = self._forward(pack, understood, counts)
                    reduce_after_this_pack(self.backbone, last)
                    self.manual_backward(total if counted else 0 * total)
            if counted:
                sums = {name: sums[name] + losses[name].detach() if name in losses else sums[name] for name in LOSSES}
        return sums

    def _forward(
        self, pack: PackedSequence, understood: Understood | None, counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A pack's summed losses by modality, and what it adds to the loss that is descended."""
        losses = self.losses_of(self.backbone(pack, understood), pack)
        return losses, self.weighted(losses, counts)

    def _passes(self, step: PackedStep) -> int:
        """Forwards that every rank makes in this step: under sharding as many as the one with the most packs."""
        if not self.sharded:
            return len(step.packs)
        passes, generates, speaks = largest(
            [len(step.packs), int(step.generates), int(step.speaks)], f"the packs of step {self.coming + 1}"
        )
        if self.packer.padded or self.zero is not None:  # which give weights that nothing reaches a gradient of 0
            reached: dict[Reach, int] = {"speaking": speaks, "generating": generates, "either": True}
            self._left_out = frozenset(samples for samples, some in reached.items() if not some)
        return passes

    def on_train_batch_start(self, batch: StepBatch | PackedStep, batch_idx: int) -> int | None:
        """End the epoch, and so the run, once its steps are made."""
        return -1 if self.position.step >= self.experiment.training.steps else None

    def step_counts(self, step: PackedStep) -> Tensor:
        """The denominators of the whole step in the order of LOSSES: samples of each modality and labelled tokens, over
        all ranks. Never read on the host within the step, which would wait for all work queued on the device."""
        counts = torch.tensor([step.counts[name] for name in LOSSES], dtype=torch.float32)
        counts = counts.to(self.device, non_blocking=True)
        if not dist.is_initialized():
            return counts
        return summed(counts) / self.sharing  # those that share packs say the same

    def pack_losses(self, pack: PackedSequence) -> dict[str, Tensor]:
        """Summed losses of a pack by modality, float32 scalars with gradient."""
        return self.losses_of(self.backbone(pack), pack)

    def losses_of(self, velocities: Velocities, pack: PackedSequence) -> dict[str, Tensor]:
        """The same of what the backbone has predicted."""
        losses = flow_matching.losses(velocities, pack)
        if pack.labels.numel():
            chunk = self.experiment.objective.logits_chunk
            losses[TEXT] = next_token.loss(velocities, pack, self.backbone.lm_head, chunk)
        return losses

    def weighted(self, losses: dict[str, Tensor], counts: Tensor) -> Tensor:
        """What a pack adds to the loss that is descended: its means over the step's `counts`, times their weights."""
        weights, least_one = self._weights(), counts.clamp(min=1)
        return torch.stack(
            [weights[name] * value / least_one[LOSSES.index(name)] for name, value in losses.items()]
        ).sum()

    # -------------------------------------------------------------------------------------------- what was measured

    def require_progress(self) -> None:
        """Raise `TrainingFailed` after too many skipped steps in a row."""
        if self.position.skipped_in_a_row >= self.experiment.optimizer.patience:
            raise TrainingFailed(
                f"{self.position.skipped_in_a_row} steps in a row were skipped for their gradients "
                f"(optimizer.patience); 'cosmos3 replay {self.experiment.name}' says which samples did it. Raise "
                f"optimizer.spike to go on; else mend the data or lower optimizer.learning_rate, and start with --fresh"
            )

    def measured(self) -> StepReport:
        """The last step's report with its losses over all ranks. Waits for the device: call it where it is shown."""
        counts = self._counts.tolist()
        totals = summed(torch.stack([self._sums[name] for name in LOSSES]).double()).tolist()
        losses = {name: total / n for name, total, n in zip(LOSSES, totals, counts, strict=True) if n}
        weights = self._weights()
        total = sum(weights[name] * value for name, value in losses.items())
        return replace(self.report, losses=losses, total=total)

    # -------------------------------------------------------------------------------------------- details

    def _weights(self) -> dict[str, float]:
        objective = self.experiment.objective
        return {"video": objective.video, "action": objective.action, "sound": objective.sound, TEXT: objective.text}

    def _descend(self, packed: PackedStep, own_time: OwnTime) -> _Queued:
        """Sum gradients over ranks, clip, step. A gradient that is not finite, or a spike, leaves weights, moments and
        schedule alone."""
        config, training = self.experiment.optimizer, self.experiment.training
        parameters = list(self.trainables.parameters.values())
        meet(f"the gradients of step {self.position.step + 1}")
        own = [p for p in parameters if part_of(p) is None]
        sum_gradients([p for p in own if not isinstance(p, DTensor)])
        if self._left_out:
            for name, parameter in self.trainables.parameters.items():
                if reach(name, self.backbone) in self._left_out:
                    parameter.grad = None
        measured = clip_gradients(own, config.clip, None if self.zero is None else self.zero.squared_norm())
        rate = set_learning_rate(self.optimizer, self.position.step, training.steps, config)
        self._compare_ranks_once(parameters, measured)
        largest_allowed = largest_norm(self.position, config.spike)
        skip = on_any_rank(1 - (measured.isfinite() & (measured <= largest_allowed)).float())
        # AdamW's fused kernel asks the device whether to skip, so all of the step is queued before the host waits.
        cast(Any, self.optimizer).found_inf = skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.zero is not None:
            set_learning_rate(self.zero.base, self.position.step, training.steps, config)
            self.zero.step(measured, config.clip, self._left_out, skip)
        found = torch.stack([measured.to(skip), skip])
        if self.device.type != "cuda":
            return _Queued(packed, found, None, rate, own_time)
        there = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return _Queued(packed, there, ready, rate, own_time)

    def _compare_ranks_once(self, parameters: list[nn.Parameter], norm: Tensor) -> None:
        if not self._compared_ranks and bool(norm.isfinite()):
            assert_same_on_all_ranks([p.grad for p in parameters if p.grad is not None], "gradients")
            assert_same_on_all_ranks(parameters, "trainable weights")
            self._compared_ranks = True

    @property
    def sharded(self) -> bool:
        """Whether no process holds all of what trains."""
        return isinstance(self.backbone, FSDPModule) or self.zero is not None

    @property
    def _in_step(self) -> bool:
        """Whether ranks exchange something between a step's beginning and its gradients."""
        return self.sharded or self.sharing > 1

    def on_train_end(self) -> None:
        """What follows needs the memory."""
        self.captured = None

    def configure_model(self) -> None:
        """Lightning's door to shard the model, which is asked for; `run.build` has done it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning's door to the optimizer that `__init__` made. ZeRO's has tensors that must stay where they are."""
        return self.optimizer
