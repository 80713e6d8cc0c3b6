"""From a log to prepared rows: windows, statistics, a card that says what made them. Once, resumable, in parallel.

Episodes are processed in blocks, whose borders depend on the log alone. A block's files are written whole or not at
all into a work folder beside the output, `.NAME.preparing`; a run that was killed goes on from there. When all blocks
are there, statistics are computed, and the finished folder takes the output's name in one rename. So the rows are the
same bytes however often the run was killed and however many workers it had.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos3_train.config import Clips, Embodiment, UserError, flatten, numbered, to_plain
from cosmos3_train.data.actions import Normaliser
from cosmos3_train.data.archives import split_place
from cosmos3_train.data.blocks import (
    Plan,
    count_sounding,
    hold_one_out,
    make_plan,
    open_work_folder,
    report_path,
    run_blocks,
    values_path,
)
from cosmos3_train.data.card import DatasetCard, Filters
from cosmos3_train.data.files import disk_is_the_users, is_there, write_whole
from cosmos3_train.data.filters import read_keep_ranges
from cosmos3_train.data.index import GAP, SPLITS, check_log
from cosmos3_train.data.output import CARD_FILE, check_output
from cosmos3_train.data.sources import CLIP_OPENERS, OPENERS, open_clips, open_log
from cosmos3_train.data.sources.clips import ClipLog
from cosmos3_train.data.sources.log import Log, left_out_of, read_besides
from cosmos3_train.data.statistics import FILE as STATISTICS_FILE
from cosmos3_train.data.statistics import Statistics, compute_moments, draw_histograms

LAYOUT_VERSION = 1
WORK_VERSION = 3
"""Of the files in a work folder: one that an older version left unfinished is begun anew."""
TAIL, MANY = 65536, 10_000
"""Bytes at a file's end that count for a log's fingerprint, unless it has more files than MANY."""
SHORT = "episode shorter than chunk + 1 frames"

# What of an embodiment card neither rows nor statistics depend on: these may change without preparing again.
FREE_KEYS = ("domain_id", "shares_domain", "initialise_from", "view_point", "execute", "simulator")


class PreparedOtherwise(UserError):
    """A folder was prepared with other settings, or its log has changed since."""


@dataclass(frozen=True)
class PreparedSummary:
    """What `prepare` made. `windows` and `episodes` (or clips) by split; `dropped` by reason, with an example of each;
    `sounding`: windows with sound by split, and `silent` those without by reason, both empty for a robot; `reused`: it
    was there already."""

    folder: Path
    fingerprint: str
    windows: dict[str, int]
    episodes: dict[str, int]
    dropped: dict[str, int]
    sounding: dict[str, int]
    silent: dict[str, int]
    examples: dict[str, str]
    seconds: float
    reused: bool


def prepare(
    card: DatasetCard,
    contract: Embodiment | Clips,
    source: str | Path,
    output: str | Path,
    *,
    window_stride: int = 1,
    heldout_fraction: float = 0.05,
    seed: int = 0,
    workers: int = 1,
    fresh: bool = False,
    progress: bool = True,
) -> PreparedSummary:
    """Prepare a log for training.

    Args:
        contract: the embodiment card; for video without a robot, how it is cut.
        source: the log's folder.
        output: the prepared folder to be made.
        window_stride: frames between the starts of a robot's neighbouring windows, counted from each episode's start.
        heldout_fraction: share of the episodes that never trains, chosen by hash.
        seed: of that hash.
        workers: processes; the result does not depend on them.
        fresh: replace a folder that was prepared otherwise.

    Raises:
        PreparedOtherwise: the folder was, and is not to be replaced.
        UserError: the log, the card or the disk does not allow it.
    """
    began = time.monotonic()
    source, output = Path(source), Path(output)
    window_stride = contract.step if isinstance(contract, Clips) else window_stride
    _check_settings(card, window_stride, heldout_fraction, workers)
    if isinstance(contract, Clips):
        log = open_clips(card, source)
    else:
        log = open_log(card, source)
        check_log(log, card, contract)
    check_output(output, source)
    if output.is_symlink():
        output = output.resolve()  # the folder that it leads to is replaced, on whatever disk that is
    settings = _settings(card, contract, log, window_stride, heldout_fraction, seed)
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    work = output.with_name(f".{output.name}.preparing")
    with disk_is_the_users(output):
        done = _already_prepared(output, settings, fingerprint, fresh)
        if done is not None:
            shutil.rmtree(work, ignore_errors=True)
            return _summary(output, done, began, reused=True)
        open_work_folder(work, f"{fingerprint} {WORK_VERSION}")
        try:
            plan, short = make_plan(card, contract, log, source, work, window_stride, heldout_fraction, seed)
            run_blocks(plan, log, workers, progress)
            content = _finish(plan, log, settings, fingerprint, short)
        except UserError:  # the log or the card will change, so no finished block is worth keeping
            shutil.rmtree(work)
            raise
        if output.exists():
            output.rename(work / "replaced")
        output.parent.mkdir(parents=True, exist_ok=True)
        (work / "finished").rename(output)
        shutil.rmtree(work)
    return _summary(output, content, began, reused=False)


def read_card(folder: str | Path) -> dict[str, Any]:
    """`card.json` of a prepared folder.

    Raises:
        UserError: the folder was not prepared, or by another version.
    """
    path = Path(folder) / CARD_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a prepared folder ({CARD_FILE} is missing); run `cosmos3 prepare`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run `cosmos3 prepare --fresh`") from None
    version = content.get("settings", {}).get("layout_version")
    if version != LAYOUT_VERSION:
        raise UserError(f"{path}: layout version {version}, this is {LAYOUT_VERSION}; run `cosmos3 prepare --fresh`")
    return content


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(dotted key, value before, value now) of the first difference of two nested mappings, None where there is none.

    Lists of mappings are compared item by item, so that the key names the item.
    """
    old, new = flatten(numbered(before)), flatten(numbered(now))
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def embodiment_settings(embodiment: Embodiment) -> dict[str, Any]:
    """What of an embodiment card the prepared rows and statistics depend on, as plain values."""
    left_out = {*FREE_KEYS, *([] if embodiment.recorded else ["recorded"])}  # folders made before it stay as they are
    return {key: value for key, value in to_plain(embodiment).items() if key not in left_out}


