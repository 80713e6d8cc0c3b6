"""Is the export what was trained? Upstream's classes load it where this package cannot be imported, and are compared.

The trained model's outputs and upstream's arguments for the same samples go to a file; `verify_upstream.py`, run by
itself, loads the base and the export and reports. The comparison is in float32: of the whole model where a copy of it
fits in memory (the trained model's copy is gone before upstream's is made); else of the embeddings and heads and of one
decoder layer at a time, each given the trained model's own inputs, and then of the whole model in bfloat16 where that
fits. The report and the export's README say which, and each difference.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmos3_train import runtime
from cosmos3_train.config import UserError
from cosmos3_train.export.adapter import PEFT_FOLDER, check_adapter
from cosmos3_train.export.base_identity import check_base
from cosmos3_train.export.folder import VerificationError, is_disk_full, write_json
from cosmos3_train.export.trained_outputs import final_outputs, layer_outputs, model_in
from cosmos3_train.export.upstream_inputs import LARGEST_SIDE, Probe, make_probes, upstream_arguments
from cosmos3_train.export.usage import WEIGHT_NAME, add_verification
from cosmos3_train.model.base_identity import shard_files
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.packing import Layout
from cosmos3_train.types import TokenSample

logger = logging.getLogger(__name__)

Way = Literal["whole", "layers"]
Rows = dict[str, list[dict[str, Any]]]
"""By form: sample, output, difference and change, one row for each output of each sample."""

SCRIPT = Path(__file__).with_name("verify_upstream.py")
REPORT = "verification.json"
ADAPTER_LIMIT = 1e-5
"""Largest difference of an adapter in float32."""
BFLOAT16_LIMIT = 5e-2
"""Largest difference of any export in bfloat16, where two correct runs differ by rounding: it finds only gross errors
(LoRA left out, a wrong alpha), and only what the layers' own comparison cannot see, how they are put together."""
MERGED_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest difference that merging may cost, by the dtype in which weights are stored or the run held them."""
MERGED_DEPTH = 6
"""Layers of a whole model of which MERGED_LIMIT holds. Roundings of more add up like their root: rounding random
weights to bfloat16 costs 6e-3 through 6 layers and 1.2e-2 through 36, and that is no fault of the export."""
MEMORY_MARGIN = 1.15


@dataclass(frozen=True)
class Difference:
    """The worst over the samples: ‖upstream − ours‖ / ‖ours‖, and ‖with − without‖ / ‖without‖ the export. Of a stream
    after a layer the denominators are of what the layer adds to it."""

    difference: float
    change: float


@dataclass(frozen=True)
class VerifyReport:
    """What `verification.json` says.

    relative_difference: the largest difference in `dtype`;  limit: what it had to stay within
    change:     the largest change: how much the export changes the base (0: nothing was loaded)
    way:        "whole": final outputs of the whole model; "layers": every part by itself, from the trained model's
        inputs;  how: the same in words, and why
    forms:      relative_difference of each form that was loaded (adapter, peft, merged)
    outputs:    of each form each output that was compared: velocities (video, sound, action), the text's hidden states,
        and one part at a time both streams before the first decoder layer and after each
    bfloat16:   the largest difference of each form of the whole model in bfloat16, None where it was not compared
    rounded_base: how far the velocities of the model as it trained, on the base's weights in fp8, lie from the exported
        one's on the base's own, which are compared above; None where they were not rounded
    """

    relative_difference: float
    change: float
    way: Way
    limit: float
    how: str
    samples: int
    forms: dict[str, float]
    outputs: dict[str, dict[str, Difference]]
    bfloat16: dict[str, float] | None = None
    rounded_base: float | None = None
    dtype: Literal["float32"] = "float32"


def verify_adapter(
    folder: Path,
    base_folder: Path,
    backbone: Cosmos3PackedTransformer,
    samples: Sequence[TokenSample],
    memory: float | None = None,
    rounded_base: float | None = None,
) -> VerifyReport:
    """Load an adapter folder by `load_lora_adapter` and its twin by `PeftModel`, and compare with the trained model.

    Args:
        backbone: the trained model;  samples: a few, of the tasks that the run trained.
        memory: bytes that the comparison may take; None asks the system.
        rounded_base: for the report, of a model that trained on a rounded base and has the base's own weights now.

    Raises:
        UserError: the wrong base, an adapter of which nothing would load, or too little memory for one layer.
        VerificationError: the numbers differ, or the adapter changes nothing.
    """
    check_base(folder, base_folder)
    check_adapter(folder)
    forms = {"adapter": folder, "peft": folder / PEFT_FOLDER}
    return _verify(folder, base_folder, backbone, samples, forms, lambda way: ADAPTER_LIMIT, memory, rounded_base)


def verify_merged(
    folder: Path,
    base_folder: Path,
    backbone: Cosmos3PackedTransformer,
    samples: Sequence[TokenSample],
    memory: float | None = None,
    rounded_base: float | None = None,
) -> VerifyReport:
    """Load a merged folder with upstream's class and report what storing its weights costs. As `verify_adapter`."""
    check_base(folder, base_folder)
    dtypes = (_stored_dtype(base_folder), backbone.compute_dtype)

    def limit(way: Way) -> float:
        return merged_limit(dtypes, len(backbone.layers) if way == "whole" else 1)

    return _verify(folder, base_folder, backbone, samples, {"merged": folder}, limit, memory, rounded_base)


