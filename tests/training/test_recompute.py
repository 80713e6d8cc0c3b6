"""How many layers keep their activations: the count that `auto` comes to from two trials, and what it gives up."""

from __future__ import annotations

import logging

import pytest

from cosmos3_train.config import Tuning
from cosmos3_train.training.recompute import most_that_fit, recompute_more
from tests.model.test_projections import adapted
from tests.parity.upstream import TINY

GIB = 2**30
BEFORE = 15 * GIB


def peak(kept: int, layer: float = 2.0, small: float = 0.2, layers: int = 36, curved: float = 0.0) -> int:
    """Bytes at the largest moment of a step: weights, layers that keep theirs, inputs of the others, a layer's work.
    Without a layer that keeps its own, one is made again when backward begins."""
    own = max(kept, 1) * layer + (layers - kept) * small + curved * kept**2
    return BEFORE + int((own + 1.5) * GIB)


@pytest.mark.parametrize(("room", "kept"), [(200, 36), (91, 36), (70, 25), (28, 2), (26, 1), (24, 0)])
def test_as_many_layers_keep_theirs_as_the_room_holds(room, kept):
    found = most_that_fit(peak, 36, room * GIB, BEFORE)
    assert found == kept
    assert found in (0, 36) or peak(found) <= room * GIB < peak(found + 1) + 0.01 * GIB


def test_fuller_micro_batches_to_come_are_counted():
    found = most_that_fit(peak, 36, 70 * GIB, BEFORE, fuller=1.5)
    own = (peak(found) - BEFORE) * 1.5
    assert 0 < found < 25 and BEFORE + own <= 70 * GIB < BEFORE + own + 3.3 * GIB


def test_what_does_not_fit_after_all_gives_way():
    def ran_out(kept: int) -> int | None:
        found = peak(kept, curved=0.05)
        return None if found > 72 * GIB else found

    untried = most_that_fit(ran_out, 36, 70 * GIB, BEFORE, largest_layer=3 * GIB)
    tried = most_that_fit(ran_out, 36, 70 * GIB, BEFORE)
    assert peak(untried, curved=0.05) > 70 * GIB >= peak(tried, curved=0.05) and tried > 3
    assert most_that_fit(lambda kept: None, 36, 70 * GIB, BEFORE) == 0


def test_ranks_that_cannot_give_way_try_nothing_that_might_not_fit():
    for room, tried in ((31, [1]), (33, [1, 3])):
        asked = []

        def told(kept: int, asked=asked) -> int:
            asked.append(kept)
            return peak(kept)

        found = most_that_fit(told, 36, room * GIB, BEFORE, largest_layer=3 * GIB)
        assert asked == tried and (found > 3) == (tried == [1, 3])


def test_a_run_whose_memory_ran_out_gives_up_what_costs_least_first(caplog):
    backbone = adapted(TINY, Tuning(rank=3))
    backbone.gradient_checkpointing, backbone.keep_attention, backbone.kept_layers = True, True, 2
    states = []
    with caplog.at_level(logging.WARNING, "cosmos3_train"):
        while recompute_more(backbone):
            states.append((backbone.lean, backbone.kept_layers, backbone.keep_attention))
    assert states == [(True, 2, True), (True, 1, True), (True, 0, True), (True, 0, False)]
    assert "norms and gates recomputed; 1 of 3 layers recomputed, attention kept" in caplog.text
