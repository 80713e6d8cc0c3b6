"""Normalising and its inverse, and the checks of a log's actions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos3_train.config import Channel, UserError
from cosmos3_train.data.actions import Normaliser, check_actions
from cosmos3_train.data.statistics import Statistics, compute_moments, draw_histograms
from tests.data.logs import embodiment

CARD = embodiment(action=[Channel("x"), Channel("still"), Channel("grip")])


def values(count=1000):
    rng = np.random.default_rng(0)
    grip = (np.arange(count) == 5).astype(float)  # rarely anything but 0: q01 and q99 are both 0
    return np.stack([rng.normal(100, 30, count), np.full(count, 0.3), grip], axis=1).astype(np.float32)


def statistics(array):
    return Statistics("moves", "mover", "f", compute_moments([array], array.shape[1]))


def test_moments_do_not_depend_on_the_parts():
    array = values()
    moments = compute_moments([array], 3)
    assert compute_moments([array[:10], array[10:700], array[700:]], 3) == moments
    x = array[:, 0].astype(np.float64)
    assert moments.count == 1000
    assert moments.mean[0] == pytest.approx(x.mean(), rel=1e-12)
    assert moments.std[0] == pytest.approx(x.std(), rel=1e-12)
    assert moments.q01[0] == pytest.approx(np.sort(x)[9] * 0.01 + np.sort(x)[10] * 0.99, rel=1e-3)
    assert moments.q50[0] == pytest.approx(np.median(x), rel=1e-12)
    assert (moments.min[2], moments.max[2]) == (0, 1)


@pytest.mark.parametrize("kind", ["quantile", "minmax", "meanstd", "none"])
def test_round_trip(kind):
    array = values()
    card = embodiment(action=CARD.action, normaliser=kind)
    normaliser = Normaliser(card, statistics(array))
    raw = torch.from_numpy(array)
    there = normaliser.normalise(raw)
    assert there.dtype == torch.float32
    assert torch.allclose(normaliser.denormalise(there), raw, rtol=1e-6, atol=1e-5)


def test_what_the_kinds_mean():
    array = values()
    moments = statistics(array)
    raw = torch.from_numpy(array)
    quantile = Normaliser(CARD, moments).normalise(raw)
    inside = (quantile[:, 0].abs() <= 1).float().mean()
    assert 0.975 <= inside <= 0.985
    assert quantile[:, 0].abs().max() > 1, "nothing is clipped"
    assert torch.equal(quantile[:, 1], torch.zeros(1000)), "a constant channel maps to 0"
    assert set(quantile[:, 2].tolist()) == {-1.0, 1.0}, "a rare event survives equal quantiles"
    said = Normaliser(CARD, moments).normalise_moments(moments.action)
    for name, expected in vars(compute_moments([quantile.numpy()], 3)).items():
        assert getattr(said, name) == pytest.approx(expected, abs=1e-6), name
    minmax = Normaliser(embodiment(action=CARD.action, normaliser="minmax"), moments).normalise(raw)
    assert minmax[:, 0].min() == -1 and minmax[:, 0].max() == 1
    meanstd = Normaliser(embodiment(action=CARD.action, normaliser="meanstd"), moments).normalise(raw)
    assert abs(float(meanstd[:, 0].mean())) < 1e-5 and float(meanstd[:, 0].std(correction=0)) == pytest.approx(1)


def test_constant_channel_comes_back():
    normaliser = Normaliser(CARD, statistics(values()))
    assert float(normaliser.denormalise(torch.full((1, 3), 0.7))[0, 1]) == pytest.approx(0.3)


def test_width_errors():
    with pytest.raises(UserError, match="3 action channels, embodiment 'mover' has 2"):
        Normaliser(embodiment(), statistics(values()))
    with pytest.raises(UserError, match="actions have 2 channels, the embodiment card has 3"):
        Normaliser(CARD, statistics(values())).normalise(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("row", "channel", "value", "words"),
    [
        (3, 1, np.nan, r"episode 7, row 3: channel 'y' of 'action' is nan"),
        (2, 0, -np.inf, r"episode 7, row 2: channel 'x' of 'action' is -inf"),
        (1, 0, 512.5, r"episode 7, row 1: action channel 'x' is 512\.5, outside its range 0 to 512 px"),
        (4, 1, -0.1, r"channel 'y' is -0\.1, outside its range 0 to 512 px"),
    ],
)
def test_bad_actions(row, channel, value, words):
    array = np.full((6, 2), 3, dtype=np.float32)
    array[row, channel] = value
    with pytest.raises(UserError, match=words):
        check_actions(array, embodiment(), "dataset 'moves', episode 7")


def test_bounds_themselves_are_inside():
    card = embodiment(action=[Channel("x", low=-0.1, high=0.1), Channel("y")])
    check_actions(np.array([[0.1, 1e9], [-0.1, -1e9]], dtype=np.float32), card, "here")


def test_wrong_width():
    with pytest.raises(UserError, match="'action' has 3 numbers a row, embodiment 'mover' has 2 channels"):
        check_actions(np.zeros((4, 3), np.float32), embodiment(), "here")


def test_statistics_file(tmp_path):
    kept = statistics(values())
    kept.save(tmp_path / "statistics.json")
    assert Statistics.load(tmp_path, embodiment="mover", dataset="moves") == kept
    with pytest.raises(UserError, match="statistics of embodiment 'mover', but the run needs those of 'arm'"):
        Statistics.load(tmp_path, embodiment="arm")
    with pytest.raises(UserError, match="statistics of dataset 'moves', but the run needs those of 'other'"):
        Statistics.load(tmp_path, embodiment="mover", dataset="other")
    with pytest.raises(UserError, match="statistics are missing; run `cosmos3 prepare`"):
        Statistics.load(tmp_path / "elsewhere.json", embodiment="mover")
    (tmp_path / "statistics.json").write_text('{"dataset": "moves"}')
    with pytest.raises(UserError, match="not a statistics file"):
        Statistics.load(tmp_path, embodiment="mover")


@pytest.mark.parametrize("channels", [1, 2, 9])
def test_histograms_are_a_picture(channels):
    """Channel i is i / 4 - 1 in every row: a bar there and nowhere else, in a panel of its own, four panels a line."""
    rows = np.tile(np.arange(channels) / 4 - 1 + 0.01, (5, 1))
    picture = draw_histograms([rows[:2], rows[2:]], [f"c{i}" for i in range(channels)], "title")
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    bars = (np.abs(pixels - (0x3B, 0x6E, 0xA5)).max(axis=2) < 8).astype(int)
    columns, lines = min(4, channels), -(-channels // 4)
    height, width = (size // count for size, count in zip(bars.shape, (lines, columns), strict=True))
    for channel in range(lines * columns):
        top, left = channel // columns * height, channel % columns * width
        seen = np.flatnonzero(bars[top : top + height, left : left + width].any(axis=0))
        assert bool(len(seen)) == (channel < channels)
        if len(seen):
            middle, value = (seen[0] + seen[-1]) / 2 / width, channel / 4 - 1
            assert np.ptp(seen) < 0.04 * width and middle == pytest.approx(0.5 + value / 4.4, abs=0.03)
