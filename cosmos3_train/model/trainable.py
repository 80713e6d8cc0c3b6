"""What trains: LoRA, LoRA with the robot's own rows of the action heads (hybrid), one tower, or everything.

Trainables are float32 masters; the arithmetic runs on copies in the run's dtype. PEFT alone gives bf16 LoRA on a bf16
base, whose small updates round away, or with float32 LoRA runs its matrix products in float32. So the layers that own a
trainable weight cast it where they use it, and its gradient arrives in float32.

A new embodiment touches only its own rows of the action heads, as parameters of their own (PEFT's trainable token
indices), so every other robot's rows stay bit-identical; `action_modality_embed` stays frozen.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig, TaskType  # noqa: F401  TaskType keeps peft's registry imported
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from cosmos3_train.config import Embodiment, Tuning, UserError, nearest
from cosmos3_train.model.domains import REGISTERED
from cosmos3_train.model.fp8 import Fp8Linear
from cosmos3_train.model.omni import Cosmos3PackedTransformer, is_understanding
from cosmos3_train.model.projections import ADAPTER, fuse_lora, join_shared
from cosmos3_train.runtime import fold

logger = logging.getLogger(__name__)

ACTION_HEADS = ("action_proj_in", "action_proj_out")
UNDERSTANDING_ATTENTION = ("to_q", "to_k", "to_v", "to_out")
GENERATION_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("gate_proj", "up_proj", "down_proj")
UPSTREAMS_DOMAINS = frozenset(REGISTERED.values())
"""Slots that published checkpoints may have trained."""

HEAD_INITIAL_STD = 0.02
"""Spread of a fresh domain's rows, a truncated normal, as upstream starts untrained action heads."""


