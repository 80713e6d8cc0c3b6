"""cosmos3 prepare DATASET_CARD: a log becomes prepared rows, once; with --cache what a model makes of them is kept too:
latents of its windows, keys and values of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos3_train.commands.console import FINISHED, say
from cosmos3_train.config import (
    Clips,
    Embodiment,
    Model,
    Strategy,
    Training,
    UserError,
    find_part,
    from_plain,
    load_embodiment,
    nearest,
    place_model,
    project_root,
    read_yaml,
)

if TYPE_CHECKING:
    from cosmos3_train.data.card import DatasetCard
    from cosmos3_train.data.prepare import PreparedSummary
    from cosmos3_train.model.sight import Counter

CACHES = ("latents", "reasoner")


def run(
    card_path: Path,
    embodiment: str | None,
    source: Path | None,
    output: Path,
    *,
    workers: int,
    stride: int | None,
    heldout: float,
    fresh: bool,
    cache: Sequence[str],
    model: str | None,
    tasks: Sequence[str] | None,
    tokens: int | None,
) -> int:
    """Prepare, and say what came of it.

    Args:
        embodiment: name or file of the embodiment card; None takes the dataset card's.
        source: the log's folder; None takes the dataset card's.
        stride: frames between window starts; None takes 1, and for video without a robot the dataset card's.
        cache: "latents" also encodes every window with the video tokenizer of `model`, a part's name or a file;
            "reasoner" runs its understanding tower on every distinct prompt.
        tasks: whose prompts these are, and whether sound is encoded too; None takes policy, and for video without a
            robot the dataset card's. A run with others adds theirs.
        tokens: that a conversation may have, as `model` counts them; None takes a run's default.

    Raises:
        UserError: the log, a card or the disk does not allow it.
    """
    from cosmos3_train.data.card import load_card  # the data floor brings pyarrow and torch
    from cosmos3_train.data.files import exclusive
    from cosmos3_train.data.prepare import prepare
    from cosmos3_train.data.statistics import FILE as STATISTICS_FILE
    from cosmos3_train.flow.tasks import sound_task

    card = load_card(card_path)
    root = project_root(card_path)
    if card.format == "conversations":
        _refuse_logs_options(embodiment=embodiment, stride=stride, cache=cache or None, tasks=tasks)
        return _prepare_talks(
            card, source or card.source_folder(root), output, model, root, workers, heldout, tokens, fresh=fresh
        )
    _check_caches(cache, model)
    if tokens is not None:
        raise UserError(f"--tokens {tokens}: {card.format} has no conversations; leave it out")
    contract = read_contract(card_path, card, embodiment, root)
    if isinstance(contract, Clips) and stride is not None:
        contract = replace(contract, stride=stride)
    tasks = tasks or (card.tasks if card.shows_clips else ["policy"])
    _check_tasks(tasks, robot=not card.shows_clips)
    part = None if model is None else read_model(model, root)
    with exclusive(output):
        summary = prepare(
            card,
            contract,
            source if source is not None else card.source_folder(root),
            output,
            window_stride=1 if stride is None else stride,
            heldout_fraction=heldout,
            workers=workers,
            fresh=fresh,
        )
    state = "was prepared already" if summary.reused else f"prepared in {summary.seconds:.1f} s"
    say(f"{summary.folder}: {state}")
    unit = "clips" if card.shows_clips else "episodes"
    for split, windows in summary.windows.items():
        say(f"  {split}: {windows:,} windows of {summary.episodes[split]:,} {unit}")
    for reason, count in summary.dropped.items():
        if count:
            example = f", such as {summary.examples[reason]}" if reason in summary.examples else ""
            say(f"  left out: {count:,} × {reason}{example}")
    _say_sound(summary)
    if not card.shows_clips:
        say(f"  statistics of the normalised actions: {summary.folder / STATISTICS_FILE}, drawn in statistics.png")
    if part is not None and "latents" in cache:
        heard = sound_task(dict.fromkeys(tasks, 1.0))
        with exclusive(output):
            _cache_latents(output, contract, part, source, workers, heard)
        say(f"  latents of {part.path}: {output / 'caches' / 'latents'}")
        if heard is not None:
            say(f"  latents of sound: {output / 'caches' / 'sound'}")
    if part is not None and "reasoner" in cache:
        with exclusive(output):
            count = _cache_reasoner(output, contract, part, tasks)
        say(f"  keys and values of {count:,} prompts by {part.path}: {output / 'caches' / 'reasoner'}")
    return FINISHED


def _refuse_logs_options(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            given_as = ",".join(value) if isinstance(value, list) else value
            raise UserError(f"--{name} {given_as}: conversations have none; leave it out")


def _prepare_talks(
    card: DatasetCard, source: Path, output: Path, model: str | None, root: Path, workers: int, heldout: float,
    tokens: int | None, *, fresh: bool,
) -> int:  # fmt: skip
    """Index a set of conversations; with a model, count their tokens."""
    from cosmos3_train.data.conversations import open_conversations
    from cosmos3_train.data.files import exclusive

    for name, value, least in (("workers", workers, 1), ("tokens", tokens, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it is at least {least}")
    if not 0 <= heldout < 1:
        raise UserError(f"--heldout is {heldout}; it is a share from 0 to below 1")
    if tokens is not None and model is None:
        raise UserError(f"--tokens {tokens} needs --model PART, such as --model cosmos3_nano, whose tokens they are")
    budget = tokens or Training().tokens_per_micro_batch
    counter = None if model is None else _counter(card, read_model(model, root))
    with exclusive(output):
        dataset = open_conversations(
            card, source, output, heldout_fraction=heldout, measure=counter, most_tokens=budget, workers=workers,
            progress=True, fresh=fresh,
        )  # fmt: skip
    if counter is not None and dataset.shows_pictures:
        counter.needed()
    say(f"{output}: {'was prepared already' if dataset.index.reused else 'prepared'}")
    for split in ("train", "heldout"):
        say(f"  {split}: {dataset.count(split):,} conversations")
    for reason, count in dataset.index.dropped.items():
        say(f"  left out: {count:,} × {reason}, such as {dataset.index.examples[reason]}")
    if dataset.left_out:
        say(f"  left out: {dataset.left_out:,} × more than {budget:,} tokens")
    if dataset.index.counted:
        say(f"  the longest has {dataset.index.column('tokens').max():,} tokens")
    else:
        say("  tokens were not counted; --model PART counts them, and so does a run")
    return FINISHED


def _counter(card: DatasetCard, model: Model) -> Counter:
    import torch

    from cosmos3_train.model.loading import load_parts
    from cosmos3_train.model.sight import Counter

    return Counter.of(model, load_parts(model, torch.device("cpu"), vae_weights=False), f"dataset {card.name!r}")


def _say_sound(summary: PreparedSummary) -> None:
    """How many windows have sound, and why the others have none."""
    for split, windows in summary.sounding.items():
        say(f"  sound: {windows:,} of {summary.windows[split]:,} windows ({split})")
    for reason, count in summary.silent.items():
        say(f"  sound: {count:,} × {reason}, such as {summary.examples[reason]}")


def _check_tasks(tasks: Sequence[str], *, robot: bool) -> None:
    from cosmos3_train.flow.tasks import TASKS

    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: {task!r} is not a task.{nearest(task, TASKS)}")
        if TASKS[task].has_robot and not robot:
            raise UserError(f"--tasks: {task!r} needs a robot's actions, which this dataset does not have")
        if TASKS[task].sound != "absent" and robot:
            raise UserError(f"--tasks: {task!r} needs sound, which is not read from a robot's log")


def _check_caches(cache: Sequence[str], model: str | None) -> None:
    for kind in cache:
        if kind not in CACHES:
            raise UserError(f"--cache: {kind!r} is unknown.{nearest(kind, CACHES)}")
    if cache and model is None:
        raise UserError(
            f"--cache {','.join(cache)} needs --model PART, such as --model cosmos3_nano (a file in configs/model/)"
        )


def read_contract(card_path: Path, card: DatasetCard, embodiment: str | None, root: Path) -> Embodiment | Clips:
    """What a dataset's rows are cut by: an embodiment card, by name (None takes the dataset card's), or the dataset
    card's own words for video without a robot.

    Raises:
        UserError: a robot's log without a name, or video with one.
    """
    if card.shows_clips:
        if embodiment is not None:
            raise UserError(f"--embodiment {embodiment}: {card.format} has no robot; leave it out")
        return card.clips()
    name = embodiment or card.embodiment
    if name is None:
        raise UserError(f"{card_path}: the dataset card names no embodiment; give --embodiment NAME")
    return load_embodiment(name, root)


def read_model(name_or_path: str, root: Path) -> Model:
    """A model part, by name (configs/model/NAME.yaml) or by path, placed in the project."""
    path = Path(name_or_path)
    path = path if path.suffix in (".yaml", ".yml") else find_part(root, "model", name_or_path)
    return place_model(from_plain(Model, read_yaml(path), str(path)), root)


def _cards(contract: Embodiment | Clips) -> dict[str, Embodiment]:
    return {contract.name: contract} if isinstance(contract, Embodiment) else {}


def _cache_latents(
    folder: Path, contract: Embodiment | Clips, model: Model, source: Path | None, workers: int, heard: str | None
) -> None:
    from cosmos3_train.data.reader import PreparedDataset
    from cosmos3_train.model.caches import ensure_latents
    from cosmos3_train.model.encoders import Encoder
    from cosmos3_train.model.loading import load_parts
    from cosmos3_train.model.sound import add_sound_tokenizer
    from cosmos3_train.training.strategy import device_for

    device = device_for(Strategy())
    encoder = Encoder(load_parts(model, device), _cards(contract))
    add_sound_tokenizer(encoder.parts, model, device, heard)
    robot = contract if isinstance(contract, Embodiment) else None
    dataset = PreparedDataset(folder, robot, source, encoder.sound_form)
    ensure_latents(dataset, encoder, workers, sound=heard is not None)


def _cache_reasoner(folder: Path, contract: Embodiment | Clips, model: Model, tasks: Sequence[str]) -> int:
    """How many prompts there are."""
    import torch

    from cosmos3_train.model.encoders import Encoder
    from cosmos3_train.model.loading import load_parts
    from cosmos3_train.model.reasoner_cache import Reasoner, ensure_reasoner, prompts_of
    from cosmos3_train.training.strategy import device_for

    encoder = Encoder(load_parts(model, torch.device("cpu"), vae_weights=False), _cards(contract))
    prompts = prompts_of(folder, contract, tasks, encoder)
    ensure_reasoner(folder, prompts, Reasoner(model, device_for(Strategy())))
    return len(prompts)
