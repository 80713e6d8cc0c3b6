"""A pack that ranks share: its parts are together the pack, their forwards and backwards together the whole's."""

from __future__ import annotations

import multiprocessing
import queue
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from cosmos3_train.config import Objective, UserError
from cosmos3_train.model.context import ContextGroup, refuse_heads
from cosmos3_train.model.omni import Cosmos3PackedTransformer
from cosmos3_train.model.slices import slice_of
from cosmos3_train.objectives import flow_matching, next_token
from cosmos3_train.types import IGNORED_LABEL, PackedSequence
from tests.parity.upstream import EDGE, TINY, layout_of, make_sample, randomise

TASKS = ("policy", "text_to_video_sound", "inverse_dynamics", "forward_dynamics")


def make_model(config: dict = TINY) -> Cosmos3PackedTransformer:
    model = Cosmos3PackedTransformer(**config)
    randomise(model)
    return model


def make_pack(*tasks: str, speaks: bool = True) -> PackedSequence:
    """The first sample's text is learnt too where it `speaks`, at its second and third token."""
    samples = [make_sample(task, number) for number, task in enumerate(tasks)]
    if speaks:
        labels = torch.full_like(samples[0].text, IGNORED_LABEL)
        labels[1:3] = torch.tensor([5, 6])
        samples[0] = replace(samples[0], labels=labels)
    return flow_matching.noisy_pack(samples, layout_of(make_model()), Objective(), seed=0)


def stream(pack: PackedSequence) -> Tensor:
    """What stands at each place of the generation stream: its row, its position, its σ."""
    rows = torch.cat([pad(part, (0, 192 - part.shape[1])) for part in (pack.video, pack.sound, pack.action)])
    levels = pack.levels[pack.level_index] * pack.noisy
    return torch.cat((rows[pack.order], pack.positions.T, levels[:, None]), dim=1)


def read(pack: PackedSequence) -> list[tuple[float, ...]]:
    """Every token that is read: what stands there, what is expected of it, and for whose mean."""
    found = []
    for name in ("video", "sound", "action"):
        target = getattr(pack, f"{name}_target")
        rows = (stream(pack)[getattr(pack, f"{name}_out")], target.velocity, target.sample[:, None])
        found += [tuple(row) for row in torch.cat(rows, dim=1).tolist()]
    counts, domains = pack.action_out_domains.counts, pack.action_out_domains.ids.tolist()
    of = [domain for domain, count in zip(domains, counts, strict=True) for _ in range(count)]
    values = pack.action_target.velocity.tolist()
    return sorted(found) + sorted((float(domain), *row) for domain, row in zip(of, values, strict=True))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_parts_are_together_the_pack(size):
    pack = make_pack(*TASKS)
    parts = [slice_of(pack, place, size) for place in range(size)]
    assert torch.equal(torch.cat([part.text_ids for part in parts]), pack.text_ids)
    assert torch.equal(torch.cat([stream(part) for part in parts]), stream(pack))
    assert sorted(row for part in parts for row in read(part)) == sorted(read(pack))
    counted = [part.labels[part.labels != IGNORED_LABEL] for part in parts]
    assert torch.equal(torch.cat(counted), pack.labels)
    assert all(part.labels.numel() for part in parts), "every rank takes part in the backward of text"
    assert {part.tokens for part in parts} == {pack.tokens}


def test_heads_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(UserError, match=r"context_parallel is 3, but the model's 2 key/value heads .* one of 1, 2$"):
        refuse_heads(make_model().config, 3)


# ------------------------------------------------------------------------------------------------ two processes


Results = tuple[dict[str, float], dict[str, Tensor]]


def losses_and_gradients(model: Cosmos3PackedTransformer, pack: PackedSequence) -> Results:
    velocities = model(pack)
    losses = flow_matching.losses(velocities, pack)
    if pack.labels.numel():
        losses["text"] = next_token.loss(velocities, pack, model.lm_head, 2)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: float(value.detach()) for name, value in losses.items()}, gradients


CASES = {
    "qwen": (TINY, {}, TASKS),
    "edge": (EDGE, {}, TASKS),
    "joint": (TINY, {"joint_layers": True, "gradient_checkpointing": True}, TASKS),
    "recomputed": (TINY, {"gradient_checkpointing": True}, TASKS),
    "attention kept": (TINY, {"gradient_checkpointing": True, "keep_attention": True}, TASKS),
    "lean, the last layer kept": (TINY, {"gradient_checkpointing": True, "kept_layers": 1, "lean": True}, TASKS),
    "short": (TINY, {}, ("text_to_image",)),
    "no text learnt": (TINY, {}, TASKS),
    "no text learnt, edge": (EDGE, {"joint_layers": True}, TASKS),
}


def make_case(name: str) -> tuple[Cosmos3PackedTransformer, PackedSequence]:
    config, settings, tasks = CASES[name]
    model, pack = make_model(config), make_pack(*tasks, speaks="no text" not in name)
    if settings.get("gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    for key, value in settings.items():
        setattr(model, key, value)
    return model.train(), pack


def share(place: int, folder: str, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=place, world_size=2)
    for name in CASES:
        if place == 0:
            torch.save(losses_and_gradients(*make_case(name)), Path(folder) / name)
        model, pack = make_case(name)
        model.context = ContextGroup(dist.group.WORLD)
        losses, gradients = losses_and_gradients(model, slice_of(pack, place, 2))
        torch.save((losses, gradients), Path(folder) / f"{name} {place}")
    dist.barrier()
    results.put(place)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with what was found of each case, and what each of two processes found of its half."""
    folder = tmp_path_factory.mktemp("shared")
    # From a server that has imported this file: of a worker that has compiled a backward no fork may make another.
    served = multiprocessing.get_context("forkserver")
    served.set_forkserver_preload([__name__])
    results = served.Queue()
    processes = [served.Process(target=share, args=(place, str(folder), results)) for place in (0, 1)]
    for process in processes:
        process.start()
    try:
        assert {results.get(timeout=120) for _ in processes} == {0, 1}
    except queue.Empty:
        pytest.fail("a process has died or hangs")
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_the_losses_and_gradients_of_one(shared, name):
    losses, gradients = torch.load(shared / name)
    halves = [torch.load(shared / f"{name} {place}") for place in (0, 1)]
    for key, value in losses.items():
        assert sum(half[0][key] for half in halves) == pytest.approx(value, rel=1e-5), key
    for key, value in gradients.items():
        found = sum(half[1][key] for half in halves if key in half[1])
        assert float((found - value).norm() / value.norm().clamp(min=1e-9)) <= 1e-5, key
    assert {key for half in halves for key in half[1]} == gradients.keys()