def merged_limit(dtypes: Sequence[torch.dtype], layers: int) -> float:
    """Largest difference that merging may cost what passes through that many decoder layers."""
    rounding = max(MERGED_LIMIT.get(dtype, 1e-2) for dtype in dtypes)
    return rounding * max(1.0, layers / MERGED_DEPTH) ** 0.5


def read_report(folder: Path) -> VerifyReport:
    """What `verification.json` of a verified export says."""
    content = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    outputs = {
        form: {name: Difference(**found) for name, found in named.items()} for form, named in content["outputs"].items()
    }
    return VerifyReport(**content | {"outputs": outputs})


def _verify(
    folder: Path,
    base_folder: Path,
    backbone: Cosmos3PackedTransformer,
    samples: Sequence[TokenSample],
    forms: Mapping[str, Path],
    limit_of: Callable[[Way], float],
    memory: float | None,
    rounded_base: float | None,
) -> VerifyReport:
    if not samples:
        raise UserError("export: no samples to verify the export with; give at least one")
    layout = Layout.of(backbone.config)
    probes = make_probes(samples, layout)
    tokens = sum(layout.tokens(probe.sample) for probe in probes)
    way, then_bfloat16, how = choose_way(backbone, runtime.free_memory() if memory is None else memory, tokens)
    limit = limit_of(way)
    question = {
        "base": str(base_folder.resolve()),
        "forms": {form: str(path.resolve()) for form, path in forms.items()},
        "weight_name": WEIGHT_NAME,
    }
    rows = _ask(backbone, probes, question, way, torch.float32)
    _require_close(rows, limit)
    halves: Rows | None = None
    if then_bfloat16:
        halves = _ask(backbone, probes, question, "whole", torch.bfloat16)
        _require_close(halves, BFLOAT16_LIMIT)
    outputs = {form: _worst(found) for form, found in rows.items()}
    differences = {form: max(d.difference for d in found.values()) for form, found in outputs.items()}
    report = VerifyReport(
        relative_difference=max(differences.values()),
        change=max(d.change for found in outputs.values() for d in found.values()),
        way=way,
        limit=limit,
        how=how,
        samples=len(samples),
        forms=differences,
        outputs=outputs,
        bfloat16=None if halves is None else {form: max(r["difference"] for r in f) for form, f in halves.items()},
        rounded_base=rounded_base,
    )
    write_json(folder / REPORT, asdict(report))
    add_verification(folder, _words(report))
    logger.info("export verified: differs by %.1e (%s)", report.relative_difference, how)
    return report


def _worst(rows: Sequence[Mapping[str, Any]]) -> dict[str, Difference]:
    """Of each output the worst over the samples, in the order in which they were compared."""
    found: dict[str, Difference] = {}
    for row in rows:
        known = found.get(row["output"], Difference(0.0, 0.0))
        found[row["output"]] = Difference(max(known.difference, row["difference"]), max(known.change, row["change"]))
    return found


def _require_close(rows: Rows, limit: float) -> None:
    for form, found in rows.items():
        worst = max(found, key=lambda row: math.inf if math.isnan(row["difference"]) else row["difference"])
        if not worst["difference"] <= limit:
            raise VerificationError(
                f"{form}: {worst['output']} differs by {worst['difference']:.2e} from the trained model for sample "
                f"{worst['sample']!r}, more than {limit:.2g}"
            )
        if not max(row["change"] for row in found) > 0:
            raise VerificationError(f"{form}: gives the base's own numbers: nothing was trained, or nothing loads")


def _words(report: VerifyReport) -> str:
    """A paragraph for the export's README."""
    text = (
        f"The trained model and this folder, loaded by upstream's classes, were compared on {report.samples} samples "
        f"(clips of at most {LARGEST_SIDE} latent cells a side): {report.how}. Largest relative difference "
        f"{report.relative_difference:.1e} (limit {report.limit:.2g}); the export changes the base's numbers by up to "
        f"{report.change:.1e}."
    )
    if report.bfloat16 is not None:
        largest = max(report.bfloat16.values())
        text += f" The whole model in bfloat16: {largest:.1e} (limit {BFLOAT16_LIMIT:g})."
    if report.rounded_base is not None:
        text += (
            " While it trained, the base's weights were rounded to fp8, which moves its velocities by up to "
            f"{report.rounded_base:.1e}; what was compared, and what this folder is for, is the base's own weights."
        )
    return text


# ------------------------------------------------------------------------------------------------ the way


