"""cosmos3 check DATASET_CARD --scan: every number and every frame of a log, before a model is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from cosmos3_train.commands.console import FINISHED, USER_ERROR, say
from cosmos3_train.commands.prepare import read_contract, read_model
from cosmos3_train.config import Clips, Embodiment, UserError, project_root
from cosmos3_train.data.card import DatasetCard, load_card
from cosmos3_train.data.faults import LONG
from cosmos3_train.data.index import check_log
from cosmos3_train.data.scan import Finding, Scan, scan_clips, scan_log, scan_talks
from cosmos3_train.data.sources import open_clips, open_log
from cosmos3_train.data.sources.conversations import open_talks
from cosmos3_train.model.encoders import Encoder
from cosmos3_train.model.loading import fetched_folder, load_parts

SHOWN = 20
"""Findings of a kind that are told one by one."""


def run(
    path: Path, embodiment: str | None, source: Path | None, *, model: str, caption_tokens: int, threads: int
) -> int:
    """Scan, and say what was found.

    Args:
        embodiment, source: None takes the dataset card's.
        model: whose tokenizer counts the captions' tokens, a part's name or a file.
        caption_tokens: that a prompt may have.
        threads: that decode.

    Returns:
        2 where something was found.

    Raises:
        UserError: the log cannot be opened, or is not what its cards say.
    """
    for name, value in (("caption-tokens", caption_tokens), ("workers", threads)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it is at least 1")
    root, card = project_root(path), load_card(path)
    folder, counts, scan = source or card.source_folder(root), Counter[str](), Scan()
    if card.format == "conversations":
        _scan_talks(card, folder, scan, threads, counts)
        return _say_found(scan, counts, "conversation", "picture", "")
    contract = read_contract(path, card, embodiment, root)
    card.check_fetched(folder)  # before a bar is drawn
    unit = "clip" if card.shows_clips else "episode"
    with tqdm(total=0, unit=unit, desc=f"scanning {card.name}") as bar:
        if isinstance(contract, Clips):
            clips = open_clips(card, folder)
            bar.total, found = len(clips.clips), scan_clips(clips, scan, threads, bar.update)
        else:
            log = open_log(card, folder)
            check_log(log, card, contract)
            bar.total, found = len(log.episodes), scan_log(log, card, contract, scan, threads, bar.update)
        for finding in found:
            _tell(finding, counts)
    long, counted = _captions(scan, contract, model, caption_tokens, root)
    for finding in long:
        _tell(finding, counts)
    return _say_found(scan, counts, unit, "frame", f", {counted}")


def _scan_talks(card: DatasetCard, source: Path, scan: Scan, threads: int, counts: Counter[str]) -> None:
    card.check_fetched(source)
    talks = open_talks(source, card.mapping)
    total = sum(len(talks.places(file)) for file in talks.files)
    with tqdm(total=total, unit="conversation", desc=f"scanning {card.name}") as bar:
        for finding in scan_talks(talks, card.pictures, scan, threads, bar.update):
            _tell(finding, counts)


def _say_found(scan: Scan, counts: Counter[str], unit: str, part: str, more: str) -> int:
    for kind, count in counts.items():
        if count > SHOWN:
            say(f"{kind}: {count - SHOWN:,} more")
    say(f"scanned {scan.items:,} {unit}s, {scan.frames:,} {part}s{more}")
    if counts:
        say("found: " + ", ".join(f"{count:,} × {kind}" for kind, count in counts.items()))
        return USER_ERROR
    say("nothing wrong was found")
    return FINISHED


def _tell(finding: Finding, counts: Counter[str]) -> None:
    counts[finding.kind] += 1
    if counts[finding.kind] <= SHOWN:
        place = f"{finding.file}, {finding.where}" if finding.where else finding.file
        tqdm.write(f"{finding.kind}: {place}: {finding.words}")


def _captions(scan: Scan, contract: Embodiment | Clips, model: str, most: int, root: Path) -> tuple[list[Finding], str]:
    """Those whose prompt is over the cap, and how many were counted, in words."""
    placed = read_model(model, root)
    folder = fetched_folder(placed)
    if folder is None:
        missing = f"hf download {placed.path}, or name another --model"
        return [], f"{len(scan.captions):,} different captions, whose tokens were not counted: {missing}"
    encoder = Encoder(load_parts(replace(placed, path=str(folder)), torch.device("cpu"), vae_weights=False), {})
    return list(_long(scan, contract, encoder, most)), f"{len(scan.captions):,} different captions"


def _long(scan: Scan, contract: Embodiment | Clips, encoder: Encoder, most: int) -> Iterator[Finding]:
    task = "policy" if isinstance(contract, Embodiment) else "text_to_video_sound"  # says all that others say, and more
    fps = contract.control_hz if isinstance(contract, Embodiment) else 24.0
    size = (contract.resolution_tier, contract.resolution_tier)  # it stands in the prompt, in as many tokens as another
    for (caption, heard), (file, where) in scan.captions.items():
        prompt = encoder.text(task, caption, contract, size, contract.frames, fps, heard)
        if len(prompt) > most:
            words = f"its prompt has {len(prompt):,} tokens, {most:,} are allowed: {caption[:60]!r} …"
            yield Finding(LONG, file, where, words)
