"""The sampler: packs against single samples, given parts, noise, modes, and what is computed only once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cosmos3_train.config import Channel, Embodiment, UserError
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.data.statistics import Moments, Statistics
from cosmos3_train.evaluation.sampling import RobotSampler, in_packs, sample
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.packing import Layout
from tests.evaluation.tiny import tiny_backbone, tiny_parts
from tests.parity.upstream import make_sample

TASKS = [
    "policy",
    "text_to_video_sound",
    "inverse_dynamics",
    "text_to_image",
    "policy",
    "sound_to_video",
    "forward_dynamics",
    "video_to_sound",
]


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def same(ours, theirs) -> None:
    for a, b in ((ours.video, theirs.video), (ours.sound, theirs.sound), (ours.action, theirs.action)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert float((a - b).norm() / b.norm()) <= 1e-5


def test_a_mixed_pack_gives_what_each_sample_gives_alone(backbone):
    samples = [make_sample(task, number, state_row=number == 4) for number, task in enumerate(TASKS)]
    packed = sample(backbone, tiny_parts(), samples, steps=3, seed=1)
    for one, value in zip(samples, packed, strict=True):
        same(value, sample(backbone, tiny_parts(), [one], steps=3, seed=1)[0])
        for given, clean, found, axis in (
            (one.video_given, one.video, value.video, 1),
            (one.sound_given, one.sound, value.sound, 0),
            (one.action_given, one.action, value.action, 0),
        ):
            if given is not None:
                places = torch.nonzero(given).flatten()
                assert torch.equal(found.index_select(axis, places), clean.index_select(axis, places))
        if one.action is not None:
            assert not value.action[:, one.action_width :].any()


def test_the_token_budget_cuts_packs_and_changes_nothing(backbone):
    samples = [make_sample("policy", number) for number in range(5)]
    layout = Layout.of(backbone.config)
    sizes = [layout.tokens(s) for s in samples]
    assert list(next(in_packs(samples, layout, sizes[0] + sizes[1]))) == [0, 1]
    assert [list(places) for places in in_packs(samples, layout, 1)] == [[0], [1], [2], [3], [4]]
    assert list(in_packs([], layout, 1)) == []
    whole = sample(backbone, tiny_parts(), samples, steps=2)
    cut = sample(backbone, tiny_parts(), samples, steps=2, tokens_per_pack=sizes[0] + sizes[1])
    for a, b in zip(whole, cut, strict=True):
        same(a, b)


def test_noise_is_a_function_of_seed_and_number(backbone):
    one, other = make_sample("policy", 3), make_sample("policy", 4)
    first = sample(backbone, tiny_parts(), [one], steps=2, seed=5)[0].action
    assert torch.equal(first, sample(backbone, tiny_parts(), [one], steps=2, seed=5)[0].action)
    assert not torch.equal(first, sample(backbone, tiny_parts(), [one], steps=2, seed=6)[0].action)
    same(
        sample(backbone, tiny_parts(), [other, one], steps=2, seed=5)[1],
        sample(backbone, tiny_parts(), [one], steps=2, seed=5)[0],
    )


def test_the_number_of_steps_counts_and_is_at_least_one(backbone):
    one = make_sample("policy", 0)
    few, many = (sample(backbone, tiny_parts(), [one], steps=n)[0].action for n in (2, 8))
    assert not torch.allclose(few, many)
    with pytest.raises(UserError, match="solver_steps is 0"):
        sample(backbone, tiny_parts(), [one], steps=0)


def test_sampling_has_no_dropout_and_gives_the_mode_back():
    from peft import LoraConfig

    backbone = tiny_backbone()
    backbone.add_adapter(LoraConfig(r=2, lora_dropout=0.9, target_modules=["add_q_proj"], init_lora_weights=False))
    backbone.train()
    one = make_sample("policy", 0)
    results = [sample(backbone, tiny_parts(), [one], steps=2)[0].action for _ in range(2)]
    assert torch.equal(*results) and backbone.training and not results[0].requires_grad


def test_guidance_runs_a_second_pass_with_an_empty_caption(backbone):
    one = make_sample("policy", 0)
    plain, guided = (sample(backbone, tiny_parts(), [one], steps=2, guidance=g)[0].action for g in (1.0, 3.0))
    assert not torch.allclose(plain, guided)


# ------------------------------------------------------------------------------------------------ the robot's sampler


def robot_sampler(backbone, **changes) -> RobotSampler:
    card = Embodiment(
        **{
            **dict(
                name="pusht",
                domain_id=4,
                control_hz=10.0,
                chunk=8,
                action=[Channel(name="x"), Channel(name="y")],
                cameras=["top"],
                execute=4,
            ),
            **changes,
        }
    )
    moments = Moments(
        2,
        *(
            [[0.0, 0.0]]
            + [[1.0, 1.0]]
            + [[-1.0, 0.0]]
            + [[1.0, 100.0]]
            + [[-1.0, 0.0]]
            + [[0.0, 0.0]] * 3
            + [[1.0, 100.0]]
        ),
    )
    normaliser = Normaliser(card, Statistics("d", "pusht", "f", moments))
    return RobotSampler(backbone, Encoder(tiny_parts(), {"pusht": card}), card, normaliser, steps=2)


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def test_the_instruction_is_understood_once_for_all_robots_and_looks(backbone):
    policy, calls = robot_sampler(backbone), []
    handles = [layer.register_forward_pre_hook(lambda _, a: calls.append(a[0])) for layer in backbone.layers]
    chunks = policy.act([image(0), image(1), image(2)], None, "Go", 0, [0, 1, 2])
    policy.act([image(3), image(4), image(5)], None, "Go", 0, [3, 4, 5])
    policy.act([image(3)], None, "Go", 0, [3])
    assert calls.count("understanding") == len(backbone.layers)
    assert calls.count("generation") == 3 * 2 * len(backbone.layers)
    policy.act([image(3)], None, "Stop", 0, [3])
    assert calls.count("understanding") == 2 * len(backbone.layers)
    for handle in handles:
        handle.remove()
    assert [c.shape for c in chunks] == [(8, 2)] * 3 and all(c.dtype == np.float32 for c in chunks)
    assert not np.allclose(chunks[0], chunks[1])


def test_a_robots_chunk_does_not_depend_on_the_others(backbone):
    policy = robot_sampler(backbone)
    together = policy.act([image(n) for n in range(4)], None, "Go", 7, [10, 11, 12, 13])
    alone = policy.act([image(2)], None, "Go", 7, [12])[0]
    assert np.linalg.norm(together[2] - alone) <= 1e-5 * np.linalg.norm(alone)


def test_a_state_row_needs_and_uses_states(backbone):
    policy = robot_sampler(backbone, state_row=True, state_key="state")
    with pytest.raises(UserError, match="needs the robots' states"):
        policy.act([image(0)], None, "Go", 0, [0])
    a, b = (policy.act([image(0)], [np.array(s, np.float32)], "Go", 0, [0])[0] for s in ([0.0, 1.0], [0.5, 90.0]))
    assert a.shape == (8, 2) and not np.allclose(a, b)
