"""Where a prepared folder may be made, and what it is known by."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cosmos3_train.config import UserError

CARD_FILE = "card.json"
ROWS = ("windows-*.parquet", "conversations.parquet")


def is_prepared(folder: Path) -> bool:
    """Whether `cosmos3 prepare` has made a folder, or works in it."""
    if (folder / "fingerprint").is_file() and (folder / "blocks").is_dir():
        return True
    card = _card(folder)
    return isinstance(card, dict) and (
        {"made_of", "counted"} <= card.keys() or {"settings", "fingerprint"} <= card.keys()
    )


def check_output(output: Path, source: Path) -> None:
    """Refuse what `--fresh` would throw away, or rows would be written among.

    Raises:
        UserError: the output is the source or a folder around it, a file, or a folder that holds other things.
    """
    place, log = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if place == log or place in log.parents:
        raise UserError(f"{output}: holds the set itself; name another folder to prepare it in")
    if not os.path.lexists(output):
        return
    try:
        ours = output.is_dir() and (is_prepared(output) or _is_damaged(output) or not any(output.iterdir()))
    except OSError as error:
        raise UserError(f"{output}: cannot be looked into ({error.strerror}); choose another output") from None
    if not ours:
        raise UserError(f"{output}: exists and is not a prepared folder; choose another output")


def is_work_folder(work: Path) -> bool:
    """Whether a folder beside a prepared one holds what `cosmos3 prepare` has begun, or nothing."""
    if work.is_symlink() or not work.is_dir():
        return False
    # Killed before it was marked, or while it was thrown away, it has no more than these.
    begun = ("fingerprint", "finished", "blocks", "replaced")
    return (work / "fingerprint").is_file() or all(path.name.startswith(begun) for path in work.iterdir())


def _is_damaged(folder: Path) -> bool:
    """Whether it is a prepared folder whose card has become unreadable; one that can be read says whose it is."""
    unreadable = (folder / CARD_FILE).is_file() and _card(folder) is None
    return unreadable and any(any(folder.glob(rows)) for rows in ROWS)


def _card(folder: Path) -> Any:
    """What a folder's card holds, None where it is no JSON or not there."""
    try:
        return json.loads((folder / CARD_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
