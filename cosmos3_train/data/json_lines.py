"""Files with a JSON mapping on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cosmos3_train.config import UserError


class JsonLine(NamedTuple):
    """A line that is not empty. where: file and line, for messages;  offset, size: its bytes in the file."""

    where: str
    number: int
    offset: int
    size: int
    row: dict[str, Any]


def read_json_lines(path: Path) -> Iterator[JsonLine]:
    """The lines of a file, in its order; they end at line feeds alone, for words may hold other line breaks.

    Raises:
        UserError: the file is missing, or a line is no JSON mapping; names file and line.
    """
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield JsonLine(where, number, offset, len(line), _mapping(line, where))
                offset += len(line)
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; copy or fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy or fetch it again") from None


def _mapping(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); copy or fetch the file again") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds a {type(row).__name__}; a mapping is expected")
    return row
