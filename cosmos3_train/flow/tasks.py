"""A task is a mask: one row says which latent frames, action rows and sound frames are given.

Every other token of the sample is generated. There is no code per task anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Presence = Literal["absent", "given", "generated"]


@dataclass(frozen=True)
class Task:
    """One row of the mask table.

    given_frames: how many leading latent frames are given (a large number means all)
    action, sound: absent from the sample, wholly given, or generated
    image:        a single frame rather than a clip
    """

    name: str
    given_frames: int
    action: Presence = "absent"
    sound: Presence = "absent"
    image: bool = False

    @property
    def has_robot(self) -> bool:
        return self.action != "absent"


ALL_FRAMES = 1 << 30

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("text_to_image", 0, image=True),
        Task("text_to_video", 0),
        Task("image_to_video", 1),
        Task("video_to_video", 2),
        Task("forward_dynamics", 1, action="given"),
        Task("inverse_dynamics", ALL_FRAMES, action="generated"),
        Task("policy", 1, action="generated"),
        Task("text_to_video_sound", 0, sound="generated"),
        Task("image_to_video_sound", 1, sound="generated"),
        Task("video_to_sound", ALL_FRAMES, sound="generated"),
        Task("sound_to_video", 0, sound="given"),
    )
}


def sound_task(weights: Mapping[str, float]) -> str | None:
    """Of a mixture's tasks and their weights, the first with sound; None where there is none."""
    named = (name for name, weight in weights.items() if weight and name in TASKS)
    return next((name for name in named if TASKS[name].sound != "absent"), None)


CONVERSATION = "conversation"
"""The task of a sample without a generation stream: next-token prediction on its labelled text."""


def video_given(task: Task, latent_frames: int) -> Tensor:
    """bool [t]: which latent frames are given. At least one frame stays generated unless the task gives all."""
    given = min(task.given_frames, latent_frames)
    if task.given_frames < ALL_FRAMES:
        given = min(given, latent_frames - 1)
    return torch.arange(latent_frames) < given


def action_given(task: Task, rows: int, state_row: bool) -> Tensor:
    """bool [rows]: which action rows are given. With a state row, row 0 is the state and always given."""
    given = torch.full((rows,), task.action == "given")
    if state_row:
        given[0] = True
    return given


def sound_given(task: Task, frames: int) -> Tensor:
    """bool [frames]: sound is given or generated as a whole."""
    return torch.full((frames,), task.sound == "given")
