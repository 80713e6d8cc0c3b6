"""torchcodec beside PyAV: the same pixels, the same errors, in this process's readers and in forked ones.

It needs FFmpeg's libraries by their own names, when a process starts. PyAV brings some, under names of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from cosmos3_train.data import torchcodec
from cosmos3_train.data.video import decode_frames
from tests.data.logs import numbered_frame, write_video

LIBRARIES = Path(av.__file__).parents[1] / "av.libs"
REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not LIBRARIES.is_dir(), reason="PyAV is built against libraries of the system here")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    named = tmp_path_factory.mktemp("ffmpeg")
    for file in [*LIBRARIES.glob("libav*.so.*"), *LIBRARIES.glob("libsw*.so.*")]:
        stem, _, version = file.name.partition(".so.")
        (named / f"{stem.split('-')[0]}.so.{version.split('.')[0]}").symlink_to(file)
    return os.environ | {"LD_LIBRARY_PATH": f"{named}:{LIBRARIES}", "PYTHONPATH": str(REPOSITORY)}


COMPARE = """
import sys
from pathlib import Path
import numpy as np, torch
from torch.utils.data import DataLoader
from cosmos3_train.data import torchcodec, video

path = Path(sys.argv[1])
windows = [np.arange(first, first + 9) / 10 + 0.004 for first in (0, 51, 23, 40)]
torchcodec_alone = [torchcodec.frames(path, list(times)) for times in windows]
assert all(found is not None for found in torchcodec_alone), "torchcodec did not read"
torch.save(torchcodec_alone, sys.argv[2])
forked = DataLoader(windows, batch_size=None, num_workers=2, collate_fn=lambda times: video.decode_frames(path, times))
assert all(torch.equal(ours, theirs) for ours, theirs in zip(torchcodec_alone, forked, strict=True))
assert torchcodec.frames(path, [5.9, 6.1]) is None, "there is no frame at 6.1 s"
"""


def test_it_gives_the_pixels_of_pyav_also_in_forked_readers(tmp_path, environment):
    import torch

    clip, found = tmp_path / "clip.mp4", tmp_path / "found.pt"
    write_video(clip, [numbered_frame(number) for number in range(60)], fps=10, keyframe_every=12)
    subprocess.run([sys.executable, "-c", COMPARE, clip, found], env=environment, check=True, timeout=120)
    assert torchcodec.frames(clip, [0.0]) is None, "this process has no FFmpeg for it, so it compares with PyAV"
    assert torchcodec._decoders() is None, "and it is not asked again: each time is a search of 6 libraries"
    for first, ours in zip((0, 51, 23, 40), torch.load(found, weights_only=True), strict=True):
        theirs = decode_frames(clip, np.arange(first, first + 9) / 10 + 0.004)
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_the_tests_of_reading_hold_with_it(environment):
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/data/test_video.py"]
    done = subprocess.run(line, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