def choose_way(backbone: Cosmos3PackedTransformer, memory: float | None, tokens: int = 0) -> tuple[Way, bool, str]:
    """How the export can be compared in `memory` bytes (None: no limit is known).

    Args:
        tokens: of all samples, which by layers are kept in float32 before the first layer and after each.

    Returns:
        The way in float32, whether the whole model is to be compared in bfloat16 as well, and both in words.

    Raises:
        UserError: not even one decoder layer fits.
    """

    def needed(count: int, width: int) -> float:
        return count * width * MEMORY_MARGIN

    # The head of the language model is not loaded by parts: no velocity sees it.
    ends = sum(p.numel() for n, p in backbone.named_parameters() if not n.startswith(("layers.", "lm_head.")))
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in backbone.layers)
    table = backbone.embed_tokens.weight.numel()
    streams = tokens * backbone.embed_tokens.weight.shape[1] * (len(backbone.layers) + 1)
    everything = sum(p.numel() for p in backbone.parameters())
    # Upstream's process has the ends or a layer; ours, before it, a layer or the table beside the other ends.
    part = max(ends, layer, ends - table + max(layer, table) + streams)
    where = "in a process without this package"
    if memory is None or needed(everything, 4) <= memory:
        return "whole", False, f"the whole model in float32, sample by sample, {where}"
    if needed(part, 4) > memory:
        raise UserError(
            f"export: verifying needs {needed(part, 4) / 1e9:.3g} GB for the largest part of the model in float32, and "
            f"{memory / 1e9:.3g} GB of memory are free; free some or export on a larger machine"
        )
    how = (
        "embeddings, heads and one decoder layer at a time in float32, each from the trained model's own inputs, "
        f"{where} (the whole in float32 needs {needed(everything, 4) / 1e9:.3g} GB, {memory / 1e9:.3g} GB are free)"
    )
    if needed(everything, 2) > memory:
        return "layers", False, f"{how}; the whole in bfloat16 does not fit either and was not compared"
    return "layers", True, f"{how}; then the whole model in bfloat16"


def _stored_dtype(base_folder: Path) -> torch.dtype:
    """The dtype of most of a checkpoint's bytes: that of the largest tensor of its first shard."""
    with safe_open(shard_files(base_folder / "transformer")[0], framework="pt") as shard:
        names = list(shard.keys())
        sizes = {name: math.prod(shard.get_slice(name).get_shape()) for name in names}
        return shard.get_tensor(max(sizes, key=lambda name: sizes[name])).dtype


# ------------------------------------------------------------------------------------------------ the job


def _ask(
    backbone: Cosmos3PackedTransformer,
    probes: Sequence[Probe],
    question: Mapping[str, Any],
    way: Way,
    dtype: torch.dtype,
) -> Rows:
    """Save what our model says and what upstream is to be asked, and let the other process compare."""
    layout = Layout.of(backbone.config)
    was_training = backbone.training
    model = model_in(backbone, dtype, a_layer_at_a_time=way == "layers")
    model.eval()  # no dropout
    try:
        if way == "layers":
            expected = layer_outputs(model, probes, layout)  # in one pack: each layer is made float32 once a tower
        else:
            expected = [final_outputs(model, [probe], layout)[0] for probe in probes]
    finally:
        backbone.train(was_training)
    del model  # a float32 copy must be gone before upstream makes its own
    tensors: dict[str, Tensor] = {}
    described = []
    for place, (probe, outputs) in enumerate(zip(probes, expected, strict=True)):
        arguments = upstream_arguments(backbone, probe, layout)
        encoded = {name: _encode(value, f"{place}.{name}", tensors) for name, value in arguments.items()}
        tensors |= {f"{place}.expected.{name}": value for name, value in outputs.items()}
        names = {name: f"{place}.expected.{name}" for name in outputs}
        described.append({"key": probe.sample.key, "arguments": encoded, "expected": names})
    with tempfile.TemporaryDirectory(prefix="cosmos3_verify_") as scratch:
        job = {
            **question,
            "blocked": __name__.partition(".")[0],
            "way": way,
            "dtype": str(dtype).removeprefix("torch."),
            "rounded": str(backbone.compute_dtype).removeprefix("torch."),
            "tensors": str(Path(scratch) / "tensors"),
            "result": str(Path(scratch) / "result.json"),
            "samples": described,
        }
        try:
            save_file(tensors, job["tensors"])
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            raise UserError(
                f"export: no space in {tempfile.gettempdir()} for verifying the export; free some, or set TMPDIR to a "
                "folder on another disk"
            ) from None
        del tensors, expected
        return _run_alone(Path(scratch), job)


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An argument as JSON can hold it; its tensors go to `tensors`, each with memory of its own as the file wants."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, int):
        return {"number": value}
    if isinstance(value[0], Tensor):
        return {"tensors": [_encode(item, f"{name}.{index}", tensors)["tensor"] for index, item in enumerate(value)]}
    return {"shapes": [list(shape) for shape in value]}


def _run_alone(scratch: Path, job: dict[str, Any]) -> Rows:
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
    if done.returncode == -signal.SIGKILL:
        raise VerificationError(
            "the verifying process was killed, most likely because the memory ran out; export again with more of it"
        )
    if done.returncode or not result.is_file():
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        reason = lines[-1] if lines else "no message"
        raise VerificationError(f"the verifying process ended with {done.returncode}: {reason}")
    return json.loads(result.read_text(encoding="utf-8"))
