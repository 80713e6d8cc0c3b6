"""Conversations of CSV tables: a dataset card's mapping puts each row into words, as the ratings of VideoPhy-2."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from omegaconf import MISSING

from cosmos3_train.config import UserError, from_plain, nearest
from cosmos3_train.data.kept import KeptFiles
from cosmos3_train.data.sources.talk_source import TalkSource, numbered
from cosmos3_train.data.talk import NoTalk

CSV = ".csv"
_COLUMN = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class TalkMapping:
    """How a row of a table becomes a conversation of one question.

    user, assistant: what each says, with columns in braces ("{caption}"); `<video>` in the question is where it stands
    video:  column with the address of a video, or its path; None: there is none
    media:  folder inside the set's in which the files lie, those of addresses below their host, as `wget -x` saves them
    """

    user: str = MISSING
    assistant: str = MISSING
    video: str | None = None
    media: str = "."


class CsvRows(TalkSource):
    """Tables with a line of names."""

    def __init__(self, root: Path, files: Sequence[Path], mapping: TalkMapping) -> None:
        super().__init__(root, files)
        self.mapping = mapping

    def places(self, file: str) -> np.ndarray:
        return numbered(len(_tables.get(self.root / file)))

    def rows(self, file: str, places: Sequence[int]) -> Iterator[Any]:
        path = self.root / file
        table = _tables.get(path)
        for place in places:
            try:
                yield self._conversation(path, table[place])
            except NoTalk as error:
                yield error

    def _conversation(self, path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
        def value(column: str) -> str:
            if column not in row:
                near = nearest(column, [name for name in row if name is not None])
                raise UserError(f"{path}: no column {column!r}, which the card's mapping names.{near}")
            if not row[column]:
                raise NoTalk(f"its column {column!r} is empty")
            return row[column]

        said = {
            role: _COLUMN.sub(lambda match: value(match[1]), getattr(self.mapping, role))
            for role in ("user", "assistant")
        }
        made: dict[str, Any] = {"messages": [{"role": role, "content": words} for role, words in said.items()]}
        if self.mapping.video is not None:
            address = urlsplit(value(self.mapping.video))
            made["videos"] = [f"{self.mapping.media}/{address.netloc}/{address.path.lstrip('/')}".replace("//", "/")]
        return made

    def _add(self, digest: Any, path: Path) -> None:
        super()._add(digest, path)
        digest.update(json.dumps(asdict(self.mapping), sort_keys=True).encode())


def open_tables(root: Path, files: Sequence[Path], mapping: Mapping[str, Any] | None) -> CsvRows:
    """CSV files of a set.

    Raises:
        UserError: there is no mapping, or it has an unknown key, or lacks one.
    """
    _tables.close()  # what was open may have been written anew
    if not mapping or not {"user", "assistant"} <= mapping.keys():
        raise UserError(
            f"{files[0]}: a CSV table; say in the dataset card's mapping what its rows ask and answer: "
            "mapping: {user: ..., assistant: ..., video: COLUMN, media: FOLDER}"
        )
    return CsvRows(root, files, from_plain(TalkMapping, mapping, "the dataset card's mapping"))


def _read_table(path: Path, _: str) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines, strict=True))
    except FileNotFoundError:
        raise UserError(f"{path}: the table is missing; fetch it again") from None
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable CSV table ({error}); fetch it again") from None


_tables = KeptFiles(_read_table)
