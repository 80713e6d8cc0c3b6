"""The order of samples: shares, permutations, tasks, and independence of ranks and workers."""

import json
from collections import Counter
from itertools import chain, pairwise

import pytest
import torch
from torch.utils.data import DataLoader

from cosmos3_train.config import Dataset, UserError
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.conversations import open_conversations
from cosmos3_train.data.mixture import ROUND, Mixture, StepDataset, permute
from tests.data.logs import prepared_logs


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    found = prepared_logs(root, {"large": [20, 20, 17], "small": [9, 8]})
    talk = root / "talk.jsonl"
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that."}]
    talk.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(5)))
    found["talk"] = open_conversations(DatasetCard(name=talk.stem, format="conversations"), talk)
    return found


def entry(weight=1.0, **tasks):
    return Dataset(prepared="somewhere", weight=weight, tasks=tasks or {"policy": 1.0})


def mixture(datasets, seed=0, split="train"):
    weights = {
        "large": entry(5, policy=3, forward_dynamics=1),
        "small": entry(2, image_to_video=1),
        "talk": entry(0.5),
    }
    return Mixture({name: (datasets[name], weights[name]) for name in datasets}, seed, split)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_a_permutation_is_one(count):
    for key in (0, 1, 12345678901234567):
        assert sorted(permute(position, count, key) for position in range(count)) == list(range(count))


def test_permutations_look_random():
    count = 1000
    orders = [[permute(position, count, key) for position in range(count)] for key in range(8)]
    assert len({tuple(order) for order in orders}) == 8
    for order in orders:
        rising = sum(a < b for a, b in pairwise(order)) / (count - 1)
        assert 0.42 < rising < 0.58
        assert abs(sum(order[:100]) / 100 - count / 2) < 120
    agree = sum(a == b for a, b in zip(orders[0], orders[1], strict=True))
    assert agree < 10


@pytest.mark.parametrize("weights", [[1, 1], [5, 2, 0.5], [1, 1000], [3, 3, 3, 1, 1, 0.2], [1]])
def test_shares_hold_on_every_prefix(datasets, weights):
    entries = {str(place): (datasets["small"], entry(weight)) for place, weight in enumerate(weights)}
    order = Mixture(entries, seed=0)
    seen = Counter()
    for number in range(ROUND + 500):
        seen[order.pick(number).dataset] += 1
        for place, weight in enumerate(weights):
            share = weight / sum(weights)
            slack = 1 + (number + 1) / ROUND  # the round's slots are whole numbers
            assert abs(seen[str(place)] - share * (number + 1)) <= slack + 1e-9


def test_every_window_once_an_epoch(datasets):
    order = mixture(datasets)
    windows = {name: dataset.count("train") for name, dataset in datasets.items()}
    seen = {name: [] for name in datasets}
    for number in range(2 * ROUND):
        pick = order.pick(number)
        seen[pick.dataset].append(pick.index)
    for name, indices in seen.items():
        epochs = [indices[i : i + windows[name]] for i in range(0, len(indices) - windows[name], windows[name])]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(range(windows[name])) for epoch in epochs)
        assert epochs[0] != epochs[1], "each epoch has its own order"


def test_tasks_by_weight(datasets):
    order = mixture(datasets)
    tasks = Counter((pick.dataset, pick.task) for pick in map(order.pick, range(6000)))
    assert set(tasks) == {
        ("large", "policy"),
        ("large", "forward_dynamics"),
        ("small", "image_to_video"),
        ("talk", "conversation"),
    }
    share = tasks["large", "policy"] / (tasks["large", "policy"] + tasks["large", "forward_dynamics"])
    assert 0.72 < share < 0.78


def test_a_pure_function_of_seed_and_number(datasets):
    numbers = [0, 5, 4095, 4096, 10**9, 3]
    assert [mixture(datasets).pick(n) for n in numbers] == [mixture(datasets).pick(n) for n in numbers]
    one, other = mixture(datasets, seed=0), mixture(datasets, seed=1)
    assert [one.pick(n) for n in range(50)] != [other.pick(n) for n in range(50)]


@pytest.mark.parametrize(("samples", "world"), [(8, 1), (8, 2), (7, 2), (7, 3), (5, 4)])
def test_ranks_share_a_step(datasets, samples, world):
    order = mixture(datasets)
    parts = [StepDataset(order, samples, rank, world, steps=4) for rank in range(world)]
    for step in range(4):
        shares = [list(part.numbers(step)) for part in parts]
        assert list(chain.from_iterable(shares)) == list(range(step * samples, (step + 1) * samples))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        keys = [(s.number, s.key, s.task) for part in parts for s in part[step].samples]
        alone = [order.sample(number) for number in range(step * samples, (step + 1) * samples)]
        assert keys == [(s.number, s.key, s.task) for s in alone]
    assert len(parts[0]) == 4
    with pytest.raises(IndexError):
        parts[0][4]


def test_any_number_of_workers_gives_the_same_batches(datasets):
    steps = StepDataset(mixture(datasets), 6, 0, 1, steps=5)

    def batches(workers):
        loader = DataLoader(steps, batch_size=None, num_workers=workers, multiprocessing_context=None)
        return [(batch.step, batch.samples) for batch in loader]

    alone, spread = batches(0), batches(2)
    for (step, samples), (other_step, others) in zip(alone, spread, strict=True):
        assert step == other_step
        for sample, other in zip(samples, others, strict=True):
            assert (sample.key, sample.number, sample.task, sample.messages) == (
                other.key, other.number, other.task, other.messages,
            )  # fmt: skip
            if sample.frames is not None:
                assert torch.equal(sample.frames, other.frames)
            if sample.action is not None:
                assert torch.equal(sample.action, other.action)


def test_heldout_windows_never_train(datasets):
    datasets = {name: datasets[name] for name in ("large", "small")}
    train, heldout = mixture(datasets), mixture(datasets, split="heldout")

    def keys(order):
        return {order.sample(number).key for number in range(150)}

    assert not keys(train) & keys(heldout)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "data.datasets is empty"),
        ({"small": entry(0)}, r"small\.weight is 0; it is above 0"),
        ({"small": entry(1, polcy=1)}, r"small\.tasks: 'polcy' is not a task. Did you mean 'policy'"),
        ({"small": entry(1, policy=-1)}, r"tasks\.policy is -1"),
        ({"small": entry(1, policy=0)}, r"tasks has no weight above 0"),
        ({"small": entry(1, video_to_sound=1)}, "needs sound"),
    ],
)
def test_wrong_entries(datasets, entries, words):
    with pytest.raises(UserError, match=words):
        Mixture({name: (datasets[name], value) for name, value in entries.items()}, 0)


def test_more_ranks_than_samples(datasets):
    with pytest.raises(UserError, match="samples_per_step is 2, fewer than the 3 ranks"):
        StepDataset(mixture(datasets), 2, 0, 3, 1)
