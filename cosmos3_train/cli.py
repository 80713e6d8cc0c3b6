"""The command line. It alone, with its commands, chains the floors: new-embodiment, prepare, check, train, evaluate,
export, show, benchmark, plan, replay.

Exit codes: 0 finished, 2 the user's mistake (one line on standard error), 75 interrupted and to be run again, 130
stopped by Ctrl-C or a closed pipe (nothing is said), 1 else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cosmos3_train.commands.console import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    QUIET,
    USER_ERROR,
    first_tells,
    say_error,
)
from cosmos3_train.config import Loaded, UserError, load_experiment
from cosmos3_train.runtime import (
    Interrupted,
    interruptible,
    leave_at_once,
    offline_hub,
    record_failure,
    set_up_logging,
    world_size,
)

BEGAN = time.monotonic()
SCAN_ONLY = ("embodiment", "source", "model", "caption_tokens", "workers")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `cosmos3`."""
    set_up_logging()
    offline_hub()
    try:
        with interruptible():
            with first_tells():
                options = parse(sys.argv[1:] if arguments is None else arguments)
            code = options.command(options)
        sys.stdout.flush()
    except UserError as error:
        record_failure(error, f"error: {error}")
        say_error(error)
        code = USER_ERROR
    except PermissionError as error:  # whatever file it is of, the right to it is the user's to give
        record_failure(error)
        say_error(f"{error.filename or 'a file'}: {error.strerror}; give yourself the right to it, or name another")
        code = USER_ERROR
    except Interrupted:
        code = INTERRUPTED
    except KeyboardInterrupt:
        code = QUIET
    except BrokenPipeError:
        # Whoever read our output is gone; the interpreter's own flush at exit must not complain about it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = QUIET
    except Exception as error:
        record_failure(error)
        if world_size() == 1:
            raise
        traceback.print_exc()
        code = FAILED
    if world_size() > 1 and code not in (FINISHED, INTERRUPTED):
        leave_at_once(code)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """One that tells a wrong line as every other mistake is told."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says what there is")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a line, and its `words`; key=value pairs may stand before and after flags.

    Raises:
        UserError: the line is wrong.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strays = [word for word in rest if word.startswith("-") or ("=" not in word and not _names_experiment(word))]
    if strays or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.words = arguments
    return options


# ------------------------------------------------------------------------------------------------ commands


def _train(options: argparse.Namespace) -> int:
    with first_tells():
        loaded = _load(options)  # before the heavy imports: a misspelt key is told at once
    from cosmos3_train.commands import train

    return train.run(loaded, fresh=options.fresh, began=BEGAN)


def _check(options: argparse.Namespace) -> int:
    if options.scan:
        return _scan(options)
    for name in SCAN_ONLY:
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: goes with --scan alone")
    loaded = _load(options)
    from cosmos3_train.commands import check

    return check.run(loaded)


def _scan(options: argparse.Namespace) -> int:
    if options.overrides:
        raise UserError(f"{options.overrides[0]}: --scan looks at a dataset card, which has no overrides")
    from cosmos3_train.commands import scan

    return scan.run(
        options.experiment,
        options.embodiment,
        options.source,
        model=options.model or "cosmos3_nano",
        caption_tokens=2048 if options.caption_tokens is None else options.caption_tokens,
        threads=(os.cpu_count() or 1) if options.workers is None else options.workers,
    )


def _show(options: argparse.Namespace) -> int:
    from cosmos3_train.commands import show

    return show.run(_load(options))


def _benchmark(options: argparse.Namespace) -> int:
    if options.loader and options.against:
        raise UserError("--loader times no training, so there is nothing to measure it against; leave --against out")
    if options.loader and options.memory is not None:
        raise UserError(f"--loader uses no GPU, so it has no use for --memory {options.memory:g}; leave it out")
    further = _further_experiments(options)
    if further:
        return _benchmark_in_turn(options, further)
    loaded = _load(options)
    from cosmos3_train.commands import benchmark

    if options.loader:
        return benchmark.run_loader(loaded, output=options.output)
    return benchmark.run(loaded, against=options.against, output=options.output, memory_gib=options.memory)


def _benchmark_in_turn(options: argparse.Namespace, further: Sequence[str]) -> int:
    """Each in a process of its own, which takes caps on memory, recorded passes and compiled code with it. The exit
    code is that of the first that fails; the others are measured all the same, unless a signal ended it."""
    several = (options.experiment, *map(Path, further))
    command, *words = (word for word in options.words if Path(word) not in several)
    overrides = [word for word in options.overrides if word not in further]
    lines: dict[str, list[str]] = {}
    for path in several:  # a mistake in the last is told before the first is measured
        name = load_experiment(path, overrides).experiment.name
        if name in lines:
            raise UserError(f"{path}: its name is {name!r}, as that of another before it; measure one at a time")
        lines[name] = [command, str(path), *words]
        if options.output:
            lines[name] += ["--output", str(options.output / name)]  # the last one counts
    failed = FINISHED
    for path, line in zip(several, lines.values(), strict=True):
        with subprocess.Popen([sys.executable, "-m", "cosmos3_train.cli", *line]) as process:
            try:
                code = process.wait()
            except BaseException:  # Interrupted, Ctrl-C
                process.terminate()
                raise
        if code in (INTERRUPTED, QUIET):
            return code
        if code:
            say_error(f"{path}: its benchmark ended with {code}")
            failed = failed or (code if code > 0 else FAILED)
    return failed


def _plan(options: argparse.Namespace) -> int:
    loaded = _load(options)
    from cosmos3_train.commands import plan

    return plan.run(loaded, gpu=options.gpu, gpus=options.gpus)


def _export(options: argparse.Namespace) -> int:
    from cosmos3_train.commands import export

    return export.run(options.run, options.to, options.output)


def _evaluate(options: argparse.Namespace) -> int:
    from cosmos3_train.commands import evaluate

    return evaluate.run(options.run, options.on, options.embodiment, options.episodes)


def _replay(options: argparse.Namespace) -> int:
    from cosmos3_train.commands import replay

    return replay.run(options.run, options.draw)


def _new_embodiment(options: argparse.Namespace) -> int:
    from cosmos3_train.commands import new_embodiment

    return new_embodiment.run(options.log, options.output)


def _prepare(options: argparse.Namespace) -> int:
    from cosmos3_train.commands import prepare

    return prepare.run(
        options.card,
        options.embodiment,
        options.source,
        options.output,
        workers=options.workers,
        stride=options.stride,
        heldout=options.heldout,
        fresh=options.fresh,
        cache=options.cache,
        model=options.model,
        tasks=options.tasks,
        tokens=options.tokens,
    )


def _load(options: argparse.Namespace) -> Loaded:
    for further in _further_experiments(options):
        raise UserError(f"{further}: a second experiment, where one is expected; benchmark alone takes several")
    return load_experiment(options.experiment, options.overrides)


def _further_experiments(options: argparse.Namespace) -> list[str]:
    """Those that stand among the overrides, as where the shell has made several files of a pattern."""
    return [word for word in options.overrides if _names_experiment(word)]


def _names_experiment(word: str) -> bool:
    return "=" not in word and word.endswith((".yaml", ".yml"))


# ------------------------------------------------------------------------------------------------ the line


def _parser() -> argparse.ArgumentParser:
    words = "Post-train Cosmos 3 for one robot; deploy it in diffusers."
    parser = _Parser(prog="cosmos3", description=words)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_experiments(commands)
    _add_results(commands)
    _add_new_embodiment(commands)
    _add_prepare(commands)
    return parser


def _add_experiments(commands: argparse._SubParsersAction) -> None:
    for name, function, words in (
        ("train", _train, "carry out an experiment, or go on with it; export and report its result"),
        ("check", _check, "look for mistakes in config, data, model and disk, in seconds and without a GPU"),
        ("show", _show, "print every resolved value and the layer that set it"),
        ("benchmark", _benchmark, "measure how fast experiments train on this machine"),
        ("plan", _plan, "predict memory and time on a GPU, in seconds and without one"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="a file under experiments/")
        several = "more experiments, each measured in its turn, and " if name == "benchmark" else ""
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="EXPERIMENT|key=value" if several else "key=value",
            help=f"{several}dotted keys, such as training.steps=200",
        )
        command.set_defaults(command=function)
        if name == "train":
            command.add_argument("--fresh", action="store_true", help="throw away the run of that name and start over")
        if name == "check":
            _add_scan(command)
        if name == "benchmark":
            command.add_argument(
                "--against", choices=("stock",), help="also time a loop over stock diffusers and PEFT, at its best"
            )
            command.add_argument(
                "--memory", type=float, metavar="GIB", help="let the run allocate so much of the GPU and no more"
            )
            command.add_argument("--loader", action="store_true", help="time reading and packing alone, without a GPU")
            command.add_argument(
                "--output", type=Path, metavar="DIR", help="folder of the result (runs/NAME; of several DIR/NAME)"
            )
        if name == "plan":
            command.add_argument("--gpu", required=True, metavar="NAME", help="its short name, such as h100-80g")
            command.add_argument("--gpus", type=int, metavar="N", help="of one machine (strategy.devices)")


def _add_scan(check: argparse.ArgumentParser) -> None:
    check.add_argument("--scan", action="store_true", help="EXPERIMENT is a dataset card: read all of its log")
    scan = check.add_argument_group("with --scan")
    scan.add_argument("--embodiment", metavar="NAME", help="embodiment card (the dataset card's)")
    scan.add_argument("--source", type=Path, metavar="DIR", help="the log's folder (the dataset card's)")
    scan.add_argument("--model", metavar="PART", help="whose tokenizer counts (cosmos3_nano)")
    words = "that a prompt may have (2048, as upstream's recipes)"
    scan.add_argument("--caption-tokens", type=int, metavar="N", help=words)
    scan.add_argument("--workers", type=int, metavar="N", help="threads (all cores)")


def _add_results(commands: argparse._SubParsersAction) -> None:
    words = "write the newest checkpoint of a run as an adapter or a merged pipeline, and verify it"
    export = commands.add_parser("export", help=words, description=words)
    export.add_argument("run", metavar="RUN", help="a run's name, or its folder")
    export.add_argument("--to", required=True, choices=("adapter", "merged"), help="form of the result")
    export.add_argument("--output", type=Path, metavar="DIR", help="folder to make (runs/NAME/export/FORM)")
    export.set_defaults(command=_export)
    words = "measure a run or a pipeline folder on a dataset: held-out loss, action error, closed loop"
    evaluate = commands.add_parser("evaluate", help=words, description=words)
    evaluate.add_argument("run", metavar="RUN|FOLDER", help="a run's name or folder, or a pipeline folder")
    evaluate.add_argument("--on", required=True, type=Path, metavar="DATASET_CARD", help="a dataset card")
    evaluate.add_argument("--embodiment", metavar="NAME", help="embodiment card (the dataset card's)")
    evaluate.add_argument(
        "--episodes", type=int, metavar="N", help="closed-loop episodes (the run's, or 20; 0 for none)"
    )
    evaluate.set_defaults(command=_evaluate)
    words = "make the steps again that a run left out, and say which of their samples did it"
    replay = commands.add_parser("replay", help=words, description=words)
    replay.add_argument("run", metavar="RUN", help="a run's name, or its folder")
    replay.add_argument("--draw", type=int, metavar="N", help="one of them, by the number in its file's name (all)")
    replay.set_defaults(command=_replay)


def _add_new_embodiment(commands: argparse._SubParsersAction) -> None:
    words = "draft an embodiment card from a log; what the log cannot show is asked, or marked"
    command = commands.add_parser("new-embodiment", help=words, description=words)
    command.add_argument(
        "--log", required=True, type=Path, metavar="DATASET_CARD|DIR", help="a dataset card, or a LeRobot log's folder"
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="card to write (configs/embodiment/NAME.yaml)")
    command.set_defaults(command=_new_embodiment)


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    words = "turn a robot's log, captioned video or conversations into prepared rows"
    prepare = commands.add_parser("prepare", help=words, description=words)
    prepare.add_argument("card", type=Path, metavar="DATASET_CARD")
    prepare.add_argument("--embodiment", metavar="NAME", help="embodiment card (the dataset card's)")
    prepare.add_argument("--source", type=Path, metavar="DIR", help="the log's folder (the dataset card's)")
    prepare.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    prepare.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    prepare.add_argument("--stride", type=int, metavar="N", help="frames between window starts (1; a video card's own)")
    prepare.add_argument(
        "--heldout", type=float, default=0.05, metavar="FRACTION", help="share of episodes that never trains (0.05)"
    )
    prepare.add_argument("--fresh", action="store_true", help="replace a folder that was prepared otherwise")
    prepare.add_argument(
        "--cache",
        type=_listed,
        default=[],
        metavar="KIND[,KIND]",
        help="latents: also encode every window, once; reasoner: also keep every prompt's keys and values",
    )
    prepare.add_argument("--model", metavar="PART", help="whose tokenizers, or tower: a file under configs/model/")
    prepare.add_argument(
        "--tasks",
        type=_listed,
        metavar="TASK[,TASK]",
        help="whose prompts and sound are kept (policy; of video, the card's)",
    )
    words = "that a conversation may have, as --model counts them (training.tokens_per_micro_batch's default)"
    prepare.add_argument("--tokens", type=int, metavar="N", help=words)
    prepare.set_defaults(command=_prepare)


def _listed(words: str) -> list[str]:
    return [word for word in words.split(",") if word]


if __name__ == "__main__":
    main()
