"""Which passes count as alike, for a recorded one stands for all of its shape, and where none is recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosmos3_train.config import UserError
from cosmos3_train.model.packing import pack
from cosmos3_train.training.captured import shape_of, tensors_of
from cosmos3_train.training.run import build
from cosmos3_train.types import PackedSequence
from tests.model.test_packing import LAYOUT
from tests.parity.upstream import make_sample, noise_it
from tests.training.project import load


def packed(*text: int, latent: tuple[int, int, int] = (2, 4, 4), task: str = "policy") -> PackedSequence:
    samples = [make_sample(task, number, text=tokens, latent=latent) for number, tokens in enumerate(text)]
    parts = [noise_it(sample, 0.5) for sample in samples]
    return pack(samples, [p[1] for p in parts], [p[2] for p in parts], LAYOUT)


def test_packs_that_differ_in_numbers_alone_are_alike():
    one, other = packed(5, 9, 7), packed(9, 7, 5)
    assert not torch.equal(one.text_spans.offsets, other.text_spans.offsets)
    assert shape_of(one) == shape_of(other)
    assert shape_of(one) == shape_of(one.copied()) == shape_of(replace(one, prompts=("a", "b", "c")))


@pytest.mark.parametrize(
    "other",
    [
        packed(5, 9, 8),  # another sum
        packed(5, 10, 6),  # another longest, by which kernels are launched
        packed(5, 9),
        packed(21),
        packed(5, 9, 7, latent=(3, 4, 4)),
        packed(5, 9, 7, task="forward_dynamics"),
    ],
)
def test_packs_that_are_launched_otherwise_are_not(other):
    assert shape_of(packed(5, 9, 7)) != shape_of(other)


def test_every_tensor_is_copied_in_one_order():
    one, other = packed(5, 9, 7), packed(9, 7, 5)
    copy = one.copied()
    for place, value in zip(tensors_of(copy), tensors_of(other), strict=True):
        place.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(copy), tensors_of(other), strict=True))
    kept = {tensor.data_ptr() for tensor in tensors_of(one) if tensor.numel()}
    assert kept.isdisjoint({tensor.data_ptr() for tensor in tensors_of(copy)}), "the first pack is not written to"
    named = {name for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
    found = {id(tensor) for tensor in tensors_of(one)}
    assert named and all(id(getattr(one, name)) in found for name in named)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("strategy.name=fsdp2", "under strategy.name=fsdp2 ranks exchange"),
        ("strategy.context_parallel=2", "under strategy.context_parallel=2 ranks exchange"),
        ("model.compile=false", "model.compile is false"),
        ("tuning.dropout=0.1", "tuning.dropout draws in every pass"),
    ],
)
def test_settings_that_rule_it_out_are_refused_before_a_run(project, change, told):
    load(project, "name=unasked", change)
    with pytest.raises(UserError, match=f"model.cuda_graphs is true, but {told}.*; use auto") as caught:
        load(project, "name=asked", "model.cuda_graphs=true", change)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_recorded_is_refused_where_it_is_asked_for(project):
    assert build(load(project, "name=on_a_cpu")).module.captured is None
    with pytest.raises(UserError, match=r"model\.cuda_graphs is true, but this is cpu"):
        build(load(project, "name=asked", "model.cuda_graphs=true"))
