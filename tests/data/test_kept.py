"""Files that stay open: few, closed when their turn is over, never shared with a fork, opened anew when replaced."""

import os

import pytest

from cosmos3_train.data.kept import KeptFiles


@pytest.fixture
def kept():
    return KeptFiles(lambda path, inside: path.open("rb"), lambda file: file.close(), most=3)


def files(tmp_path, count):
    paths = [tmp_path / str(number) for number in range(count)]
    for path in paths:
        path.write_text(path.name)
    return paths


def test_the_last_used_stay_open(tmp_path, kept):
    paths = files(tmp_path, 4)
    first, second, _ = (kept.get(path) for path in paths[:3])
    assert kept.get(paths[0]) is first
    kept.get(paths[3])
    assert len(kept) == 3 and second.closed and not first.closed
    assert kept.get(paths[0], "inside") is not first
    kept.close(paths[0])
    assert first.closed and len(kept) == 1
    kept.close()
    assert len(kept) == 0


def test_a_replaced_file_is_opened_anew(tmp_path, kept):
    path = files(tmp_path, 1)[0]
    assert kept.get(path).read() == b"0"
    (tmp_path / "new").write_text("new")
    (tmp_path / "new").replace(path)
    assert kept.get(path).read() == b"new"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        kept.get(path)


def test_a_fork_opens_its_own(tmp_path, kept):
    """Descriptors that were inherited share their offset: the child's reading must not move the parent's."""
    path = files(tmp_path, 1)[0]
    mine = kept.get(path)
    child = os.fork()
    if child == 0:  # pragma: no cover
        own = kept.get(path)
        kept.close()
        os._exit(0 if own is not mine and own.closed and not mine.closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert mine.read() == b"0" and kept.get(path) is mine
