"""Run by itself (`python -I verify_upstream.py job.json`): an export's numbers by upstream's classes and nothing else.

Runs every sample on the base, and on a fresh base with each form of the export loaded onto it, and writes to the job's
"result" how far the outputs are from the expected ones and how much the export changes the base's. The job says which
way: the whole model at once, or a part at a time (embeddings and heads, then each decoder layer), where a part is a
model of upstream's class of which only that part is in memory, given the trained model's own inputs. That the package
which wrote the export cannot be imported here is proved first. Any doubt ends the process with an error.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Outputs = dict[str, Any]
"""A sample's outputs, float32, by name: those of the whole model or those of a part."""


class _Blocker(importlib.abc.MetaPathFinder):
    """First in line for every import, refuses one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"{fullname} is not to be imported here", name=fullname)


def block(package: str) -> None:
    """Make a package impossible to import, and prove it."""
    sys.meta_path.insert(0, _Blocker(package))
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return
    raise SystemExit(f"{package} could be imported, so this proves nothing")


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    block(job["blocked"])
    results = _by_part(job) if job["way"] == "layers" else _whole(job)
    _require_all_compared(job, results)
    if job["blocked"] in {name.partition(".")[0] for name in sys.modules}:
        raise SystemExit(f"{job['blocked']} was imported on the way, so this proves nothing")
    Path(job["result"]).write_text(json.dumps(results), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the whole model


def _whole(job: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    def outputs(form: str | None) -> list[Outputs]:
        transformer = _load_base(job["forms"]["merged"] if form == "merged" else job["base"], job, form)
        if form in ("adapter", "peft"):
            _load_adapter(transformer, form, job, lambda key: True)
        return [_forward(transformer, job, sample) for sample in job["samples"]]

    base = outputs(None)
    return {form: _compare(job, outputs(form), base) for form in job["forms"]}


def _load_base(folder: str, job: dict[str, Any], form: str | None) -> Any:
    import torch
    from diffusers import Cosmos3OmniTransformer

    # With low_cpu_mem_usage the weights come shard by shard, so that one copy is all the memory needed.
    transformer = Cosmos3OmniTransformer.from_pretrained(
        folder,
        subfolder="transformer",
        torch_dtype=getattr(torch, job["dtype"]),
        use_safetensors=True,
        local_files_only=True,
    )
    if job["dtype"] != job["rounded"]:
        for name, parameter in transformer.named_parameters():
            parameter.data = _rounded(name, parameter.data, job, form).to(parameter.dtype)
    return transformer.eval()


def _rounded(name: str, value: Any, job: dict[str, Any], form: str | None) -> Any:
    """A base's tensor as the run held it: a checkpoint that is kept in float32 may be trained in bfloat16."""
    import torch

    if form == "merged" or name.startswith("time_embedder."):
        return value
    return value.to(getattr(torch, job["rounded"]))


# ------------------------------------------------------------------------------------------------ a part at a time


