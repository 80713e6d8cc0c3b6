"""Denoising many samples in lockstep as one pack, and a robot's policy made of it.

The solver is upstream's scheduler, and every step does what `Cosmos3OmniPipeline` does for its single sample: given
parts stay clean, the network is told the scheduler's whole-numbered timestep, action channels beyond the robot's width
are zero. What a pack holds besides its noisy values never changes between steps, so it is built once; the understanding
tower runs once a pack, and in `RobotSampler` once an instruction.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cosmos3_train.config import Embodiment, UserError
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.evaluation.stacks import stacks_of
from cosmos3_train.flow.tasks import TASKS, video_given
from cosmos3_train.model.encoders import Encoder, Parts, action_fields
from cosmos3_train.model.omni import TIMESTEPS, Cosmos3PackedTransformer, Understood
from cosmos3_train.model.packing import Layout, Values, draw_noise, pack
from cosmos3_train.model.prompts import dropped_prompt
from cosmos3_train.runtime import draw, leave_if_asked
from cosmos3_train.types import NoiseLevels, PackedSequence, TokenSample

TOKENS_PER_PACK = 16384
"""Default token budget of one forward while evaluating, both streams together."""

PURE_NOISE = NoiseLevels(1.0, 1.0, 1.0)


def sample(
    backbone: Cosmos3PackedTransformer,
    parts: Parts,
    samples: Sequence[TokenSample],
    *,
    steps: int,
    seed: int = 0,
    noise: Sequence[Values] | None = None,
    guidance: float = 1.0,
    tokens_per_pack: int = TOKENS_PER_PACK,
) -> list[Values]:
    """Generate what the samples' masks leave open.

    Args:
        parts: upstream's pipeline without a transformer: its scheduler and its schedule are used.
        samples: their clean values are read where given; elsewhere only the shapes matter.
        steps: solver steps.
        seed: of the noise, drawn from (seed, "sample", sample number), so that it does not depend on the packing.
        noise: ε of every sample, instead of drawing it.
        guidance: 1 runs one pass a step; above 1 a second pass sees an empty caption.
        tokens_per_pack: the samples are denoised in as many packs as this budget asks for.

    Returns:
        float32 values on the CPU in the samples' order; given parts are the samples' own.
    """
    if noise is None:
        noise = [draw_noise(s, draw(seed, "sample", s.number)) for s in samples]
    found: list[Values] = []
    for places in in_packs(samples, Layout.of(backbone.config), tokens_per_pack):
        few = [samples[place] for place in places]
        solver = PackSolver(backbone, parts, few, guidance=guidance)
        found += solver.run([clean_values(s) for s in few], [noise[place] for place in places], steps)
    return found


def in_packs(samples: Sequence[TokenSample], layout: Layout, budget: int) -> Iterator[range]:
    """Runs of neighbouring samples that fit a token budget; a sample above the budget comes alone."""
    start, tokens = 0, 0
    for place, one in enumerate(samples):
        count = layout.tokens(one)
        if place > start and tokens + count > budget:
            yield range(start, place)
            start, tokens = place, 0
        tokens += count
    if start < len(samples):
        yield range(start, len(samples))


def clean_values(sample: TokenSample) -> Values:
    """A sample's own values."""
    return Values(video=sample.video, sound=sample.sound, action=sample.action)


