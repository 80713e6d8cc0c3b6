"""An adapter gives the trained model's numbers in upstream's classes, and a useless or misplaced one is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cosmos3_train.config import Tuning, UserError
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.export.adapter import METADATA_KEY, check_adapter, write_adapter, write_safetensors
from cosmos3_train.export.base_identity import check_base
from cosmos3_train.export.folder import VerificationError
from cosmos3_train.export.usage import WEIGHT_NAME
from cosmos3_train.export.verify import read_report, verify_adapter
from cosmos3_train.model.base_identity import identify_base
from tests.export.trained import DOMAIN, PICO, odd_samples, owned, robot, token_samples, trained_pico

BOTH = ["understanding", "generation"]
TUNINGS = {
    "lora with dropout": Tuning(method="lora", rank=4, alpha=4.0, dropout=0.5, learning_rate_multipliers={}),
    "hybrid, rsLoRA, alpha is not rank": Tuning(method="hybrid", rank=4, alpha=10.0, rslora=True),
    "hybrid, DoRA, both towers": Tuning(method="hybrid", rank=4, alpha=6.0, dora=True, towers=BOTH, dropout=0.1),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A hybrid adapter, for the tests that only look at the folder."""
    folder = tmp_path_factory.mktemp("export") / "adapter"
    return write_adapter(
        trained_pico(TUNINGS["hybrid, rsLoRA, alpha is not rank"]),
        folder,
        PICO,
        run="a",
        base_name="example/Pico",
        robots=[robot()],
    )


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "adapter"))


@pytest.mark.parametrize(
    "tuning, run_dtype", zip(TUNINGS.values(), ("float32", "bfloat16", "float32"), strict=True), ids=TUNINGS
)
def test_upstream_gives_the_trained_models_numbers(tuning, run_dtype, tmp_path):
    samples = [*token_samples(), *odd_samples()]
    if tuning.method == "lora":
        samples = [s for s in samples if s.action is None]
    backbone = trained_pico(tuning, run_dtype)
    backbone.train()  # as a run leaves it
    folder = write_adapter(backbone, tmp_path / "adapter", PICO, run="a")
    report = verify_adapter(folder, PICO, backbone, samples)
    assert backbone.training and backbone.proj_in.weight.dtype == getattr(torch, run_dtype)
    assert report.way == "whole" and report.dtype == "float32" and report.limit == 1e-5
    assert set(report.forms) == {"adapter", "peft"}
    assert report.relative_difference <= 1e-5
    assert report.change > 1e-2  # far above the tolerance: it is the adapter that was compared
    assert read_report(folder) == report
    assert report.how in (folder / "README.md").read_text()


def test_another_training_is_refused_and_set_aside(tmp_path, upstream_here):
    trained, folder = trained_pico(TUNINGS["lora with dropout"]), tmp_path / "adapter"
    other = trained_pico(TUNINGS["lora with dropout"], step=0.06)

    def verify(new: Path) -> None:
        verify_adapter(new, PICO, trained, token_samples(("text_to_video",)))

    write_adapter(trained, folder, PICO, run="a", verify=verify)
    kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(VerificationError, match=r"differs by .* kept as .*adapter\.refused"):
        write_adapter(other, folder, PICO, run="a", verify=verify)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == kept
    refused = tmp_path / "adapter.refused"
    assert (refused / WEIGHT_NAME).read_bytes() != (folder / WEIGHT_NAME).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "adapter.refused"}


def test_file_is_what_upstreams_loader_needs(exported):
    with safe_open(exported / WEIGHT_NAME, framework="pt") as file:
        keys, metadata = list(file.offset_keys()), file.metadata()
    config = json.loads(metadata[METADATA_KEY])
    assert "lora_A" in next(iter(load_file(exported / WEIGHT_NAME)))
    assert all(key.startswith("transformer.") for key in (*keys, *config))
    assert config["transformer.use_rslora"] is True and config["transformer.lora_alpha"] == 10.0
    assert isinstance(config["transformer.target_modules"], list)
    assert config["transformer.trainable_token_indices"]["action_proj_in.fc"] == [DOMAIN]
    assert sum("trainable_tokens_delta" in key for key in keys) == 4
    for name in ("embodiment.yaml", "statistics.json", "README.md", "robot.py", "robot.json", "export.json"):
        assert (exported / name).is_file()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda tensors, head: ({k.removeprefix("transformer."): v for k, v in tensors.items()}, head),
            "nothing would",
        ),
        (lambda tensors, head: ({}, head), "nothing would load"),
        (lambda tensors, head: (tensors, {"format": "pt"}), "alpha, rsLoRA and DoRA would come out wrong"),
        (lambda tensors, head: (dict(sorted(tensors.items())), head), "stands first"),
    ],
    ids=["prefix", "empty", "no metadata", "order"],
)
def test_an_adapter_that_would_not_load_is_refused(copied, spoil, message):
    file = copied / WEIGHT_NAME
    with safe_open(file, framework="pt") as content:
        head = content.metadata()
    write_safetensors(file, *spoil(owned(file), head))
    with pytest.raises(UserError, match=message):
        check_adapter(copied)


