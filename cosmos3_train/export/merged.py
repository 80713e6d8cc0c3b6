"""A pipeline folder with the trained weights inside, which names upstream's classes only.

Every tensor of the transformer is cast(W + s·B·A), computed in float32 from the base's file and cast to the dtype that
it has there; DoRA by PEFT's formula; a robot's own rows of the action heads replaced; whole weights as trained. One
shard is in memory at a time, shards and their index keep the base's names, and whatever did not change is a copy of the
base's file: the folder shares nothing with the base, so that whoever edits, moves or deletes one leaves the other as it
was. (A hard link would change with it, and a symbolic one would break.)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cosmos3_train.config import UserError, first_line
from cosmos3_train.data.files import write_whole
from cosmos3_train.export.folder import whole_folder
from cosmos3_train.export.usage import Robot, merged_readme, write_robot_files
from cosmos3_train.model.base_identity import identify_base, shard_files
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.trainable import ADAPTER
from cosmos3_train.model.vision import VISION

Change = Callable[[Tensor], Tensor]
"""From the base's tensor as it is on disk to the merged one in float32."""

WEIGHT_FILES = (".safetensors", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt")
"""How files that hold a transformer's weights end: all but the merged shards stay behind, lest a deployer load them."""

ROOT_FILES = {
    "model_index.json", "config.json", "generation_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json",
    "chat_template.jinja",
}  # fmt: skip
"""Of a folder's root, by which diffusers and transformers load it. By name: a base that is itself an export has its own
record and its robots' files beside, which are not this one's."""


def write_merged(
    backbone: Cosmos3PackedTransformer,
    base_folder: Path,
    output: Path,
    *,
    run: str,
    base_name: str | None = None,
    robots: Sequence[Robot] = (),
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Write the merged pipeline, whole or not at all. Arguments as `adapter.write_adapter`'s.

    Raises:
        UserError: nothing was trained, the base's folder lacks files or has damaged ones, `output` is something else's
            or the base itself, no space.
        VerificationError: from `verify`; see `whole_folder`.
    """
    changes = merged_changes(backbone)
    base = identify_base(base_folder, base_name)
    shards = shard_files(base_folder / "transformer")
    files = _component_files(base_folder)
    _require_apart(output, base_folder)
    _require_space(output, sum(file.stat().st_size for file in (*shards, *files)))
    with whole_folder(output, {"form": "merged", "run": run, "base": base.plain()}) as new:
        for file in files:
            target = new / file.relative_to(base_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        for shard in shards:
            _merge_shard(shard, new / "transformer" / shard.name, changes)
        if changes:
            raise UserError(
                f"{base_folder}: it has no tensor {min(changes)!r}, which the run trained; give the base that it was "
                "trained on"
            )
        write_robot_files(new, robots)
        write_whole(new / "README.md", merged_readme(run, base, robots).encode())
        if verify is not None:
            verify(new)
    return output


def merged_changes(backbone: Cosmos3PackedTransformer) -> dict[str, Change]:
    """What happens to each tensor that the run changed, by its name in the checkpoint.

    Raises:
        UserError: the run changed nothing.
    """
    changes: dict[str, Change] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            changes[f"{name}.weight"] = _lora_change(module)
        elif isinstance(module, TrainableTokensWrapper):
            changes[f"{name}.weight"] = _rows_change(module)
    if not changes:
        changes = {name: _replacement(p) for name, p in backbone.named_parameters() if p.requires_grad}
    if not changes:
        raise UserError("export: the run trained nothing, so there is nothing to merge")
    return changes


def lora_delta(module: LoraLayer) -> Tensor:
    """s·B·A, float32 [out, in] on the CPU, so that a merge gives the same bits wherever the run was."""
    a, b = (
        cast(nn.Linear, part[ADAPTER]).weight.detach().to("cpu", torch.float32)
        for part in (module.lora_A, module.lora_B)
    )
    return (b @ a) * module.scaling[ADAPTER]


def _lora_change(module: LoraLayer) -> Change:
    def change(weight: Tensor) -> Tensor:
        merged = weight.float() + lora_delta(module)
        if ADAPTER in module.lora_magnitude_vector:
            magnitude = cast(Tensor, module.lora_magnitude_vector[ADAPTER].weight).detach().to("cpu", torch.float32)
            merged = (magnitude / torch.linalg.norm(merged, dim=1)).view(-1, 1) * merged
        return merged

    return change


def _rows_change(module: TrainableTokensWrapper) -> Change:
    def change(weight: Tensor) -> Tensor:
        rows = torch.tensor(module.token_adapter.token_indices[ADAPTER])
        trained = module.token_adapter.trainable_tokens_delta[ADAPTER].detach().to("cpu", torch.float32)
        return weight.float().index_copy(0, rows, trained)

    return change


def _replacement(parameter: nn.Parameter) -> Change:
    return lambda weight: parameter.detach().to("cpu", torch.float32).view_as(weight)


def _merge_shard(source: Path, target: Path, changes: dict[str, Change]) -> None:
    """Write one shard; the changes that it used are taken out of `changes`."""
    tensors = {}
    try:
        with safe_open(source, framework="pt") as shard:
            names, metadata = list(shard.keys()), shard.metadata()
            changed = any(name in changes for name in names)
            for name in names if changed else ():
                weight = shard.get_tensor(name)
                change = changes.pop(name, None)
                tensors[name] = weight if change is None else change(weight).to(weight.dtype).contiguous()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source}: damaged ({first_line(error)}); fetch the base again") from None
    if changed:
        save_file(tensors, target, metadata=metadata or {"format": "pt"})
    else:
        shutil.copyfile(source, target)


def _component_files(base_folder: Path) -> list[Path]:
    """The pipeline's index, its licence and every file of its components but the transformer's weights; and the vision
    encoder with the small files beside the index, by which transformers loads the same folder as the reasoner.

    Raises:
        UserError: the index cannot be read, or a component that it names is missing.
    """
    try:
        index = json.loads((base_folder / "model_index.json").read_text(encoding="utf-8"))
        components = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{base_folder}/model_index.json cannot be read ({error}); fetch the base again") from None
    found = [
        file
        for file in sorted(base_folder.iterdir())
        if file.is_file()
        and (
            file.name in ROOT_FILES
            or file.name.endswith(".safetensors.index.json")
            or file.name.upper().startswith(("LICENSE", "NOTICE"))
        )
    ]
    if (base_folder / VISION).is_dir() and VISION not in components:  # no part of the pipeline
        components.append(VISION)
    for component in components:
        if Path(component).name != component:
            raise UserError(f"{base_folder}/model_index.json: component {component!r} is no folder's; fetch it again")
        folder = base_folder / component
        if not folder.is_dir():
            raise UserError(f"{folder}: missing, though model_index.json names it; fetch the base again")
        weights = WEIGHT_FILES if component == "transformer" else ()
        found += [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.endswith(weights)]
    return found


def _require_apart(output: Path, base_folder: Path) -> None:
    """An output that is the base, lies in it or holds it would take its place."""
    here, base = output.resolve(), base_folder.resolve()
    if here == base or here in base.parents or base in here.parents:
        raise UserError(
            f"{output}: is, holds or lies in the folder of the base, {base_folder}; choose another output folder"
        )


def _require_space(output: Path, needed: int) -> None:
    place = output.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{output}: a merged pipeline needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there; free "
            "some space or choose another output folder"
        )
