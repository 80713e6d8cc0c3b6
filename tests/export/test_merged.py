"""A merged pipeline holds cast(W + s·B·A) bit for bit, and upstream loads it as a plain checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from safetensors.torch import load_file

from cosmos3_train.config import Tuning, UserError
from cosmos3_train.export.folder import VerificationError
from cosmos3_train.export.merged import _component_files, write_merged
from cosmos3_train.export.verify import verify_merged
from tests.disk import small_files
from tests.export.trained import DOMAIN, PICO, robot, token_samples, trained_pico

BOTH = ["understanding", "generation"]


def transformer_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted((folder / "transformer").glob("*.safetensors")):
        found |= load_file(shard)
    return found


def expected_tensors(backbone, tuning: Tuning) -> dict[str, torch.Tensor]:
    """The merge written out anew, from the trained parameters by their names."""
    trained = {name: p.detach() for name, p in backbone.named_parameters() if p.requires_grad}
    scale = tuning.alpha / (tuning.rank**0.5 if tuning.rslora else tuning.rank)
    found = transformer_tensors(PICO)
    for name, b in trained.items():
        stem, _, rest = name.partition(".lora_B.")
        if not rest:
            continue
        merged = found[f"{stem}.weight"].float() + (b @ trained[f"{stem}.lora_A.default.weight"]) * scale
        if tuning.dora:
            magnitude = trained[f"{stem}.lora_magnitude_vector.default.weight"]
            merged = (magnitude / torch.linalg.norm(merged, dim=1))[:, None] * merged
        found[f"{stem}.weight"] = merged.to(found[f"{stem}.weight"].dtype)
    for name, rows in trained.items():
        stem, _, rest = name.partition(".token_adapter.")
        if rest:
            found[f"{stem}.weight"] = found[f"{stem}.weight"].clone()
            found[f"{stem}.weight"][DOMAIN] = rows[0].to(found[f"{stem}.weight"].dtype)
    return found


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(method="hybrid", rank=4, alpha=10.0, rslora=True, dropout=0.1),
        Tuning(method="hybrid", rank=4, alpha=6.0, dora=True, towers=BOTH),
    ],
    ids=["rsLoRA", "DoRA"],
)
def test_merged_weights_bit_for_bit(tuning, tmp_path):
    backbone = trained_pico(tuning)
    folder = write_merged(backbone, PICO, tmp_path / "merged", run="a", robots=[robot()])
    merged, expected, base = transformer_tensors(folder), expected_tensors(backbone, tuning), transformer_tensors(PICO)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert merged[name].dtype == base[name].dtype
        assert torch.equal(merged[name], value), name
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert sum("lora_B" in name for name, _ in backbone.named_parameters()) == len(changed) - 4
    rows = merged["action_proj_in.fc.weight"] != base["action_proj_in.fc.weight"]
    assert rows.any(dim=1).nonzero().flatten().tolist() == [DOMAIN]


def test_upstream_loads_it_and_the_cast_costs_little(tmp_path, upstream_here):
    backbone = trained_pico(Tuning(method="hybrid", rank=4, alpha=10.0, rslora=True))
    folder = write_merged(backbone, PICO, tmp_path / "merged", run="a", robots=[robot()])
    report = verify_merged(folder, PICO, backbone, token_samples())
    assert 0 < report.relative_difference <= 1e-2  # Pico is stored in bfloat16
    assert report.change > 3 * report.relative_difference
    pipe = Cosmos3OmniPipeline.from_pretrained(folder, enable_safety_checker=False)
    assert type(pipe.transformer).__name__ == "Cosmos3OmniTransformer"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "Cosmos3OmniTransformer"]
    for file in PICO.rglob("*"):
        of_its_robots = file.name.startswith("statistics.")  # which are other robots than the trained one
        if file.is_file() and file.suffix != ".safetensors" and file.name != "README.md" and not of_its_robots:
            assert (folder / file.relative_to(PICO)).read_bytes() == file.read_bytes()
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / vae).read_bytes() == (PICO / vae).read_bytes()


def linked_pico(folder: Path) -> Path:
    """Pico as the Hub's cache keeps a checkpoint: every file a link to a blob elsewhere."""
    blobs = Path(shutil.copytree(PICO, folder / "blobs"))
    for blob in blobs.rglob("*"):
        if blob.is_file():
            link = folder / "base" / blob.relative_to(blobs)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    return folder / "base"


