"""Sources of robot logs and of captioned video: one file a format, and the tables of those that exist."""

from collections.abc import Callable
from pathlib import Path

from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.sources.camera_tracks import open_camera_tracks
from cosmos3_train.data.sources.clips import ClipLog
from cosmos3_train.data.sources.hdf5 import open_hdf5
from cosmos3_train.data.sources.jsonl_video import open_jsonl
from cosmos3_train.data.sources.lerobot import those_here
from cosmos3_train.data.sources.lerobot_v2 import open_lerobot_v2
from cosmos3_train.data.sources.lerobot_v3 import open_lerobot
from cosmos3_train.data.sources.log import Log
from cosmos3_train.data.sources.mcap import open_mcap
from cosmos3_train.data.sources.rlds import open_rlds
from cosmos3_train.data.sources.webdataset import open_webdataset
from cosmos3_train.data.sources.zarr import open_zarr

OPENERS: dict[str, Callable[[DatasetCard, Path], Log]] = {
    "camera_tracks": open_camera_tracks,
    "hdf5": open_hdf5,
    "lerobot_v2": lambda card, source: those_here(open_lerobot_v2(source), card),
    "lerobot_v3": lambda card, source: those_here(open_lerobot(source), card),
    "mcap": open_mcap,
    "rlds": open_rlds,
    "zarr": open_zarr,
}
"""Format of a dataset card -> what opens such a log at `source`."""


CLIP_OPENERS: dict[str, Callable[[DatasetCard, Path], ClipLog]] = {
    "jsonl_video": open_jsonl,
    "webdataset": open_webdataset,
}
"""The same for captioned video without a robot."""


def open_log(card: DatasetCard, source: Path) -> Log:
    """Open the log of a dataset card.

    Args:
        source: its folder (or file), which may differ from the card's.

    Raises:
        UserError: it is not there, is of another format, or is damaged.
    """
    card.check_fetched(source)
    return OPENERS[card.format](card, source)


def open_clips(card: DatasetCard, source: Path) -> ClipLog:
    """Open the captioned video of a dataset card, as `open_log`."""
    card.check_fetched(source)
    return CLIP_OPENERS[card.format](card, source)
