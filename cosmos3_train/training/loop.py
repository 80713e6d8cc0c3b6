"""What happens between steps: show, log, evaluate, save, and stop where asked, at a step's border and never within."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from torch.distributed.fsdp import FSDPModule

from cosmos3_train.config import UserError
from cosmos3_train.runtime import Interrupted, is_first_rank, leaving_if, world_size
from cosmos3_train.training.checkpoints import Checkpoint, Saving
from cosmos3_train.training.module import PostTraining
from cosmos3_train.training.optimizer import optimizer_tensors
from cosmos3_train.training.overdue import Overdue
from cosmos3_train.training.progress import SKIPPED, Bar, Metrics, tell_failed, write_status
from cosmos3_train.training.sharding import lend, own_part, own_rows, shard_count, writes_shards
from cosmos3_train.training.skipped import keep_skipped
from cosmos3_train.training.strategy import (
    Leaving,
    PeerLost,
    RankMissing,
    any_rank,
    from_all_ranks,
    meet,
    wait_for_first_rank,
)
from cosmos3_train.training.throughput import OWN, StepTime, Throughput, lagging, spread, together

logger = logging.getLogger(__name__)

LINES_IN_A_ROW = 5
EVALUATED = "evaluated"
"""Written last of an evaluation's metrics, so that a resumed run knows which evaluations it has."""


