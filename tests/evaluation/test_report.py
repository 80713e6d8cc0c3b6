"""The report's two files, and its pictures as PNG files that hold what they should."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cosmos3_train.config import UserError
from cosmos3_train.evaluation.closed_loop import Episode
from cosmos3_train.evaluation.heldout import HeldoutLoss
from cosmos3_train.evaluation.pictures import (
    draw_coverage,
    draw_film,
    draw_loss_by_band,
    draw_loss_curve,
    read_metrics,
    smooth,
)
from cosmos3_train.evaluation.report import MEANINGS, Picture, shown, write_report


class Page(HTMLParser):
    """Tags with their attributes, and the words of the table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def picture(path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)
    return path


def test_the_report_is_complete_and_stands_alone(tmp_path):
    numbers = {key: 0.1 * place for place, key in enumerate(MEANINGS)}
    numbers |= {"more": np.float32(2.5), "bands": {"action": [1.0, None, float("nan")]}, "broken": float("inf")}
    path = write_report(
        tmp_path / "run",
        numbers,
        [Picture(picture(tmp_path / "a.png"), "Loss & <b>more</b>.")],
        title="A <run>",
        summary="First.\n\nSecond.",
        facts={"seeds": "1 to 3", "trials": 3},
        units={"action_error_after": "cm"},
    )
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(content) == sorted(content) and set(MEANINGS) <= set(content)
    assert content["more"] == 2.5 and content["broken"] is None and content["bands"]["action"] == [1.0, None, None]
    assert content["facts"] == {"seeds": "1 to 3", "trials": 3}
    text = path.read_text()
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe"} & set(names) and "b" not in names  # the caption's markup is escaped
    addresses = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href")]
    assert len(addresses) == 1 and addresses[0].startswith("data:image/png;base64,")
    assert base64.b64decode(addresses[0].split(",")[1]) == (tmp_path / "a.png").read_bytes()
    assert "http" not in text and "url(" not in text and "@import" not in text
    words = "|".join(page.words)
    for expected in (
        "A <run>",
        "|First.|",
        "|Second.|",
        "|0.1 cm|",
        f"|{shown(numbers['seconds'])} s|",
        "|1 to 3|",
        "|2.5|",
        "|–|",
    ):
        assert expected in words
    for meaning in MEANINGS.values():
        assert meaning in words
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]


def test_what_was_not_measured_is_not_shown(tmp_path):
    text = write_report(tmp_path, {"seconds": 3.0}, [], title="t").read_text()
    assert "coverage_after" not in text and "How it was measured" not in text
    assert json.loads((tmp_path / "report.json").read_text()) == {"seconds": 3.0}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123456, "0.1235"),
        (3.1e-7, "3.10e-07"),
        (12345.6, "12346"),
        (7, "7"),
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0"),
        ("words", "words"),
        (True, "True"),
        (2e9, "2.00e+09"),
    ],
)
def test_numbers_are_short(value, expected):
    assert shown(value) == expected


# ------------------------------------------------------------------------------------------------ pictures


def is_picture(path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 200 and pixels.shape[1] > 300
    return pixels


def colours(pixels: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(int(c) for c in row) for row in np.unique(pixels.reshape(-1, 3), axis=0)}


def test_metrics_are_read_and_drawn(tmp_path):
    rows = ["step,metric,value", "1,loss/action,0.5", "2,loss/action,0.25", "2,heldout/loss/action,0.3", "2,loss,5"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["loss/action"] == ([1, 2], [0.5, 0.25]) and metrics["loss"] == ([2], [5.0])
    pixels = is_picture(draw_loss_curve(tmp_path / "loss.png", metrics))
    assert (0xC8, 0x54, 0x1C) in colours(pixels)
    assert draw_loss_curve(tmp_path / "again.png", metrics).read_bytes() == (tmp_path / "loss.png").read_bytes()
    is_picture(draw_loss_curve(tmp_path / "empty.png", {}))


def test_metrics_that_are_not_there_or_not_metrics(tmp_path):
    with pytest.raises(UserError, match="not there"):
        read_metrics(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a metrics file"):
        read_metrics(tmp_path / "metrics.csv")


def test_smoothing_keeps_lines_and_length():
    line = np.linspace(0, 3, 61)
    assert np.allclose(smooth(list(line)), line)
    noisy = np.tile([0.0, 1.0], 60)
    assert smooth(list(noisy))[20:100].std() < 0.2 * noisy.std()
    assert len(smooth([1.0])) == 1 and smooth([1.0])[0] == 1.0


def test_bands_coverage_and_film(tmp_path):
    before, after = (HeldoutLoss(1.0, {}, {"action": [s] * 9 + [None]}, 4, 2) for s in (1.0, 0.5))
    both = is_picture(draw_loss_by_band(tmp_path / "bands.png", after, before))
    assert {(0x9A, 0xA1, 0xA9), (0x1F, 0x6F, 0xB2)} <= colours(both)
    assert (0x9A, 0xA1, 0xA9) not in colours(is_picture(draw_loss_by_band(tmp_path / "after.png", after)))
    episodes = [[Episode(seed, value * s, 0.0, 1) for seed, value in enumerate((0.2, 0.9))] for s in (1.0, 0.3, 0.1)]
    is_picture(draw_coverage(tmp_path / "coverage.png", *episodes))
    is_picture(draw_coverage(tmp_path / "alone.png", episodes[0]))
    frames = [np.full((96, 96, 3), (10 * n, 200, 7), np.uint8) for n in range(23)]
    film = colours(is_picture(draw_film(tmp_path / "film.png", Episode(1, 0.5, 0.5, 22, frames, list(range(23))))))
    assert {(0, 200, 7), (220, 200, 7)} <= film and len([c for c in film if c[1:] == (200, 7)]) == 10