@contextmanager
def evaluating(backbone: Cosmos3PackedTransformer) -> Iterator[None]:
    """No gradient and no dropout inside; the mode that the backbone was in afterwards."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(was_training)


class PackSolver:
    """A pack of samples to be denoised in lockstep: built once, run as often as wanted with other values.

    Args:
        samples: shapes, masks and texts; their values are not kept.
        guidance: see `sample`.
        understood: of the samples' texts in order, where it is known; the weights must be those that made it.
    """

    def __init__(
        self,
        backbone: Cosmos3PackedTransformer,
        parts: Parts,
        samples: Sequence[TokenSample],
        *,
        guidance: float = 1.0,
        understood: Understood | None = None,
    ) -> None:
        self.backbone, self.parts, self.guidance = backbone, parts, guidance
        self.device = next(backbone.parameters()).device
        self.layout = Layout.of(backbone.config)
        self._stacks = stacks_of(samples, self.layout, self.device)
        with evaluating(backbone):
            self._passes = [self._prepared(samples, understood)]
            if guidance != 1.0:
                empty = dropped_prompt(parts)
                self._passes.append(self._prepared([replace(s, text=empty, labels=None) for s in samples], None))

    def run(self, clean: Sequence[Values], noise: Sequence[Values], steps: int) -> list[Values]:
        """Walk from ε to x0.

        Args:
            clean: values of every sample, read where given.
            noise: ε of every sample, read where generated.
            steps: solver steps.

        Returns:
            float32 values on the CPU, one for each sample.
        """
        schedule = solver_schedule(self.parts, steps)
        states = [stack.start(clean, noise, self.device) for stack in self._stacks]
        solvers = [copy.deepcopy(schedule) for _ in self._stacks]
        with evaluating(self.backbone):
            for timestep in schedule.timesteps:
                leave_if_asked()
                velocities = self._velocities(states, float(timestep) / TIMESTEPS)
                for place, (stack, solver) in enumerate(zip(self._stacks, solvers, strict=True)):
                    if stack.generates:
                        step = solver.step(velocities[place], timestep, states[place], return_dict=False)
                        states[place] = stack.cleaned(step[0], states[place])
        return self._values(states, len(clean))

    def _prepared(
        self, samples: Sequence[TokenSample], understood: Understood | None
    ) -> tuple[PackedSequence, Understood]:
        values = [clean_values(s) for s in samples]
        packed = pack(samples, values, [PURE_NOISE] * len(samples), self.layout).to(self.device)
        return packed, understood or self.backbone.understand(packed)

    def _velocities(self, states: Sequence[Tensor], sigma: float) -> list[Tensor]:
        """v of every stack, zero at given places."""
        found = []
        for packed, understood in self._passes:
            filled = self._filled(packed, states, sigma)
            rows = dict(zip(("video", "sound", "action"), self.backbone.generate(filled, understood), strict=True))
            found.append([stack.velocity(rows[stack.modality].float()) for stack in self._stacks])
        if len(found) == 1:
            return found[0]
        return [empty + self.guidance * (v - empty) for v, empty in zip(*found, strict=True)]

    def _filled(self, packed: PackedSequence, states: Sequence[Tensor], sigma: float) -> PackedSequence:
        rows = {"video": packed.video, "sound": packed.sound, "action": packed.action}
        for stack, state in zip(self._stacks, states, strict=True):
            rows[stack.modality] = rows[stack.modality].index_copy(0, stack.rows, stack.tokens(state))
        return replace(
            packed,
            video=rows["video"],
            sound=rows["sound"],
            action=rows["action"],
            levels=torch.full_like(packed.levels, sigma),
        )

    def _values(self, states: Sequence[Tensor], count: int) -> list[Values]:
        found: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for stack, state in zip(self._stacks, states, strict=True):
            for place, value in zip(stack.places, state.cpu(), strict=True):
                found[place][stack.modality] = value
        return [Values(**fields) for fields in found]


def solver_schedule(parts: Parts, steps: int) -> Any:
    """A copy of the pipeline's scheduler, set to `steps` as the pipeline sets it.

    Raises:
        UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"evaluation.solver_steps is {steps}; it is at least 1")
    schedule: Any = copy.deepcopy(parts.scheduler)
    if cast(Any, parts.config).use_native_flow_schedule:
        last = 1.0 / schedule.config.num_train_timesteps
        schedule.set_timesteps(steps, sigmas=np.linspace(1.0 - last, 0.0, steps + 1)[:-1])
    else:
        schedule.set_timesteps(steps)
    return schedule


# ------------------------------------------------------------------------------------------------ one robot's policy


