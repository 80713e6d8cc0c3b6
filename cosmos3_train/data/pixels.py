"""How large a picture may be that is decoded: some kilobytes of PNG or H.264 can hold more than fits into memory."""

from __future__ import annotations

from cosmos3_train.config import UserError

MOST_PIXELS = 8192 * 8192
"""Of an image, or of a frame of a video: 200 MB in RGB."""


class TooLarge(UserError):
    """A picture of more."""


def check_pixels(height: int, width: int, where: str) -> None:
    """Raise `TooLarge` for a picture of more than `MOST_PIXELS`; from its header, before it is decoded."""
    if height * width > MOST_PIXELS:
        raise TooLarge(f"{where}: {height} x {width} pixels, over {MOST_PIXELS:,}; make it smaller, or take it out")
