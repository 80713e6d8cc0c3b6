"""The index of a conversation set: which rows can be used, what each is made of, how many tokens it has.

Made in blocks by several processes, the same bytes for any number of them, and kept in the prepared folder: what is
killed goes on where it was. It is of the source's bytes, and of the pictures that rows were left out for: of others, or
where the file of one of these has come or changed since, it is made anew.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from cosmos3_train.config import UserError, to_plain
from cosmos3_train.data.blocks import open_work_folder
from cosmos3_train.data.card import DatasetCard, PictureOptions
from cosmos3_train.data.files import disk_is_the_users, write_whole
from cosmos3_train.data.output import CARD_FILE, check_output
from cosmos3_train.data.sources.conversations import open_talks
from cosmos3_train.data.sources.talk_source import TalkSource
from cosmos3_train.data.talk import NoTalk, Talk, parse_talk
from cosmos3_train.data.talk_pictures import Faulty, Shape, check_there, picture_shape, stamp_of
from cosmos3_train.data.unusable import Unusable
from cosmos3_train.data.workers import run_in_workers
from cosmos3_train.runtime import fold

logger = logging.getLogger(__name__)

VERSION = 3
ROWS_FILE = "conversations.parquet"
BLOCK_ROWS = 1024
MOST_FAULTY, LONGEST_PATH = 1000, 4096
"""Pictures at fault that are remembered, the first of a set; and characters of a path that a file can have."""
NO_TALK = "no conversation"
UNTAKEN = "cannot be turned into tokens"

SCHEMA = pa.schema(
    [
        ("file", pa.int32()),  # of the source's files
        ("place", pa.int64()),  # in it
        ("number", pa.int64()),  # of the row in its file, from 0
        ("content", pa.int64()),  # a hash of what is said and shown, and by whom
        ("pictures", pa.int32()),
        ("tokens", pa.int64()),  # 0 where they were not counted
    ]
)


class Measure(Protocol):
    """Counts the tokens of a conversation with pictures of these shapes; the words name it in errors. Goes to workers.

    `Unusable` leaves the row out, any other error ends the work.  fingerprint: of the model's part in the count
    """

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, talk: Talk, shapes: Sequence[Shape], where: str) -> int: ...


@dataclass(frozen=True)
class TalkIndex:
    """rows: of `SCHEMA`;  counted: by which `Measure` tokens were, "" by none
    dropped: reason → rows;  examples: reason → the first
    faulty:  of the first MOST_FAULTY pictures that rows were dropped for, path below the source's folder → `stamp_of`
    total:   rows of the set, where only some were looked at
    """

    rows: pa.Table
    counted: str
    dropped: dict[str, int]
    examples: dict[str, str]
    faulty: dict[str, list[int]]
    reused: bool = False
    total: int = 0

    @property
    def seen(self) -> int:
        """Rows that were looked at."""
        return self.rows.num_rows + sum(self.dropped.values())

    def column(self, name: str) -> np.ndarray:
        return self.rows.column(name).to_numpy()


@dataclass(frozen=True)
class _Work:
    """What all blocks depend on."""

    talks: TalkSource
    options: PictureOptions
    measure: Measure | None


_BlockRows = tuple[int, np.ndarray]
"""A file of the source, and the numbers and places of some of its rows."""


def index_talks(
    card: DatasetCard, source: Path, folder: Path | None, *, measure: Measure | None = None, workers: int = 1,
    progress: bool = False, most_rows: int | None = None, fresh: bool = False, settled: bool = False,
) -> TalkIndex:  # fmt: skip
    """Look at every row of a set.

    Args:
        source: its folder or file.
        folder: prepared folder where the index is kept and looked for; None keeps none.
        measure: None counts no tokens; an index with tokens serves all the same.
        fresh: make an index anew that is there, or that was left unfinished.
        settled: take an index of this source that is there, also where pictures at fault have come or changed since.
        most_rows: where no index is there, only so many rows are looked at, and nothing is written.

    Raises:
        UserError: a file cannot be read, a JSON line is no conversation, no row can be used, or the prepared folder
            cannot be one (`check_output`).
    """
    card.check_fetched(source)
    talks = open_talks(source, card.mapping)
    if folder is not None:
        check_output(folder, source)
    made_of = _made_of(talks, card.pictures)
    there = None if folder is None else _read(folder, made_of, talks.root, settled=settled)
    counted = "" if measure is None else measure.fingerprint
    if there is not None and not fresh and counted in ("", there.counted):
        return there
    blocks: list[_BlockRows] = []
    for file, name in enumerate(talks.files):
        places = talks.places(name)
        blocks += [(file, places[first : first + BLOCK_ROWS]) for first in range(0, len(places), BLOCK_ROWS)]
    total = sum(len(places) for _, places in blocks)
    if most_rows is not None:
        blocks, folder = _first(blocks, most_rows), None
    work = _Work(talks, card.pictures, measure)
    if folder is None:
        found = _whole([_do_block(work, block) for block in blocks], counted)
        return replace(_refuse_empty(found, source), total=total)
    with disk_is_the_users(folder):
        beside = folder.with_name(f"{folder.name}.partial")
        beside.parent.mkdir(parents=True, exist_ok=True)
        open_work_folder(beside, f"{made_of} {counted}", fresh=fresh)
        _run_blocks(work, blocks, beside, workers, progress, f"preparing {card.name}")
        found = _whole([_read_block(_block_path(beside, n)) for n in range(len(blocks))], counted)
        if not found.rows.num_rows:  # what is mended may be pictures, of which the blocks know nothing
            shutil.rmtree(beside)
        _refuse_empty(found, source)
        _write(folder, found, made_of, card)
        shutil.rmtree(beside)
    return found


def _first(blocks: Sequence[_BlockRows], most: int) -> list[_BlockRows]:
    found = []
    for file, places in blocks:
        if most > 0:
            found.append((file, places[:most]))
        most -= len(places)
    return found


def _made_of(talks: TalkSource, options: PictureOptions) -> str:
    settings = json.dumps([VERSION, talks.fingerprint(), to_plain(options)], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:32]


def _read(folder: Path, made_of: str, root: Path, *, settled: bool) -> TalkIndex | None:
    """The index that is there, None where there is none, or one of other bytes, or, unless it is settled, pictures.

    Raises:
        UserError: the folder holds the rows of a log.
    """
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(card, dict) or "made_of" not in card:
        raise UserError(f"{folder}: holds rows that are no conversations; name another prepared folder")
    if card["made_of"] != made_of:
        return None
    try:
        rows = pq.read_table(folder / ROWS_FILE)
        found = TalkIndex(rows, card["counted"], card["dropped"], card["examples"], card["faulty"], reused=True)
        mended = _are_mended(root, found.faulty)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None
    if mended and settled:
        logger.info("%s: pictures that were left out have come or changed; cosmos3 prepare looks again", folder)
    return None if mended and not settled else found


def _are_mended(root: Path, faulty: Mapping[str, list[int]]) -> bool:
    """Whether any picture that a row was left out for may be another by now."""
    return any(stamp_of(root / path) != stamp for path, stamp in faulty.items())


def _write(folder: Path, index: TalkIndex, made_of: str, card: DatasetCard) -> None:
    """The card last: it says that the index is whole. One of nothing first, by which a folder is known as ours when
    this is killed: the rows may lie inside a set of such files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CARD_FILE, json.dumps({"made_of": "", "counted": ""}).encode())
    write_whole(folder / ROWS_FILE, _parquet_bytes(index.rows))
    content = {"name": card.name, "format": card.format, "made_of": made_of, "counted": index.counted,
               "rows": index.rows.num_rows, "dropped": index.dropped, "examples": index.examples,
               "faulty": index.faulty}  # fmt: skip
    write_whole(folder / CARD_FILE, (json.dumps(content, indent=2) + "\n").encode())


