"""What the trained model itself says of the probes, whole or with one decoder layer at a time in float32.

A model that is trained in bfloat16 on a GPU is compared in float32 on the CPU. Where a float32 copy does not fit, the
copy shares the layers' weights with the original and makes each layer float32 only while it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_train.export.upstream_inputs import Probe
from cosmos3_train.export.verify_upstream import stream_names
from cosmos3_train.model.loading import KEPT_FLOAT32
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout, pack, unpatchify
from cosmos3_train.model.projections import joined_weights


def model_in(
    backbone: Cosmos3PackedTransformer, dtype: torch.dtype, *, a_layer_at_a_time: bool = False
) -> Cosmos3PackedTransformer:
    """The backbone itself where it already runs in that dtype below float32, else a copy on the CPU that does. What is
    there in that dtype already is shared with the backbone.

    Args:
        a_layer_at_a_time: the copy has no weights of the decoder layers, of the embedding table and of the language
            model's head but the backbone's own, and converts those of a layer while the layer runs.
    """
    # In float32 never itself: on a GPU its products may be TF32's, and its kernels others than upstream's.
    if backbone.compute_dtype == dtype != torch.float32:
        return backbone
    shared = [*backbone.layers, backbone.embed_tokens, *([backbone.lm_head] if hasattr(backbone, "lm_head") else [])]
    stays = {id(p) for module in shared for p in module.parameters()} if a_layer_at_a_time else set()
    memo: dict[int, Any] = {}
    for name, parameter in backbone.named_parameters():
        if id(parameter) in stays:
            memo[id(parameter)] = parameter
            continue
        # Masters are float32 whatever the run computes in.
        kept = parameter.requires_grad or name.startswith(KEPT_FLOAT32)
        value = parameter.detach().to("cpu", torch.float32 if kept else dtype)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu")
    memo.update((id(joined), None) for joined in joined_weights(backbone))
    # deepcopy takes what the memo has: no second copy of the weights in the device's memory.
    model = copy.deepcopy(backbone, memo)
    model.compute_dtype = dtype
    model.attention_backend = "sdpa"
    model.compiler = None
    if a_layer_at_a_time:
        for module in (*model.layers, model.embed_tokens):
            _convert_while_it_runs(module, dtype)
    return model


def _convert_while_it_runs(module: nn.Module, dtype: torch.dtype) -> None:
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []

    def convert(module: nn.Module, arguments: Any) -> None:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    originals.append((part, name, parameter))
                    part._parameters[name] = nn.Parameter(parameter.detach().to("cpu", dtype), requires_grad=False)

    def give_back(module: nn.Module, arguments: Any, output: Any) -> None:
        for part, name, parameter in originals:
            part._parameters[name] = parameter
        originals.clear()

    module.register_forward_pre_hook(convert)
    module.register_forward_hook(give_back)


@torch.no_grad()
def final_outputs(
    backbone: Cosmos3PackedTransformer, probes: Sequence[Probe], layout: Layout
) -> list[dict[str, Tensor]]:
    """Each probe's outputs, of one pack: float32 on the CPU in upstream's shapes, zero at given tokens.

    Returns:
        video [C, t, h, w], sound [64, S] and action [N, A] velocities, of modalities of which something is generated,
        and text [L, D]: the hidden states that the language model's head sees.
    """
    device = backbone.proj_in.weight.device
    samples = [probe.sample for probe in probes]
    packed = pack(samples, [probe.values for probe in probes], [probe.levels for probe in probes], layout)
    velocities = backbone(packed.to(device))
    text, video, sound, action = (
        part.float().cpu() for part in (velocities.text_hidden, velocities.video, velocities.sound, velocities.action)
    )
    found: list[dict[str, Tensor]] = []
    for sample in samples:
        outputs: dict[str, Tensor] = {}
        own, text = text.tensor_split([sample.text.numel()])
        outputs["text"] = own.clone()
        assert sample.video is not None and sample.video_given is not None
        generated = ~sample.video_given
        if generated.any():
            count = int(generated.sum())
            _, rows, columns = layout.grid(sample.video)
            tokens, video = video.tensor_split([count * rows * columns])
            shape = (sample.video.shape[0], count, *sample.video.shape[2:])
            outputs["video"] = torch.zeros(sample.video.shape)
            outputs["video"][:, generated] = unpatchify(tokens, shape, layout.patch)
        if sample.sound is not None and sample.sound_given is not None and not sample.sound_given.all():
            tokens, sound = sound.tensor_split([int((~sample.sound_given).sum())])
            whole = torch.zeros(sample.sound.shape)
            whole[~sample.sound_given] = tokens
            outputs["sound"] = whole.T.contiguous()
        found.append(outputs)
    # Actions are packed by domain, so that each domain's weights are used once.
    for place in sorted(range(len(samples)), key=lambda place: (samples[place].domain, place)):
        values, given = samples[place].action, samples[place].action_given
        if values is not None and given is not None and not given.all():
            tokens, action = action.tensor_split([int((~given).sum())])
            found[place]["action"] = torch.zeros(values.shape)
            found[place]["action"][~given] = tokens
    return found


@torch.no_grad()
def layer_outputs(model: Cosmos3PackedTransformer, probes: Sequence[Probe], layout: Layout) -> list[dict[str, Tensor]]:
    """`final_outputs`, and both streams before the first decoder layer and after each, by `stream_names`: [L, D] and
    [G, D] of each probe, in the order of upstream's sequence."""
    streams: dict[str, Tensor] = {}

    def keep_input(module: nn.Module, arguments: Any) -> None:
        understanding, generation = stream_names(0)
        streams[understanding if arguments[0] == "understanding" else generation] = arguments[1].clone()

    def keep_output(boundary: int) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            understanding, generation = stream_names(boundary)
            streams[understanding if arguments[0] == "understanding" else generation] = output[0].clone()

        return keep

    hooks = [model.layers[0].register_forward_pre_hook(keep_input)]
    hooks += [layer.register_forward_hook(keep_output(n + 1)) for n, layer in enumerate(model.layers)]
    try:
        found = final_outputs(model, probes, layout)
    finally:
        for hook in hooks:
            hook.remove()
    lengths = [probe.sample.text.numel() for probe in probes]
    generated = [_generation_length(probe, layout) for probe in probes]
    for boundary in range(len(model.layers) + 1):
        for name, counts in zip(stream_names(boundary), (lengths, generated), strict=True):
            for outputs, part in zip(found, streams.pop(name).split(counts), strict=True):
                outputs[name] = part.clone()  # a view would keep the whole pack's, and no file takes it
    return found


def _generation_length(probe: Probe, layout: Layout) -> int:
    return layout.tokens(probe.sample) - probe.sample.text.numel()