# ------------------------------------------------------------------------------------------------ settings


def _check_settings(card: DatasetCard, window_stride: int, heldout_fraction: float, workers: int) -> None:
    if card.format not in OPENERS | CLIP_OPENERS:
        known = ", ".join([*OPENERS, *CLIP_OPENERS])
        raise UserError(f"dataset {card.name!r}: format {card.format!r} is not prepared; {known} are")
    if window_stride < 1:
        raise UserError(f"window_stride is {window_stride}; it is at least 1")
    if not 0 <= heldout_fraction < 1:
        raise UserError(f"heldout_fraction is {heldout_fraction}; it is a share from 0 to below 1")
    if workers < 1:
        raise UserError(f"workers is {workers}; it is at least 1")


def _settings(
    card: DatasetCard,
    contract: Embodiment | Clips,
    log: Log | ClipLog,
    stride: int,
    heldout_fraction: float,
    seed: int,
) -> dict[str, Any]:
    """Everything that the rows and statistics are a function of. Paths are not: a log may be moved."""
    return {
        "layout_version": LAYOUT_VERSION,
        "dataset": card.name,
        "caption_column": card.caption_column,
        "constant_caption": card.constant_caption,
        "mapping": card.mapping,
        **_filter_settings(card, log),
        **contract_settings(card, contract),
        "window_stride": stride,
        "heldout_fraction": float(heldout_fraction),
        "seed": seed,
        "log": _log_digest(log),
    }


def _filter_settings(card: DatasetCard, log: Log | ClipLog) -> dict[str, Any]:
    """Nothing without filters: folders made before there were any, or before `keep_key`, stay as they are."""
    if card.filters == Filters() or isinstance(log, ClipLog):
        return {}
    keep, said = read_keep_ranges(card, log), to_plain(card.filters)
    if card.filters.keep_key is None:
        del said["keep_key"]
    ranges = None if keep is None else hashlib.sha256(repr(sorted(keep.items())).encode()).hexdigest()[:32]
    return {"filters": said | {"ranges": ranges}}