@dataclass(frozen=True)
class Trainables:
    """The parameters that train, by name, float32 every one, and how they are grouped for the optimizer.

    factors: learning-rate factor of each;  decayed: names that weight decay applies to (matrices, not head rows)
    """

    parameters: dict[str, nn.Parameter]
    factors: dict[str, float]
    decayed: frozenset[str]
    description: str

    def groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups, one for each (factor, decay, kind of tensor) that occurs, in a stable order."""
        grouped: dict[tuple[float, float, type], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            # A fused step takes sharded and whole parameters, but not both at once.
            key = (self.factors[name], weight_decay if name in self.decayed else 0.0, type(parameter.data))
            grouped.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "lr": learning_rate * factor, "weight_decay": decay, "factor": factor}
            for (factor, decay, _), parameters in grouped.items()
        ]

    def found_in(self, backbone: nn.Module) -> Trainables:
        """The same by name, where other parameters have taken the place of those that `make_trainable` found."""
        return replace(self, parameters={name: p for name, p in backbone.named_parameters() if p.requires_grad})


def make_trainable(
    backbone: Cosmos3PackedTransformer, tuning: Tuning, embodiments: Sequence[Embodiment], seed: int
) -> Trainables:
    """Choose, inject and convert what trains; call it once, before any sharding and before the optimizer is made.

    Raises:
        UserError: a pattern matches no parameter, or a robot's slot of the action heads would stay untrained.
    """
    backbone.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        # The CPU generator: adapters are made there so that one seed gives one start on every kind of machine.
        torch.manual_seed(fold(seed, "trainables"))
        if tuning.method in ("lora", "hybrid"):
            _inject(backbone, tuning, embodiments)
        else:
            _release(backbone, tuning)
    _keep_masters(backbone)
    fuse_lora(backbone)
    parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    backbone.understanding_trains = any(is_understanding(n) or "k_norm_und_for_gen" in n for n in parameters)
    if backbone.understanding_trains and not backbone.understands:
        raise UserError(
            f"tuning.method is {tuning.method!r}, which trains what the understanding tower's keys pass through, so "
            "they cannot be cached; set cache_reasoner to false for every dataset, or use lora on the generation tower"
        )
    heads = tuple(f"{head}." for head in ACTION_HEADS)
    return Trainables(
        parameters=parameters,
        factors=_factors(tuning.learning_rate_multipliers, parameters),
        # Decay moves rows that no gradient touches; rows of other robots must stay as they are.
        decayed=frozenset(n for n, p in parameters.items() if p.dim() > 1 and not n.startswith(heads)),
        description=_description(backbone, parameters, tuning),
    )


def arrange_frozen(backbone: Cosmos3PackedTransformer, fp8_copies: int) -> None:
    """Lay the frozen weights out for speed, once it is known what trains: those that share an input in one piece, and
    with two copies of FP8 codes those that gradients pass through in both layouts. Not where weights are sharded."""
    for name, module in backbone.named_modules():
        passed = backbone.understanding_trains or not is_understanding(f"{name}.weight")
        if fp8_copies == 2 and isinstance(module, Fp8Linear) and passed:
            module.keep_transposed()
    join_shared(backbone)


def adapter_config(backbone: Cosmos3PackedTransformer) -> LoraConfig:
    """The PEFT configuration of the injected adapter."""
    return cast(Any, backbone).peft_config[ADAPTER]


def trained_rows(embodiments: Sequence[Embodiment]) -> list[int]:
    """The domains whose rows of the action heads train in a hybrid run, in rising order."""
    return sorted({card.domain_id for card in embodiments})


# ------------------------------------------------------------------------------------------------ LoRA and head rows


def lora_targets(backbone: Cosmos3PackedTransformer, tuning: Tuning) -> list[str]:
    """Module-name endings that get LoRA, of those that this architecture has (Edge has no gate)."""
    wanted = []
    for tower in tuning.towers:
        attention = UNDERSTANDING_ATTENTION if tower == "understanding" else GENERATION_ATTENTION
        mlp = "mlp" if tower == "understanding" else "mlp_moe_gen"
        wanted += attention if "attention" in tuning.modules else ()
        wanted += [f"{mlp}.{name}" for name in MLP] if "mlp" in tuning.modules else []
    present = {name for name, _ in backbone.layers[0].named_modules()}
    return [w for w in wanted if w in present or f"self_attn.{w}" in present]


def _inject(backbone: Cosmos3PackedTransformer, tuning: Tuning, embodiments: Sequence[Embodiment]) -> None:
    rows = trained_rows(embodiments) if tuning.method == "hybrid" else []
    if tuning.method == "hybrid" and not rows:
        raise UserError("tuning.method is 'hybrid', but no dataset names an embodiment; use 'lora' without a robot")
    if tuning.method == "lora":
        _refuse_untrained_slots(embodiments)
    indices = {f"{head}.{part}": rows for head in ACTION_HEADS for part in ("fc", "bias")} if rows else None
    with _stand_ins(backbone):
        backbone.add_adapter(
            LoraConfig(
                r=tuning.rank,
                lora_alpha=cast(int, tuning.alpha),
                lora_dropout=tuning.dropout,
                target_modules=lora_targets(backbone, tuning),
                use_rslora=tuning.rslora,
                use_dora=tuning.dora,
                trainable_token_indices=cast(Any, indices),
            ),
            adapter_name=ADAPTER,
        )
    backbone.draws = tuning.dropout > 0
    if rows:
        _start_rows(backbone, embodiments, rows)


@contextmanager
def _stand_ins(backbone: Cosmos3PackedTransformer) -> Iterator[None]:
    """Within the block one number stands for every weight that is not read yet: PEFT puts an adapter on the device of
    its layer's weight, where the meta device would take its values away."""
    devices = {parameter.device for parameter in backbone.parameters()} - {torch.device("meta")}
    if not devices:  # no weight will be read: adapters are only to be counted
        yield
        return
    (device,) = devices
    empty = [
        (module, name, parameter)
        for module in backbone.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in empty:
        number = torch.zeros((), dtype=backbone.compute_dtype, device=device)
        setattr(module, name, nn.Parameter(number.expand(parameter.shape), requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in empty:
            setattr(module, name, parameter)


def restart_magnitudes(module: nn.Module) -> None:
    """Start the DoRA magnitudes of a module from its weights, for adapters made before those were read."""
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_magnitude_vector:
            magnitude, base = cast(Any, layer.lora_magnitude_vector[ADAPTER]), cast(nn.Linear, layer.get_base_layer())
            a, b = (cast(Tensor, side[ADAPTER].weight).to(base.weight.dtype) for side in (layer.lora_A, layer.lora_B))
            magnitude.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=layer.scaling[ADAPTER])
            magnitude.weight.data = magnitude.weight.data.float()


def _refuse_untrained_slots(embodiments: Sequence[Embodiment]) -> None:
    for card in embodiments:
        if card.domain_id not in UPSTREAMS_DOMAINS and card.initialise_from != card.domain_id:
            raise UserError(
                f"tuning.method is 'lora', which does not train the action heads, but embodiment {card.name!r} is on "
                f"domain {card.domain_id}, an untrained slot; use tuning.method=hybrid (or, if this checkpoint's slot "
                f"is trained, say initialise_from: {card.domain_id} on the card)"
            )


def _start_rows(backbone: Cosmos3PackedTransformer, embodiments: Sequence[Embodiment], rows: list[int]) -> None:
    """Start each domain's rows: the checkpoint's own for upstream's ids, another's, or fresh ones."""
    cards = {card.domain_id: card for card in embodiments}
    for head in ACTION_HEADS:
        for part in ("fc", "bias"):
            wrapper = cast(TrainableTokensWrapper, backbone.get_submodule(f"{head}.{part}"))
            wrapper.token_adapter.__class__ = HeadRows
            delta = wrapper.token_adapter.trainable_tokens_delta[ADAPTER]
            weight = cast(Tensor, wrapper.original_module.weight)
            for place, domain in enumerate(rows):
                source = cards[domain].initialise_from
                if source is None and domain in UPSTREAMS_DOMAINS:
                    source = domain
                if source is not None:
                    delta.data[place] = weight.data[source]
                elif part == "bias":
                    delta.data[place] = 0
                else:
                    fresh = torch.empty(delta.shape[1])
                    nn.init.trunc_normal_(fresh, std=HEAD_INITIAL_STD, a=-2 * HEAD_INITIAL_STD, b=2 * HEAD_INITIAL_STD)
                    delta.data[place] = fresh.to(delta)


class HeadRows(TrainableTokensLayer):
    """PEFT's rows that train, whose numbers lie on the device: PEFT brings them there in every pass, which a pass that
    is recorded must not."""

    _places: Tensor | None = None

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        if tuple(active_adapters) != (ADAPTER,):
            return super().get_merged_weights(active_adapters)
        weight = cast(Tensor, self.base_layer.weight)
        if self._places is None or self._places.device != weight.device:
            self._places = torch.tensor(self.token_indices[ADAPTER], device=weight.device)
        return weight.index_copy(0, self._places, self.trainable_tokens_delta[ADAPTER].to(weight))


# ------------------------------------------------------------------------------------------------ whole weights


def _release(backbone: Cosmos3PackedTransformer, tuning: Tuning) -> None:
    for name, parameter in backbone.named_parameters():
        tower = "understanding" if is_understanding(name) else "generation"
        chosen = tuning.method == "full" or tower in tuning.towers
        parameter.requires_grad_(chosen and name != "action_modality_embed")


# ------------------------------------------------------------------------------------------------ masters


class MasterLinear(nn.Linear):
    """A linear layer whose float32 weight is used in the input's dtype; the gradient arrives in float32."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class MasterRMSNorm(RMSNorm):
    """Upstream's RMSNorm as it computes with a half-precision weight, from a float32 one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        variance = hidden_states.float().square().mean(-1, keepdim=True)
        normed = (hidden_states * torch.rsqrt(variance + self.eps)).to(dtype)
        return normed * cast(Tensor, self.weight).to(dtype)


def _keep_masters(backbone: Cosmos3PackedTransformer) -> None:
    """Make every trainable float32 and teach its layer to compute in the input's dtype."""
    for module in backbone.modules():
        if isinstance(module, LoraLayer | BaseTunerLayer):
            cast(Any, module).cast_input_dtype_enabled = False
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        for parameter in own:
            parameter.data = parameter.data.float()
        if own and type(module) is nn.Linear:
            module.__class__ = MasterLinear
        elif own and type(module) is RMSNorm:
            module.__class__ = MasterRMSNorm


# ------------------------------------------------------------------------------------------------ groups and words


def _factors(multipliers: Mapping[str, float], parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    factors = dict.fromkeys(parameters, 1.0)
    for pattern, factor in multipliers.items():
        matched = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            hint = nearest(pattern.strip("*"), {part for n in parameters for part in (n, *n.split("."))})
            raise UserError(f"tuning.learning_rate_multipliers: {pattern!r} matches no trainable parameter.{hint}")
        for name in matched:
            factors[name] = factor
    return factors


def _description(backbone: Cosmos3PackedTransformer, parameters: Mapping[str, nn.Parameter], tuning: Tuning) -> str:
    """What trains, how much of it, and where, in a few lines for the log."""
    everything = sum(p.numel() for p in backbone.parameters())
    trained = sum(p.numel() for p in parameters.values())
    where: dict[str, int] = {}
    for name, parameter in parameters.items():
        if name.startswith(ACTION_HEADS):
            place = "action heads"
        else:
            tower = "understanding" if is_understanding(name.replace(f".{ADAPTER}", "")) else "generation"
            kind = "attention" if "self_attn" in name else "mlp" if "mlp" in name else "projections and norms"
            place = f"{tower} tower, {kind}"
        where[place] = where.get(place, 0) + parameter.numel()
    lines = [f"trains ({tuning.method}): {trained:,} of {everything:,} parameters ({trained / everything:.2%})"]
    lines += [f"  {place}: {count:,}" for place, count in where.items()]
    return "\n".join(lines)
