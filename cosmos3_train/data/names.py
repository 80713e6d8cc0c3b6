"""Names and words as files hold them, before anything is done with them: sources, shell patterns, Unicode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos3_train.config import UserError


def check_source(source: Path) -> None:
    """Raise `UserError` for a name that no file can have, or that may not be looked at."""
    try:
        source.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"source {str(source)!r}: cannot be looked at ({reason}); name another") from None


def files_below(root: Path, pattern: Any, key: str) -> list[Path]:
    """What fits a shell pattern of a dataset card below its source, sorted.

    Raises:
        UserError: it is no pattern, or leads out of the source.
    """
    try:
        if ".." in Path(pattern).parts:
            raise ValueError("leads out of the source")
        return sorted(root.glob(pattern))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"mapping.{key} is {pattern!r}, no pattern of files below the source ({error})") from None


def encodes(words: str) -> bool:
    """Whether words are Unicode: JSON may hold half a surrogate pair, and a file's name any bytes, which no tokenizer,
    table or terminal takes."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True
