"""The robot of this folder, for diffusers' own Cosmos 3 pipeline. Needs diffusers, torch and numpy, nothing else.

    import robot
    robot.register()                                      # once a process
    actions = robot.act(pipe, image, "what to do")        # float32 [chunk, channels] in the robot's own units
    poses = robot.targets(actions, {"hand": pose_now})    # where channels are moves: the poses that they lead to

Everything that it knows stands in robot.json beside it: name, domain, width, rate, canvas, and the affine map of each
channel from the model's units to the robot's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as upstream
from PIL import Image

ROBOTS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "robot.json").read_text(encoding="utf-8"))


def register(name: str | None = None) -> dict[str, Any]:
    """Make the pipeline know the robot, and return what robot.json says of it.

    Args:
        name: which robot, where the folder has several; None takes the only one.

    Raises:
        ValueError: unknown name, a name that the pipeline has for another robot, or a robot with a state row, which
            diffusers' pipeline cannot serve.
    """
    robot = _find(name)
    if robot["state_row"]:
        raise ValueError(
            f"robot {robot['name']!r} has a state row: its policy reads the robot's state as row 0 of the actions, and "
            "diffusers' action pipeline has no place for it; sample it with cosmos3_train instead"
        )
    wanted = (robot["domain_id"], robot["width"])
    tables = (upstream._EMBODIMENT_TO_DOMAIN_ID, upstream._EMBODIMENT_TO_RAW_ACTION_DIM)
    for table, value in zip(tables, wanted, strict=True):
        if table.get(robot["name"], value) != value:
            raise ValueError(
                f"the pipeline already has a robot {robot['name']!r} with domain "
                f"{tables[0].get(robot['name'])} and {tables[1].get(robot['name'])} channels, this one has domain "
                f"{wanted[0]} and {wanted[1]} channels; rename it in robot.json"
            )
    for table, value in zip(tables, wanted, strict=True):
        table[robot["name"]] = value
    return robot


def act(
    pipe: upstream.Cosmos3OmniPipeline,
    image: Any,
    instruction: str,
    generator: torch.Generator | None = None,
    num_inference_steps: int = 10,
    name: str | None = None,
) -> np.ndarray:
    """The next actions of the robot.

    Args:
        pipe: the pipeline on the trained weights.
        image: what the cameras see now: a PIL image or uint8 [H, W, 3], in its native size; for several cameras a
            list of them in the order of robot.json's "cameras".
        instruction: the words given to the robot.
        generator: of the noise that the sampler starts from.

    Returns:
        float32 [chunk, width] in the robot's own units. Carry out the first `execute` (robot.json), then look again.
    """
    robot = register(name)
    condition = upstream.CosmosActionCondition(
        mode="policy",
        chunk_size=robot["chunk"],
        domain_name=robot["name"],
        resolution_tier=robot["resolution_tier"],
        image=_compose(image, robot),
        view_point=robot["view_point"],
    )
    result: Any = pipe(
        prompt=instruction,
        action=condition,
        fps=robot["fps"],
        guidance_scale=1.0,
        num_inference_steps=num_inference_steps,
        use_system_prompt=False,
        generator=generator,
        output_type="latent",  # the predicted frames stay undecoded: only the actions are wanted
    )
    return denormalise(result.action[0].double().numpy(), robot)


def targets(actions: np.ndarray, now: dict[str, np.ndarray], name: str | None = None) -> dict[str, np.ndarray]:
    """The poses that moves lead to, one after the other, of every body in robot.json's "bodies".

    Args:
        actions: [n, width] in the robot's own units, as `act` gives them.
        now: body -> its pose [4, 4] in metres, in the frame in which the log recorded it.

    Returns:
        body -> poses [n, 4, 4], in the same frame.
    """
    robot, found = _find(name), {}
    for body, place in robot["bodies"].items():
        tool = np.asarray(place["tool"])
        pose, poses = np.asarray(now[body], dtype=np.float64) @ tool, []
        for move in np.asarray(actions, dtype=np.float64)[:, place["first"] : place["first"] + 9]:
            step = np.eye(4)  # its rotation's first two columns, which a model writes only nearly orthonormal
            step[:3, 3], step[:3, 0] = move[:3], move[3:6] / np.linalg.norm(move[3:6])
            second = move[6:9] - step[:3, 0] * (step[:3, 0] @ move[6:9])
            step[:3, 1] = second / np.linalg.norm(second)
            step[:3, 2] = np.cross(step[:3, 0], step[:3, 1])
            pose = pose @ step
            poses.append(pose @ np.linalg.inv(tool))
        found[body] = np.stack(poses)
    return found


def denormalise(actions: np.ndarray, robot: dict[str, Any]) -> np.ndarray:
    """[..., width] from the model's units to float32 in the robot's own."""
    return (actions * np.asarray(robot["scale"]) + np.asarray(robot["offset"])).astype(np.float32)


def _find(name: str | None) -> dict[str, Any]:
    if name is None and len(ROBOTS) == 1:
        return next(iter(ROBOTS.values()))
    if name not in ROBOTS:
        raise ValueError(f"no robot {name!r} in this folder; it has {', '.join(sorted(ROBOTS))}")
    return ROBOTS[name]


def _compose(image: Any, robot: dict[str, Any]) -> Image.Image:
    """One picture of all views, as the training frames were laid out; only "over_two" scales, its smaller two."""
    views = [np.asarray(view, dtype=np.uint8) for view in (image if isinstance(image, list | tuple) else [image])]
    if len(views) != len(robot["cameras"]):
        raise ValueError(f"{len(views)} views, but robot {robot['name']!r} has cameras {', '.join(robot['cameras'])}")
    if robot["layout"] == "over_two":
        halves = [_halved(view, views[0].shape[:2]) for view in views[1:]]
        return Image.fromarray(np.concatenate([views[0], np.concatenate(halves, axis=1)], axis=0))
    axis = 0 if robot["layout"] == "column" else 1
    return Image.fromarray(np.concatenate(views, axis=axis))


def _halved(view: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A view at half of `size` (H, W): the mean of 2 × 2 pixels, or as it is where it has that size."""
    height, width = size[0] // 2, size[1] // 2
    if view.shape[:2] == (height, width):
        return view
    cells = view.reshape(height, 2, width, 2, 3)
    return ((cells.sum(axis=(1, 3), dtype=np.uint16) + 2) // 4).astype(np.uint8)
