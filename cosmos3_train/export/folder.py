"""An export folder is written whole or not at all, knows whose it is, and never takes the place of another run's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cosmos3_train.config import UserError
from cosmos3_train.data.files import is_disk_full, write_whole

MARKER = "export.json"


class VerificationError(RuntimeError):
    """An export does not give the trained model's numbers: an error of this project or of a library, not the user's."""


@contextlib.contextmanager
def whole_folder(output: Path, description: dict[str, Any]) -> Iterator[Path]:
    """A new folder beside `output` to write and verify in; it takes `output`'s place when the block ends well.

    Args:
        description: what `export.json` will say; its "run" is whose export this is.

    Raises:
        UserError: `output` is there and is not an export of the same run, cannot be made, or the disk is full.
        VerificationError: the block's; what it wrote is kept beside `output` under another name, so that nobody
            deploys it, and an earlier export stays where it is.
    """
    try:
        _refuse_another_runs(output, description["run"])
        output = output.resolve()  # of a link, the folder that it leads to is replaced
        temporary = output.with_name(f".{output.name}.{os.getpid()}.writing")
        former = output.with_name(f".{output.name}.{os.getpid()}.former")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except (OSError, RuntimeError) as error:  # the latter of a link that leads to itself
        reason = getattr(error, "strerror", error)
        raise UserError(f"{output}: cannot be made ({reason}); choose another output folder") from None
    try:
        write_json(temporary / MARKER, description)
        yield temporary
        _bring_to_disk(temporary)
        if output.exists():
            output.rename(former)
        temporary.rename(output)
    except VerificationError as error:
        refused = _set_aside(temporary, output)
        raise VerificationError(f"{error}; the export is kept as {refused} for inspection") from None
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise UserError(f"{output}: the disk is full; free some space and export again, nothing was written") from None
    finally:
        if former.exists() and not output.exists():  # the second rename failed: the former export is still good
            former.rename(output)
        shutil.rmtree(former, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _set_aside(folder: Path, output: Path) -> Path:
    """Name a refused export after what it should have become; an earlier refused one goes, anything else stays."""
    refused = output.with_name(f"{output.name}.refused")
    if refused.exists() and not (refused / MARKER).is_file():
        refused = output.with_name(f"{output.name}.{os.getpid()}.refused")
    shutil.rmtree(refused, ignore_errors=True)
    return folder.rename(refused)


def _bring_to_disk(folder: Path) -> None:
    """A name that survives a power cut must not lead to files that did not."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def read_description(folder: Path) -> dict[str, Any]:
    """What `export.json` of an export folder says.

    Raises:
        UserError: the folder is not an export.
    """
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: not an export ({MARKER} is missing); give a folder that cosmos3 export wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MARKER}: cannot be read ({error}); remove the folder and export again") from None
    base = content.get("base") if isinstance(content, dict) else None
    if not isinstance(base, dict) or not {"name", "config", "weights"} <= base.keys() or "run" not in content:
        raise UserError(
            f"{folder / MARKER}: does not say of which run and base the export is; remove the folder and export again"
        )
    return content


def write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _refuse_another_runs(output: Path, run: str) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MARKER).is_file():
        raise UserError(f"{output}: exists and is not an export; choose another output folder or remove it")
    owner = read_description(output)["run"]
    if owner != run:
        raise UserError(f"{output}: is the export of run {owner!r}, not of {run!r}; choose another output folder")
