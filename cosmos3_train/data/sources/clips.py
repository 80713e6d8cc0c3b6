"""What every source of captioned video gives, whatever its format: clips, where each lies, and what is said of it.

A source is one file beside this one with a subclass of `ClipLog`, which says how many clips there are and where; their
captions and videos are read clip by clip. A clip that cannot be used is not an error but counted, by reason: published
sets hold some of each kind. Only a set of which nothing is left is one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos3_train.config import UserError, nearest
from cosmos3_train.data.archives import split_place
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.files import is_there
from cosmos3_train.data.names import encodes
from cosmos3_train.data.pixels import TooLarge
from cosmos3_train.data.sound import Track, track_of
from cosmos3_train.data.unusable import Unusable
from cosmos3_train.data.video import VideoTimes, video_times

NO_CAPTION = "clip or caption window without a caption"
NO_VIDEO = "clip whose video is not there"
UNREADABLE = "clip whose video cannot be read"
TOO_LARGE = "clip whose frames have more pixels than are read"
BAD_TEXT = "clip whose caption file cannot be read"
OUTSIDE = "caption window that begins beyond its clip or ends before it begins"

WINDOWS = "t2w_windows"


@dataclass(frozen=True)
class Clip:
    """One video of a set, not opened yet.

    index: its place in the set;  name: for people
    group: clips of one group are held out together (the cameras of one scene)
    place: of its video, as `video.frames_at` takes it;  text: places of what is said of it (`archives.read_place`)
    """

    index: int
    name: str
    group: str
    place: str
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A stretch of a clip that one caption describes: frames first, first + interval, … up to last.

    sound_caption: words of what is heard, "" where the set has none
    """

    first: int
    last: int
    interval: int
    caption: str
    sound_caption: str = ""


@dataclass(frozen=True)
class ClipRecord:
    """One clip, read.

    video:    its frame times and rate, None where there is no video
    sound:    what its file says of its sound, None where it has none; silence: where that cannot be read, why
    segments: in the order in which the set gives them
    faults:   reason → (how many of it were left out, an example)
    """

    clip: Clip
    video: VideoTimes | None = None
    sound: Track | None = None
    silence: str = ""
    segments: tuple[Segment, ...] = ()
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)


class ClipLog:
    """An opened set of clips. Opening finds the clips; `records` reads what is said of them and their videos' headers.

    root: the folder that places are relative to;  clips: in a stable order
    """

    def __init__(self, card: DatasetCard, root: Path, clips: Sequence[Clip]) -> None:
        self.card, self.root, self.clips = card, root, tuple(clips)

    def documents(self, clip: Clip) -> list[Mapping[str, Any]]:
        """What is said of a clip, the first to be asked first.

        Raises:
            Unusable: it cannot be read.
        """
        raise NotImplementedError

    def facts(self, clip: Clip) -> Mapping[str, Any]:
        """What a caption template may also name: things that no document says."""
        return {"clip": clip.name}

    def described_by(self) -> Iterable[Path]:
        """Files whose every byte the prepared rows depend on."""
        return ()

    def records(self, clips: Sequence[Clip]) -> Iterator[ClipRecord]:
        """Read clips in the order given."""
        for clip in clips:
            try:
                yield self._record(clip)
            except Unusable as fault:
                yield ClipRecord(clip, faults={fault.reason: (1, f"{clip.name}: {fault.example}")})

    def _record(self, clip: Clip) -> ClipRecord:
        documents = self.documents(clip)
        if not documents:
            self.caption(clip, documents)  # raises unless the card says it itself: of some nothing is said
        path, inside = split_place(self.root, clip.place)
        if not is_there(path):
            raise Unusable(NO_VIDEO, f"{self.root / clip.place} is missing")
        try:
            video = video_times(path, inside)
        except UserError as error:
            raise Unusable(TOO_LARGE if isinstance(error, TooLarge) else UNREADABLE, str(error)) from None
        found, counts, examples = [], Counter[str](), {}
        for window, where in _windows(documents):
            try:
                found.append(self._segment(clip, window, documents, len(video.times)))
            except Unusable as fault:
                counts[fault.reason] += 1
                examples.setdefault(fault.reason, f"{clip.name}{where}: {fault.example}")
        sound, silence = None, ""
        try:
            sound = track_of(self.root, clip.place)
        except UserError as error:
            silence = str(error)
        faults = {key: (n, examples[key]) for key, n in counts.items()}
        return ClipRecord(clip, video, sound, silence, tuple(found), faults)

    def _segment(
        self, clip: Clip, window: Mapping[str, Any], documents: Sequence[Mapping[str, Any]], frames: int
    ) -> Segment:
        said = [window, *documents] if window else documents
        caption = self.caption(clip, said)
        heard = _first_words(self.card.sound_captions, said)
        if not encodes(caption + heard):
            raise Unusable(BAD_TEXT, "its words are not valid Unicode")
        try:
            first = int(window.get("start_frame", 0))
            last = min(int(window.get("end_frame", frames - 1)), frames - 1)
            interval = int(window.get("temporal_interval") or 1)
        except (TypeError, ValueError, OverflowError):
            raise Unusable(OUTSIDE, f"its frames are no numbers: {_shown(window)}") from None
        if first < 0 or last < first or interval < 1:
            raise Unusable(OUTSIDE, f"frames {first} to {window.get('end_frame', last)} of {frames}")
        return Segment(first, last, interval, caption, heard)

    def caption(self, clip: Clip, documents: Sequence[Mapping[str, Any]]) -> str:
        """The words of a clip, from where the dataset card says they are.

        Raises:
            Unusable: there are none.
        """
        card = self.card
        if card.constant_caption is not None:
            return card.constant_caption
        if words := _first_words(card.captions, documents):
            return words
        if card.caption_template is not None:
            return fill_template(card.caption_template, [*documents, self.facts(clip)])
        keys = list(dict.fromkeys(key for document in documents for key in document))
        asked = ", ".join(card.captions) or "nothing (the dataset card names no captions)"
        hint = nearest(card.captions[0], keys) if card.captions and keys else ""
        raise Unusable(NO_CAPTION, f"asked for {asked}; it has {', '.join(keys) or 'no text at all'}.{hint}")


