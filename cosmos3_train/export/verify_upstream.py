"""Run by itself (`python -I verify_upstream.py job.json`): an export's numbers by upstream's classes and nothing else.

Loads the base, runs every sample, loads each form of the export onto a fresh base, runs every sample again, and writes
to the job's "result" how far the velocities are from the expected ones, how much the export changes the base's, and
that the package which wrote the export could not be imported here. Any doubt ends the process with an error.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


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
    from safetensors.torch import load_file

    tensors = load_file(job["tensors"])
    base = _run(_load_base(job["base"], job["dtype"]), job, tensors)
    results = {}
    for form, path in job["forms"].items():
        transformer = _load_form(form, path, job)
        results[form] = _compare(job, tensors, _run(transformer, job, tensors), base)
        del transformer
    if job["blocked"] in {name.partition(".")[0] for name in sys.modules}:
        raise SystemExit(f"{job['blocked']} was imported on the way, so this proves nothing")
    Path(job["result"]).write_text(json.dumps(results), encoding="utf-8")


def _load_base(folder: str, dtype: str) -> Any:
    import torch
    from diffusers import Cosmos3OmniTransformer

    # With low_cpu_mem_usage the weights come shard by shard, so that one copy is all the memory needed.
    transformer = Cosmos3OmniTransformer.from_pretrained(
        folder, subfolder="transformer", torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    return transformer.eval()


def _load_form(form: str, path: str, job: dict[str, Any]) -> Any:
    if form == "merged":
        return _load_base(path, job["dtype"])
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    transformer = _load_base(job["base"], job["dtype"])
    if form == "adapter":
        transformer.load_lora_adapter(path, weight_name=job["weight_name"])
        if not getattr(transformer, "peft_config", None):
            raise SystemExit(f"{job['weight_name']}: upstream loaded nothing of it (a wrong prefix?)")
        name = next(iter(transformer.peft_config))
        file, prefix = Path(path) / job["weight_name"], "transformer."
    else:
        transformer = PeftModel.from_pretrained(transformer, path)
        name, file, prefix = "default", Path(path) / "adapter_model.safetensors", ""
    loaded = get_peft_model_state_dict(transformer, adapter_name=name, save_embedding_layers=False)
    _require_all_loaded(file, prefix, loaded)
    # Not .eval(): whoever loads an adapter as its usage text says does not call it either.
    return transformer


def _require_all_loaded(file: Path, prefix: str, loaded: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    wanted = load_file(file)
    for key, value in wanted.items():
        name = key.removeprefix(prefix)
        if name not in loaded:
            raise SystemExit(f"{file.name}: upstream left out {key!r}")
        if not torch.equal(loaded[name].cpu(), value.to(loaded[name].dtype)):
            raise SystemExit(f"{file.name}: {key!r} is another tensor once upstream has loaded it")
    if len(wanted) != len(loaded):
        raise SystemExit(f"{file.name}: upstream has {len(loaded)} adapter tensors, the file {len(wanted)}")


def _run(transformer: Any, job: dict[str, Any], tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """float32 velocities of every sample, by modality."""
    import torch

    dtype = getattr(torch, job["dtype"])
    outputs = []
    for sample in job["samples"]:
        arguments = {name: _decode(value, tensors) for name, value in sample["arguments"].items()}
        for name in ("vision_tokens", "sound_tokens", "action_tokens"):
            if name in arguments:
                arguments[name] = [value.to(dtype) for value in arguments[name]]
        with torch.no_grad():
            out = transformer(**arguments)
        found = {"video": out.sample[0][0]}
        found |= {"sound": out.sound[0]} if out.sound is not None else {}
        found |= {"action": out.action[0]} if out.action is not None else {}
        outputs.append({name: value.float() for name, value in found.items()})
    return outputs


def _decode(value: Any, tensors: dict[str, Any]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tensors" in value:
        return [tensors[name] for name in value["tensors"]]
    return [tuple(shape) for shape in value["shapes"]] if "shapes" in value else value["number"]


def _compare(job: dict[str, Any], tensors: dict[str, Any], found: list, base: list) -> list[dict[str, Any]]:
    rows = []
    for sample, ours, without in zip(job["samples"], found, base, strict=True):
        for modality, name in sample["expected"].items():
            expected = tensors[name]
            difference = (ours[modality] - expected).norm() / expected.norm()
            change = (ours[modality] - without[modality]).norm() / without[modality].norm().clamp(min=1e-30)
            rows.append(
                {
                    "sample": sample["key"],
                    "modality": modality,
                    "difference": float(difference),
                    "change": float(change),
                }
            )
    return rows


if __name__ == "__main__":
    main(sys.argv[1])
