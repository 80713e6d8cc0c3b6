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
from cosmos3_train.data.files import DISK_FULL, write_whole

MARKER = "export.json"


@contextlib.contextmanager
def whole_folder(output: Path, description: dict[str, Any]) -> Iterator[Path]:
    """A new folder beside `output` to write into; it takes `output`'s place when the block ends well.

    Args:
        description: what `export.json` will say; its "run" is whose export this is.

    Raises:
        UserError: `output` is there and is not an export of the same run, or the disk is full.
    """
    _refuse_another_runs(output, description["run"])
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.writing")
    former = output.with_name(f".{output.name}.{os.getpid()}.former")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        write_json(temporary / MARKER, description)
        if output.exists():
            output.rename(former)
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise
        raise UserError(f"{output}: the disk is full; free some space and export again, nothing was written") from None
    finally:
        if former.exists() and not output.exists():  # the second rename failed: the former export is still good
            former.rename(output)
        shutil.rmtree(former, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


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
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{folder / MARKER}: not readable as JSON; export again") from None
    return content


def write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def set_aside(folder: Path) -> Path:
    """Rename an export that failed its verification, so that nobody deploys it by its name."""
    refused = folder.with_name(f"{folder.name}.refused")
    shutil.rmtree(refused, ignore_errors=True)
    return folder.rename(refused)


def _refuse_another_runs(output: Path, run: str) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MARKER).is_file():
        raise UserError(f"{output}: exists and is not an export; choose another output folder or remove it")
    owner = read_description(output).get("run")
    if owner != run:
        raise UserError(f"{output}: is the export of run {owner!r}, not of {run!r}; choose another output folder")


def _is_disk_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return any(f"os error {code})" in str(error) for code in DISK_FULL)
