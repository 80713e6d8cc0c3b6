"""Is the export what was trained? Upstream's classes load it where this package cannot be imported, and are compared.

The trained backbone's velocities and upstream's arguments for the same samples go to a file; `verify_upstream.py`, run
by itself, loads the base and the export and reports. The comparison is in float32 where a copy of the model fits in
memory (the trained model's copy is gone before upstream's is made), else in bfloat16, and the report says which.
An export that fails is renamed, so that nobody deploys it by its name.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cosmos3_train.config import UserError
from cosmos3_train.export.adapter import PEFT_FOLDER, check_adapter
from cosmos3_train.export.base_identity import check_base
from cosmos3_train.export.folder import set_aside, write_json
from cosmos3_train.export.upstream_inputs import Probe, make_probes, our_velocities, upstream_arguments
from cosmos3_train.export.usage import WEIGHT_NAME
from cosmos3_train.model.base_identity import shard_files
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout
from cosmos3_train.types import TokenSample

logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16"]
SCRIPT = Path(__file__).with_name("verify_upstream.py")
REPORT = "verification.json"
ADAPTER_LIMIT: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 5e-2}
"""Largest difference of an adapter. In bfloat16 two correct runs differ by rounding, so that limit only finds gross
errors (LoRA left out, a wrong alpha); the float32 one is the proof."""
MERGED_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest difference that merging may cost, by the dtype in which the merged weights are stored."""
MEMORY_MARGIN = 1.15


class VerificationError(RuntimeError):
    """An export does not give the trained model's numbers: an error of this project or of a library, not the user's."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verification.json` says.

    relative_difference: largest ‖upstream − ours‖ / ‖ours‖ over the samples' velocities, each modality by itself
    change:   largest ‖with − without‖ / ‖without‖: how much the export changes the base (0: nothing was loaded)
    dtype:    in which both ran;  limit: what the difference had to stay below
    how:      in words
    forms:    relative_difference of each form that was loaded (adapter, peft, merged)
    """

    relative_difference: float
    change: float
    dtype: Precision
    limit: float
    how: str
    samples: int
    forms: dict[str, float]


def verify_adapter(
    folder: Path,
    base_folder: Path,
    backbone: Cosmos3PackedTransformer,
    samples: Sequence[TokenSample],
    dtype: Precision | Literal["auto"] = "auto",
) -> VerifyReport:
    """Load an adapter folder by `load_lora_adapter` and its twin by `PeftModel`, and compare with the trained model.

    Args:
        backbone: the trained model;  samples: a few, of the tasks that the run trained.
        dtype: auto takes float32 where a copy of the model fits in this machine's memory.

    Raises:
        UserError: the wrong base, or an adapter of which nothing would load.
        VerificationError: the numbers differ, or the adapter changes nothing; the folder is renamed.
    """
    check_base(folder, base_folder)
    check_adapter(folder)
    forms = {"adapter": folder, "peft": folder / PEFT_FOLDER}
    precision, how = _precision(backbone, dtype)
    return _verify(folder, base_folder, backbone, samples, forms, precision, how, ADAPTER_LIMIT[precision])


def verify_merged(
    folder: Path,
    base_folder: Path,
    backbone: Cosmos3PackedTransformer,
    samples: Sequence[TokenSample],
    dtype: Precision | Literal["auto"] = "auto",
) -> VerifyReport:
    """Load a merged folder with upstream's class and report what storing its weights costs. As `verify_adapter`."""
    check_base(folder, base_folder)
    precision, how = _precision(backbone, dtype)
    limit = max(ADAPTER_LIMIT[precision] if precision == "bfloat16" else 0.0, MERGED_LIMIT[_stored_dtype(base_folder)])
    return _verify(folder, base_folder, backbone, samples, {"merged": folder}, precision, how, limit)


def _verify(
    folder: Path,
    base_folder: Path,
    backbone: Cosmos3PackedTransformer,
    samples: Sequence[TokenSample],
    forms: Mapping[str, Path],
    precision: Precision,
    how: str,
    limit: float,
) -> VerifyReport:
    if not samples:
        raise UserError("export: no samples to verify the export with; give at least one")
    layout = Layout.of(backbone.config)
    probes = make_probes(samples, layout)
    with tempfile.TemporaryDirectory(prefix="cosmos3_verify_") as scratch:
        job = _write_job(Path(scratch), backbone, probes, layout, precision)
        job |= {
            "base": str(base_folder.resolve()),
            "forms": {form: str(path.resolve()) for form, path in forms.items()},
            "weight_name": WEIGHT_NAME,
        }
        try:
            rows = _run_alone(Path(scratch), job)
            _require_close(rows, limit)
        except VerificationError as error:
            raise VerificationError(f"{error}; the export is kept as {set_aside(folder)} for inspection") from None
    differences = {form: max(row["difference"] for row in found) for form, found in rows.items()}
    report = VerifyReport(
        relative_difference=max(differences.values()),
        change=max(row["change"] for found in rows.values() for row in found),
        dtype=precision,
        limit=limit,
        how=how,
        samples=len(probes),
        forms=differences,
    )
    write_json(folder / REPORT, asdict(report))
    logger.info("export verified: differs by %.1e (%s), %s", report.relative_difference, precision, folder)
    return report