def _parquet_bytes(rows: pa.Table) -> bytes:
    written = io.BytesIO()
    pq.write_table(rows, written)
    return written.getvalue()


def _refuse_empty(index: TalkIndex, source: Path) -> TalkIndex:
    if not index.rows.num_rows:
        reasons = [f"{n:,} × {reason}, such as {index.examples[reason]}" for reason, n in index.dropped.items()]
        raise UserError(
            f"{source}: no conversation can be used: {'; '.join(reasons)}; fetch or mend them: cosmos3 check CARD "
            "--scan names every one"
            if reasons
            else f"{source}: the set has no conversation; fetch it again, or name another file or folder"
        )
    return index


# ------------------------------------------------------------------------------------------------ blocks


@dataclass
class _Block:
    """rows: of `SCHEMA`;  dropped, examples, faulty: as of `TalkIndex`"""

    rows: pa.Table
    dropped: dict[str, int]
    examples: dict[str, str]
    faulty: dict[str, list[int]]


def _do_block(work: _Work, block: _BlockRows) -> _Block:
    file, places = block
    name, found, made = work.talks.files[file], list[tuple[int, ...]](), _Block(SCHEMA.empty_table(), {}, {}, {})
    folder = work.talks.pictures(name)

    def drop(reason: str, example: str) -> None:
        made.dropped[reason] = made.dropped.get(reason, 0) + 1
        made.examples.setdefault(reason, example)

    rows = work.talks.rows(name, places[:, 1].tolist())
    for (turn, place), row in zip(places.tolist(), rows, strict=True):
        where = work.talks.where(name, turn)
        try:
            talk = talk_of(row)
            tokens = _tokens(work, talk, folder, where)
        except NoTalk as error:
            if work.talks.strict:
                raise UserError(f"{where}: {error}") from None
            drop(NO_TALK, f"{where}: {error}")
        except Unusable as error:
            if isinstance(error, Faulty) and len(error.path) <= LONGEST_PATH:
                path = folder / error.path
                made.faulty[path.relative_to(work.talks.root).as_posix()] = stamp_of(path)
            drop(error.reason, f"{where}: {error.example}")
        else:
            found.append((file, place, turn, content_of(talk), len(talk.pictures), tokens))
    made.faulty = _first_faulty(made.faulty)
    if found:
        made.rows = pa.Table.from_pydict(dict(zip(SCHEMA.names, zip(*found, strict=True), strict=True)), schema=SCHEMA)
    return made


