"""Conversations for next-token prediction, their pictures read and decoded when a sample is.

Every row is looked at once (`talk_index`). A sample then costs the decoding of its own pictures, and the reading of its
row: of JSON lines one seek; of VideoPhy-2 a file of its own; of Parquet the columns of its row group up to the row, the
pictures of other rows too, so that small row groups are read faster.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np

from cosmos3_train.config import UserError
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.index import SPLITS, assign_splits
from cosmos3_train.data.sources.conversations import open_talks
from cosmos3_train.data.talk import NoTalk
from cosmos3_train.data.talk_index import Measure, TalkIndex, index_talks, talk_of
from cosmos3_train.data.talk_pictures import read_picture
from cosmos3_train.data.unusable import Unusable
from cosmos3_train.flow.tasks import CONVERSATION
from cosmos3_train.types import Sample

logger = logging.getLogger(__name__)


class ConversationDataset:
    """A set of conversations, with the same `count` and `sample` as a `PreparedDataset`.

    name: the card's;  fingerprint: of what its samples are
    shows_pictures: whether any has one;  left_out: conversations over the cap
    """

    def __init__(
        self,
        card: DatasetCard,
        source: Path,
        index: TalkIndex,
        *,
        heldout_fraction: float = 0.0,
        seed: int = 0,
        most_tokens: int | None = None,
    ) -> None:
        """Args:
            source: the set's folder or file;  index: of it.
            heldout_fraction: share of the conversations, by a hash of (seed, content), that is "heldout": adding a row
                moves no other, and copies of a conversation, here or in another file, are on one side. A folder of
                VideoPhy-2 that is for validation is held out whole, and then nothing else is: alone it can be measured
                on, not trained (`check_trains`).
            most_tokens: conversations with more are left out, where the index has counted.

        Raises:
            UserError: the cap leaves none.
        """
        self.name, self.card, self.index = card.name, card, index
        self.source, self._given = open_talks(source, card.mapping), source
        tokens, contents = index.column("tokens"), index.column("content")
        kept = np.ones(len(tokens), dtype=bool) if most_tokens is None else tokens <= most_tokens
        self.left_out = int((~kept).sum())
        if not kept.any():
            raise UserError(
                f"{source}: all {len(tokens):,} conversations have more than {most_tokens:,} tokens, the shortest "
                f"{tokens.min():,}; raise training.tokens_per_micro_batch, or lower the card's pictures.most_pixels"
            )
        self._files, self._numbers = index.column("file"), index.column("number")
        self._rows, self._shown = index.column("place"), index.column("pictures")
        held = np.array([self.source.heldout(file) for file in self.source.files])[self._files]
        if held.any():
            heldout = held
        else:
            different = list(dict.fromkeys(contents[kept].tolist()))
            sides = assign_splits(CONVERSATION, different, heldout_fraction if len(different) > 1 else 0.0, seed)
            heldout = np.array([sides.get(content) == "heldout" for content in contents.tolist()])
        places = {"train": kept & ~heldout, "heldout": kept & heldout}
        self._places = {split: np.flatnonzero(places[split]) for split in SPLITS}
        self.shows_pictures = bool(self._shown[kept].any())
        digest = hashlib.sha256(np.ascontiguousarray(contents[kept]).tobytes())
        digest.update(repr(card.pictures).encode() if self.shows_pictures else b"")
        self.fingerprint = digest.hexdigest()[:32]

    def check_trains(self) -> None:
        """Raise `UserError` where no conversation is to train on, since all lie in folders for validation."""
        if not self.count("train"):
            file = self.source.files[int(self._files[self._places["heldout"][0]])]
            raise UserError(
                f"{self._given}: all conversations that can be used lie in {(self.source.root / file).parent}, which "
                "is held out whole by its name; add a folder to train on, or rename it"
            )

    def count(self, split: str) -> int:
        """Conversations of "train" or "heldout"."""
        return len(self._places[split])

    def sample(self, split: str, index: int, task: str, number: int) -> Sample:
        """A conversation as a sample; `task` is "conversation".

        Raises:
            UserError: the source has changed, or a picture is damaged; names it.
        """
        assert task == CONVERSATION
        row = self._places[split][index]
        file, turn = self.source.files[int(self._files[row])], int(self._numbers[row])
        where = self.source.where(file, turn)
        try:
            talk = talk_of(self.source.row(file, int(self._rows[row])))
            folder, options = self.source.pictures(file), self.card.pictures
            pictures = tuple(read_picture(folder, reference, options) for reference in talk.pictures)
        except NoTalk as error:
            raise UserError(f"{where}: {error}; the set has changed, start the command again") from None
        except Unusable as error:
            raise UserError(
                f"{where}: {error}; cosmos3 check CARD --scan finds all such rows: mend them, or take them out"
            ) from None
        key = f"{self.name}/{self.source.called(file, turn)}"
        return Sample(key, number, task, messages=talk.messages, pictures=pictures)


def open_conversations(
    card: DatasetCard, source: Path, folder: Path | None = None, *, heldout_fraction: float = 0.0, seed: int = 0,
    measure: Measure | None = None, most_tokens: int | None = None, workers: int = 1, progress: bool = False,
    most_rows: int | None = None, fresh: bool = False, settled: bool = False,
) -> ConversationDataset:  # fmt: skip
    """A set, looked at where that has not been done.

    Args:
        folder: prepared folder; None looks anew and writes nothing.
        most_rows: only so many rows are looked at where they were not yet, and nothing is written.
        others: as of `talk_index.index_talks` and `ConversationDataset`.
    """
    index = index_talks(
        card, source, folder, measure=measure, workers=workers, progress=progress, most_rows=most_rows, fresh=fresh,
        settled=settled,
    )  # fmt: skip
    for reason, count in index.dropped.items():
        logger.info("%s: left out %s × %s, such as %s", card.name, f"{count:,}", reason, index.examples[reason])
    made = ConversationDataset(
        card, source, index, heldout_fraction=heldout_fraction, seed=seed, most_tokens=most_tokens
    )
    if made.left_out:
        words = "%s: left out %s conversations of more than %s tokens"
        logger.info(words, card.name, f"{made.left_out:,}", f"{most_tokens:,}")
    return made
