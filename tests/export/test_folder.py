"""An export folder gets its name whole and verified, or the name keeps what it had."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cosmos3_train.config import UserError
from cosmos3_train.export.folder import VerificationError, is_disk_full, whole_folder, write_json
from tests.disk import small_files

BASE = {"name": "b", "config": "c", "weights": "w"}
DESCRIPTION = {"form": "adapter", "run": "a", "base": BASE}


def write(output: Path, weights: str, error: Exception | None = None) -> None:
    with whole_folder(output, DESCRIPTION) as new:
        (new / "weights").write_text(weights)
        assert not output.exists() or (output / "weights").read_text() != weights  # its name comes last
        if error is not None:
            raise error


def test_a_refused_export_stands_beside_the_earlier_one(tmp_path):
    output = tmp_path / "adapter"
    write(output, "first")
    for weights in ("second", "third"):
        with pytest.raises(VerificationError, match=r"^numbers; the export is kept as .*/adapter\.refused for insp"):
            write(output, weights, VerificationError("numbers"))
        assert (output / "weights").read_text() == "first"
        assert (tmp_path / "adapter.refused" / "weights").read_text() == weights
    write(output, "fourth")
    assert (output / "weights").read_text() == "fourth"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "adapter.refused"}


def test_a_refused_export_does_not_take_anothers_place(tmp_path):
    mine = tmp_path / "adapter.refused"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    with pytest.raises(VerificationError, match=r"kept as .*/adapter\.\d+\.refused"):
        write(tmp_path / "adapter", "first", VerificationError("numbers"))
    assert (mine / "notes").read_text() == "mine"
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("error", [UserError("no memory"), RuntimeError("a fault"), KeyboardInterrupt()])
def test_any_other_end_leaves_what_was_there(error, tmp_path):
    write(tmp_path / "adapter", "first")
    with pytest.raises(type(error)):
        write(tmp_path / "adapter", "second", error)
    assert (tmp_path / "adapter" / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_is_told_in_one_line(tmp_path):
    write(tmp_path / "adapter", "first")
    with (
        small_files(1000),
        pytest.raises(UserError, match=r"/adapter: the disk is full; free some space") as told,
        whole_folder(tmp_path / "adapter", DESCRIPTION) as new,
    ):
        write_json(new / "weights", "2" * 1001)
    assert "\n" not in str(told.value)
    assert (tmp_path / "adapter" / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_errors_of_a_full_disk_are_known():
    assert is_disk_full(OSError(errno.EDQUOT, "over quota"))
    assert is_disk_full(SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})"))
    assert not is_disk_full(OSError(errno.EACCES, "permission denied"))
    assert not is_disk_full(SafetensorError("I/O error: Permission denied (os error 13)"))


def test_a_folder_that_cannot_be_made_is_the_users(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for output in ("file/adapter", "n" * 300, "loop"):
        with pytest.raises(UserError, match="cannot be made"):
            write(tmp_path / output, "first")
