"""An export is compared with the trained model by whichever way fits in memory, and nothing false gets through."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cosmos3_train.config import Tuning, UserError
from cosmos3_train.export import verify, verify_upstream
from cosmos3_train.export.adapter import PEFT_FOLDER, write_adapter, write_safetensors
from cosmos3_train.export.folder import VerificationError
from cosmos3_train.export.merged import write_merged
from cosmos3_train.export.trained_outputs import final_outputs, layer_outputs, model_in
from cosmos3_train.export.upstream_inputs import LARGEST_SIDE, make_probes
from cosmos3_train.export.usage import WEIGHT_NAME
from cosmos3_train.export.verify import MEMORY_MARGIN, choose_way, merged_limit, read_report, verify_adapter
from cosmos3_train.export.verify_upstream import stream_names
from cosmos3_train.model.packing import Layout
from cosmos3_train.types import TokenSample
from tests.disk import small_files
from tests.export.trained import PICO, odd_samples, owned, token_samples, trained_pico

# Of a model of which one layer is in memory, upstream's loaders fill the others on the meta device.
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter.*no-op")

LAYERS = 6
BOTH = ["understanding", "generation"]
HYBRID = Tuning(method="hybrid", rank=4, alpha=6.0, dora=True, towers=BOTH)


@pytest.fixture(scope="module")
def backbone():
    return trained_pico(HYBRID, "bfloat16")


def bytes_of(backbone, width: int) -> float:
    """What the whole model needs at that many bytes a weight."""
    return sum(p.numel() for p in backbone.parameters()) * width * MEMORY_MARGIN


def by_layers_only(backbone) -> float:
    return bytes_of(backbone, 2) - 1


def large_clip() -> TokenSample:
    (sample,) = token_samples(("policy",))
    return replace(sample, key="large", video=torch.randn((48, 3, LARGEST_SIDE + 5, LARGEST_SIDE + 2)))


# ------------------------------------------------------------------------------------------------ the way


def test_the_whole_model_in_float32_where_it_fits(backbone):
    for memory in (None, bytes_of(backbone, 4)):
        way, then_bfloat16, how = choose_way(backbone, memory)
        assert (way, then_bfloat16) == ("whole", False)
        assert how.startswith("the whole model in float32")


def test_else_layers_and_the_whole_in_bfloat16_where_that_fits(backbone):
    for memory, both in (
        (bytes_of(backbone, 4) - 1, True),
        (bytes_of(backbone, 2), True),
        (bytes_of(backbone, 2) - 1, False),
    ):
        way, then_bfloat16, how = choose_way(backbone, memory)
        assert (way, then_bfloat16) == ("layers", both)
        assert "one decoder layer at a time in float32" in how and f"{memory / 1e9:.3g} GB are free" in how
        assert ("then the whole model in bfloat16" in how) is both
        assert ("was not compared" in how) is not both


def test_too_little_for_a_layer_is_refused_in_one_line(backbone):
    layer = sum(p.numel() for p in backbone.layers[0].parameters()) * 4
    for memory, tokens in ((layer, 0), (by_layers_only(backbone), 10_000)):
        with pytest.raises(UserError, match=r"verifying needs [\d.]+ GB .* GB of memory are free; free some") as told:
            choose_way(backbone, memory, tokens)
        assert "\n" not in str(told.value)
    assert choose_way(backbone, by_layers_only(backbone), 100)[0] == "layers"


def test_the_limit_of_a_merge_grows_with_the_depth_it_is_measured_through():
    assert merged_limit([torch.bfloat16, torch.float32], 1) == merged_limit([torch.bfloat16], LAYERS) == 1e-2
    assert merged_limit([torch.float32], 1) == 1e-5
    assert merged_limit([torch.bfloat16], 6 * LAYERS) == pytest.approx(1e-2 * 6**0.5)


# ------------------------------------------------------------------------------------------------ by layers


def test_an_adapter_layer_by_layer_and_then_whole_in_bfloat16(backbone, tmp_path, upstream_here):
    backbone.train()  # as a run leaves it
    folder = write_adapter(backbone, tmp_path / "adapter", PICO, run="a")
    samples = [large_clip(), odd_samples()[1]]
    report = verify_adapter(folder, PICO, backbone, samples, memory=bytes_of(backbone, 2))
    assert backbone.training and backbone.proj_in.weight.dtype == torch.bfloat16
    assert (report.way, report.samples) == ("layers", 2)
    assert report.relative_difference <= 1e-5 < 1e-2 < report.change
    for form in ("adapter", "peft"):
        streams = {name for boundary in range(LAYERS + 1) for name in stream_names(boundary)}
        assert set(report.outputs[form]) == streams | {"text", "video", "action", "sound"}
        for boundary in range(1, LAYERS + 1):  # LoRA is in every layer of both towers
            assert all(report.outputs[form][name].change > 1e-2 for name in stream_names(boundary))
    assert report.bfloat16 is not None and set(report.bfloat16) == {"adapter", "peft"}
    assert all(1e-4 < difference <= 5e-2 for difference in report.bfloat16.values())  # rounding, through Pico's weights
    assert read_report(folder) == report
    told = (folder / "README.md").read_text()
    assert told.count("\n\n## Verified\n") == 1 and report.how in told and "The whole model in bfloat16: " in told


@pytest.mark.slow
def test_a_merge_layer_by_layer(backbone, tmp_path):
    folder = write_merged(backbone, PICO, tmp_path / "merged", run="a")
    samples = [*token_samples(), *odd_samples()]
    report = verify.verify_merged(folder, PICO, backbone, samples, memory=by_layers_only(backbone))
    assert report.way == "layers" and report.bfloat16 is None and report.limit == 1e-2
    assert 1e-4 < report.relative_difference <= 1e-2  # Pico is stored in bfloat16
    assert report.outputs["merged"]["layer 5, generation"].change > 1e-2
    assert report.outputs["merged"]["embeddings, understanding"].difference <= 1e-6  # nothing of it was merged
    assert read_report(folder) == report


def spoil(file: Path, names: str | tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write a safetensors file again with the tensors whose names contain all of `names` changed."""
    with safe_open(file, framework="pt") as content:
        order, head = list(content.offset_keys()), content.metadata()
    wanted = (names,) if isinstance(names, str) else names
    tensors = owned(file)
    found = [name for name in tensors if all(part in name for part in wanted)]
    assert len(found) == 1
    tensors[found[0]] = change(tensors[found[0]])
    if tensors[found[0]].dtype == torch.float32:
        write_safetensors(file, {name: tensors[name] for name in order}, head)
    else:
        save_file(tensors, file, metadata=head)