class RunLoop(lightning.Callback):
    """The hooks of a run. `interrupted` says whether a signal ended it.

    Args:
        evaluate: called where an evaluation is due, on the first rank alone.
        watch: called after every step with its time.
    """

    def __init__(
        self,
        module: PostTraining,
        folder: Path,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        watch: Callable[[StepTime], None] | None = None,
    ) -> None:
        self.module, self.folder, self.evaluate, self.watch = module, folder, evaluate, watch
        self.training = module.experiment.training
        self.interrupted = False
        self._asked_to_stop = self._left = False
        self._saving: Saving | None = None
        self._overdue = Overdue(module.experiment.strategy.collective_timeout_seconds, self._tell_failed)
        self._lagging: dict[tuple[str, int], int] = {}
        self._bar: Bar | None = None
        self._metrics: Metrics | None = None
        self._throughput: Throughput | None = None
        self._previous_handler: Any = None

    # -------------------------------------------------------------------------------------------- hooks

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # It only raises a flag: a collective or a file written inside a handler could meet one that is half done.
        self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)
        step = self.module.position.step
        self._refuse_other_places(step)
        if is_first_rank():
            self._metrics = Metrics(self.folder, self.module.experiment, step, self.module.position.skipped)
            write_status(self.folder, "running", step, self.training.steps)
        if self._evaluation_due(step):  # unless it was made already: a run may stop between a checkpoint and the next
            trainer.should_stop = self.interrupted = not self._evaluate()
        self._bar = Bar(self.training.steps, step, is_first_rank())
        self._throughput = Throughput(self.module.device)
        if world_size() > 1:
            self._overdue.start()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._throughput is not None
        self._throughput.have_data()
        meet(f"the samples of step {self.module.coming + 1}")
        self._overdue.begin(f"step {self.module.coming + 1}")
        self._throughput.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = self.module
        assert self._bar is not None and self._throughput is not None
        if self._due(module.coming):
            module.conclude()
        self._keep_left_out()
        report = module.report
        time = self._throughput.stop(report.tokens, report.samples, report.flops, module.own_seconds)
        if self.watch is not None:
            self.watch(time)
        if self._saving is not None:
            self._saving.check()
        stop = any_rank(self._asked_to_stop, "whether to stop")
        if stop:
            module.conclude()
            self._keep_left_out()
        self._bar.advance(module.coming)
        if module.coming == module.position.step:
            self._at_border(trainer, stop)
        self._overdue.end()
        self._throughput.await_data()

    def _due(self, step: int) -> bool:
        """Whether something is to be done once the run stands at this step, so that it must be known to."""
        training = self.training
        every = (training.log_every_n_steps, training.checkpoint_every_n_steps, training.evaluate_every_n_steps)
        return step >= training.steps or any(number and step % number == 0 for number in every)

    def _keep_left_out(self) -> None:
        """Keep the batches of skipped steps, and end a run that has nothing else."""
        for left_out in self.module.left_out:
            keep_skipped(self.folder, left_out.packed, left_out.norm)
            self._write(self.module.position.step + 1, {SKIPPED: left_out.skipped})
        if self.module.left_out:
            self.module.left_out.clear()
            self.module.require_progress()

    def _at_border(self, trainer: lightning.Trainer, stop: bool) -> None:
        """What is to be done where the run stands."""
        assert self._throughput is not None
        training, step = self.training, self.module.position.step
        last, made = step >= training.steps, not self.module.report.skipped
        if last or (made and step % training.log_every_n_steps == 0):
            self._log(step)
        self._overdue.end()
        self.interrupted = stop and not last
        due = made and training.checkpoint_every_n_steps and step % training.checkpoint_every_n_steps == 0
        if last or self.interrupted or due:
            self._save(trainer, last or self.interrupted)
            self._throughput.restart()
        if made and self._evaluation_due(step) and not self.interrupted:
            self.interrupted = not self._evaluate()
            if self.interrupted and not (last or due):
                self._save(trainer, True)
            self._throughput.restart()
        if last or self.interrupted:
            self._finish_saving()  # of a checkpoint that was due before an evaluation that was left
            trainer.should_stop = True

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if is_first_rank():
            state = "interrupted" if self.interrupted else "finished"
            write_status(self.folder, state, self.module.position.step, self.training.steps)
        self._close()
        # A launcher ends the rest as soon as one process has ended with another code than 0.
        wait_for_first_rank("the end")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        # What Lightning tears down now is not to be cut short, and the error not to be hidden by another: the launcher
        # ends the ranks that meet an error, their own or a peer's, later than the first.
        if isinstance(exception, PeerLost):
            self._previous_handler = lambda number, frame: setattr(exception, "asked_to_stop", True)
        elif isinstance(exception, Exception) and world_size() > 1:
            self._previous_handler = signal.SIG_IGN
        self._close()
        if self._saving is not None:
            self._saving.wait_alone()
        if isinstance(exception, PeerLost | RankMissing) and isinstance(trainer.strategy, Leaving):
            trainer.strategy.peer_lost = True
        if isinstance(exception, PeerLost):
            exception.asked_to_stop |= self._asked_to_stop

    # -------------------------------------------------------------------------------------------- details

    def _refuse_other_places(self, step: int) -> None:
        """Raise `UserError` where ranks have gone on from other checkpoints than the first."""
        wait_for_first_rank("the start")  # a rank may have taken minutes longer to load
        steps = [int(one) for (one,) in from_all_ranks([float(step)], "where the run stands")]
        other = next((rank for rank, one in enumerate(steps) if one != steps[0]), None)
        if other is not None:
            raise UserError(
                f"{self.folder}: rank 0 stands at step {steps[0]}, rank {other} at step {steps[other]}, so they do not "
                "see the same checkpoints; start all of them in one folder, on a disk that every machine sees"
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = True

    def _tell_failed(self, error: RankMissing) -> None:
        """Of a rank that is missing, by the thread that found it out."""
        if self._saving is not None:
            self._saving.wait_alone()
        if is_first_rank():
            tell_failed(self.folder, self.module.position.step, self.training.steps, error)

    def _log(self, step: int) -> None:
        report = self.module.measured()
        assert self._bar is not None and self._throughput is not None
        rates = self._throughput.rates()
        if rates and world_size() > 1:
            ranks = from_all_ranks([rates.get(name, 0.0) for name in OWN], f"the times of step {step}")
            rates |= together(ranks, self.module.experiment.strategy.context_parallel) | spread(ranks)
            self._tell_who_lags(step, lagging(ranks))
        self._bar.show({"all": report.total, **report.losses}, rates)
        values = {
            "loss": report.total,
            **{f"loss/{name}": value for name, value in report.losses.items()},
            "gradient_norm": report.gradient_norm,
            "learning_rate": report.learning_rate,
            **rates,
            "packs": report.packs,
            "budget_filled": report.tokens / (report.packs * self.module.packer.budget),
            "samples": self.module.position.samples,
        }
        self._write(step, values)

    def _tell_who_lags(self, step: int, found: Mapping[tuple[str, int], str]) -> None:
        """Once, where a rank held the others up in several lines of the log in a row: in one it may be its samples."""
        self._lagging = {key: self._lagging.get(key, 0) + 1 for key in found}
        for key, lines in self._lagging.items():
            if lines == LINES_IN_A_ROW and is_first_rank():
                logger.warning("step %d: %s", step, found[key])

    def _evaluation_due(self, step: int) -> bool:
        if step == 0:
            return self.module.experiment.evaluation.before
        every = self.training.evaluate_every_n_steps
        return step >= self.training.steps or (every > 0 and step % every == 0)

    def _evaluate(self) -> bool:
        """Make the evaluation that is due, unless it is there. False where the first rank was asked to stop meanwhile
        and left it; the run that goes on makes it."""
        module, step = self.module, self.module.position.step
        due = self.evaluate is not None and self._metrics is not None and not self._metrics.has(step, EVALUATED)
        if module.sharded:
            due = any_rank(due, f"whether the evaluation at step {step} is due")  # the first rank alone has metrics
        if due:
            self._measure_together(step)
        wait_for_first_rank(f"the evaluation at step {step}")
        return not any_rank(self._left, f"whether the evaluation at step {step} was left")

    def _measure_together(self, step: int) -> None:
        module = self.module
        module.backbone.eval()
        if module.captured is not None:
            module.captured.clear()  # an evaluation needs the memory, and to record a pass anew takes a second
        with nullcontext() if module.average is None else module.average.in_place_of(module.trainables.parameters):
            if isinstance(module.backbone, FSDPModule):
                lend(module.backbone, self._measure)
            elif module.zero is not None and module.zero.stage == 3:
                module.zero.lend(self._measure)
            else:
                if is_first_rank():
                    self._measure()
                if module.sharded:  # before the weights are exchanged again, for which ranks do not wait so long
                    wait_for_first_rank(f"the evaluation at step {step}")
        module.backbone.train()

    def _measure(self) -> None:
        assert self.evaluate is not None
        try:
            with leaving_if(lambda: self._asked_to_stop):
                found = self.evaluate()
        except Interrupted:  # caught here: the ranks that lend to this one are told of its end as of any other
            self._left = True
            return
        self._write(self.module.position.step, {**found, EVALUATED: 1.0})

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(step, values)

    def _save(self, trainer: lightning.Trainer, last: bool) -> None:
        """Begin to write a checkpoint, when the one before is whole; the run's last one is waited for."""
        checkpoint = current_checkpoint(self.module)
        self._finish_saving()
        if is_first_rank() or checkpoint.rows:
            kept = self.training.keep_checkpoints, self.training.keep_every_n_steps
            self._saving = Saving(self.folder / "checkpoints", checkpoint, *kept)
        if last:
            self._finish_saving()
            trainer.strategy.barrier()

    def _finish_saving(self) -> None:
        if self._saving is not None:
            self._saving.finish()

    def _close(self) -> None:
        self._overdue.close()
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)


def current_checkpoint(module: PostTraining) -> Checkpoint:
    """Where a run stands, with what this rank has of it to write."""
    parameters = module.trainables.parameters
    rows = own_rows(parameters)
    if not writes_shards(parameters):
        return Checkpoint(module.position, {}, {}, {}, rows)  # another copy of the model writes the same
    return Checkpoint(
        position=module.position,
        trainables={name: own_part(p) for name, p in parameters.items()},
        average=module.average.values if module.average is not None else {},
        optimizer=optimizer_tensors(module.optimizer, parameters),
        rows=rows,
        writers=shard_count(parameters),
    )
