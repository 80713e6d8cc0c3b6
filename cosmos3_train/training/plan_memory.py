"""How much memory a run takes on each GPU, counted from what the code keeps, without making any of it.

Activations are those that autograd saves for backward in the decoder layers as they are written (`model.omni`), fused
LoRA and all; `tests/training/test_plan.py` counts them in a real forward. Not counted: the CUDA context, which
`gpus.TAKEN_MIB` takes off, what the allocator holds beyond what is used, a sound tokenizer, the video tokenizer's
working memory, and what evaluation takes; nor what PEFT's own LoRA keeps beyond ours (`tuning.dropout`, `tuning.dora`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cosmos3_train.config import Experiment, Model
from cosmos3_train.model.loading import DTYPES, KEPT_FLOAT32, LARGE, layer_count, make_backbone, read_config
from cosmos3_train.model.omni import is_understanding
from cosmos3_train.model.packing import Layout
from cosmos3_train.model.reasoner_cache import DEVICE_BYTES
from cosmos3_train.model.trainable import ADAPTER, make_trainable
from cosmos3_train.training.throughput import Arithmetic

MASTER = 4
"""Bytes of a number that trains, of its gradient, of each of its two moments and of its average."""

GATHERED_LAYERS = 2
"""Layers that are whole at a time under sharding: the one that runs, and the one that is fetched meanwhile."""


@dataclass(frozen=True)
class Weight:
    """One parameter of a backbone.

    numbers: of it;  outputs: rows, each of which has a scale where it is rounded
    matrix:  of a decoder layer's linear layer, which may be rounded
    layer:   it is in a decoder layer;  large: it is sharded where the model is
    """

    numbers: int
    outputs: int
    understanding: bool
    matrix: bool
    layer: bool
    trains: bool
    large: bool
    float32: bool
    output_layer: bool


@dataclass(frozen=True)
class Item:
    """A part of the memory, in words and in bytes of one GPU."""

    what: str
    bytes: float


@dataclass(frozen=True)
class Memory:
    """What a run takes on each GPU.

    items:  at its largest moment; their sum is `run`
    making: before that, while the understanding tower makes the reasoner cache; 0 where it does not
    """

    items: list[Item]
    making: float

    @property
    def run(self) -> float:
        return sum(item.bytes for item in self.items)

    @property
    def peak(self) -> float:
        return max(self.making, self.run)


@dataclass(frozen=True)
class Pack:
    """The fullest micro-batch: tokens of both streams, and text tokens whose next one is predicted.

    prompt: text tokens of the one prompt that all samples of the run have; None where they have several
    alone:  the step has no other micro-batch
    """

    text: int
    generation: int
    labelled: int
    prompt: int | None
    alone: bool


@dataclass(frozen=True)
class Architecture:
    """weights: every parameter of both towers, adapters among them, the layers' as if they were one;  arithmetic: with
    nothing cached;  layout: what packing knows of it"""

    weights: list[Weight]
    arithmetic: Arithmetic
    layout: Layout


def read_architecture(folder: Path, experiment: Experiment, model: Model) -> Architecture:
    """What a run would load and train, from the checkpoint's config.json alone.

    Args:
        model: placed;  folder: of the checkpoint's transformer.

    Raises:
        UserError: as `make_backbone` and `make_trainable`.
    """
    model, tuning = replace(model, base_precision="dtype"), experiment.tuning
    config = model.random or read_config(folder)
    with torch.device("meta"):
        # Layers are alike, and making all of them takes as long as importing torch does.
        backbone = make_backbone(folder, replace(model, random={**config, "num_hidden_layers": 1}))
    robots = list(experiment.embodiments.values())
    make_trainable(backbone, replace(tuning, learning_rate_multipliers={}), robots, experiment.training.seed)
    layers, adapted = layer_count(config), tuning.method in ("lora", "hybrid")
    found = []
    for place, module in backbone.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{place}.{leaf}" if place else leaf
            trains, layer = parameter.requires_grad, name.startswith("layers.")
            found.append(
                Weight(
                    numbers=parameter.numel() * (layers if layer else 1),
                    outputs=parameter.shape[0] * (layers if layer else 1),
                    understanding=is_understanding(name.replace(f".{ADAPTER}", "")),
                    matrix=layer and isinstance(module, nn.Linear) and leaf == "weight" and not trains,
                    layer=layer,
                    trains=trains,
                    large=name.startswith(LARGE) and not (adapted and trains),
                    float32=name.startswith(KEPT_FLOAT32),
                    output_layer=name.startswith("lm_head."),
                )
            )
    arithmetic = replace(Arithmetic.of(backbone.config, tuning), layers=layers)
    return Architecture(found, arithmetic, Layout.of(backbone.config))


def activation_bytes(
    arithmetic: Arithmetic, itemsize: int, *, compiled: bool, adapted: bool, repeated: bool, lean: bool = False
) -> tuple[int, int]:
    """Bytes that one layer of one tower keeps for backward: (a token of its stream, a token of the keys' stream).

    Args:
        adapted: LoRA on frozen weights; without, whole weights train.
        repeated: `attention.repeats_heads`.
        lean: of `model.omni`.
    """
    a, gated = arithmetic, arithmetic.mlp_matrices == 3
    # The stream at the layer's input and after attention, and both again normalised.
    kept = 4 * a.hidden
    # Queries, keys and values as projected; queries as rotated; what attention made of them.
    kept += (a.queries + 2 * a.keys) + 2 * a.queries
    # Gate and up, and their product.
    kept += (3 if gated else 2) * a.intermediate
    wide = 0
    if lean:  # without the normalised stream and the gate's product; as it is written, a product's sum stays instead
        kept -= 2 * a.hidden + a.intermediate - (0 if compiled else a.hidden)
        gated = False
    if not compiled:  # norms in float32, and the gate after its activation
        wide = 2 * a.hidden + a.queries + a.keys
        kept += a.intermediate if gated else 0
        kept += 0 if adapted else 2 * a.hidden + a.queries + a.keys
    keys = 2 * (a.queries if repeated else a.keys)
    return kept * itemsize + 4 * wide, keys * itemsize


def predict_memory(
    experiment: Experiment,
    weights: Sequence[Weight],
    arithmetic: Arithmetic,
    pack: Pack,
    *,
    cached: bool,
    shards: int,
    ranks: int,
    compiled: bool,
    repeated: bool,
    tokenizer_bytes: int,
    making: float,
    kept: int,
    lean: bool,
    vision_bytes: int = 0,
) -> Memory:
    """Memory of each of `ranks` processes.

    Args:
        kept: layers that keep their activations, all or but norms and gates (`lean`); the others are recomputed.
        weights: those that are loaded.
        cached: the understanding tower's keys and values are.
        shards: processes that share one copy of the large weights; 1 where each holds them all.
        tokenizer_bytes: of the video tokenizer, where it stays on the device.
        making: of `Memory`.
        vision_bytes: of the vision encoder, where conversations show pictures.
    """
    model, itemsize = experiment.model, DTYPES[experiment.model.dtype].itemsize

    def size(weight: Weight, rounded: bool) -> float:
        """Bytes of a frozen weight."""
        share = shards if weight.large else 1
        if rounded and weight.matrix:
            passed = not weight.understanding or arithmetic.understanding_learns
            return weight.numbers * (model.fp8_copies if passed else 1) + 4 * weight.outputs
        return weight.numbers * (4 if weight.float32 else itemsize) / share

    def total(tower: str, rounded: bool = model.base_precision == "fp8") -> float:
        return sum(
            size(weight, rounded)
            for weight in weights
            if not weight.trains
            and (("understanding" if weight.understanding else "generation") if weight.layer else "rest") == tower
        )

    form = "bf16" if itemsize == 2 else "fp32"
    both = f"fp8 in {model.fp8_copies} {'copies' if model.fp8_copies > 1 else 'copy'}"
    one = both if arithmetic.understanding_learns else "fp8 in 1 copy"
    fp8 = model.base_precision == "fp8"
    trained = sum(w.numbers / (shards if w.large else 1) for w in weights if w.trains)
    moments = f"{'average and ' if experiment.training.ema_decay else ''}Adam's two moments"
    static = [
        Item(f"generation tower's layers, {both if fp8 else form}", total("generation")),
        Item(f"understanding tower's layers, {one if fp8 else form}", total("understanding")),
        Item(f"embeddings and heads, {form}", total("rest")),
        Item("what trains, float32", trained * MASTER),
        Item(moments, trained * MASTER * (2 + bool(experiment.training.ema_decay))),
        Item("keys and values of prompts", _prompts(arithmetic, itemsize, pack, cached)),
        Item("video tokenizer", tokenizer_bytes),
        *([Item("vision encoder", vision_bytes)] if vision_bytes else []),
    ]
    adapted, gradients = experiment.tuning.method in ("lora", "hybrid"), trained * MASTER
    activations, work = _activations(experiment, arithmetic, pack, itemsize, compiled, repeated, kept, lean)
    again = ["norms and gates"] * (lean and kept > 0) + [
        f"{arithmetic.layers - kept} of {arithmetic.layers} layers"
    ] * (kept < arithmetic.layers)
    words = f", {' and '.join(again)} recomputed" if again else ""
    backward = [Item("gradients", gradients), Item(f"activations kept for backward{words}", activations)]
    if kept and not (shards > 1 and not adapted):
        # A layer keeps the copies that it multiplies by. Sharded, they are what is gathered; recomputed, one layer's.
        copies = sum(w.numbers for w in weights if w.trains and w.layer) * kept / arithmetic.layers
        backward.append(Item("copies of what trains, in the model's dtype", copies * itemsize))
    backward.append(Item("one layer's work", work))
    if shards > 1:
        layers = sum(w.numbers for w in weights if w.layer and w.large) / arithmetic.layers
        root = sum(w.numbers for w in weights if w.large and not w.layer)
        backward.append(Item("layers gathered from other GPUs", (GATHERED_LAYERS * layers + root) * itemsize))
        whole = sum(w.numbers for w in weights if w.large and w.trains)
        if whole and not pack.alone:
            # Of all but a step's last micro-batch. Its rows take their place layer by layer, when activations go too.
            backward[0] = Item("gradients", gradients - whole * MASTER / shards)
            backward.append(Item("gradients not summed over GPUs yet", whole * MASTER))
    if pack.labelled:
        chunk = min(pack.labelled, experiment.objective.logits_chunk)
        # Logits and their gradient, in the model's dtype and in float32.
        backward.append(Item("logits", chunk * arithmetic.vocabulary * 2 * (itemsize + 4)))
    step = [Item("gradients", gradients)]
    if ranks > 1:
        flat = sum(w.numbers for w in weights if w.trains and not (shards > 1 and w.large))
        step.append(Item("gradients in one piece, to be summed", flat * MASTER))
    largest = max(backward, step, key=lambda items: sum(item.bytes for item in items))
    return Memory([item for item in (*static, *largest) if item.bytes > 0], making)


def _prompts(arithmetic: Arithmetic, itemsize: int, pack: Pack, cached: bool) -> float:
    tokens = arithmetic.layers * 2 * arithmetic.keys * itemsize
    if not cached:
        return pack.text * tokens if pack.generation else 0.0
    return DEVICE_BYTES + pack.text * tokens if pack.prompt is None else pack.prompt * tokens


def _activations(
    experiment: Experiment,
    arithmetic: Arithmetic,
    pack: Pack,
    itemsize: int,
    compiled: bool,
    repeated: bool,
    kept: int,
    lean: bool,
) -> tuple[float, float]:
    """(what is kept of all layers until their backward, what one layer's backward takes beside that)."""
    adapted = experiment.tuning.method in ("lora", "hybrid")
    own, joint = activation_bytes(
        arithmetic, itemsize, compiled=compiled, adapted=adapted, repeated=repeated, lean=lean
    )
    streams = [(pack.generation, pack.generation + pack.text)] if pack.generation else []
    if arithmetic.understanding_learns:
        streams.append((pack.text, pack.text))
    layer = sum(tokens * own + keys * joint for tokens, keys in streams)
    tokens = sum(tokens for tokens, _ in streams)
    # The stream's gradient, and those of gate, up and their product.
    gradients = itemsize * (2 * arithmetic.hidden + 3 * arithmetic.intermediate)
    work = max((length for length, _ in streams), default=0) * gradients
    attention = experiment.model.checkpoint_activations in ("auto", "but_attention")
    again = itemsize * tokens * (arithmetic.hidden + (arithmetic.queries if attention else 0))
    # Without a layer that keeps its own, the last one's are made again when backward begins.
    return kept * layer + (arithmetic.layers - kept) * again, work if kept else work + layer
