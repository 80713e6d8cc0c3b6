"""A published folder as it comes out of the loader: what stays float32, what no file holds, what a bad file says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate import infer_auto_device_map
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer
from safetensors.torch import load_file, save_file

from cosmos3_train.config import Model, UserError
from cosmos3_train.evaluation.sampling import solver_schedule
from cosmos3_train.model import loading
from cosmos3_train.model.loading import load_backbone, load_parts
from cosmos3_train.model.prompts import robot_prompt, video_prompt
from tests.training.project import robot

CPU = torch.device("cpu")
SYSTEM, NATIVE = "default_use_system_prompt", "use_native_flow_schedule"


def model(folder, dtype="bfloat16", **changes) -> Model:
    return Model(path=str(folder), dtype=dtype, checkpoint_activations=False, **changes)


def test_every_weight_is_the_files_and_nothing_stays_meta(folder):
    ours = load_backbone(model(folder, "float32"), CPU)
    theirs = Cosmos3OmniTransformer.from_pretrained(folder / "transformer")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
    assert not any(p.requires_grad for p in ours.parameters())


def test_in_bf16_the_timestep_embedder_and_the_rotary_frequencies_stay_float32_and_exact(folder):
    ours = load_backbone(model(folder), CPU)
    for name, parameter in ours.named_parameters():
        expected = torch.float32 if name.startswith("time_embedder.") else torch.bfloat16
        assert parameter.dtype == expected, name
    upstream = Cosmos3OmniTransformer.from_config(Cosmos3OmniTransformer.load_config(folder / "transformer"))
    assert ours.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(ours.rotary_emb.inv_freq, upstream.rotary_emb.inv_freq)
    written_out = 1.0 / (5e6 ** (torch.arange(0, 16, 2).float() / 16))
    assert torch.equal(ours.rotary_emb.inv_freq, written_out)


def test_why_a_module_is_never_cast_as_a_whole(folder):
    """`module.to(bfloat16)`, which 'bf16-true' does, reaches what must stay float32: here is what it would cost."""
    exact = load_backbone(model(folder, "float32"), CPU)
    cast = load_backbone(model(folder, "float32"), CPU).to(torch.bfloat16)
    assert cast.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert {p.dtype for p in cast.time_embedder.parameters()} == {torch.bfloat16}
    position = torch.tensor([[[15001.0]]]).expand(3, 1, 1)
    right = exact.rotary_emb(position, CPU, torch.float32)[0]
    wrong = cast.rotary_emb(position, CPU, torch.float32)[0]
    assert float((right - wrong).abs().max()) > 0.5, "angles at far positions are noise"


def test_why_the_rotary_frequencies_are_made_anew(folder):
    """A module filled after `to_empty` passes a strict load with frequencies that nothing wrote."""
    config = Cosmos3OmniTransformer.load_config(folder / "transformer")
    with torch.device("meta"):
        empty = Cosmos3OmniTransformer.from_config(config)
    assert empty.rotary_emb.inv_freq.is_meta
    empty = empty.to_empty(device="cpu")
    empty.rotary_emb.inv_freq.fill_(float("nan"))  # what uninitialised memory may hold
    weights = load_backbone(model(folder, "float32"), CPU).state_dict()
    assert not any("inv_freq" in name for name in weights)
    empty.load_state_dict(weights, strict=True)
    assert empty.rotary_emb.inv_freq.isnan().all(), "the strict load did not notice"
    ours = load_backbone(model(folder, "float32"), CPU)
    assert not ours.rotary_emb.inv_freq.isnan().any()


def test_without_text_logits_the_output_layer_is_not_read(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("lm_head.weight")
    save_file(tensors, file, {"format": "pt"})
    assert not hasattr(load_backbone(model(copy), CPU, text_logits=False), "lm_head")
    with pytest.raises(UserError, match=r"lacks 1 tensors, 'lm_head.weight' first"):
        load_backbone(model(copy), CPU)


def test_bad_files_are_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: damaged .*fetch it again"):
        load_backbone(model(copy), CPU)
    file.write_bytes(whole)
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UserError, match=r"is \[.*80.*\], the model expects \[.*96.*\]"):
        load_backbone(model(copy), CPU)
    file.unlink()
    with pytest.raises(UserError, match="no safetensors file in it"):
        load_backbone(model(copy), CPU)
    (copy / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match=r"no transformer/config.json in it"):
        load_backbone(model(copy), CPU)
    shutil.rmtree(copy / "vae")
    (copy / "transformer" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"its model_index.json, tokenizer, scheduler or vae cannot be read"):
        load_parts(model(copy), CPU)


@pytest.mark.parametrize("switches", [{}, {SYSTEM: False, NATIVE: True}, {SYSTEM: True, NATIVE: False}], ids=str)
def test_the_switches_of_the_folder_are_upstream_s(folder, tmp_path, switches):
    """Plain clips have the prompt that the folder's pipeline gives them by default, and its noise levels; robots have
    no system prompt whatever the default."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    kept = {key: value for key, value in index.items() if key not in (SYSTEM, NATIVE)}
    (copy / "model_index.json").write_text(json.dumps(kept | switches))
    ours = load_parts(model(copy, "float32"), CPU, vae_weights=False)
    theirs = Cosmos3OmniPipeline.from_pretrained(copy, enable_safety_checker=False)
    assert (ours.config[SYSTEM], ours.config[NATIVE]) == (theirs.config[SYSTEM], theirs.config[NATIVE])
    assert (ours.config[SYSTEM], ours.config[NATIVE]) == (switches.get(SYSTEM, True), switches.get(NATIVE, False))
    ids, _ = theirs.tokenize_prompt("a block", num_frames=5, height=64, width=96, fps=10.0)
    assert video_prompt(ours, "a block", 5, (64, 96), 10.0).tolist() == ids
    words = ours.text_tokenizer.decode(ids)
    assert ("<|im_start|>system" in words) == ours.config[SYSTEM]
    assert "system" not in ours.text_tokenizer.decode(robot_prompt(ours, "push", robot(), (64, 96)))
    native, otherwise = [999, 899, 749, 499], [999, 900, 750, 500]
    assert solver_schedule(ours, 4).timesteps.tolist() == (native if ours.config[NATIVE] else otherwise)


