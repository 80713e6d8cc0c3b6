"""A row of a conversation set as one form: messages as the chat template takes them, and where their pictures are.

Read are role/content and ShareGPT's from/value messages, bare or below "messages" or "conversations". A picture is a
part of the content, {"type": "image", "image": PATH}, or `<image>` or `<video>` in the words, with the row's `image`,
`images`, `video` or `videos` beside, in order: a path inside the set's folder, or the file's bytes. One that is null
or empty is none; but where a row has such a key, words that name a picture are no mere words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from cosmos3_train.config import nearest
from cosmos3_train.data.names import encodes
from cosmos3_train.data.unusable import Unusable

ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's names of them."""

UNMATCHED = "its words and its pictures do not match"
OUTSIDE = "a picture is outside the set's folder"

_PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")
"""With the line breaks that set it apart: the chat template puts none."""


class NoTalk(Exception):
    """A row that is no conversation; says why."""


@dataclass(frozen=True)
class Reference:
    """A picture before it is read: kind, and its path inside the set's folder, or the bytes of its file."""

    kind: Literal["image", "video"]
    path: str = ""
    content: bytes | None = None


@dataclass(frozen=True)
class Talk:
    """messages: as of `Sample`;  pictures: one for each part of them that is one, in their order"""

    messages: list[dict[str, Any]]
    pictures: tuple[Reference, ...] = ()


def parse_talk(row: Any) -> Talk:
    """The conversation of a row.

    Raises:
        NoTalk: it is none, or its last message is not the assistant's.
        Unusable: its pictures are not those that its words name, or lie elsewhere.
    """
    given, media = row, {}
    if isinstance(row, Mapping):
        keys = [key for key in ("messages", "conversations") if key in row]
        if not keys:
            raise NoTalk(f"no 'messages'.{nearest('messages', [str(key) for key in row])}")
        given = next((row[key] for key in keys if row[key]), row[keys[0]])
        if given is None:
            raise NoTalk(f"{keys[0]!r} is null")
        media = {kind: _given(row, kind) for kind in ("image", "video") if kind in row or f"{kind}s" in row}
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise NoTalk("a non-empty list of messages is expected")
    shown = _Shown(media)
    messages = [_message(message, place, shown) for place, message in enumerate(given)]
    if messages[-1]["role"] != "assistant":
        raise NoTalk("the last message is not the assistant's, so nothing would be learned from it")
    left = shown.left()
    if left and not shown.found:  # no word says where: before the first question, as upstream puts them
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise Unusable(UNMATCHED, f"{len(left)} pictures and no question")
        content = first["content"]
        words = [{"type": "text", "text": content}] if isinstance(content, str) else content
        first["content"] = [*({"type": reference.kind} for reference in left), *words]
        return Talk(messages, tuple(left))
    if left:
        raise Unusable(UNMATCHED, f"{len(left)} pictures more than the words name")
    return Talk(messages, tuple(shown.found))


class _Shown:
    """The pictures of a row, handed out in the order in which its words name them."""

    def __init__(self, media: Mapping[str, list[Any]]) -> None:
        self.kinds = set(media)
        """That the row has a key of, whatever it holds."""
        self._waiting = {kind: list(values) for kind, values in media.items()}
        self._listed = {kind for kind, values in media.items() if values}
        self.found: list[Reference] = []

    def take(self, kind: Literal["image", "video"], own: Any) -> None:
        """The next of a kind: the row's where it lists any, else what the part itself names."""
        if kind in self._listed:
            if not self._waiting[kind]:
                raise Unusable(UNMATCHED, f"fewer {kind}s than the words name")
            own = self._waiting[kind].pop(0)
        self.found.append(_reference(kind, own))

    def left(self) -> list[Reference]:
        return [_reference(kind, value) for kind in ("image", "video") for value in self._waiting.get(kind, [])]


def _given(row: Mapping[str, Any], kind: str) -> list[Any]:
    """What a row lists of a kind."""
    for key in (kind, f"{kind}s"):
        value = row.get(key)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if any(map(_is_empty, value)):
                raise Unusable(UNMATCHED, f"{key!r} holds an empty entry")
            if value:
                return list(value)
        elif not _is_empty(value):
            return [value]
    return []


def _is_empty(value: Any) -> bool:
    """Whether a picture's entry is one of no picture, as columns hold for rows of words alone."""
    return value is None or value in ("", b"") or (isinstance(value, Mapping) and not any(value.values()))


def _reference(kind: Literal["image", "video"], value: Any) -> Reference:
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes) and content:
        return Reference(kind, content=content)
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str) or not path:
        raise Unusable(UNMATCHED, f"the words name {'an image' if kind == 'image' else 'a video'} that is not there")
    if not encodes(path):
        raise NoTalk("the path of a picture is not valid Unicode")
    pure = PurePosixPath(path.removeprefix("file://"))
    if "://" in str(path).removeprefix("file://") or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise Unusable(OUTSIDE, repr(path))
    return Reference(kind, path=pure.as_posix())


def _message(message: Any, place: int, shown: _Shown) -> dict[str, Any]:
    where = f"message {place}: "
    said = {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
    if set(said) == {"from", "value"}:
        role, content = SHAREGPT.get(str(said["from"]), said["from"]), said["value"]
    elif set(said) == {"role", "content"}:
        role, content = said["role"], said["content"]
    else:
        raise NoTalk(f"{where}exactly the keys 'role' and 'content', or 'from' and 'value', are expected")
    if role not in ROLES:
        raise NoTalk(f"{where}role {role!r}.{nearest(str(role), ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": _words(_checked(content, where), shown)}
    if not isinstance(content, Sequence) or not content:
        raise NoTalk(f"{where}content is neither words nor a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": _checked(part["text"], where)})
        elif kind in ("image", "video"):
            shown.take(kind, part.get(kind))
            parts.append({"type": kind})
        else:
            raise NoTalk(f"{where}a part is none of text, image and video: {str(part)[:60]}")
    only_words = all(part["type"] == "text" for part in parts)
    return {"role": role, "content": "".join(part["text"] for part in parts) if only_words else parts}


def _checked(words: str, where: str) -> str:
    if not encodes(words):
        raise NoTalk(f"{where}its words are not valid Unicode")
    return words


def _words(words: str, shown: _Shown) -> str | list[dict[str, Any]]:
    """Words as they are, or cut where they name the row's pictures."""
    parts, after = [], 0
    for match in _PLACEHOLDER.finditer(words):
        kind = "image" if match[1] == "image" else "video"
        if kind not in shown.kinds:
            continue  # a row that knows of no pictures may talk about tags
        parts += [{"type": "text", "text": words[after : match.start()]}] if match.start() > after else []
        shown.take(kind, None)
        parts.append({"type": kind})
        after = match.end()
    if not parts:
        return words
    return [*parts, *([{"type": "text", "text": words[after:]}] if after < len(words) else [])]
