"""cosmos3 new-embodiment --log LOG: a first draft of an embodiment card, with what a log cannot show left open."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cosmos3_train.commands.console import FINISHED, say
from cosmos3_train.config import UserError, free_domain, project_root, read_yaml


def run(log: Path, output: Path | None) -> int:
    """Draft the card. Asks on a terminal; elsewhere what would be asked is marked in the file, and told.

    Args:
        log: a dataset card, or the folder of a LeRobot log.
        output: file to write; None makes configs/embodiment/NAME.yaml, NAME being the dataset's.

    Raises:
        UserError: the file exists, no domain is free, or the log cannot be read.
    """
    from cosmos3_train.data.card import DatasetCard, load_card  # the data floor brings pyarrow and torch
    from cosmos3_train.data.draft import draft
    from cosmos3_train.data.files import write_whole
    from cosmos3_train.data.sources import OPENERS, open_log
    from cosmos3_train.data.sources.lerobot import READ_BY
    from cosmos3_train.model.domains import REGISTERED

    root = project_root(log)
    if log.is_dir():
        form = READ_BY.get(_major_version(log), "lerobot_v3")  # whose reader says what is wrong with any other folder
        card, source = DatasetCard(name=_word(log.resolve().name), format=form), log
    else:
        card = load_card(log)
        source = card.source_folder(root)
    if card.format not in OPENERS:
        raise UserError(f"{log}: format {card.format!r} is no robot's log; those are {', '.join(OPENERS)}")
    name = _word(card.name) if output is None else output.stem
    output = root / "configs" / "embodiment" / f"{name}.yaml" if output is None else output
    if output.exists():
        raise UserError(f"{output}: there is a file already; give --output FILE, or delete it")
    cards = (root / "configs" / "embodiment").glob("*.yaml")
    known = [read_yaml(path).get("domain_id") for path in cards]
    domain = free_domain([*REGISTERED.values(), *(number for number in known if isinstance(number, int))])
    if domain is None:
        raise UserError("no domain is free; give two of your robots one slot (shares_domain), or remove a card")
    made = draft(open_log(card, source), name, domain, _ask)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, made.text.encode())
    say(f"{output}: drafted")
    for words in made.open:
        say(f"  to fill in: {words}")
    shown = log if log.suffix else "DATASET_CARD"
    say(f"then: cosmos3 prepare {shown} --embodiment {output} --output prepared/{name}")
    return FINISHED


def _ask(question: str, answers: Sequence[str]) -> str:
    """An answer from the terminal; "" where there is none, or nothing was typed."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return ""
    choices = f" ({', '.join(answers)})" if answers else ""
    while True:
        answer = input(f"{question}{choices}, Enter to leave it open: ").strip()
        if not answer or not answers or answer in answers:
            return answer


def _major_version(log: Path) -> str:
    try:
        version = json.loads((log / "meta" / "info.json").read_text(encoding="utf-8"))["codebase_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(version).lstrip("v").partition(".")[0]


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
