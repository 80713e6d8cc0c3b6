"""cosmos3 benchmark EXPERIMENT: how fast it trains on this machine, as a table, a JSON file and a Markdown file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cosmos3_train.commands.console import FAILED, FINISHED, INTERRUPTED, say, say_error, say_table
from cosmos3_train.config import Loaded, UserError

if TYPE_CHECKING:
    from cosmos3_train.training.benchmark import Rate, Result

UNITS = {"a_second": "windows/s", "a_core": "of a core"}
NUMBERS, TABLE, LOADER = "benchmark.json", "benchmark.md", "loader.json"

HEAD = (
    "way",
    "steps",
    "s/step",
    "samples/s",
    "tokens/s",
    "MFU",
    "peak GiB",
    "waits for data",
    "warm-up s",
    "× bare step",
    "× stock",
)


def run(
    loaded: Loaded, *, against: Literal["stock"] | None, output: Path | None, memory_gib: float | None = None
) -> int:
    """Measure, print, write.

    Args:
        memory_gib: what the run may allocate on the GPU; None takes all of it.
        output: folder of the two files; None takes the run's.

    Raises:
        UserError: the experiment is no benchmark, or the output cannot be a folder.
    """
    from cosmos3_train.data.files import write_whole
    from cosmos3_train.training.benchmark import measure
    from cosmos3_train.training.run import TrainingFailed, quieten_lightning

    folder = _folder(loaded, output)

    def write(result: Result) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / NUMBERS, (json.dumps(result.plain(), indent=2) + "\n").encode())
        write_whole(folder / TABLE, markdown(result).encode())

    def write_before_stock(result: Result) -> None:
        write(result)
        say(f"written to {folder / TABLE}; stock diffusers and PEFT are timed next")

    quieten_lightning()
    try:
        result = measure(loaded, against, memory_gib, write_before_stock)
    except TrainingFailed as error:
        say_error(error)
        return FAILED
    if result is None:
        return INTERRUPTED
    write(result)
    say()
    for line in about(result):
        say(line)
    say_table(table(result.rates))
    say(f"written to {folder / TABLE} and {folder / NUMBERS}")
    return FINISHED


def run_loader(loaded: Loaded, *, output: Path | None) -> int:
    """Measure the loader alone, print, write.

    Args:
        output: folder of the file; None takes the run's.

    Raises:
        UserError: the experiment is no benchmark, or the output cannot be a folder.
    """
    from cosmos3_train.data.files import write_whole
    from cosmos3_train.training.loader_benchmark import measure_loader

    folder = _folder(loaded, output)
    rates = measure_loader(loaded)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / LOADER, (json.dumps([rate.plain() for rate in rates], indent=2) + "\n").encode())
    say(f"{loaded.experiment.name}: one process of the loader, {os.cpu_count()} cores in this machine")
    lines = [("way", "windows", "windows/s", "windows/s of a core", "wanted", "reached")]
    for rate in rates:
        wanted = "–" if rate.wanted is None else f"{rate.wanted:g} {UNITS[rate.by]}"
        numbers = (f"{rate.windows:,}", f"{rate.a_second:.1f}", f"{rate.a_core:.1f}")
        lines.append((rate.way, *numbers, wanted, {None: "–", True: "yes", False: "no"}[rate.enough]))
    say_table(lines)
    say(f"written to {folder / LOADER}")
    return FINISHED


def _folder(loaded: Loaded, output: Path | None) -> Path:
    """Where the result goes: the run's folder, or a given one, which is made before minutes are spent."""
    if output is None:
        return loaded.run_folder
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror}); choose another folder") from None
    if not os.access(output, os.W_OK):
        raise UserError(f"--output {output}: nothing may be written there; choose another folder")
    return output


def about(result: Result) -> list[str]:
    """What was measured, on what, in words."""
    compiled = f"compiled by {result.compiler}" if result.compiler else "not compiled"
    compiled += ", passes launched as one" if result.launched_as_one else ""
    found = [
        f"{result.workload}: {result.gpu}, torch {result.torch}{_capped(result)}",
        f"a step: {result.samples} samples, {result.generation_tokens:,} generation and {result.text_tokens:,} text "
        f"tokens, {result.flops / 1e12:.4g} TFLOP that it must do, by which MFU counts",
        f"cosmos3 train: attention {result.attention}, layers {compiled}, {result.recomputed}, "
        f"frozen weights {result.frozen}",
    ]
    if result.reasoner_cached:
        found.append(
            f"the understanding tower's keys and values are cached: {result.done_flops / 1e12:.4g} TFLOP of a step are "
            "done (cache_reasoner=false of the dataset measures the whole run without)"
        )
    if result.stock_tried:
        tried = "; ".join(f"{way} {rate:.3g}" for way, rate in result.stock_tried.items())
        found.append(f"diffusers + PEFT, samples/s by a few samples: {tried}")
    return found


def _capped(result: Result) -> str:
    return "" if result.memory_gib is None else f", of its memory {result.memory_gib:g} GiB"


def table(rates: Sequence[Rate]) -> list[tuple[str, ...]]:
    """The head and a line for each way, as words."""
    return [HEAD, *(_line(rate) for rate in rates)]


def markdown(result: Result) -> str:
    """The same as a Markdown file."""
    head, *lines = table(result.rates)
    rows = [head, ("---",) * len(head), *lines]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    words = "\n".join(f"- {line}" for line in about(result))
    return f"# {result.workload}\n\n{words}\n\n{text}\n"


def _line(rate: Rate) -> tuple[str, ...]:
    return (
        rate.way,
        str(rate.steps),
        f"{rate.step_seconds:.4g}",
        f"{rate.samples_per_second:.3g}",
        f"{rate.tokens_per_second:,.0f}",
        _number(rate.mfu, ".1%"),
        _number(rate.peak_memory_gib, ".1f"),
        _number(rate.data_wait_share, ".1%"),
        _number(rate.warm_up_seconds, ".1f"),
        _number(rate.to_bare, ".3f"),
        _number(rate.to_stock, ".2f"),
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
