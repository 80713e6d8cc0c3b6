"""What a run shows and writes while it goes: the progress bar, metrics.csv, Weights & Biases, status.json."""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from cosmos3_train.config import Experiment, UserError, first_line, to_plain
from cosmos3_train.data.files import write_whole
from cosmos3_train.training.disk import told_in_one_line

State = Literal["running", "interrupted", "finished", "failed"]

WANDB_ID = "wandb_id"
SKIPPED = "skipped"
"""The metric that a step leaves which was left out: how many were, so far."""


class Metrics:
    """Numbers by step, appended to `metrics.csv` as rows (step, metric, value), and to W&B where asked.

    Args:
        resumed_at: rows of later steps are dropped, for those steps are made again.
        skipped: steps that were left out up to there, which are not left out again: their rows stay.
    """

    def __init__(self, folder: Path, experiment: Experiment, resumed_at: int, skipped: int = 0) -> None:
        self.path = folder / "metrics.csv"
        with told_in_one_line(f"{self.path}:"):
            self._kept = _keep_rows_until(self.path, resumed_at, skipped)
        self._wandb = _start_wandb(folder, experiment) if experiment.logging.wandb else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step: all of them in one write, which a kill does not cut.

        Raises:
            UserError: the disk is full, or the folder gone.
        """
        with told_in_one_line(f"{self.path}:"), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows((step, name, repr(float(value))) for name, value in values.items())
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def has(self, step: int, name: str) -> bool:
        """Whether the metric of a step was there when the run was resumed."""
        return (step, name) in self._kept

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


class Bar:
    """Loss, rates and time left, on one line."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self._bar = tqdm(total=steps, initial=done, desc="train", unit="step", disable=not shown, dynamic_ncols=True)

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def show(self, losses: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Show the losses, and of the rates (`throughput.RATES`) those that are there."""
        shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        words = {
            "tokens_per_second": "{:,.0f} tokens/s",
            "samples_per_second": "{:.3g} samples/s",
            "mfu": "MFU {:.1%}",
            "peak_memory_gib": "{:.1f} GiB",
            "data_wait_share": "waits for data {:.0%}",
        }
        self._bar.set_postfix_str(
            " | ".join([f"loss {shown}", *(text.format(rates[name]) for name, text in words.items() if name in rates)])
        )

    def close(self) -> None:
        self._bar.close()


def write_status(folder: Path, state: State, step: int, steps: int, reason: str = "") -> None:
    """Replace `status.json`, which a batch script reads to know whether to start the run again."""
    content = {"state": state, "step": step, "steps": steps}
    if reason:
        content["reason"] = reason
    beside = folder / ".status.json.partial"
    with told_in_one_line(f"{folder / 'status.json'}:"):
        beside.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(beside, folder / "status.json")  # noqa: PTH105


def tell_failed(folder: Path, step: int, steps: int, error: Exception) -> None:
    """The same of a run that an error ends, unless the disk or the folder is what the error is about."""
    with suppress(UserError):
        write_status(folder, "failed", step, steps, first_line(error))


def read_status(folder: Path) -> dict | None:
    """What `status.json` says, None where there is no run yet."""
    path = folder / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _keep_rows_until(path: Path, step: int, skipped: int) -> set[tuple[int, str]]:
    """Drop rows of steps that a resumed run will make again; returns what is left, by step and metric."""

    def stays(row: list[str]) -> bool:
        # A step that was left out is told with the step that it was on the way to, and counts all so far.
        return int(row[0]) <= step or (row[1] == SKIPPED and float(row[2]) <= skipped)

    rows: list[list[str]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and stays(row)]
    beside = path.with_suffix(".partial")
    with beside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "metric", "value"), *rows])
    beside.replace(path)
    return {(int(row[0]), row[1]) for row in rows}


def _start_wandb(folder: Path, experiment: Experiment) -> Any:
    """W&B's run of this folder, gone on with where it is there already.

    Raises:
        UserError: W&B does not start: no key, no network.
    """
    import wandb

    try:
        return wandb.init(
            project=experiment.logging.project,
            name=experiment.name,
            id=_wandb_id(folder),
            resume="allow",
            dir=folder,
            mode="offline" if experiment.logging.offline else None,  # None: as W&B's own settings say
            config=to_plain(experiment),
            # It would copy what is printed and the address of the repository, either of which may hold a secret.
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
    except wandb.Error as error:
        raise UserError(
            f"logging.wandb is true, but W&B did not start ({' '.join(str(error).split())}); run 'wandb login', or set "
            f"logging.offline=true and send the files later with 'wandb sync'"
        ) from error


def _wandb_id(folder: Path) -> str:
    """An id of the run in this folder alone, the same after every interruption. A name would meet another's run."""
    path = folder / WANDB_ID
    if not path.is_file():
        with told_in_one_line(f"{path}:"):
            write_whole(path, f"{secrets.token_hex(8)}\n".encode())
    return path.read_text(encoding="utf-8").strip()