def contract_settings(card: DatasetCard, contract: Embodiment | Clips) -> dict[str, Any]:
    """What rows depend on of the embodiment card, or of how video without a robot is cut, framed and captioned."""
    if isinstance(contract, Embodiment):
        # Only `camera_tracks` reads these of a robot's formats; folders made without them stay as they are.
        said = {key: value for key in ("captions", "caption_template") if (value := getattr(card, key))}
        return {"embodiment": embodiment_settings(contract), **said}
    return {
        "format": card.format,
        "captions": card.captions,
        "caption_template": card.caption_template,
        **({"sound_captions": card.sound_captions} if card.sound_captions else {}),
        "clips": to_plain(contract),
    }


def _log_digest(log: Log | ClipLog) -> str:
    """Of what describes the log, and of size and last 64 KiB of other files (of their size alone where they are many):
    hashing terabytes would take hours.

    The end of a Parquet file holds the extremes of every column, the end of an mp4 the size of every frame.
    """
    digest = hashlib.sha256()
    for path in log.described_by():
        digest.update(path.relative_to(log.root).as_posix().encode() + b"\0" + path.read_bytes())
    if isinstance(log, ClipLog):
        media = {clip.place for clip in log.clips} | {place for clip in log.clips for place in clip.text}
    else:
        media = {episode.data_file for episode in log.episodes}
        media |= {place.path for episode in log.episodes for place in episode.video.values()}
        media |= read_besides(log)
    files = {name.removesuffix(f"#{inside}") if (inside := split_place(log.root, name)[1]) else name for name in media}
    tail = TAIL if len(files) <= MANY else 0
    for name in sorted(media | files):
        if name not in files:  # a place inside one of the files
            digest.update(f"{name}\0".encode())
            continue
        path = log.root / name
        size = path.stat().st_size if is_there(path) else -1
        digest.update(f"{name}\0{size}\0".encode())
        if size > 0 and tail:
            with path.open("rb") as file:
                file.seek(max(0, size - tail))
                digest.update(file.read())
    return digest.hexdigest()[:32]


def _already_prepared(output: Path, settings: dict[str, Any], fingerprint: str, fresh: bool) -> dict[str, Any] | None:
    """The card of a folder that is as wanted; None where there is work to do."""
    if not output.exists():
        return None
    if not (output / CARD_FILE).exists():
        output.rmdir()
        return None
    if fresh:
        return None
    content = read_card(output)
    if content["fingerprint"] == fingerprint:
        return content
    difference = first_difference(content["settings"], settings)
    assert difference is not None, "fingerprints differ but settings do not"
    key, before, now = difference
    what = "the log has changed since" if key == "log" else f"prepared with {key} {before!r}, now {now!r}"
    raise PreparedOtherwise(f"{output}: {what}; prepare it again with --fresh, or choose another output")


# ------------------------------------------------------------------------------------------------ the end