def test_a_folder_without_its_index_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"copy: its model_index.json, tokenizer.* cannot be read .*fetch it again"):
        load_parts(model(copy), CPU, vae_weights=False)


def test_what_upstream_and_accelerate_ask_for_by_class_name_finds_the_packed_layers(folder):
    """Our layers have another class name: with upstream's lists nothing would match, and without an error a layer would
    be split between devices, or never compiled."""
    backbone = load_backbone(model(folder, "float32"), CPU)
    names = {type(layer).__name__ for layer in backbone.layers}
    assert set(backbone._no_split_modules) == set(backbone._repeated_blocks) == names
    assert not names & {*Cosmos3OmniTransformer._no_split_modules, *Cosmos3OmniTransformer._repeated_blocks}
    layer = sum(p.numel() * p.element_size() for p in backbone.layers[0].parameters())
    rest = sum(p.numel() * p.element_size() for p in backbone.parameters()) - 2 * layer
    for room in range(layer // 4, 2 * rest + 2 * layer, layer // 3):
        places = infer_auto_device_map(
            backbone, {0: room, "cpu": 10**12}, no_split_module_classes=backbone._no_split_modules
        )
        assert not [name for name in places if name.startswith("layers.") and name.count(".") > 1]
    backbone.compile_repeated_blocks()
    assert all(layer._compiled_call_impl is not None for layer in backbone.layers)


def test_a_download_that_was_cut_off_is_not_there_yet(folder, tmp_path, monkeypatch):
    copy = tmp_path / "snapshot"
    shutil.copytree(folder, copy)
    monkeypatch.setattr(loading, "snapshot_download", lambda *arguments, **named: str(copy))
    hub = Model(path="nvidia/Cosmos3-Nano")
    assert loading.fetched_folder(hub) == copy
    index = (copy / "model_index.json").read_text()
    (copy / "model_index.json").write_text(json.dumps({"sound_tokenizer": ["diffusers", "Cosmos3AVAEAudioTokenizer"]}))
    assert loading.fetched_folder(hub) is None, "its sound tokenizer is not there"
    (copy / "model_index.json").write_text(index)
    next((copy / "transformer").glob("*.safetensors")).unlink()
    assert loading.fetched_folder(hub) is None
