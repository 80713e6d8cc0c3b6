"""ZeRO: DeepSpeed's optimizers of stages 2 and 3 under our loop.

They are driven here, and neither by Lightning's strategy nor by DeepSpeed's engine. Lightning's refuses any device but
CUDA, so nothing of it could be proved on a CPU, and casts every float of a batch, positions and noise levels too. The
engine wants one dtype for the whole model, where ours has float32 masters among frozen weights in the run's dtype; it
clips by the norm of what it manages alone; and it steps weights that no sample of the step reaches. What it does around
the optimizers is a dozen calls, which `one_pass` and `step` make.

Managed are the weights that `sharding` shards, and their adapters. Stage 2: every rank holds all weights, and of those
that train a part of the masters, moments and summed gradients, elements of all of them laid end to end. Stage 3: a part
of every weight, the frozen ones too, gathered a decoder layer at a time (`stage3`). Heads are whole on every rank, as
in `sharding`, for a rank's samples may not use them.

Both stages sum gradients over ranks as backward makes them, in buckets filled in that order. So all ranks run the same
passes, which reach the same weights in the same order, by the means of `sharding`: a last pack that is run again, and
padding. (Autograd takes what is ready by the order of the forward, which within the layers is every rank's; only heads
differ.) To accumulate without communication is to hold whole gradients until the last pass, as `sharding` does;
`hold_gradients=false` sums and parts those of whole weights in every pass, ZeRO's own way, which takes less memory.

DeepSpeed is imported where a run asks for it: that takes seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cosmos3_train.config import Model, Optimizer, Strategy
from cosmos3_train.model.loading import LARGE, read_weights
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.projections import is_adapter
from cosmos3_train.model.trainable import Trainables, restart_magnitudes
from cosmos3_train.runtime import choose_accelerator, is_first_rank, rank, world_size
from cosmos3_train.training.frozen import lay_frozen, settle_frozen
from cosmos3_train.training.optimizer import clip_factor
from cosmos3_train.training.sharding import Part, Reach, reach, set_part, tell_passes
from cosmos3_train.training.strategy import peers, summed, zero_stage

logger = logging.getLogger(__name__)

BUCKET = 50_000_000
"""Numbers of gradients that are summed over ranks at once, and a buffer of so many; a larger matrix goes by itself."""


class FlatAdamW(torch.optim.AdamW):
    """What ZeRO calls to update this rank's part of each group, one flat tensor.

    scale: of the gradients, float32 scalar: undoes the mean over ranks, and clips;  left_out: what this step's samples
    reach nothing of
    """

    scale: Tensor
    left_out: frozenset[Reach] = frozenset()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        flats = [(flat, group["reach"]) for group in self.param_groups for flat in group["params"]]
        gradients = [flat.grad for flat, _ in flats]
        for (flat, reached_by), gradient in zip(flats, gradients, strict=True):
            if reached_by in self.left_out:
                flat.grad = None
            elif gradient is not None:
                gradient.mul_(self.scale.to(gradient.device))
        super().step()
        for (flat, _), gradient in zip(flats, gradients, strict=True):
            flat.grad = gradient  # under offload it is a buffer that lasts


class Zero:
    """ZeRO over a backbone's large weights that train, and at stage 3 over all its large ones.

    Args:
        backbone: with its trainables injected; at stage 3 after `partition`.
        trainables: those of large weights get a `Part`, which tells what this rank holds of them.
        device: of this process.
    """

    def __init__(
        self,
        strategy: Strategy,
        backbone: Cosmos3PackedTransformer,
        trainables: Trainables,
        optimizer: Optimizer,
        device: torch.device,
    ) -> None:
        _prepare(device)
        self.stage, self.offload, self.device = zero_stage(strategy), strategy.offload, device
        names = {parameter: name for name, parameter in trainables.parameters.items() if name.startswith(LARGE)}
        groups = _groups(trainables, names, optimizer, backbone)
        self.holds_gradients = strategy.hold_gradients or all(is_adapter(name) for name in names.values())
        self.backbone = backbone
        self.base = FlatAdamW(groups, betas=optimizer.betas, eps=optimizer.eps, fused=True)
        self.base.scale = torch.ones((), device=device)
        self.optimizer: Any = self._second(names) if self.stage == 2 else self._third(names)
        self._tell_parts()

    # -------------------------------------------------------------------------------------------- the step

    @contextmanager
    def one_pass(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of a pack: gradients are summed and parted on the way, those that are held on
        the last pack's.

        last: of the step, whose gradients are complete after it.
        """
        held = self.holds_gradients and not last
        self.optimizer._coalesce_grad_reduction = held  # DeepSpeed's hooks then leave a gradient where it is
        self.optimizer.clear_backward_seen_flag()
        if self.stage == 3:
            self.optimizer.parameter_offload.get_param_coordinator().reset_step()
        self.optimizer.set_gradient_accumulation_boundary(last)
        self.optimizer.backward_prologue()
        self.optimizer.enter_backward()
        yield
        if not held:
            self.optimizer.overlapping_partition_gradients_reduce_epilogue()
        self.optimizer.backward_epilogue()
        self.optimizer.exit_backward()

    def squared_norm(self) -> Tensor:
        """Of the gradients of everything managed, summed over ranks, float32 scalar on the device."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return summed(norm.to(self.device).square()) * world_size() ** 2

    def step(self, norm: Tensor, largest: float, left_out: frozenset[Reach], skip: Tensor) -> None:
        """Update the managed weights and bring every rank's copies up to date.

        Args:
            norm: of all gradients of the step, which is to be at most `largest` (0: as it is).
            left_out: what has no gradient in this step.
            skip: float32 scalar on the device, 1 where the step is not to be made, else 0.
        """
        self.base.scale, self.base.left_out = clip_factor(norm, largest) * world_size(), left_out
        # There, for the update on the host would not wait for its own copy of it.
        cast(Any, self.base).found_inf = skip.to(self._flats()[0].device)
        with peers("what ranks exchange of a step's weights"):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Let go of the model, to which DeepSpeed's hooks and lists refer for good."""
        from deepspeed.runtime.zero import parameter_offload

        self.optimizer.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()

    def _gradients(self) -> list[Tensor]:
        """This rank's part of the step's mean over ranks."""
        if self.offload:
            if self.stage == 2:
                self.optimizer._wait_for_offload_copies()
            return [cast(Tensor, flat.grad) for flat in self._flats()]
        return [part for parts in self.optimizer.averaged_gradients.values() for part in parts]

    # -------------------------------------------------------------------------------------------- measuring

    def lend(self, work: Callable[[], None]) -> None:
        """At stage 3, as `sharding.lend`."""
        from deepspeed import zero

        layers, rest = list(self.backbone.layers), _units(self.backbone)[len(self.backbone.layers) :]

        def gather_layers() -> None:
            for layer in layers:
                with zero.GatheredParameters(list(layer.parameters())):
                    pass

        # Its own hooks would gather ahead, and their record of what follows what is that of a step.
        offload = self.optimizer.parameter_offload
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        hooks = []
        if is_first_rank():
            hooks = [hook for layer in layers for hook in _gathering(layer, zero.GatheredParameters)]
        gathered = zero.GatheredParameters([parameter for unit in rest for parameter in unit.parameters()])
        with peers("the weights that are lent for measuring"), gathered:
            tell_passes(self.backbone, work, gather_layers)
        for hook in hooks:
            hook.remove()
        offload._register_deepspeed_module(offload.module)

    # -------------------------------------------------------------------------------------------- the parts

    def _flats(self) -> list[Tensor]:
        """This rank's part of every group's masters."""
        if self.stage == 2:
            return self.optimizer.single_partition_of_fp32_groups
        return self.optimizer.fp32_partitioned_groups_flat

    def publish(self) -> None:
        """Bring every rank's copies up to date after parts were written; every rank calls it."""
        if self.stage == 2:
            with peers("weights that were written"):
                self.optimizer.update_lp_params()
            return
        for group in range(len(self._flats())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.optimizer._partition_all_parameters()  # adapters that are kept gathered are gathered anew

    def _tell_parts(self) -> None:
        for group, flat in enumerate(self._flats()):
            state = self.base.state[flat]
            # One count for all of a group, which under every strategy have made the same steps: `reach` cuts them so.
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
            for parameter, place, first, count in self._layout(group, flat.numel()):
                moments = {key: state[key].narrow(0, place, count) for key in ("exp_avg", "exp_avg_sq")}
                shape = parameter.shape if self.stage == 2 else parameter.ds_shape
                part = Part(
                    values=flat.detach().narrow(0, place, count),
                    moments={"step": state["step"], **moments},
                    first=first,
                    shape=torch.Size(shape),
                    publish=self.publish,
                )
                set_part(parameter, part)

    def _layout(self, group: int, size: int) -> Iterator[tuple[Any, int, int, int]]:
        """(parameter, place in this rank's flat tensor, first element, number of elements) for all of a group."""
        if self.stage == 3:
            place = 0
            for parameter in self.optimizer.fp16_groups[group]:
                each = parameter.partition_numel()
                first = min(parameter.ds_numel, each * rank())
                yield parameter, place, first, min(each, parameter.ds_numel - first)
                place += each
            return
        begin = size * rank()
        offsets = self.optimizer.round_robin_bit16_offsets[group]
        for parameter, offset in zip(self.optimizer.round_robin_bit16_groups[group], offsets, strict=True):
            low, high = max(begin, offset), min(begin + size, offset + parameter.numel())
            count = max(0, high - low)
            yield parameter, (low - begin if count else 0), (low - offset if count else 0), count

    # -------------------------------------------------------------------------------------------- DeepSpeed's own

    def _second(self, names: dict[nn.Parameter, str]) -> Any:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        return DeepSpeedZeroOptimizer(
            self.base,
            names,
            **_common(self.device),
            check_grad_overflow=False,  # `found_inf` of the base tells
            optimizer_params={},
            compute_grad_norm=self.offload,  # which cannot do without
            partition_grads=True,
            offload_optimizer_config=_offload(self.offload, self.device),
        )

    def _third(self, names: dict[nn.Parameter, str]) -> Any:
        from cosmos3_train.training.stage3 import ALL, Stage3, numbers_of

        units = _units(self.backbone)
        for unit in units:
            cast(Any, unit)._z3_leaf = True
        return Stage3(
            nn.ModuleList(units),
            self.base,
            names,
            **_common(self.device),
            ds_config=_config(),
            overlap_comm=self.device.type == "cuda",
            # The next layer is gathered while one runs, and a layer is kept only for a pass that follows at once.
            prefetch_bucket_size=numbers_of(units[0]),
            max_live_parameters=ALL,
            max_reuse_distance=1,
            sub_group_size=ALL,  # a group is updated at once
            offload_ratio=1.0,
            offload_optimizer_config=_offload(self.offload, self.device),
        )


def partition(backbone: Cosmos3PackedTransformer, model: Model, device: torch.device) -> None:
    """Read the large weights of a backbone that was loaded without them, a layer at a time, and keep this rank's part.

    Args:
        backbone: its trainables injected.

    Raises:
        UserError: as `load_backbone`.
    """
    _prepare(device)
    from deepspeed import zero

    for number, layer in enumerate(backbone.layers):
        read_weights(backbone, model, device, lambda name, prefix=f"layers.{number}.": name.startswith(prefix))
        restart_magnitudes(layer)
        lay_frozen(layer)
        zero.Init(module=layer, config_dict_or_path=_config())
        settle_frozen(layer)
    read_weights(backbone, model, device)
    for unit in _units(backbone)[len(backbone.layers) :]:
        zero.Init(module=unit, config_dict_or_path=_config())
    backbone.joint_layers = True  # else each tower would gather every layer for itself
    if backbone.compiler is not None and model.compile == "auto":
        logger.info("layers are not compiled: under stage 3 only model.compile=true does so")
        backbone.compiler = None


def _gathering(layer: nn.Module, gathered: Any) -> list[Any]:
    """Hooks that gather a layer's weights for its forward."""
    within = ExitStack()

    def before(*_: Any) -> None:
        within.enter_context(gathered(list(layer.parameters())))
        settle_frozen(layer)

    def after(*_: Any) -> None:
        within.close()
        settle_frozen(layer)

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


def _units(backbone: Cosmos3PackedTransformer) -> list[nn.Module]:
    """What is gathered at once: a decoder layer, the token embedding, the output layer."""
    rest = [cast(nn.Module, getattr(backbone, name)) for name in ("embed_tokens", "lm_head") if hasattr(backbone, name)]
    return [*backbone.layers, *rest]


def _config() -> dict[str, Any]:
    """Of stage 3's parts. (The patch of torch's linear layers would be one of every layer of the process.)"""
    stage: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 0}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}


