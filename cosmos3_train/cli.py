"""The command line. It alone chains the floors: prepare, train, evaluate, export, check, show.

Exit codes: 0 finished, 2 the user's mistake (one line on standard error), 75 interrupted and to be run again, 1 else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cosmos3_train.config import Loaded, UserError, flatten, load_experiment, to_plain
from cosmos3_train.runtime import offline_hub, set_up_logging

INTERRUPTED = 75
"""BSD's 'temporary failure, try again', which batch systems read as a request to run the command again."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `cosmos3`."""
    set_up_logging()
    offline_hub()
    options = _parser().parse_args(arguments)
    try:
        code = options.command(options)
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        code = 2
    sys.exit(code)


def say(text: str, to=None) -> None:
    """A line for the user, on standard output unless told otherwise."""
    print(text, file=to or sys.stdout, flush=True)


def train(options: argparse.Namespace) -> int:
    """cosmos3 train EXPERIMENT [key=value ...]"""
    loaded = _load(options)  # before the heavy imports: a misspelt key is told at once
    from cosmos3_train.training.run import TrainingFailed
    from cosmos3_train.training.run import train as carry_out

    try:
        ended = carry_out(loaded, fresh=options.fresh)
    except TrainingFailed as error:
        say(f"error: {error}", sys.stderr)
        return 1
    return INTERRUPTED if ended == "interrupted" else 0


def show(options: argparse.Namespace) -> int:
    """cosmos3 show EXPERIMENT [key=value ...]: every resolved value and the layer that set it."""
    loaded = _load(options)
    values = flatten(to_plain(loaded.experiment))
    width = min(56, max(len(key) for key in values))
    for key, value in values.items():
        say(f"{key:<{width}}  {value!s:<28}  # {loaded.origin.get(key, 'schema')}")
    return 0


def _load(options: argparse.Namespace) -> Loaded:
    return load_experiment(options.experiment, options.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cosmos3", description="Post-train Cosmos 3 for one robot; deploy it in diffusers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, words in (
        ("train", train, "carry out an experiment, or go on with it"),
        ("show", show, "print every resolved value and the layer that set it"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="a file under experiments/")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="dotted keys, such as training.steps=200"
        )
        command.set_defaults(command=function)
        if name == "train":
            command.add_argument("--fresh", action="store_true", help="throw away the run of that name and start over")
    return parser


if __name__ == "__main__":
    main()
