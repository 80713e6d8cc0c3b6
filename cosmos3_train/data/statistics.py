"""Statistics of a dataset's actions, raw and as normalised, and states, over the frames of its train split; never over
held-out episodes.

Quantiles are exact: one channel at a time is brought into memory, 40 MB for ten million frames. The file knows which
dataset and which embodiment it describes, and refuses to serve another.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cosmos3_train.config import UserError
from cosmos3_train.data.files import write_whole

FILE = "statistics.json"
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True)
class Moments:
    """Per channel, in the robot's own units, over `count` frames."""

    count: int
    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    q01: list[float]
    q10: list[float]
    q50: list[float]
    q90: list[float]
    q99: list[float]


@dataclass(frozen=True)
class Statistics:
    """What `statistics.json` holds.

    state:      None where the embodiment names no state column
    normalised: of the action, in the model's units, for people; None in folders that were prepared before it was there
    """

    dataset: str
    embodiment: str
    fingerprint: str
    action: Moments
    state: Moments | None = None
    normalised: Moments | None = None

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        write_whole(Path(path), (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path, *, embodiment: str | None = None, dataset: str | None = None) -> Statistics:
        """Read the file, checking whose statistics they are.

        Args:
            path: the file, or the prepared folder that holds it.
            embodiment: name of the embodiment card that they must describe; None takes any.
            dataset: name of the dataset that they must describe; None takes any.

        Raises:
            UserError: missing, unreadable, or of another dataset or embodiment.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            statistics = cls(
                dataset=content["dataset"],
                embodiment=content["embodiment"],
                fingerprint=content["fingerprint"],
                action=_moments(content["action"]),
                state=None if content.get("state") is None else _moments(content["state"]),
                normalised=None if content.get("normalised") is None else _moments(content["normalised"]),
            )
        except FileNotFoundError:
            raise UserError(f"{path}: the statistics are missing; run `cosmos3 prepare` for the dataset") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a statistics file ({error!r}); run `cosmos3 prepare` again") from None
        if embodiment is not None and statistics.embodiment != embodiment:
            raise UserError(
                f"{path}: statistics of embodiment {statistics.embodiment!r}, but the run needs those of "
                f"{embodiment!r}; run `cosmos3 prepare` with --embodiment {embodiment}"
            )
        if dataset is not None and statistics.dataset != dataset:
            raise UserError(
                f"{path}: statistics of dataset {statistics.dataset!r}, but the run needs those of {dataset!r}; "
                f"run `cosmos3 prepare` for {dataset}"
            )
        return statistics


def compute_moments(parts: Sequence[np.ndarray], width: int) -> Moments:
    """Moments of [frames, width] arrays end to end (memory-mapped ones are welcome).

    Independent of how the frames are cut into parts: each channel is put together before anything is summed.
    """
    count = sum(len(part) for part in parts)
    assert count > 0, "statistics of no frames"
    found: dict[str, list[float]] = {field.name: [] for field in fields(Moments) if field.name != "count"}
    for channel in range(width):
        values = np.concatenate([np.asarray(part[:, channel], dtype=np.float64) for part in parts])
        found["mean"].append(float(values.mean()))
        found["std"].append(float(values.std()))
        found["min"].append(float(values.min()))
        found["max"].append(float(values.max()))
        for name, value in zip(QUANTILES, np.quantile(values, list(QUANTILES.values())), strict=True):
            found[name].append(float(value))
    return Moments(count=count, **found)


def draw_histograms(normalised: Iterable[np.ndarray], names: Sequence[str], title: str) -> bytes:
    """A PNG with one small panel a channel of the normalised actions, on [-2, 2].

    Args:
        normalised: arrays [n, W] in the model's units, as many as there are; what lies beyond ±2 goes to the last bins.
    """
    edges = np.linspace(-2, 2, 81)
    counts = np.zeros((len(names), 80))
    for part in normalised:
        for channel in range(len(names)):
            counts[channel] += np.histogram(np.clip(part[:, channel], -2, 2), edges)[0]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.4 * columns, 1.7 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot no window system is ever asked for
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for channel, panel in enumerate(panels):
        if channel >= len(names):
            panel.set_axis_off()
            continue
        panel.stairs(counts[channel], edges, fill=True, color="#3b6ea5")
        panel.axvspan(-1, 1, color="#d8e3ef", zorder=0)
        panel.set_title(names[channel], fontsize=8)
        panel.set_yticks([])
        panel.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png", metadata={"Software": None})
    return picture.getvalue()


def _moments(content: dict[str, Any]) -> Moments:
    return Moments(**content)
