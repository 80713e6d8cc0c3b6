"""What the disk refuses a run, in one line with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from cosmos3_train.config import UserError, first_line
from cosmos3_train.data.files import is_disk_full


@contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Make a `UserError` of a file of a run that cannot be written.

    Args:
        what: with its path, as the line begins: "runs/NAME/status.json:".
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter where safetensors meets it
        reason = getattr(error, "strerror", None) or first_line(error)
        remedy = "free some space" if is_disk_full(error) else "bring the folder back, or the right to write in it,"
        raise UserError(
            f"{what} could not be written ({reason}); {remedy} and run the same command again, which goes on from the "
            f"last whole checkpoint"
        ) from error