def talk_of(row: Any) -> Talk:
    """`talk.parse_talk` of what a source gives."""
    if isinstance(row, NoTalk):
        raise row
    return parse_talk(row)


def content_of(talk: Talk) -> int:
    """A number of what is said and shown, however the row writes it."""
    words = [
        part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
        for message in talk.messages
        for part in (message["role"], message["content"])
    ]
    pictures = [r.path or hashlib.blake2b(r.content or b"", digest_size=16).hexdigest() for r in talk.pictures]
    return fold(0, *words, *pictures)


def _tokens(work: _Work, talk: Talk, folder: Path, where: str) -> int:
    if work.measure is None:
        for reference in talk.pictures:
            check_there(folder, reference)
        return 0
    shapes = [picture_shape(folder, reference, work.options) for reference in talk.pictures]
    return work.measure(talk, shapes, where)


def _run_blocks(
    work: _Work, blocks: Sequence[_BlockRows], folder: Path, workers: int, progress: bool, words: str
) -> None:
    """Do the blocks that are not done, or of which a picture at fault was mended since. Returns when all are."""

    def is_done(path: Path) -> bool:
        return path.exists() and not _are_mended(work.talks.root, _read_block(path).faulty)

    todo = [number for number in range(len(blocks)) if not is_done(_block_path(folder, number))]
    sizes = [len(places) for _, places in blocks]
    done = sum(sizes) - sum(sizes[number] for number in todo)
    with tqdm(total=sum(sizes), initial=done, unit="row", desc=words, disable=not progress) as bar:
        if workers == 1 or len(todo) <= 1:
            for number in todo:
                _write_block(work, blocks[number], _block_path(folder, number))
                bar.update(sizes[number])
            return
        tasks = {number: (blocks[number], _block_path(folder, number)) for number in todo}
        run_in_workers(
            _in_worker, tasks, lambda number: bar.update(sizes[number]), workers, begin=_begin, given=(work,)
        )


_works: list[_Work] = []
"""Of a worker, which gets it once: a tokenizer is too large to be sent with every block."""


def _begin(work: _Work) -> None:
    torch.set_num_threads(1)
    _works.append(work)


def _in_worker(block: _BlockRows, path: Path) -> None:
    _write_block(_works[0], block, path)


def _block_path(folder: Path, number: int) -> Path:
    return folder / "blocks" / f"{number:05d}.parquet"


def _write_block(work: _Work, block: _BlockRows, path: Path) -> None:
    """Rows, with what was left out beside them in the file's own header: one file, whole or not there."""
    made = _do_block(work, block)
    told = json.dumps([made.dropped, made.examples, made.faulty]).encode()
    write_whole(path, _parquet_bytes(made.rows.replace_schema_metadata({b"left_out": told})))


def _read_block(path: Path) -> _Block:
    rows = pq.read_table(path)
    dropped, examples, faulty = json.loads((rows.schema.metadata or {})[b"left_out"])
    return _Block(rows.replace_schema_metadata(None), dropped, examples, faulty)


def _whole(blocks: Sequence[_Block], counted: str) -> TalkIndex:
    dropped: dict[str, int] = {}
    examples: dict[str, str] = {}
    for block in blocks:
        for reason, count in block.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
            examples.setdefault(reason, block.examples[reason])
    rows = pa.concat_tables([SCHEMA.empty_table(), *(block.rows for block in blocks)]).combine_chunks()
    faulty = _first_faulty({path: stamp for block in blocks for path, stamp in block.faulty.items()})
    return TalkIndex(rows, counted, dropped, examples, faulty)


def _first_faulty(faulty: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return dict(itertools.islice(faulty.items(), MOST_FAULTY))
