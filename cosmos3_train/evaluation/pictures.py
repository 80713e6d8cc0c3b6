"""The report's pictures, drawn by matplotlib straight to PNG files; no window system is ever asked for.

One look for all: before is grey, after is blue, a baseline is a dashed line with its name on it.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cosmos3_train.config import UserError
from cosmos3_train.evaluation.closed_loop import Episode, mean_coverage
from cosmos3_train.evaluation.heldout import HeldoutLoss
from cosmos3_train.flow.noise_levels import BANDS

BEFORE, AFTER, BASELINE = "#9aa1a9", "#1f6fb2", "#b3541e"
COLOURS = {"loss": "#333333", "video": "#1f6fb2", "action": "#c8541c", "sound": "#3b8f4f", "text": "#7a4fa3"}
DPI = 140
FILM_FRAMES = 10


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each metric in a run's metrics.csv (rows of step, metric, value).

    Raises:
        UserError: the file is missing or not of that form.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                steps, values = found.setdefault(row["metric"], ([], []))
                steps.append(int(row["step"]))
                values.append(float(row["value"]))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; a run writes it while it trains") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a metrics file ({error!r}); its columns are step, metric, value") from None
    return found


def draw_loss_curve(path: Path, metrics: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Path:
    """Training loss of each modality over steps, a panel each, with the held-out loss where it was measured.

    Args:
        metrics: from `read_metrics`; "loss/video" and its like are drawn, and "heldout/loss/video" and its like.

    Returns:
        `path`.
    """
    names = [name for name in COLOURS if f"loss/{name}" in metrics]
    figure, panels = make_panels(len(names))
    for panel, name in zip(panels, names, strict=True):
        steps, values = metrics[f"loss/{name}"]
        colour = COLOURS[name]
        panel.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        panel.plot(steps, smooth(values), color=colour, linewidth=2, label="training, smoothed")
        top = float(np.quantile(values, 0.98))
        if f"heldout/loss/{name}" in metrics:
            held_steps, held = metrics[f"heldout/loss/{name}"]
            panel.plot(
                held_steps, held, color="black", marker="o", markersize=5, linewidth=1, label="held-out episodes"
            )
            top = max(top, *held)
        panel.set_ylim(0, 1.08 * top)
        panel.set_title(f"{name} loss" if name != "text" else "text loss (nats a token)")
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.legend(frameon=False)
    if panels:
        panels[0].set_ylabel("mean squared velocity error" if names[0] != "text" else "cross-entropy")
    return save_figure(figure, path)


def smooth(values: Sequence[float]) -> np.ndarray:
    """A running mean over about a twelfth of the curve, shrinking at its ends."""
    series = np.asarray(values, dtype=np.float64)
    half = max(1, len(series) // 24)
    sums = np.concatenate([[0.0], np.cumsum(series)])
    places = np.arange(len(series))
    reach = np.minimum(half, np.minimum(places, len(series) - 1 - places))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def draw_loss_by_band(path: Path, after: HeldoutLoss, before: HeldoutLoss | None = None) -> Path:
    """Held-out loss in each band of σ, a panel a modality, before beside after."""
    names = [name for name in COLOURS if name in after.by_band]
    figure, panels = make_panels(len(names))
    centres = (np.arange(BANDS) + 0.5) / BANDS
    for panel, name in zip(panels, names, strict=True):
        if before is None:
            panel.bar(centres, _heights(after, name), width=0.08, color=AFTER, label="after training")
        else:
            panel.bar(centres - 0.021, _heights(before, name), width=0.04, color=BEFORE, label="before training")
            panel.bar(centres + 0.021, _heights(after, name), width=0.04, color=AFTER, label="after training")
        panel.set_title(name)
        panel.set_xlim(0, 1)
        panel.set_xticks(np.linspace(0, 1, 6))
        panel.set_xlabel("noise level σ  (0 clean, 1 pure noise)")
        panel.legend(frameon=False)
    if panels:
        panels[0].set_ylabel("held-out velocity error (MSE)")
    return save_figure(figure, path)


def draw_film(path: Path, episode: Episode, title: str = "", frames: int = FILM_FRAMES) -> Path:
    """A film strip of a filmed rollout: pictures that the policy saw, evenly over the episode, with their times."""
    assert episode.frames, "the episode was not filmed"
    shown = np.unique(np.linspace(0, len(episode.frames) - 1, min(frames, len(episode.frames))).round().astype(int))
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.75 * columns, 1.87 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(np.atleast_1d(figure.subplots(rows, columns)).ravel()):
        panel.set_axis_off()
        if place < len(shown):
            panel.imshow(episode.frames[shown[place]], interpolation="nearest")
            panel.set_title(f"{episode.times[shown[place]]:.1f} s", fontsize=9, pad=3)
    figure.suptitle(title or f"seed {episode.seed}: largest coverage {episode.max_coverage:.2f}", fontsize=11)
    return save_figure(figure, path)


def draw_coverage(
    path: Path,
    after: Sequence[Episode],
    before: Sequence[Episode] | None = None,
    still: Sequence[Episode] | None = None,
) -> Path:
    """The largest coverage of every seed, before joined with after, sorted by after; means as dashed lines."""
    order = sorted(range(len(after)), key=lambda place: after[place].max_coverage)
    places = np.arange(len(order))
    figure = Figure(figsize=(max(6.0, 0.22 * len(order) + 2.6), 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    _plain(panel)
    above = [after[place].max_coverage for place in order]
    if before is not None:
        assert [e.seed for e in before] == [e.seed for e in after]
        below = [before[place].max_coverage for place in order]
        panel.vlines(places, below, above, color="#d5dae0", linewidth=2, zorder=1)
        panel.scatter(places, below, s=26, color=BEFORE, zorder=2, label=f"before, mean {mean_coverage(before):.2f}")
        panel.axhline(mean_coverage(before), color=BEFORE, linestyle="--", linewidth=1)
    panel.scatter(places, above, s=34, color=AFTER, zorder=3, label=f"after, mean {mean_coverage(after):.2f}")
    panel.axhline(mean_coverage(after), color=AFTER, linestyle="--", linewidth=1)
    if still is not None:
        value = mean_coverage(still)
        panel.axhline(value, color=BASELINE, linestyle=":", linewidth=1.4, label=f"standing still, mean {value:.2f}")
    panel.set_ylim(-0.02, 1.02)
    panel.set_xlim(-0.7, len(order) - 0.3)
    panel.set_xticks(places, [str(after[place].seed) for place in order], rotation=90, fontsize=7)
    panel.set_xlabel("episode seed, sorted by coverage after training")
    panel.set_ylabel("largest coverage of the goal")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return save_figure(figure, path)


# ------------------------------------------------------------------------------------------------ details


def make_panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels side by side, in the look of all."""
    figure = Figure(figsize=(4.2 * max(1, count) + 0.4, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    if count == 0:
        return figure, []
    panels = list(np.atleast_1d(figure.subplots(1, count)).ravel())
    for panel in panels:
        _plain(panel)
    return figure, panels


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e6e9ed", linewidth=0.8)
    panel.set_axisbelow(True)


def _heights(loss: HeldoutLoss, name: str) -> list[float]:
    return [np.nan if value is None else value for value in loss.by_band[name]]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, the folders above it made first; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # without a version, the same data give the same file
    return path
