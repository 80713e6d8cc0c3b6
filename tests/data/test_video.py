"""Frames by time, from files with sparse keyframes, and the canvas of several views."""

import av
import numpy as np
import pytest
import torch

from cosmos3_train.config import UserError
from cosmos3_train.data.video import compose, decode_frames
from tests.data.logs import frame_number, numbered_frame, write_video


def numbers(frames):
    return [frame_number(frame.numpy()) for frame in frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, [numbered_frame(number) for number in range(60)], fps=10, keyframe_every=12)
    return path


@pytest.mark.parametrize("wanted", [[0], [59], [0, 1, 2], [11, 12, 13], [5, 9, 30], [47, 48, 59]])
def test_the_right_frames(clip, wanted):
    frames = decode_frames(clip, [number / 10 for number in wanted])
    assert frames.dtype == torch.uint8
    assert frames.shape == (len(wanted), 3, 96, 96)
    assert numbers(frames) == wanted


def test_times_as_float32_and_a_little_off(clip):
    times = np.arange(20, 37, dtype=np.float32) / np.float32(10) + np.float32(0.02)
    assert numbers(decode_frames(clip, times.astype(np.float64))) == list(range(20, 37))


def test_backwards_and_forwards_on_one_open_file(clip):
    for start in (50, 3, 29, 0, 43):
        assert numbers(decode_frames(clip, [start / 10, (start + 1) / 10])) == [start, start + 1]


def test_no_frame_at_that_time(clip):
    with pytest.raises(UserError, match=r"clip\.mp4: no frame within half a frame period .* of 6\.1000 s"):
        decode_frames(clip, [5.9, 6.1])


def test_missing_corrupt_and_truncated(tmp_path, clip):
    with pytest.raises(UserError, match=r"gone\.mp4: the video is missing"):
        decode_frames(tmp_path / "gone.mp4", [0.0])
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(UserError, match=r"noise\.mp4: not a readable video"):
        decode_frames(tmp_path / "noise.mp4", [0.0])
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"half\.mp4: "):
        decode_frames(tmp_path / "half.mp4", [0.0])


def test_a_playlist_is_refused(tmp_path, clip):
    line = f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{clip.with_suffix('.ts')}\n#EXT-X-ENDLIST\n"
    with av.open(str(clip)) as source, av.open(str(clip.with_suffix(".ts")), "w", format="mpegts") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    (tmp_path / "list.m3u8").write_text(line)
    with pytest.raises(UserError, match=r"list\.m3u8: a playlist \(hls\)"):
        decode_frames(tmp_path / "list.m3u8", [0.0])


def test_damaged_in_the_middle(tmp_path, clip):
    """The index is whole, the pictures are not: no frame may pass for the wanted one without an error."""
    content = bytearray(clip.read_bytes())
    start = content.find(b"mdat") + 4
    content[start : start + 4000] = bytes(4000)
    (tmp_path / "hurt.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"hurt\.mp4: "):
        decode_frames(tmp_path / "hurt.mp4", [0.0, 0.1, 0.2])


def test_a_late_window_is_sought_and_not_reached_by_decoding(tmp_path, clip):
    """All before the keyframe at 4.8 s is destroyed: whoever decodes on the way there fails."""
    with av.open(str(clip)) as container:
        (stream,) = container.streams.video
        wiped = [packet for packet in container.demux(stream) if packet.size and packet.pts * packet.time_base < 4.8]
        content = bytearray(clip.read_bytes())
        for packet in wiped:
            content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    (tmp_path / "late.mp4").write_bytes(content)
    assert len(wiped) == 48
    with pytest.raises(UserError, match=r"late\.mp4: "):
        decode_frames(tmp_path / "late.mp4", [0.0, 0.1])
    late = range(50, 60)
    assert numbers(decode_frames(tmp_path / "late.mp4", [number / 10 for number in late])) == list(late)


def test_compose():
    left, right = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.ones(2, 3, 4, 7, dtype=torch.uint8)
    row = compose([left, right], "row")
    assert row.shape == (2, 3, 4, 12)
    assert row[..., :5].sum() == 0 and row[..., 5:].min() == 1
    column = compose([left, left + 1], "column")
    assert column.shape == (2, 3, 8, 5)
    assert compose([left], "single") is left
    with pytest.raises(UserError, match="differ in width"):
        compose([left, right], "column")
