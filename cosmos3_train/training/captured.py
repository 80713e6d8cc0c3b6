"""Passes whose shapes come again, recorded once and launched as one: CUDA graphs.

A pass of Nano, forward and backward, is some four thousand launches. They take the host as long as 8,000 tokens take a
fast GPU, and a slow host longer. A graph of them is one launch, whatever the host. It reads and writes where the pass
that was recorded did: a pack is copied over that one's, and gradients are added to buffers that are lent to the
parameters.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_train.config import Experiment, UserError, first_line
from cosmos3_train.model.omni import Cosmos3PackedTransformer, Understood
from cosmos3_train.training.recompute import MARGIN, room_on
from cosmos3_train.types import PackedSequence, Spans

logger = logging.getLogger(__name__)

AS_WRITTEN = 3
"""Passes of a shape that are made before one is recorded: by then all that they call is compiled and warm."""

MOST_GRAPHS = 4
MOST_SHAPES = 1000
"""Shapes that are counted at a time; where packs have more, hardly one comes again."""

LARGEST = 16_384
"""Tokens of a pack above which the GPU is the limit and not the host, so `auto` records none."""

APART = ("prompts", "generation_lengths")
"""Of a pack, what no kernel is told."""

Work = Callable[[PackedSequence, Understood | None, Tensor], tuple[dict[str, Tensor], Tensor]]
"""A pack's summed losses by modality and what it adds to the loss that is descended, by the step's counts."""


@dataclass(frozen=True)
class _Graph:
    """inputs: where it reads;  losses: where it writes them;  reached: parameters that it gives gradients."""

    recorded: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    losses: dict[str, Tensor]
    reached: list[nn.Parameter]


class CapturedPasses:
    """Makes passes of packs by graphs where it has one of their shape.

    Args:
        parameters: that train.
        work: forward of a pack up to its loss.
        largest: tokens of a pack that may be recorded, where memory has room for it; None: any, whatever the room.
        alone: nothing else of a step takes the device's memory for a while, as encoding its windows would.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], work: Work, largest: int | None, alone: bool) -> None:
        self._parameters, self._work, self._largest, self._alone = list(parameters), work, largest, alone
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: Counter[Hashable] = Counter()
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._pool: Any = None
        self._gave_up = self._differ = False

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self, pack: PackedSequence, understood: Understood | None, counts: Tensor, may_record: bool
    ) -> dict[str, Tensor] | None:
        """A pass of a pack on the device: its losses, once its gradients are added to the parameters'; they are
        overwritten by the next pass of that shape. None where it has to be made as written.

        Args:
            may_record: no pass of this step was made as written. While autograd's nodes of one live, those of the
                parameters are its own, on another stream, which a pass that is recorded must not wait for.
        """
        if not self._may_be_recorded(pack):
            self._differ = True
            return None
        shape = shape_of((pack, understood, counts))
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._recorded(shape, pack, understood, counts) if self._in_time(shape) and may_record else None
            if graph is None:
                return None
        else:
            torch._foreach_copy_(graph.inputs, list(tensors_of((pack, understood, counts))))
        self._lend_gradients(graph.reached)
        graph.recorded.replay()
        return graph.losses

    def clear(self) -> None:
        """Give the memory of all graphs back, between steps; a pass of a known shape is recorded anew."""
        self._graphs, self._gradients, self._pool = {}, {}, None

    def begin_anew(self) -> None:
        """Clear, and forget what was seen: from here on passes are made of other things."""
        self.clear()
        self._seen.clear()
        self._gave_up = self._differ = False

    def give_back(self) -> bool:
        """After memory ran out: clear, and record no more. False where nothing was recorded."""
        had, self._gave_up = bool(self._graphs), True
        if had:
            self.clear()
            logger.warning("memory ran out; passes are no longer recorded (model.cuda_graphs)")
        return had

    def _may_be_recorded(self, pack: PackedSequence) -> bool:
        # Text that is learnt and pictures differ from pack to pack, and their passes ask the device for numbers.
        generates = pack.pictures is None and not pack.labels.numel()
        return generates and not self._gave_up and (self._largest is None or pack.tokens <= self._largest)

    def _in_time(self, shape: Hashable) -> bool:
        """Whether passes of a shape have been made a few times, and one more graph may be kept."""
        if len(self._seen) > MOST_SHAPES:
            self._seen.clear()
        self._seen[shape] += 1
        self._differ |= len(self._seen) > 1
        return self._seen[shape] > AS_WRITTEN and len(self._graphs) < MOST_GRAPHS

    def _has_room(self, device: torch.device) -> bool:
        """Whether a GPU holds what is recorded, which has memory of its own, and a pass as written beside it. Where all
        passes so far are alike there will hardly be one, and the first that has no room gives the graph back; then it
        is enough that what trains has room for gradients of its own, and once more where ranks sum them."""
        stays = torch.cuda.memory_allocated(device)
        a_pass = torch.cuda.max_memory_allocated(device) - stays
        gradients = 2 * sum(parameter.nbytes for parameter in self._parameters)
        beside = gradients if self._alone and not self._differ else a_pass
        return stays + a_pass + beside <= room_on(device, MARGIN)

    def _recorded(
        self, shape: Hashable, pack: PackedSequence, understood: Understood | None, counts: Tensor
    ) -> _Graph | None:
        """The graph of a pack's pass, None where it cannot be recorded; then none is any more."""
        began, graph = time.monotonic(), None
        if self._largest is not None and not self._graphs and not self._has_room(pack.text_ids.device):
            logger.info("passes are not launched as one: memory is short (model.cuda_graphs=true does it all the same)")
            self._gave_up = True
            return None
        try:
            graph = self._graphs[shape] = self._record(pack, understood, counts)
        except RuntimeError as error:  # memory that runs out too
            cause = first_line(error.__context__ or error)  # the first of what went wrong while it was recorded
            logger.warning("a pass could not be recorded (model.cuda_graphs), so none is: %s", cause)
            self._gave_up = True
        if graph is None:  # now that the error, which held on to all that the pass had made, is gone
            self.clear()
            gc.collect()
            torch.cuda.empty_cache()
            return None
        words = "passes of %d samples and %d tokens are launched as one from here on; recording took %.1f s"
        logger.info(words, pack.samples, pack.tokens, time.monotonic() - began)
        return graph

    def _record(self, pack: PackedSequence, understood: Understood | None, counts: Tensor) -> _Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        for parameter in self._parameters:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.empty_like(parameter, requires_grad=False)
        pack, counts = pack.copied(), counts.clone()
        understood = None if understood is None else understood.copied()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins packs, may call what a thread that records must not.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses, total = self._work(pack, understood, counts)
            found = torch.autograd.grad(total, self._parameters, allow_unused=True)
            pairs = [(p, g) for p, g in zip(self._parameters, found, strict=True) if g is not None]
            torch._foreach_add_([self._gradients[p] for p, _ in pairs], [g for _, g in pairs])
            losses = {name: value.detach() for name, value in losses.items()}
        return _Graph(graph, list(tensors_of((pack, understood, counts))), losses, [p for p, _ in pairs])

    def _lend_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let parameters have their gradients in the buffers that graphs add to."""
        fresh = []
        for parameter in parameters:
            own = self._gradients[parameter]
            if parameter.grad is own:
                continue
            if parameter.grad is None:
                fresh.append(own)
            else:  # of a pass of this step that was made as written
                own.copy_(parameter.grad)
            parameter.grad = own
        if fresh:
            torch._foreach_zero_(fresh)


def captures(
    experiment: Experiment, backbone: Cosmos3PackedTransformer, parameters: Sequence[nn.Parameter], work: Work
) -> CapturedPasses | None:
    """What records passes of a run, None where none is.

    Raises:
        UserError: it is asked for and cannot be had here; says why.
    """
    wanted = experiment.model.cuda_graphs
    obstacle = None if wanted is False else _obstacle(experiment, backbone)
    if wanted is True and obstacle:
        raise UserError(f"model.cuda_graphs is true, but {obstacle}; use 'auto'")
    if wanted is False or obstacle:
        return None
    encoded = all(dataset.cache_latents for dataset in experiment.data.datasets.values())
    return CapturedPasses(parameters, work, LARGEST if wanted == "auto" else None, alone=encoded)


def _obstacle(experiment: Experiment, backbone: Cosmos3PackedTransformer) -> str | None:
    """Why passes of a run cannot be recorded, or None."""
    if backbone.device.type != "cuda":
        return f"this is {backbone.device.type}"
    if backbone.compiler is None:
        return "the layers are not compiled"
    if backbone.attention_backend == "sdpa":
        return "sdpa attends sample by sample (model.attention)"
    return experiment.pass_is_not_one()


def shape_of(value: Any) -> Hashable:
    """All that distinguishes the launches of two passes but the numbers on the device, of what a pass is given."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Spans):  # kernels know where samples lie from the device
        return shape_of(value.offsets), value.total, value.longest
    if isinstance(value, list | tuple):
        return tuple(shape_of(item) for item in value)
    if is_dataclass(value):
        return tuple(shape_of(getattr(value, field.name)) for field in fields(value) if field.name not in APART)
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor of what a pass is given, in one order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