def _by_part(job: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Embeddings and heads together, then one decoder layer after the other; never two of them in memory."""
    count = _config(job["base"])["num_hidden_layers"]
    for form in job["forms"]:
        _require_layers(form, job, count)
    rows: dict[str, list[dict[str, Any]]] = {form: [] for form in job["forms"]}
    rotary: list[Any] = []
    for layer in (None, *range(count)):
        base = _part_outputs(layer, None, job, count, rotary)
        for form in job["forms"]:
            rows[form] += _compare(job, _part_outputs(layer, form, job, count, rotary), base, layer)
    return rows


def _part_outputs(layer: int | None, form: str | None, job: dict[str, Any], count: int, rotary: list) -> list[Outputs]:
    """A part's outputs for every sample. Of the embeddings (`layer` None) `rotary` is kept for the layers."""
    import torch

    transformer = _load_part(job["forms"]["merged"] if form == "merged" else job["base"], layer, job, form)
    if form in ("adapter", "peft"):
        _load_adapter(
            transformer, form, job, lambda key: not key.startswith("layers.") or _layer_of(key) == (layer or 0)
        )
    found = []
    if layer is None:
        between = _between(count, job)
        transformer.layers = torch.nn.ModuleList([between])
        for place, sample in enumerate(job["samples"]):
            between.place = place
            outputs = _forward(transformer, job, sample)
            found.append(outputs | dict(zip(stream_names(0), between.seen[:2], strict=True)))
            if form is None:
                rotary.append(between.seen[2])
        return found
    for place in range(len(job["samples"])):
        with torch.no_grad():
            outputs = transformer.layers[layer](*_recorded(job, place, layer), rotary[place])
        found.append(dict(zip(stream_names(layer + 1), outputs, strict=True)))
    return found


def stream_names(boundary: int) -> tuple[str, str]:
    """What the two streams are called before the first decoder layer and after each."""
    where = f"layer {boundary - 1}" if boundary else "embeddings"
    return f"{where}, understanding", f"{where}, generation"


def _recorded(job: dict[str, Any], place: int, boundary: int) -> list[Any]:
    """The trained model's own streams of a sample at a boundary between layers."""
    expected = job["samples"][place]["expected"]
    return [_tensor(job, expected[name]) for name in stream_names(boundary)]


def _between(count: int, job: dict[str, Any]) -> Any:
    """Stands in the place of all decoder layers: keeps what comes in, hands on what came out of the trained
    model's last one."""
    import torch

    class Between(torch.nn.Module):
        place = 0
        seen: tuple[Any, ...] = ()

        def forward(self, understanding: Any, generation: Any, rotary: Any) -> Any:
            self.seen = (understanding.clone(), generation.clone(), rotary)
            return tuple(_recorded(job, self.place, count))

    return Between()


def _load_part(folder: str, layer: int | None, job: dict[str, Any], form: str | None) -> Any:
    """Upstream's model with one decoder layer under its own name, of which only the part asked for is in memory: that
    layer, or everything else. What is left on the meta device is there for PEFT to find its targets."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import Cosmos3OmniTransformer
    from safetensors import safe_open

    with init_empty_weights():
        transformer: Any = Cosmos3OmniTransformer.from_config(_config(folder) | {"num_hidden_layers": 1})
    others = [torch.nn.Identity() for _ in range(layer or 0)]
    transformer.layers = torch.nn.ModuleList([*others, transformer.layers[0]])
    files = _files(folder)
    for name, parameter in list(transformer.named_parameters()):
        if name.startswith("layers.") != (layer is not None) or name.startswith("lm_head."):
            continue  # no velocity sees the language model's head
        with safe_open(files[name], framework="pt") as shard:
            value = _rounded(name, shard.get_tensor(name), job, form).float()
        if value.shape != parameter.shape:
            raise SystemExit(f"{files[name].name}: {name!r} is {list(value.shape)}, not {list(parameter.shape)}")
        owner, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return transformer.eval()


def _config(folder: str) -> dict[str, Any]:
    from diffusers import Cosmos3OmniTransformer

    config: Any = Cosmos3OmniTransformer.load_config(folder, subfolder="transformer", local_files_only=True)
    return dict(config)


def _files(folder: str) -> dict[str, Path]:
    """Which file of a base holds each tensor."""
    from safetensors import safe_open

    place = Path(folder) / "transformer"
    for index in sorted(place.glob("*.safetensors.index.json")):
        return {name: place / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found = {}
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), file)
    return found


# ------------------------------------------------------------------------------------------------ adapters


def _adapter_file(form: str, job: dict[str, Any]) -> tuple[Path, str]:
    """An adapter's file and what its keys begin with."""
    folder = Path(job["forms"][form])
    if form == "adapter":
        return folder / job["weight_name"], "transformer."
    return folder / "adapter_model.safetensors", "base_model.model."


def _load_adapter(transformer: Any, form: str, job: dict[str, Any], wanted: Callable[[str], bool]) -> None:
    """Put an adapter, or the tensors of it that are `wanted` by their names in the model, onto a base by upstream's
    loader or PEFT's, and make sure that all of them arrived."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import save_file

    file, prefix = _adapter_file(form, job)
    with safe_open(file, framework="pt") as content:
        keys, metadata = list(content.offset_keys()), content.metadata() or {}
        whole = all(wanted(key.removeprefix(prefix)) for key in keys)
        tensors = {key: content.get_tensor(key) for key in keys if wanted(key.removeprefix(prefix))}
    model = transformer
    if form == "adapter":
        if whole:
            transformer.load_lora_adapter(str(file.parent), weight_name=file.name)
        else:
            transformer.load_lora_adapter(tensors, metadata=json.loads(metadata["lora_adapter_metadata"]))
        if not getattr(transformer, "peft_config", None):
            raise SystemExit(f"{file.name}: upstream loaded nothing of it (a wrong prefix?)")
        name = next(iter(transformer.peft_config))
    else:
        folder = file.parent
        if not whole:
            folder = Path(job["result"]).parent / "part"
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / file.name, metadata=metadata)
            shutil.copy(file.with_name("adapter_config.json"), folder)
        model, name = PeftModel.from_pretrained(transformer, str(folder)), "default"
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _require_all_loaded(file, tensors, "transformer." if form == "adapter" else "", loaded)
    # Not .eval(): whoever loads an adapter as its usage text says does not call it either.


def _require_all_loaded(file: Path, wanted: dict[str, Any], prefix: str, loaded: dict[str, Any]) -> None:
    import torch

    for key, value in wanted.items():
        name = key.removeprefix(prefix)
        if name not in loaded:
            raise SystemExit(f"{file.name}: upstream left out {key!r}")
        if loaded[name].is_meta:
            continue  # of a part that is not in memory; it is looked at with its own
        if not torch.equal(loaded[name].cpu(), value.to(loaded[name].dtype)):
            raise SystemExit(f"{file.name}: {key!r} is another tensor once upstream has loaded it")
    if len(wanted) != len(loaded):
        raise SystemExit(f"{file.name}: upstream has {len(loaded)} adapter tensors, the file {len(wanted)}")


def _require_layers(form: str, job: dict[str, Any], count: int) -> None:
    """No tensor of an adapter may belong to a layer that no part visits."""
    from safetensors import safe_open

    if form == "merged":
        return
    file, prefix = _adapter_file(form, job)
    with safe_open(file, framework="pt") as content:
        for key in content.keys():  # noqa: SIM118  not a dict
            name = key.removeprefix(prefix)
            if name.startswith("layers.") and not 0 <= _layer_of(name) < count:
                raise SystemExit(f"{file.name}: {key!r} is of a layer that the base has not")


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])


# ------------------------------------------------------------------------------------------------ samples


def _forward(transformer: Any, job: dict[str, Any], sample: dict[str, Any]) -> Outputs:
    """A sample's velocities by modality, and the text's hidden states as the language model's head sees them."""
    import torch

    arguments = {name: _decode(value, job) for name, value in sample["arguments"].items()}
    for name in ("vision_tokens", "sound_tokens", "action_tokens"):
        if name in arguments:
            arguments[name] = [value.to(getattr(torch, job["dtype"])) for value in arguments[name]]
    text: list[Any] = []
    hook = transformer.norm.register_forward_hook(lambda module, given, hidden: text.append(hidden))
    with torch.no_grad():
        out = transformer(**arguments)
    hook.remove()
    found = {"text": text[0], "video": out.sample[0][0]}
    found |= {"sound": out.sound[0]} if out.sound is not None else {}
    found |= {"action": out.action[0]} if out.action is not None else {}
    return {name: value.float() for name, value in found.items()}


def _decode(value: Any, job: dict[str, Any]) -> Any:
    if "tensor" in value:
        return _tensor(job, value["tensor"])
    if "tensors" in value:
        return [_tensor(job, name) for name in value["tensors"]]
    return [tuple(shape) for shape in value["shapes"]] if "shapes" in value else value["number"]


def _tensor(job: dict[str, Any], name: str) -> Any:
    from safetensors import safe_open

    with safe_open(job["tensors"], framework="pt") as file:
        return file.get_tensor(name)


def _compare(
    job: dict[str, Any], found: list[Outputs], base: list[Outputs], layer: int | None = None
) -> list[dict[str, Any]]:
    """Of every output that something is expected of: how far it is from that, and from the base's; of a layer in
    proportion to what it adds, for beside the stream that goes through it a fault would look small."""
    rows = []
    for place, (sample, ours, without) in enumerate(zip(job["samples"], found, base, strict=True)):
        through: Outputs = {}
        if layer is not None:
            through = dict(zip(stream_names(layer + 1), _recorded(job, place, layer), strict=True))
        for name in ours:
            if name not in sample["expected"]:
                continue  # nothing of it is generated
            expected = _tensor(job, sample["expected"][name])
            difference = (ours[name] - expected).norm() / (expected - through.get(name, 0)).norm()
            change = (ours[name] - without[name]).norm() / (without[name] - through.get(name, 0)).norm().clamp(
                min=1e-30
            )
            rows.append(
                {"sample": sample["key"], "output": name, "difference": float(difference), "change": float(change)}
            )
    return rows


def _require_all_compared(job: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> None:
    """Whatever the trained model said of a sample must have met upstream's, in every form."""
    for form in job["forms"]:
        compared = {(row["sample"], row["output"]) for row in results[form]}
        for sample in job["samples"]:
            for name in sample["expected"]:
                if (sample["key"], name) not in compared:
                    raise SystemExit(f"{form}: upstream gave no {name!r} of sample {sample['key']!r} to compare")


if __name__ == "__main__":
    main(sys.argv[1])
