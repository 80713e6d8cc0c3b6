"""The files of an export that tell its reader what it is and how to run it: card, statistics, robot module, README."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_train.config import Embodiment, to_yaml
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.data.files import write_whole
from cosmos3_train.data.recorded import tool_of
from cosmos3_train.data.statistics import FILE, Statistics
from cosmos3_train.export.folder import write_json
from cosmos3_train.model.base_identity import BaseIdentity

WEIGHT_NAME = "cosmos3_adapter.safetensors"
VERIFIED = "## Verified"
ROBOT_MODULE = Path(__file__).with_name("robot.py")


@dataclass(frozen=True)
class Robot:
    """A robot that the run trained: its card, the statistics that normalised it, an instruction for the usage text."""

    embodiment: Embodiment
    statistics: Statistics
    instruction: str = ""


def write_robot_files(folder: Path, robots: Sequence[Robot]) -> None:
    """Card and statistics of each robot (the first under the plain names), and the module that serves them."""
    for place, robot in enumerate(robots):
        name = f".{robot.embodiment.name}" if place else ""
        write_whole(folder / f"embodiment{name}.yaml", to_yaml(robot.embodiment).encode())
        robot.statistics.save(folder / f"statistics{name}.json")
    if robots:
        write_json(folder / "robot.json", {robot.embodiment.name: robot_values(robot) for robot in robots})
        shutil.copyfile(ROBOT_MODULE, folder / "robot.py")


def robot_statistics(folder: Path, embodiment: str) -> Statistics | None:
    """The statistics that an exported folder holds of a robot, under either of its names; None where it holds none.

    Raises:
        UserError: a file of its name cannot be read.
    """
    for path in (folder / f"statistics.{embodiment}.json", folder / FILE):
        if path.is_file() and (statistics := Statistics.load(path)).embodiment == embodiment:
            return statistics
    return None


def robot_values(robot: Robot) -> dict[str, Any]:
    """What robot.json says of a robot; a channel's own value is the model's times `scale` plus `offset`."""
    card = robot.embodiment
    normaliser = Normaliser(card, robot.statistics)
    return {
        "name": card.name,
        "domain_id": card.domain_id,
        "width": card.width,
        "fps": card.control_hz,
        "chunk": card.chunk,
        "execute": card.execute,
        "resolution_tier": card.resolution_tier,
        "view_point": card.view_point,
        "cameras": list(card.cameras),
        "layout": card.layout,
        "state_row": card.state_row,
        "channels": [{"name": channel.name, "unit": channel.unit} for channel in card.action],
        "bodies": bodies(card),
        "scale": normaliser.scale.tolist(),
        "offset": normaliser.offset.tolist(),
    }


def bodies(card: Embodiment) -> dict[str, dict[str, Any]]:
    """Body whose channels are moves made from its recorded poses -> its first channel, and its tool [4][4]."""
    found, first = {}, 0
    for piece in card.recorded:
        if piece.kind == "pose" and not piece.moves:
            found[piece.name] = {"first": first, "tool": tool_of(piece).tolist()}
        first += len(piece.channels())
    return found


def adapter_readme(run: str, base: BaseIdentity, robots: Sequence[Robot]) -> str:
    """README.md of an adapter folder."""
    load = f"""import torch
from diffusers import Cosmos3OmniPipeline

base = {json.dumps(base.name)}  # Hub id or folder of the checkpoint that the adapter was trained on
pipe = Cosmos3OmniPipeline.from_pretrained(base, torch_dtype=torch.bfloat16, enable_safety_checker=False)
pipe.transformer.load_lora_adapter(".", weight_name="{WEIGHT_NAME}")
pipe.to("cuda")"""
    twin = """from diffusers import Cosmos3OmniTransformer
from peft import PeftModel

transformer = Cosmos3OmniTransformer.from_pretrained(base, subfolder="transformer", torch_dtype=torch.bfloat16)
transformer = PeftModel.from_pretrained(transformer, "peft")"""
    return "\n".join(
        [
            f"# Adapter of run `{run}`",
            "",
            f"Trained on `{base.name}` (weights {base.weights}). Run this in the adapter's folder, with diffusers and "
            "peft installed:",
            "",
            *_code(load),
            *_robot_text(robots),
            "The same adapter in PEFT's own form is in `peft/`:",
            "",
            *_code(twin),
        ]
    )


def merged_readme(run: str, base: BaseIdentity, robots: Sequence[Robot]) -> str:
    """README.md of a merged pipeline folder."""
    load = """import torch
from diffusers import Cosmos3OmniPipeline

pipe = Cosmos3OmniPipeline.from_pretrained(".", torch_dtype=torch.bfloat16, enable_safety_checker=False)
pipe.to("cuda")"""
    return "\n".join(
        [
            f"# Pipeline of run `{run}`",
            "",
            f"`{base.name}` (weights {base.weights}) with what the run trained merged into it. Run this in its folder:",
            "",
            *_code(load),
            *_robot_text(robots),
            "The folder stands by itself: it shares no file with the base.",
            "",
        ]
    )


def add_verification(folder: Path, words: str) -> None:
    """Say at the end of an export's README how it was verified; what an earlier verification said there goes."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8").partition(VERIFIED)[0].rstrip()
    write_whole(path, f"{text}\n\n{VERIFIED}\n\n{words} Each difference stands in `verification.json`.\n".encode())


def _robot_text(robots: Sequence[Robot]) -> list[str]:
    if not robots:
        return []
    robot = robots[0]
    card = robot.embodiment
    units = ", ".join(f"{channel.name} [{channel.unit or '-'}]" for channel in card.action)
    if card.state_row:
        return [
            f"Robot `{card.name}` has a state row, which diffusers' action pipeline cannot serve: `robot.register()` "
            "says so, and cosmos3_train's own sampler runs it.",
            "",
        ]
    which = f', name="{card.name}"' if len(robots) > 1 else ""
    instruction = robot.instruction or "what to do"
    code = f"""import robot

frame = ...  # PIL image or uint8 [H, W, 3] of {" + ".join(card.cameras)}, native size
actions = robot.act(pipe, frame, {instruction!r}{which})"""
    return [
        *_code(code),
        f"`actions` is float32 [{card.chunk}, {card.width}] at {card.control_hz:g} Hz: {units}. Carry out the first "
        f"{card.execute}, then look again.",
        "",
    ]


def _code(text: str) -> list[str]:
    return ["```python", *text.splitlines(), "```", ""]
