"""Conversations as JSON lines: one list of {"role", "content"} a line, text only, for next-token prediction.

The file is read through once, which checks every line and notes where it begins; a sample then costs one seek.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.index import SPLITS, assign_splits
from cosmos3_train.flow.tasks import CONVERSATION
from cosmos3_train.runtime import fold
from cosmos3_train.types import Sample

ROLES = ("system", "user", "assistant")


class ConversationDataset:
    """A .jsonl file of conversations, with the same `count` and `sample` as a `PreparedDataset`.

    name: the file's stem;  fingerprint: of its bytes
    """

    def __init__(
        self, path: str | Path, *, name: str | None = None, heldout_fraction: float = 0.0, seed: int = 0
    ) -> None:
        """Args:
            path: the file, or a folder that holds exactly one .jsonl file.
            heldout_fraction: share of the conversations, by a hash of (seed, content), that is "heldout": adding a line
                moves no other, and copies of a conversation, here or in another file, are on one side.

        Raises:
            UserError: the file is missing, or a line is not a conversation; names file and line.
        """
        self.path = _file(Path(path))
        self.name = name or self.path.stem
        offsets, contents, digest = [], [], hashlib.sha256()
        offset = 0
        with self.path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    messages = _parse(line, f"{self.path}, line {line_number}")
                    offsets.append((line_number, offset))
                    contents.append(_content(messages))
                offset += len(line)
                digest.update(line)
        if not offsets:
            raise UserError(f"{self.path}: the file has no conversation")
        self.fingerprint = digest.hexdigest()[:32]
        self._lines = np.asarray(offsets, dtype=np.int64)
        different = list(dict.fromkeys(contents))
        sides = assign_splits(CONVERSATION, different, heldout_fraction if len(different) > 1 else 0.0, seed)
        splits = np.array([sides[content] for content in contents])
        self._places: dict[str, np.ndarray] = {split: np.flatnonzero(splits == split) for split in SPLITS}

    def count(self, split: str) -> int:
        """Conversations of "train" or "heldout"."""
        return len(self._places[split])

    def sample(self, split: str, index: int, task: str, number: int) -> Sample:
        """A conversation as a sample; `task` is "conversation"."""
        assert task == CONVERSATION
        line_number, offset = (int(value) for value in self._lines[self._places[split][index]])
        with self.path.open("rb") as file:
            file.seek(offset)
            messages = _parse(file.readline(), f"{self.path}, line {line_number}")
        return Sample(key=f"{self.name}/line_{line_number:06d}", number=number, task=task, messages=messages)


def _content(messages: list[dict[str, str]]) -> int:
    """A number of what is said and by whom, however the line writes it."""
    return fold(0, *(word for message in messages for word in (message["role"], message["content"])))


def _file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if len(found) != 1:
            raise UserError(f"{path}: holds {len(found)} .jsonl files; name one of them")
        return found[0]
    if not path.is_file():
        beside = [other.name for other in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file.{nearest(path.name, beside)}")
    return path


def _parse(line: bytes, where: str) -> list[dict[str, str]]:
    """The messages of a line: {"messages": [...]} or the bare list."""
    try:
        content: Any = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if isinstance(content, dict):
        if "messages" not in content:
            raise UserError(f"{where}: no 'messages'.{nearest('messages', content)}")
        content = content["messages"]
    if not isinstance(content, list) or not content:
        raise UserError(f"{where}: a non-empty list of messages is expected")
    for place, message in enumerate(content):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise UserError(f"{where}, message {place}: exactly the keys 'role' and 'content' are expected")
        if message["role"] not in ROLES:
            raise UserError(
                f"{where}, message {place}: role {message['role']!r}.{nearest(str(message['role']), ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise UserError(f"{where}, message {place}: content is not text; only text conversations are read")
    if content[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is not the assistant's, so nothing would be learned from it")
    return content