class RobotSampler:
    """A policy for robots of one embodiment: pictures, states and an instruction in, action chunks out.

    Only the newest picture is encoded: the video tokenizer is causal in time, so the first latent frame of a clip is
    the latent of its first picture alone. The other latent frames start as noise and are never decoded. The
    instruction's keys and values are computed once and repeated for every robot; a sampler therefore belongs to one
    state of the weights, so make a new one when they have changed.

    Args:
        backbone: with or without adapters.
        encoder: holds the tokenizer and the video tokenizer, with weights.
        embodiment: the robots'.
        normaliser: of the dataset that the policy was trained on.
        steps: solver steps a chunk.
        guidance: see `sample`.
    """

    def __init__(
        self,
        backbone: Cosmos3PackedTransformer,
        encoder: Encoder,
        embodiment: Embodiment,
        normaliser: Normaliser,
        steps: int,
        guidance: float = 1.0,
    ) -> None:
        self.backbone, self.encoder, self.embodiment = backbone, encoder, embodiment
        self.normaliser, self.steps, self.guidance = normaliser, steps, guidance
        self._understood: tuple[object, Understood] | None = None
        self._solver: tuple[object, PackSolver] | None = None

    def act(
        self,
        images: Sequence[np.ndarray],
        states: Sequence[np.ndarray] | None,
        instruction: str,
        seed: int,
        numbers: Sequence[int],
    ) -> list[np.ndarray]:
        """One chunk of actions for each robot.

        Args:
            images: uint8 [H, W, 3] of every robot, all of one size, camera views already composed.
            states: float [width] of every robot in its own units; read only where the embodiment has a state row.
            instruction: the words given to all of them.
            seed, numbers: a robot's noise is drawn from (seed, "act", its number), whoever else is in the pack.

        Returns:
            float32 [chunk, width] for every robot, in its own units.

        Raises:
            UserError: states are missing that the embodiment's state row needs.
        """
        card = self.embodiment
        if card.state_row and states is None:
            raise UserError(f"embodiment {card.name!r} has a state row, so its policy needs the robots' states")
        size = (images[0].shape[0], images[0].shape[1])
        frames = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] for image in images]
        text = self.encoder.robot_text(instruction, card, size)
        latents = self.encoder.encode_frames(frames, card)
        samples = [
            policy_sample(text, latent, self._state(states, place), card, numbers[place])
            for place, latent in enumerate(latents)
        ]
        noise = [draw_noise(s, draw(seed, "act", s.number)) for s in samples]
        values = self._solver_for((instruction, size, len(samples)), samples).run(
            [clean_values(s) for s in samples], noise, self.steps
        )
        return [self.actions_of(value) for value in values]

    def actions_of(self, values: Values) -> np.ndarray:
        """The chunk float32 [chunk, width] in the robot's own units, of what was sampled."""
        return robot_actions(values, self.embodiment, self.normaliser)

    def _state(self, states: Sequence[np.ndarray] | None, place: int) -> Tensor | None:
        if not self.embodiment.state_row:
            return None
        assert states is not None
        return self.normaliser.normalise(torch.as_tensor(states[place], dtype=torch.float32))

    def _solver_for(self, key: tuple, samples: Sequence[TokenSample]) -> PackSolver:
        if self._solver is None or self._solver[0] != key:
            understood = repeated(self._understood_once(key[:2], samples[0]), len(samples))
            solver = PackSolver(
                self.backbone, self.encoder.parts, samples, guidance=self.guidance, understood=understood
            )
            self._solver = (key, solver)
        return self._solver[1]

    def _understood_once(self, key: tuple, sample: TokenSample) -> Understood:
        if self._understood is None or self._understood[0] != key:
            device = next(self.backbone.parameters()).device
            packed = pack([sample], [clean_values(sample)], [PURE_NOISE], Layout.of(self.backbone.config))
            with evaluating(self.backbone):
                self._understood = (key, self.backbone.understand(packed.to(device)))
        return self._understood[1]


def policy_sample(
    text: Tensor, first_latent: Tensor, state: Tensor | None, embodiment: Embodiment, number: int, key: str = ""
) -> TokenSample:
    """What a policy is asked: a first latent frame is given, the frames and actions that follow are to be made.

    Args:
        text: int64 [L] from `Encoder.robot_text`.
        first_latent: float32 [C, 1, h, w].
        state: float32 [width], normalised; for embodiments with a state row.
        number: which the noise is drawn from.
    """
    channels, _, height, width = first_latent.shape
    frames = 1 + embodiment.chunk // 4
    video = first_latent.new_zeros((channels, frames, height, width))
    video[:, :1] = first_latent
    return TokenSample(
        key=key,
        number=number,
        task="policy",
        text=text,
        fps=embodiment.control_hz,
        tier=embodiment.resolution_tier,
        video=video,
        video_given=video_given(TASKS["policy"], frames),
        **action_fields(torch.zeros((embodiment.chunk, embodiment.width)), state, embodiment, "policy"),
    )


def robot_actions(values: Values, embodiment: Embodiment, normaliser: Normaliser) -> np.ndarray:
    """float32 [chunk, width] in the robot's own units: without the state row, without unused channels."""
    assert values.action is not None
    rows = values.action[int(embodiment.state_row) :, : embodiment.width]
    return normaliser.denormalise(rows).numpy()


def repeated(understood: Understood, times: int) -> Understood:
    """What `times` copies of one text leave behind. The copies' positions start anew, so they are equal."""
    return Understood(
        keys_values=[(k.repeat(times, 1, 1), v.repeat(times, 1, 1)) for k, v in understood.keys_values],
        text_hidden=understood.text_hidden[:0],
    )