def _finish(plan: Plan, log: Log | ClipLog, settings: dict[str, Any], fingerprint: str, short: int) -> dict[str, Any]:
    """Statistics of a robot and their picture, and the card, which is written last."""
    robot = plan.contract if isinstance(plan.contract, Embodiment) else None
    reports = [json.loads(report_path(plan, number).read_text()) for number in range(len(plan.blocks))]
    counts = {
        key: {split: sum(report[key][split] for report in reports) for split in SPLITS}
        for key in ("windows", "episodes")
    }
    dropped = {SHORT: short, GAP: 0} if robot else {}
    silent: dict[str, int] = {}
    examples: dict[str, str] = {}
    if not isinstance(log, ClipLog):
        for reason, (count, example) in left_out_of(log).items():
            dropped[reason], examples[reason] = count, example
    for report in reports:
        examples = report["examples"] | examples
        for totals, key in ((dropped, "dropped"), (silent, "silent")):
            for reason, count in report[key].items():
                totals[reason] = totals.get(reason, 0) + count
    why = "; ".join(f"{n:,} × {reason} ({examples.get(reason, '')})" for reason, n in dropped.items() if n)
    if counts["windows"]["train"] == 0:
        raise UserError(f"dataset {plan.card.name!r}: no window to train on; left out: {why or 'nothing'}")
    if isinstance(log, ClipLog) and settings["heldout_fraction"] and not counts["windows"]["heldout"]:
        moved = hold_one_out(plan, log, settings["heldout_fraction"], settings["seed"])
        for key, count in zip(("windows", "episodes"), moved, strict=True):
            counts[key] = {"train": counts[key]["train"] - count, "heldout": count}
    if robot is not None and not counts["windows"]["heldout"]:
        _check_held_out(plan, settings["heldout_fraction"], why)
    folder = plan.work / "finished"
    heard = {} if robot else {"sounding": count_sounding(folder), "silent": silent}
    if robot is not None:
        _statistics(plan, robot, fingerprint, folder).save(folder / STATISTICS_FILE)
    content = {
        "fingerprint": fingerprint,
        "source": str(log.root.resolve()),
        "dataset": to_plain(plan.card),
        **({"embodiment": to_plain(robot)} if robot else {"clips": to_plain(plan.contract)}),
        "settings": settings,
        "counts": counts,
        "dropped": dropped,
        **heard,
        "examples": examples,
    }
    write_whole(folder / CARD_FILE, (json.dumps(content, indent=1) + "\n").encode())
    return content


def _check_held_out(plan: Plan, heldout_fraction: float, why: str) -> None:
    """Raise `UserError` where episodes were to be held out, of which what is left out left no window."""
    lost = sum(split == "heldout" for split in plan.splits.values())
    if not lost:
        return
    keys = [key for key in ("success", "keep_ranges", "idle_rows") if getattr(plan.card.filters, key) is not None]
    what, loosen = (
        (f"filters ({', '.join(keys)}) leave", ", or loosen them") if keys else ("the log's gaps and faults leave", "")
    )
    raise UserError(
        f"dataset {plan.card.name!r}: {what} no window of {lost:,} episodes to hold out; make heldout_fraction "
        f"{heldout_fraction:g} larger, or 0 to hold out nothing{loosen}; left out: {why}"
    )


def _statistics(plan: Plan, embodiment: Embodiment, fingerprint: str, folder: Path) -> Statistics:
    width = embodiment.width
    paths = [path for number in range(len(plan.blocks)) if (path := values_path(plan, number)).exists()]
    parts = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    widths = {part.shape[1] for part in parts}
    if len(widths) != 1:
        raise UserError(f"dataset {plan.card.name!r}: {embodiment.state_key!r} changes its width between episodes")
    total = widths.pop()
    moments = compute_moments(parts, total)
    statistics = Statistics(
        dataset=plan.card.name,
        embodiment=embodiment.name,
        fingerprint=fingerprint,
        action=_channels(moments, 0, width),
        state=_channels(moments, width, total) if total > width else None,
    )
    normaliser = Normaliser(embodiment, statistics)
    picture = draw_histograms(
        (normaliser.normalise(torch.from_numpy(np.array(part[:, :width]))).numpy() for part in parts),
        [channel.name for channel in embodiment.action],
        f"{plan.card.name}: actions after normalisation ({embodiment.normaliser})",
    )
    write_whole(folder / "statistics.png", picture)
    return replace(statistics, normalised=normaliser.normalise_moments(statistics.action))


def _channels(moments: Any, first: int, stop: int) -> Any:
    names = [name for name in vars(moments) if name != "count"]
    return replace(moments, **{name: vars(moments)[name][first:stop] for name in names})


def _summary(folder: Path, content: dict[str, Any], began: float, reused: bool) -> PreparedSummary:
    return PreparedSummary(
        folder=folder,
        fingerprint=content["fingerprint"],
        windows=content["counts"]["windows"],
        episodes=content["counts"]["episodes"],
        dropped=content["dropped"],
        sounding=content.get("sounding", {}),
        silent=content.get("silent", {}),
        examples=content.get("examples", {}),
        seconds=time.monotonic() - began,
        reused=reused,
    )