def _groups(
    trainables: Trainables, names: dict[nn.Parameter, str], optimizer: Optimizer, backbone: Cosmos3PackedTransformer
) -> list[dict[str, Any]]:
    """The optimizer's groups of what is managed, cut by `reach`: a group is one tensor, and is updated or left out."""
    found: list[dict[str, Any]] = []
    for group in trainables.groups(optimizer.learning_rate, optimizer.weight_decay):
        apart: dict[Reach, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter in names:
                apart.setdefault(reach(names[parameter], backbone), []).append(parameter)
        found += [group | {"params": parameters, "reach": by} for by, parameters in apart.items()]
    return found


def _common(device: torch.device) -> dict[str, Any]:
    """What both stages are told."""
    import deepspeed.comm as comm
    from deepspeed.utils.timer import NoopTimer

    return {
        "timers": NoopTimer(),
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "dp_process_group": comm.get_world_group(),
        "communication_data_type": torch.float32,
        "gradient_accumulation_dtype": torch.float32,
    }


def _offload(wanted: bool, device: torch.device) -> Any:
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    if not wanted:
        return None
    return DeepSpeedZeroOffloadOptimizerConfig.model_validate({"device": "cpu", "pin_memory": device.type == "cuda"})


def _prepare(device: torch.device) -> None:
    """Tell DeepSpeed which device this is and which processes there are, and to be as quiet as the rest."""
    choose_accelerator(device.type)
    import deepspeed
    import deepspeed.comm as comm

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # of inference on CPUs: nothing has to be compiled
    if not comm.is_initialized():
        comm.init_distributed(dist_init_required=False)
