"""An adapter folder: one safetensors file for diffusers, its twin for PEFT, and what its robot needs.

What upstream's loader does with a file decides its form. Keys begin with `transformer.`, the default prefix; anything
else loads nothing and only warns. The LoRA configuration travels in the header, or alpha, rsLoRA and DoRA are guessed
from the ranks. The first tensor of the file must be a LoRA one: the loader takes a file that begins with anything else
for an older format and renames some of its keys (`to_out`'s DoRA magnitude among them). And dropout is written as 0:
layers injected into a model in evaluation mode drop out nonetheless.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos3_train.config import UserError, first_line
from cosmos3_train.data.files import write_whole
from cosmos3_train.export.folder import whole_folder, write_json
from cosmos3_train.export.usage import WEIGHT_NAME, Robot, adapter_readme, write_robot_files
from cosmos3_train.model.base_identity import identify_base
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.trainable import ADAPTER, adapter_config

PREFIX = "transformer."
PEFT_PREFIX = "base_model.model."
METADATA_KEY = "lora_adapter_metadata"
PEFT_FOLDER = "peft"


def write_adapter(
    backbone: Cosmos3PackedTransformer,
    folder: Path,
    base_folder: Path,
    *,
    run: str,
    base_name: str | None = None,
    robots: Sequence[Robot] = (),
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Write the adapter that a LoRA or hybrid run trained, whole or not at all.

    Args:
        backbone: with the trained adapter injected; its float32 masters are what is written.
        folder: to be made; an export of the same run there is replaced.
        base_folder: the checkpoint that the run trained on;  base_name: how users get it (Hub id).
        run: the run's name.
        robots: the embodiments that it trained; none for video or text.
        verify: called with the written folder before that gets its name.

    Raises:
        UserError: there is no adapter to write (whole weights trained), `folder` is something else's, or the disk is
            full.
        VerificationError: from `verify`; see `whole_folder`.
    """
    tensors = adapter_tensors(backbone)
    config = portable_config(adapter_config(backbone))
    base = identify_base(base_folder, base_name)
    description = {"form": "adapter", "run": run, "base": base.plain(), "weight_name": WEIGHT_NAME}
    with whole_folder(folder, description) as new:
        metadata = {
            "format": "pt",
            METADATA_KEY: json.dumps({PREFIX + key: value for key, value in config.items()}, sort_keys=True),
            "cosmos3_base": json.dumps(base.plain(), sort_keys=True),
        }
        write_safetensors(new / WEIGHT_NAME, {PREFIX + key: value for key, value in tensors.items()}, metadata)
        twin = new / PEFT_FOLDER
        twin.mkdir()
        twin_tensors = {PEFT_PREFIX + key: value for key, value in tensors.items()}
        write_safetensors(twin / "adapter_model.safetensors", twin_tensors, {"format": "pt"})
        write_json(
            twin / "adapter_config.json", config | {"inference_mode": True, "base_model_name_or_path": base.name}
        )
        write_robot_files(new, robots)
        write_whole(new / "README.md", adapter_readme(run, base, robots).encode())
        check_adapter(new)
        if verify is not None:
            verify(new)
    return folder


def adapter_tensors(backbone: Cosmos3PackedTransformer) -> dict[str, Tensor]:
    """The trained tensors by PEFT's names without the adapter's, float32 on the CPU, LoRA before head rows.

    Raises:
        UserError: the run trained whole weights, or nothing.
    """
    if ADAPTER not in getattr(backbone, "peft_config", {}):
        raise UserError(
            "export: the run has no adapter (tuning.method 'tower' and 'full' train whole weights); export it with "
            "--to merged"
        )
    found = get_peft_model_state_dict(backbone, adapter_name=ADAPTER, save_embedding_layers=False)
    if not any(".lora_A." in key for key in found):
        raise UserError("export: the adapter has no LoRA tensors, so nothing would load; train with tuning.method=lora")
    lora_first = sorted(found, key=lambda key: (".lora_A." not in key, ".lora_" not in key, key))
    return {key: found[key].detach().to("cpu", torch.float32).contiguous() for key in lora_first}


def portable_config(config: LoraConfig) -> dict[str, Any]:
    """The LoRA configuration as JSON can hold it: sets as sorted lists, no dropout, nothing of the machine."""
    content = dict(config.to_dict())
    for key, value in content.items():
        if isinstance(value, set | frozenset):
            content[key] = sorted(value)
    content |= {"lora_dropout": 0.0, "base_model_name_or_path": None, "revision": None, "inference_mode": False}
    return json.loads(json.dumps(content))


def check_adapter(folder: Path) -> None:
    """Refuse an adapter folder of which upstream would load nothing, or not all.

    Raises:
        UserError: no file, no tensor under the prefix, tensors outside it, or no configuration in the header.
    """
    file = folder / WEIGHT_NAME
    try:
        with safe_open(file, framework="pt") as content:
            keys, metadata = list(content.offset_keys()), content.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: missing or damaged ({first_line(error)}); export again") from None
    stray = [key for key in keys if not key.startswith(PREFIX)]
    if not keys or stray:
        what = f"{stray[0]!r} has not" if stray else "it is empty"
        raise UserError(f"{file}: nothing would load: every key begins with {PREFIX!r}, but {what}; export again")
    if "lora_A" not in keys[0]:
        raise UserError(f"{file}: {keys[0]!r} stands first, so upstream would rename its keys; export again")
    try:
        config = json.loads(metadata[METADATA_KEY])
    except (KeyError, json.JSONDecodeError):
        raise UserError(
            f"{file}: no {METADATA_KEY} in its header, so alpha, rsLoRA and DoRA would come out wrong; export again"
        ) from None
    if not config or not all(key.startswith(PREFIX) for key in config):
        raise UserError(f"{file}: the keys of {METADATA_KEY} do not begin with {PREFIX!r}; export again")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Float32 tensors in the order given. The library sorts by name, and here the order matters."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data must begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.write(tensor.numpy().astype("<f4", copy=False).tobytes())