def test_whole_weights_have_no_adapter(tmp_path):
    backbone = trained_pico(Tuning(method="tower"), step=0.0)
    with pytest.raises(UserError, match="--to merged"):
        write_adapter(backbone, tmp_path / "adapter", PICO, run="a")
    assert list(tmp_path.iterdir()) == []


def test_wrong_base_is_refused(exported, tmp_path):
    check_base(exported, PICO)
    other = Path(shutil.copytree(PICO / "transformer", tmp_path / "other" / "transformer")).parent
    check_base(exported, other)
    shard = next((other / "transformer").glob("*.safetensors"))
    tensors = owned(shard)
    name = next(name for name, value in tensors.items() if value.dim() == 2)
    tensors[name] = tensors[name] + 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"wrong base: it was trained on 'example/Pico', but '.*other' is the same"):
        check_base(exported, other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(UserError, match="another architecture"):
        check_base(exported, other)


def test_identity_does_not_depend_on_sharding(tmp_path):
    folder = tmp_path / "one" / "transformer"
    folder.mkdir(parents=True)
    shutil.copy(PICO / "transformer" / "config.json", folder)
    tensors = {}
    for shard in (PICO / "transformer").glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    assert identify_base(tmp_path / "one", "x") == identify_base(PICO, "x")


def test_another_runs_export_is_not_overwritten(copied):
    backbone = trained_pico(TUNINGS["lora with dropout"])
    with pytest.raises(UserError, match="is the export of run 'a', not of 'b'"):
        write_adapter(backbone, copied, PICO, run="b")
    write_adapter(backbone, copied, PICO, run="a")
    assert not (copied / "robot.py").exists()  # the run's new export, not a mixture
    (copied / "export.json").unlink()
    with pytest.raises(UserError, match="is not an export"):
        write_adapter(backbone, copied, PICO, run="a")
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_robot_module_drives_the_real_pipeline(exported):
    module = _load(exported / "robot.py", "exported_robot")
    pipe = Cosmos3OmniPipeline.from_pretrained(PICO, torch_dtype=torch.float32, enable_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)

    def act():
        generator = torch.Generator().manual_seed(1)
        return module.act(pipe, image, "push the block", generator, num_inference_steps=2)

    base = act()
    pipe.transformer.load_lora_adapter(exported, weight_name=WEIGHT_NAME)
    adapted = act()
    assert adapted.shape == (8, 3) and adapted.dtype == np.float32
    assert np.array_equal(adapted, act())
    assert np.abs(adapted - base).max() > 1e-3
    assert module.register()["fps"] == 7.0


def test_usage_text_runs(exported, monkeypatch):
    monkeypatch.chdir(exported)
    monkeypatch.syspath_prepend(str(exported))
    text = (exported / "README.md").read_text()
    here = {"example/Pico": str(PICO), '"cuda"': '"cpu"', "bfloat16": "float32", "frame = ...": "frame = picture"}
    for written, replacement in here.items():
        assert written in text
        text = text.replace(written, replacement)
    names: dict = {"picture": np.zeros((96, 96, 3), dtype=np.uint8)}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for block in blocks:
        exec(block, names)
    sys.modules.pop("robot")  # the folder's module, not one that others should find
    assert len(blocks) == 3
    assert names["actions"].shape == (8, 3)
    assert type(names["transformer"]).__name__ == "PeftModel"


def test_robot_module_returns_the_robots_own_units(exported):
    module = _load(exported / "robot.py", "exported_robot")
    shown = robot()
    raw = torch.tensor([[-5.0, 10.0, 0.5], [2.5, 33.0, 1.0]])
    normalised = Normaliser(shown.embodiment, shown.statistics).normalise(raw)
    assert np.allclose(module.denormalise(normalised.numpy(), module.ROBOTS["test_arm"]), raw.numpy(), atol=1e-5)


def test_robot_module_refuses_what_the_pipeline_cannot_serve(exported, copied):
    values = json.loads((copied / "robot.json").read_text())
    values["test_arm"] |= {"name": "pusht"}
    (copied / "robot.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="already has a robot 'pusht'"):
        _load(copied / "robot.py", "clashing_robot").register()
    with pytest.raises(ValueError, match="no robot 'arm'"):
        _load(exported / "robot.py", "exported_robot").register("arm")


def test_robot_module_refuses_a_state_row(tmp_path):
    backbone = trained_pico(TUNINGS["hybrid, rsLoRA, alpha is not rank"])
    folder = write_adapter(backbone, tmp_path / "a", PICO, run="a", robots=[robot(state_row=True)])
    with pytest.raises(ValueError, match="has a state row"):
        _load(folder / "robot.py", "stateful_robot").register()
    assert "state row" in (folder / "README.md").read_text()


def _load(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
