"""Where the rows of a conversation set lie, in four layouts: JSON lines, Parquet files, CSV tables that a mapping of
the dataset card puts into words, and VideoPhy-2's folders.

talk.jsonl                                     a conversation a line
**/*.parquet                                   a conversation a row, its pictures' bytes in a column
*.csv                                          a row, of which the mapping makes a conversation (`talk_tables`)
[videophy2_train/]meta.json                    [{id, media, conversation}, …]; absent paths are media/video_ID.mp4
[videophy2_train/]text/conversation_ID.json    and text/conversation_ID.json. A folder whose name ends in _val is
[videophy2_train/]media/video_ID.mp4           held out whole
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.kept import KeptFiles
from cosmos3_train.data.names import check_source
from cosmos3_train.data.output import is_prepared
from cosmos3_train.data.sources.talk_source import TalkSource, numbered
from cosmos3_train.data.sources.talk_tables import CSV, open_tables
from cosmos3_train.data.talk import NoTalk

COLUMNS = ("messages", "conversations", "image", "images", "video", "videos")
"""Of a Parquet file, that are read."""
VALIDATION = "_val"
PAGE = 1 << 20
"""Bytes of a column that are read at a time: without it, all that a row group has of it."""
TAIL = 1 << 16
"""Bytes at a Parquet file's end, which say where everything in it is, that count for a set's fingerprint."""


class JsonLines(TalkSource):
    """One file of them."""

    strict = True

    def places(self, file: str) -> np.ndarray:
        found, offset = [], 0
        with (self.root / file).open("rb") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    found.append((number, offset))
                offset += len(line)
        return np.asarray(found, dtype=np.int64).reshape(-1, 2)

    def rows(self, file: str, places: Sequence[int]) -> Iterator[Any]:
        with (self.root / file).open("rb") as lines:
            for place in places:
                lines.seek(place)
                yield _json(lines.readline())

    def called(self, file: str, number: int) -> str:
        return f"line_{number + 1:06d}"

    def where(self, file: str, number: int) -> str:
        return f"{self.root / file}, line {number + 1}"


class ParquetRows(TalkSource):
    """Files of them, such as LLaVA-OneVision's. Of a row group only the pages before a row are read."""

    def places(self, file: str) -> np.ndarray:
        return numbered(_parquet(self.root / file).metadata.num_rows)

    def rows(self, file: str, places: Sequence[int]) -> Iterator[Any]:
        path, wanted = self.root / file, list(places)
        opened, start = _parquet(path), 0
        names = [name for name in opened.schema_arrow.names if name in COLUMNS]
        if not {"messages", "conversations"} & set(names):
            near = nearest("conversations", opened.schema_arrow.names)
            raise UserError(f"{path}: no column 'messages' or 'conversations'.{near}")
        for group in range(opened.metadata.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            here = [place - start for place in wanted if start <= place < start + count]
            yield from _of_group(path, opened, group, names, here)
            start += count

    def _add(self, digest: Any, path: Path) -> None:
        with path.open("rb") as content:
            size = path.stat().st_size
            content.seek(max(0, size - TAIL))
            digest.update(str(size).encode() + content.read())


class VideoPhy(TalkSource):
    """meta.json with the conversation of each entry in a file of its own."""

    def places(self, file: str) -> np.ndarray:
        return numbered(len(_meta(self.root / file)))

    def rows(self, file: str, places: Sequence[int]) -> Iterator[Any]:
        path = self.root / file
        entries = _meta(path)
        for place in places:
            yield _joined(path.parent, entries[place])

    def called(self, file: str, number: int) -> str:
        """See `TalkSource.called`: by the entry's id."""
        folder = Path(file).parent.as_posix()
        name = str(_meta(self.root / file)[number].get("id", number))
        return name if folder == "." else f"{folder}/{name}"

    def heldout(self, file: str) -> bool:
        return (self.root / file).absolute().parent.name.endswith(VALIDATION)

    def _add(self, digest: Any, path: Path) -> None:
        super()._add(digest, path)
        for entry in _meta(path):
            try:
                digest.update(hashlib.sha256((path.parent / _text_of(entry)).read_bytes()).digest())
            except (NoTalk, OSError, ValueError):  # as in `_joined`, which says so
                digest.update(b"none")


def open_talks(source: Path, mapping: Mapping[str, Any] | None = None) -> TalkSource:
    """The rows of a set at a file or in a folder, by its layout.

    Args:
        mapping: the dataset card's: what CSV tables say, see `talk_tables.TalkMapping`.

    Raises:
        UserError: there is none, or several .jsonl files, or Parquet files beside, and nothing says which; or tables
            without a mapping, or a mapping without tables.
    """
    _tables.close()  # what was open may have been written anew
    _metas.close()
    check_source(source)
    if source.is_file():
        if source.suffix == CSV:
            return open_tables(source.parent, [source], mapping)
        made = {".jsonl": JsonLines, ".parquet": ParquetRows}.get(source.suffix, JsonLines)
        return made(source.parent, [source])
    if not source.is_dir():
        beside = [other.name for other in source.parent.glob("*.jsonl")] if source.parent.is_dir() else []
        raise UserError(f"{source}: no such file or folder.{nearest(source.name, beside)}")
    metas = [path for pattern in ("meta.json", "*/meta.json") for path in source.glob(pattern) if path.is_file()]
    if metas:
        return VideoPhy(source, metas)
    sheets = sorted(source.glob(f"*{CSV}"))
    if mapping:
        if sheets:
            return open_tables(source, sheets, mapping)
        raise UserError(
            f"{source}: the dataset card has a mapping, which is of CSV tables, and there is no *{CSV} here"
        )
    tables, lines = _tables_of(source), sorted(source.glob("*.jsonl"))
    if tables and lines:
        both = f"{lines[0].name} and {min(tables).relative_to(source)}"
        raise UserError(f"{source}: holds {both}, which are two sets; name one of the files, or move one out")
    if tables:
        return ParquetRows(source, tables)
    if not lines and sheets:
        return open_tables(source, sheets, mapping)  # which says that a mapping is wanted
    if not lines:
        raise UserError(
            f"{source}: holds no rows that are read here (a .jsonl file, **/*.parquet, *.csv, or VideoPhy-2's "
            "meta.json); see the dataset card's layout"
        )
    if len(lines) != 1:
        raise UserError(f"{source}: holds {len(lines)} .jsonl files; name one of them")
    return JsonLines(source, lines)


def _tables_of(source: Path) -> list[Path]:
    """The Parquet files below a folder, but for those of prepared folders in it, of which an index may be one."""
    ours: dict[Path, bool] = {source: False}

    def within(folder: Path) -> bool:
        if folder not in ours:
            ours[folder] = is_prepared(folder) or within(folder.parent)
        return ours[folder]

    return [path for path in source.rglob("*.parquet") if not within(path.parent)]


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return NoTalk(f"not valid JSON ({error})")


def _joined(folder: Path, entry: Mapping[str, Any]) -> Any:
    """A row of VideoPhy-2: its conversation, with the videos that its entry names."""
    name, media = entry.get("id"), entry.get("media")
    try:
        text = _text_of(entry)
    except NoTalk as error:
        return error
    try:
        row = _json((folder / text).read_bytes())
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        return NoTalk(f"{text!r}: cannot be read ({getattr(error, 'strerror', None) or error})")
    if isinstance(media, Mapping):
        media = list(media.values())
    videos = [media] if isinstance(media, str) else media or [f"media/video_{name}.mp4"]
    if isinstance(row, Mapping):
        return {key: row[key] for key in ("messages", "conversations") if key in row} | {"videos": videos}
    return {"messages": row, "videos": videos} if isinstance(row, list) else row


def _text_of(entry: Mapping[str, Any]) -> str:
    """Where an entry's conversation lies in its folder."""
    text = entry.get("conversation") or f"text/conversation_{entry.get('id')}.json"
    if not isinstance(text, str) or Path(text).is_absolute() or ".." in Path(text).parts:
        raise NoTalk(f"its conversation {text!r} is no path inside the set's folder")
    return text


def _meta(path: Path) -> list[dict[str, Any]]:
    return _metas.get(path)


def _read_meta(path: Path, _: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise UserError(f"{path}: a list of mappings with id, media and conversation is expected")
    return content


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return _tables.get(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the Parquet file is missing; fetch it again") from None


def _open_parquet(path: Path, _: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=PAGE)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _of_group(path: Path, opened: pq.ParquetFile, group: int, names: list[str], rows: list[int]) -> Iterator[Any]:
    """Rows of a row group, at rising places in it."""
    if not rows:
        return
    left, before = list(rows), 0
    try:
        for batch in opened.iter_batches(batch_size=16, row_groups=[group], columns=names, use_threads=False):
            here = [row - before for row in left if row < before + batch.num_rows]
            if here:
                yield from batch.take(pa.array(here)).to_pylist()
                left = left[len(here) :]
            if not left:
                return
            before += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    problem = " ".join(str(error).split())[:160]
    return UserError(f"{path}: not a readable Parquet file ({problem}); fetch it again")


_tables = KeptFiles(_open_parquet, lambda opened: opened.close())
_metas = KeptFiles(_read_meta, lambda _: None)