@pytest.mark.parametrize(
    "file, tensor, named",
    [
        (WEIGHT_NAME, ("layers.3.", "add_q_proj.lora_B"), "^adapter: layer 3, generation differs"),
        (WEIGHT_NAME, ("layers.5.", ".mlp.down_proj.lora_magnitude"), "^adapter: layer 5, understanding differs"),
        (f"{PEFT_FOLDER}/adapter_model.safetensors", ("layers.0.", "to_v.lora_A"), "^peft: layer 0, "),
        (WEIGHT_NAME, "action_proj_out.bias.token_adapter", "^adapter: action differs"),
        (WEIGHT_NAME, "action_proj_in.fc.token_adapter", "^adapter: embeddings, generation differs"),
    ],
)
def test_a_spoilt_tensor_of_an_adapter_is_found_and_its_layer_named(
    file, tensor, named, backbone, tmp_path, upstream_here
):
    folder = write_adapter(backbone, tmp_path / "adapter", PICO, run="a")
    spoil(folder / file, tensor, lambda value: value * 1.01)
    with pytest.raises(VerificationError, match=named):
        verify_adapter(folder, PICO, backbone, token_samples(("policy",)), memory=by_layers_only(backbone))
    assert not (folder / "verification.json").exists() and "## Verified" not in (folder / "README.md").read_text()


def test_a_spoilt_tensor_of_a_merge_is_found_and_its_layer_named(backbone, tmp_path, upstream_here):
    folder = write_merged(backbone, PICO, tmp_path / "merged", run="a")
    name = "layers.2.mlp_moe_gen.up_proj.weight"
    spoil(folder / "transformer" / verify_upstream._files(str(folder))[name].name, name, lambda value: value * 1.1)
    with pytest.raises(VerificationError, match=r"^merged: layer 2, generation differs"):
        verify.verify_merged(folder, PICO, backbone, token_samples(("policy",)), memory=by_layers_only(backbone))


def test_what_flows_between_layers_is_compared(backbone, tmp_path, upstream_here, monkeypatch):
    def outputs_of_a_model_whose_last_layer_adds_more(*arguments):
        found = layer_outputs(*arguments)
        found[0]["layer 5, understanding"] *= 1.0001  # which the norm after it takes back: no final output shows it
        return found

    monkeypatch.setattr(verify, "layer_outputs", outputs_of_a_model_whose_last_layer_adds_more)
    folder = write_adapter(backbone, tmp_path / "adapter", PICO, run="a")
    with pytest.raises(VerificationError, match=r"^adapter: layer 5, understanding differs by "):
        verify_adapter(folder, PICO, backbone, token_samples(("policy",)), memory=by_layers_only(backbone))


def test_layers_that_are_put_together_otherwise_are_found_in_bfloat16(backbone, tmp_path, upstream_here, monkeypatch):
    def outputs_of_layers_in_another_order(*arguments):
        layers = arguments[0].layers
        layers[1], layers[2] = layers[2], layers[1]
        try:
            return final_outputs(*arguments)
        finally:
            layers[1], layers[2] = layers[2], layers[1]

    monkeypatch.setattr(verify, "final_outputs", outputs_of_layers_in_another_order)
    folder = write_adapter(backbone, tmp_path / "adapter", PICO, run="a")
    with pytest.raises(VerificationError, match=r"^adapter: \w+ differs by .* more than 0\.05"):
        verify_adapter(folder, PICO, backbone, token_samples(("policy",)), memory=bytes_of(backbone, 2))
    assert not (folder / "verification.json").exists()


