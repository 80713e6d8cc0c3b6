"""The different texts of a prepared folder, whose keys and values a cache keeps once each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import ArrowException

from cosmos3_train.config import UserError, first_line

COLUMNS = ("instruction", "sound_caption", "height", "width", "fps")
TIMES = "timestamps"


class Text(NamedTuple):
    """What a prompt is made of: the instruction, words of what is heard ("": none), (H, W) of the frames in pixels,
    frames a second, frames."""

    instruction: str
    sound_caption: str
    size: tuple[int, int]
    fps: float
    frames: int


def distinct_texts(folder: Path) -> list[Text]:
    """The texts of all windows, training and held-out, each once, in a stable order.

    Raises:
        UserError: the rows cannot be read.
    """
    found: set[Text] = set()
    for path in sorted(folder.glob("windows-*.parquet")):
        try:
            table = pq.read_table(path, columns=[*COLUMNS, TIMES])
            if "sound_caption" not in table.column_names:  # prepared before rows had it
                table = table.append_column("sound_caption", pa.nulls(len(table), pa.string()))
            frames = cast(Any, pc).list_value_length(table[TIMES])
            rows = table.drop_columns([TIMES]).append_column("frames", frames)
            rows = rows.group_by([*COLUMNS, "frames"]).aggregate([])
        except (OSError, ArrowException) as error:
            reason = first_line(error)
            raise UserError(f"{path}: the rows cannot be read ({reason}); run 'cosmos3 prepare --fresh'") from None
        for row in rows.to_pylist():
            size = (row["height"], row["width"])
            found.add(Text(row["instruction"], row["sound_caption"] or "", size, row["fps"], row["frames"]))
    return sorted(found)
