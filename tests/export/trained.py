"""A Pico with something trained in it, and samples to ask it about: what the export tests begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from cosmos3_train.config import Channel, Embodiment, Model, Tuning
from cosmos3_train.data.statistics import Moments, Statistics
from cosmos3_train.export.usage import Robot
from cosmos3_train.flow.tasks import TASKS, action_given, video_given
from cosmos3_train.model.loading import load_backbone
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.trainable import make_trainable
from cosmos3_train.runtime import draw
from cosmos3_train.types import TokenSample

PICO = Path(__file__).resolve().parents[2] / "data" / "cosmos3_pico"
DOMAIN = 24
"""A slot that upstream gives no robot."""


def card(*, state_row: bool = False) -> Embodiment:
    return Embodiment(
        name="test_arm",
        domain_id=DOMAIN,
        control_hz=7.0,
        chunk=8,
        action=[Channel(name="x", unit="mm"), Channel(name="y", unit="mm"), Channel(name="grip")],
        cameras=["top"],
        state_row=state_row,
        state_key="state" if state_row else None,
        view_point="third_person_view",
        execute=4,
    )


def robot(*, state_row: bool = False) -> Robot:
    low, high, mean, std = [-5.0, 10.0, 0.0], [5.0, 40.0, 1.0], [0.1, 20.0, 0.5], [2.0, 6.0, 0.4]
    moments = Moments(count=100, mean=mean, std=std, min=low, max=high, q01=low, q10=low, q50=mean, q90=high, q99=high)
    statistics = Statistics(dataset="test", embodiment="test_arm", fingerprint="0", action=moments)
    return Robot(card(state_row=state_row), statistics, "push the block")


def trained_pico(tuning: Tuning, dtype: str = "float32", step: float = 0.05) -> Cosmos3PackedTransformer:
    """Pico after a pretended training: every trainable moved, none left at its start."""
    model = Model(path=str(PICO), dtype=dtype, attention="sdpa", checkpoint_activations=False)  # type: ignore[arg-type]
    backbone = load_backbone(model, torch.device("cpu"))
    trainables = make_trainable(backbone, tuning, [card()] if tuning.method == "hybrid" else [], seed=0)
    with torch.no_grad():
        for name, parameter in trainables.parameters.items():
            parameter += torch.randn(parameter.shape, generator=draw(0, "pretended", name)) * step
    return backbone


def token_samples(tasks: tuple[str, ...] = ("policy", "inverse_dynamics", "text_to_video")) -> list[TokenSample]:
    """Small random samples; the robot's are on the fresh domain."""
    found = []
    for number, task in enumerate(tasks):
        generator, row = draw(3, task, number), TASKS[task]
        fields: dict = {}
        if row.has_robot:
            action = torch.zeros((8, 64))
            action[:, :3] = torch.randn((8, 3), generator=generator)
            fields = dict(action=action, action_given=action_given(row, 8, False), action_width=3, domain=DOMAIN)
        found.append(
            TokenSample(
                key=f"{task}/{number}",
                number=number,
                task=task,
                text=torch.randint(0, 1000, (6 + number,), generator=generator),
                fps=7.0,
                video=torch.randn((48, 3, 3, 4), generator=generator),
                video_given=video_given(row, 3),
                **fields,
            )
        )
    return found


def owned(file: Path) -> dict[str, torch.Tensor]:
    """A file's tensors in memory of their own: the file is about to be written over."""
    return {name: value.clone() for name, value in load_file(file).items()}


def odd_samples() -> list[TokenSample]:
    """What the pipeline itself never serves: a state row, sound generated and given, a conversation."""
    policy, video = token_samples(("policy", "text_to_video"))
    assert policy.action is not None
    sound = torch.randn((6, 64), generator=draw(3, "sound"))
    return [
        replace(
            policy,
            key="state row",
            action=torch.cat([policy.action[:1] / 2, policy.action]),
            action_given=action_given(TASKS["policy"], 9, True),
            action_start=0,
        ),
        replace(video, key="sound", sound=sound, sound_given=torch.zeros(6, dtype=torch.bool)),
        replace(video, key="given sound", sound=sound, sound_given=torch.ones(6, dtype=torch.bool)),
        TokenSample("chat", 9, "conversation", torch.arange(12), labels=torch.arange(12)),
    ]
