"""What a folder takes of the host's memory while it is loaded: the tensors that the run uses, once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Cosmos3OmniTransformer
from safetensors.torch import save_file

from tests.training.project import NANO_WIDE

ROOT = Path(__file__).parents[2]
SIZES = {**NANO_WIDE, "num_hidden_layers": 5}
LOAD = """
import json, sys, threading, time
from pathlib import Path
import torch
from cosmos3_train.config import Model
from cosmos3_train.model.loading import load_backbone

small, large, towers, device, kinds = json.loads(sys.argv[1])
seen, ended = [], threading.Event()

def taken():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(tuple(kinds)))

def watch():
    while not ended.wait(0.005):
        seen.append(taken())

def load(model):
    model = Model(**model, checkpoint_activations=False)
    made = load_backbone(model, torch.device(device), text_logits=False, towers=towers)
    for parameter in made.parameters():
        if device == "cpu":  # the pages of a file that is mapped come when they are read
            parameter.view(-1)[::64].sum()
    return made

load(small)  # whatever is imported late
before, watcher = taken(), threading.Thread(target=watch)
watcher.start()
made = load(large)
ended.set()
watcher.join()
used = sum(tensor.nbytes for tensor in (*made.parameters(), *made.buffers()))
print(json.dumps({"grown": max(seen) - before, "used": used}))
"""


def grown(small: dict, large: dict, towers: str, device: str, kinds: list[str]) -> dict[str, int]:
    """Bytes by which a process's memory of these kinds grows at most while it loads a model, and those of its tensors.

    Args:
        small: a model of the same kind, loaded before;  kinds: as /proc calls them
    """
    arguments = json.dumps([small, large, towers, device, kinds])
    done = subprocess.run(
        [sys.executable, "-c", LOAD, arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A random folder of 4 GB, a shard a layer."""
    root = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        empty = Cosmos3OmniTransformer(**SIZES)
    empty.save_config(root / "transformer")
    numbers = torch.randn(max(value.numel() for value in empty.state_dict().values())).bfloat16()
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, value in empty.state_dict().items():
        layer = name.split(".")[1] if name.startswith("layers.") else "rest"
        shards.setdefault(f"diffusion_pytorch_model-{layer}.safetensors", {})[name] = value.shape
    for file, shapes in shards.items():
        save_file(
            {name: numbers[: shape.numel()].view(shape).clone() for name, shape in shapes.items()},
            root / "transformer" / file,
            {"format": "pt"},
        )
    places = {name: file for file, shapes in shards.items() for name in shapes}
    index = root / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("towers", "dtype", "gigabytes"),
    [("generation", "bfloat16", 2.0), ("both", "bfloat16", 4.0), ("generation", "float32", 4.1)],
)
def test_a_sharded_folder_is_read_in_the_memory_of_what_is_used(folder, large, towers, dtype, gigabytes):
    """In float32, which is not the files', their mapped pages are not counted: the kernel takes them back."""
    small, whole = ({"path": str(path), "dtype": dtype} for path in (folder, large))
    kinds = ["RssAnon", "RssFile"] if dtype == "bfloat16" else ["RssAnon"]
    found = grown(small, whole, towers, "cpu", kinds)
    print(f"\n{towers}, {dtype}: {found['used'] / 1e9:.2f} GB used, {found['grown'] / 1e9:.2f} GB grown")
    assert found["used"] / 1e9 == pytest.approx(gigabytes, rel=0.05)
    assert found["used"] * 0.9 < found["grown"] < found["used"] * 1.1