def look_up(document: Any, key: str) -> Any:
    """The value of a dotted key, None where there is none. Keys that hold dots themselves are found too."""
    if not isinstance(document, Mapping):
        return None
    if key in document:
        return document[key]
    for dot in (match.start() for match in re.finditer(r"\.", key)):
        if key[:dot] in document and (found := look_up(document[key[:dot]], key[dot + 1 :])) is not None:
            return found
    return None


def fill_template(template: str, documents: Sequence[Mapping[str, Any]]) -> str:
    """The template with every {dotted.key} replaced by its value, '_' by a space.

    Raises:
        Unusable: a value is not there.
    """

    def value(match: re.Match[str]) -> str:
        for document in documents:
            found = look_up(document, match[1])
            if isinstance(found, str | int | float):
                return str(found).replace("_", " ").strip()
        raise Unusable(NO_CAPTION, f"no value {match[1]!r} for the card's caption_template")

    return re.sub(r"\{([^{}]+)\}", value, template)


def parse_document(content: bytes, name: str) -> Mapping[str, Any]:
    """A caption file: JSON, or plain text, which becomes {"caption": text}.

    Raises:
        Unusable: neither.
    """
    try:
        text = content.decode("utf-8-sig")
        found = json.loads(text) if name.endswith(".json") else {"caption": text.strip()}
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Unusable(BAD_TEXT, f"{name} is not valid JSON ({error})") from None
    if isinstance(found, str):
        return {"caption": found}
    if not isinstance(found, Mapping):
        raise Unusable(BAD_TEXT, f"{name} holds a {type(found).__name__}; a mapping is expected")
    return found


def _windows(documents: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """The caption windows that a document gives, or one over the whole clip; each with words for where it stands."""
    for document in documents:
        windows = document.get(WINDOWS)
        if isinstance(windows, list) and windows:
            known = [window if isinstance(window, Mapping) else {"start_frame": window} for window in windows]
            return [(window, f", {WINDOWS}[{place}]") for place, window in enumerate(known)]
    return [({}, "")]


def _first_words(keys: Sequence[str], documents: Sequence[Mapping[str, Any]]) -> str:
    """The words of the first key that has any, "" where none has."""
    found = (_as_words(look_up(document, key)) for key in keys for document in documents)
    return next((words for words in found if words), "")


def _as_words(value: Any) -> str:
    """A caption; a mapping as upstream serialises captions, for training and inference prompts alike."""
    if isinstance(value, str):
        return value.strip()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) and value else ""


def _shown(window: Mapping[str, Any]) -> str:
    return str({key: window.get(key) for key in ("start_frame", "end_frame", "temporal_interval")})