def _require_close(rows: Mapping[str, list[dict[str, Any]]], limit: float) -> None:
    for form, found in rows.items():
        worst = max(found, key=lambda row: math.inf if math.isnan(row["difference"]) else row["difference"])
        if not worst["difference"] <= limit:
            raise VerificationError(
                f"{form}: velocity of {worst['modality']} differs by {worst['difference']:.2e} from the trained model "
                f"for sample {worst['sample']!r}, more than {limit:g}"
            )
        if not max(row["change"] for row in found) > 0:
            raise VerificationError(f"{form}: gives the base's own numbers: nothing was trained, or nothing loads")


# ------------------------------------------------------------------------------------------------ the job


def _write_job(
    scratch: Path, backbone: Cosmos3PackedTransformer, probes: Sequence[Probe], layout: Layout, precision: Precision
) -> dict[str, Any]:
    """Save what our backbone says and what upstream is to be asked; the job's part that describes it."""
    tensors: dict[str, Tensor] = {}
    described = []
    model, was_training = _model_in(backbone, precision), backbone.training
    model.eval()  # no dropout
    try:
        for place, probe in enumerate(probes):
            arguments = upstream_arguments(backbone, probe, layout)
            encoded = {name: _encode(value, f"{place}.{name}", tensors) for name, value in arguments.items()}
            expected = our_velocities(model, probe, layout)
            tensors |= {f"{place}.expected.{name}": value for name, value in expected.items()}
            names = {name: f"{place}.expected.{name}" for name in expected}
            described.append({"key": probe.sample.key, "arguments": encoded, "expected": names})
    finally:
        backbone.train(was_training)
    del model  # a float32 copy must be gone before upstream makes its own
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, scratch / "tensors")
    return {
        "blocked": __name__.partition(".")[0],
        "dtype": precision,
        "tensors": str(scratch / "tensors"),
        "result": str(scratch / "result.json"),
        "samples": described,
    }


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, int):
        return {"number": value}
    if isinstance(value[0], Tensor):
        tensors |= {f"{name}.{index}": item for index, item in enumerate(value)}
        return {"tensors": [f"{name}.{index}" for index in range(len(value))]}
    return {"shapes": [list(shape) for shape in value]}


def _run_alone(scratch: Path, job: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Run the script in a process of its own, from a folder that holds nothing else; its rows by form."""
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    # A copy: beside the original lies this package, and -I keeps the working folder and PYTHONPATH out as well.
    script = Path(shutil.copy(SCRIPT, scratch / SCRIPT.name))
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(scratch / "job.json")],
        cwd=scratch,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    result = Path(job["result"])
    if done.returncode or not result.is_file():
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        reason = lines[-1] if lines else "no message"
        raise VerificationError(f"the verifying process ended with {done.returncode}: {reason}")
    return json.loads(result.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ precision


def _precision(backbone: nn.Module, wanted: Precision | Literal["auto"]) -> tuple[Precision, str]:
    """In what both models run, and the words for the report."""
    where = "sample by sample, in a process without this package"
    if wanted == "auto":
        needed = sum(p.numel() for p in backbone.parameters()) * 4 * MEMORY_MARGIN
        free = _free_memory()
        if free is not None and needed > free:
            why = f"float32 needs {needed / 1e9:.0f} GB a copy, {free / 1e9:.0f} GB are free"
            return "bfloat16", f"the whole model in bfloat16 ({why}), {where}"
        wanted = "float32"
    return wanted, f"the whole model in {wanted}, {where}"


def _free_memory() -> float | None:
    """Bytes that a new process may take, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
        return math.prod(os.sysconf(name) for name in names) if set(names) <= set(os.sysconf_names) else None
    found = {line.split(":")[0]: float(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return found.get("MemAvailable")


def _model_in(backbone: Cosmos3PackedTransformer, precision: Precision) -> Cosmos3PackedTransformer:
    """The backbone itself where it already runs in that precision, else a copy on the CPU that does."""
    wanted = getattr(torch, precision)
    if backbone.compute_dtype == wanted:
        return backbone
    if wanted == torch.bfloat16:
        raise UserError("export: the run is in float32, so its export is verified in float32; it needs more memory")
    memo: dict[int, Any] = {}
    for parameter in backbone.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", wanted), requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", wanted if buffer.is_floating_point() else buffer.dtype)
    # deepcopy takes what the memo has: no second copy of the weights in the device's memory.
    model = copy.deepcopy(backbone, memo)
    model.compute_dtype = wanted
    model.attention_backend = "sdpa"
    return model


def _stored_dtype(base_folder: Path) -> torch.dtype:
    """The dtype of most of a checkpoint's bytes: that of the largest tensor of its first shard."""
    with safe_open(shard_files(base_folder / "transformer")[0], framework="pt") as shard:
        names = list(shard.keys())
        sizes = {name: math.prod(shard.get_slice(name).get_shape()) for name in names}
        return shard.get_tensor(max(sizes, key=lambda name: sizes[name])).dtype
