"""Refusing to put an export on another base than the one it was trained on."""

from __future__ import annotations

from pathlib import Path

from cosmos3_train.config import UserError
from cosmos3_train.export.folder import read_description
from cosmos3_train.model.base_identity import identify_base


def check_base(folder: Path, base_folder: Path) -> None:
    """Refuse to put an export on another base than the one it was trained on.

    Raises:
        UserError: wrong base; names both.
    """
    trained = read_description(folder)["base"]
    found = identify_base(base_folder)
    if (found.config, found.weights) == (trained["config"], trained["weights"]):
        return
    what = "another architecture" if found.config != trained["config"] else "the same architecture with other weights"
    raise UserError(
        f"{folder}: wrong base: it was trained on {trained['name']!r}, but {str(base_folder)!r} is {what} "
        f"(weights {found.weights[:12]}, not {trained['weights'][:12]}); give the base that it was trained on"
    )