def test_an_output_that_upstream_does_not_give_is_missed():
    job = {"forms": ["adapter"], "samples": [{"key": "a", "expected": {"video": "x", "layer 0, generation": "y"}}]}
    rows = [{"sample": "a", "output": "video"}, {"sample": "a", "output": "layer 0, generation"}]
    verify_upstream._require_all_compared(job, {"adapter": rows})
    with pytest.raises(SystemExit, match="adapter: upstream gave no 'layer 0, generation' of sample 'a'"):
        verify_upstream._require_all_compared(job, {"adapter": rows[:1]})


def test_an_adapter_that_changes_nothing_is_refused(tmp_path, upstream_here):
    untrained = trained_pico(Tuning(method="lora", rank=4, learning_rate_multipliers={}), step=0.0)
    folder = write_adapter(untrained, tmp_path / "adapter", PICO, run="a")
    with pytest.raises(VerificationError, match="gives the base's own numbers"):
        verify_adapter(folder, PICO, untrained, token_samples(("text_to_video",)))


# ------------------------------------------------------------------------------------------------ the trained model


def test_one_layer_in_float32_at_a_time_gives_the_whole_models_outputs(backbone):
    layout = Layout.of(backbone.config)
    probes = make_probes([large_clip(), *token_samples(), *odd_samples()], layout)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    whole, by_layer = (model_in(backbone, torch.float32, a_layer_at_a_time=one).eval() for one in (False, True))
    expected = [final_outputs(whole, [probe], layout)[0] for probe in probes]
    found = layer_outputs(by_layer, probes, layout)
    for probe, ours, theirs in zip(probes, found, expected, strict=True):
        for name, value in theirs.items():
            assert (ours[name] - value).norm() <= 1e-5 * value.norm(), (probe.sample.key, name)
        assert ours["layer 5, understanding"].shape == (probe.sample.text.numel(), 256)
        assert ours["layer 0, generation"].shape == (layout.tokens(probe.sample) - probe.sample.text.numel(), 256)
    pairs = zip(by_layer.layers.parameters(), backbone.layers.parameters(), strict=True)
    assert all(p is q for p, q in pairs), "a layer gives its float32 weights back"
    for name, parameter in backbone.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])


def test_a_copy_shares_the_weights_that_are_in_its_dtype_already():
    trained = trained_pico(Tuning(method="lora", rank=4, learning_rate_multipliers={}))
    trained.compiler = "aot_eager"
    copied = model_in(trained, torch.float32)
    assert copied is not trained and copied.compiler is None and copied.attention_backend == "sdpa"
    pairs = zip(copied.parameters(), trained.parameters(), strict=True)
    assert all(p.data_ptr() == q.data_ptr() for p, q in pairs)


# ------------------------------------------------------------------------------------------------ a process of its own


def alone(script: str, monkeypatch, tmp_path) -> None:
    """Verify with another script in the place of ours."""
    file = tmp_path / "verify_upstream.py"
    file.write_text(script)
    monkeypatch.setattr(verify, "SCRIPT", file)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    verify._run_alone(scratch, {"result": str(scratch / "result.json"), "blocked": "cosmos3_train", "way": "whole"})


def test_this_package_cannot_be_imported_where_it_is_verified(monkeypatch, tmp_path):
    ours = verify.SCRIPT.read_text()
    tried = "def _whole(job):\n    sys.path.insert(0, {root!r})\n    {what}\n    raise SystemExit('imported')\n\n\n"
    main = 'if __name__ == "__main__":'
    assert ours.count(main) == 1
    for what in ("import cosmos3_train", "from cosmos3_train.types import TokenSample"):
        script = ours.replace(main, tried.format(root=str(PICO.parents[1]), what=what) + main)
        (tmp_path / what).mkdir()
        with pytest.raises(VerificationError, match=r"ModuleNotFoundError: cosmos3_train is not to be imported here"):
            alone(script, monkeypatch, tmp_path / what)


def test_a_package_that_was_imported_before_proves_nothing():
    code = (
        f"import sys; sys.path.insert(0, {str(verify.SCRIPT.parent)!r}); import verify_upstream as v; v.block('json')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "json could be imported, so this proves nothing" in done.stderr


@pytest.mark.parametrize(
    "script, message",
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "was killed, most likely because the memory"),
        ("print('a line')\nraise SystemExit('a reason')", "ended with 1: a reason$"),
        ("", "ended with 0: no message$"),
    ],
)
def test_a_process_that_gives_no_result_is_no_proof(script, message, monkeypatch, tmp_path):
    with pytest.raises(VerificationError, match=message):
        alone(script, monkeypatch, tmp_path)


def test_no_space_for_what_is_compared_is_told_in_one_line(backbone, tmp_path, monkeypatch):
    def never(*arguments: Any) -> None:
        raise AssertionError("it was asked nonetheless")

    folder = write_adapter(backbone, tmp_path / "adapter", PICO, run="a")
    monkeypatch.setattr(verify, "_run_alone", never)
    with small_files(1000), pytest.raises(UserError, match=r"no space in .*; free some, or set TMPDIR") as told:
        verify_adapter(folder, PICO, backbone, token_samples(("policy",)))
    assert "\n" not in str(told.value)