def contents(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_it_shares_nothing_with_the_base(tmp_path):
    base = linked_pico(tmp_path)
    backbone = trained_pico(Tuning(method="hybrid", rank=4))
    folder = write_merged(backbone, base, tmp_path / "merged", run="a")
    assert not any(file.is_symlink() for file in folder.rglob("*"))
    originals, written = contents(base), contents(folder)
    for name in written:
        with (folder / name).open("r+b") as file:  # in place, as whoever edits a config or a tensor may do it
            file.write(b"merged")
    assert contents(base) == originals
    for name in originals:
        with (base / name).open("r+b") as file:
            file.write(b"base__")
    assert all(content.startswith(b"merged") for content in contents(folder).values())
    shutil.rmtree(tmp_path / "blobs")
    assert contents(folder).keys() == written.keys()


@pytest.mark.parametrize("largest", [10_000, 5_000_000], ids=["a copied file", "a merged shard"])
def test_a_full_disk_is_told_in_one_line_and_nothing_is_left(largest, tmp_path):
    backbone = trained_pico(Tuning(method="hybrid", rank=4))
    with small_files(largest), pytest.raises(UserError, match=r"/merged: the disk is full; free some space") as told:
        write_merged(backbone, PICO, tmp_path / "merged", run="a")
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_known_before_anything_is_written(tmp_path, monkeypatch):
    backbone = trained_pico(Tuning(method="hybrid", rank=4))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"needs [\d.]+ GB and 0\.0 GB are free there") as told:
        write_merged(backbone, PICO, tmp_path / "made" / "merged", run="a")
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_of_the_base_is_named_in_one_line(tmp_path):
    base = Path(shutil.copytree(PICO, tmp_path / "base"))
    shard = sorted((base / "transformer").glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    backbone = trained_pico(Tuning(method="hybrid", rank=4))
    with pytest.raises(UserError, match=r"damaged \(.*\); fetch (it|the base) again") as told:
        write_merged(backbone, base, tmp_path / "merged", run="a")
    assert "\n" not in str(told.value) and shard.name in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("output", [".", "merged", ".."])
def test_a_place_in_or_around_the_base_is_refused(output, tmp_path):
    base = Path(shutil.copytree(PICO, tmp_path / "base"))
    with pytest.raises(UserError, match="is, holds or lies in the folder of the base"):
        write_merged(trained_pico(Tuning(method="hybrid", rank=4)), base, base / output, run="a")
    assert contents(base) == contents(PICO)


def test_one_that_is_refused_does_not_take_the_earlier_ones_place(tmp_path):
    def refuse(new: Path) -> None:
        raise VerificationError("other numbers")

    first, second = (trained_pico(Tuning(method="hybrid", rank=4), step=step) for step in (0.05, 0.06))
    folder = write_merged(first, PICO, tmp_path / "merged", run="a", verify=lambda new: None)
    earlier = contents(folder)
    with pytest.raises(VerificationError, match=r"^other numbers; the export is kept as .*/merged\.refused"):
        write_merged(second, PICO, folder, run="a", verify=refuse)
    assert contents(folder) == earlier
    assert contents(tmp_path / "merged.refused").keys() == earlier.keys()


def test_whole_weights_are_written_as_trained(tmp_path):
    backbone = trained_pico(Tuning(method="tower", towers=["generation"]), step=0.01)
    folder = write_merged(backbone, PICO, tmp_path / "merged", run="a")
    merged, base = transformer_tensors(folder), transformer_tensors(PICO)
    trained = {name: p.detach() for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(trained) > 50
    for name, value in merged.items():
        wanted = trained[name].to(base[name].dtype) if name in trained else base[name]
        assert torch.equal(value, wanted), name


def test_nothing_trained_is_refused_and_nothing_is_left(tmp_path):
    backbone = trained_pico(Tuning(method="tower"))
    backbone.requires_grad_(False)
    with pytest.raises(UserError, match="trained nothing"):
        write_merged(backbone, PICO, tmp_path / "merged", run="a")
    assert list(tmp_path.iterdir()) == []


def test_a_component_is_a_folder_of_the_base(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"../secrets": ["diffusers", "AutoencoderKLWan"]}))
    with pytest.raises(UserError, match=r"'\.\./secrets' is no folder's"):
        _component_files(tmp_path)


def test_an_export_as_the_base_leaves_its_record_and_its_robots_behind(tmp_path):
    base = Path(shutil.copytree(PICO, tmp_path / "base"))
    for name in ("export.json", "robot.json", "statistics_a.json", "config.json"):
        (base / name).write_text("{}")
    found = {file.name for file in _component_files(base) if file.parent == base}
    assert {"config.json", "model_index.json"} <= found
    assert not found & {"export.json", "robot.json", "statistics_a.json"}
