"""The sound of clips: what prepare notes of it, and that the reader's samples are those of the window's own time."""

from __future__ import annotations

import json

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from cosmos3_train.config import Dataset, UserError
from cosmos3_train.data.index import BAD_TRACK, BEYOND_TRACK, NO_TRACK, PARTLY
from cosmos3_train.data.mixture import Mixture, usable_windows
from cosmos3_train.data.prepare import prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sound import SoundForm, Track, sound_at, track_of
from tests.data.clips import mp4, row, video_card, write_files, write_rows, write_tar
from tests.data.sounds import TONES, pitch, sounding, wave

FORM = SoundForm(48000, 2)
SECOND = {"frames": 25, "stride": 24}
"""A window of 25 frames at 24 a second begins with every second of a clip."""


def prepared(source, output, card=None, **options):
    card = card or video_card(**SECOND)
    summary = prepare(card, card.clips(), source, output, progress=False, **{"heldout_fraction": 0.0, **options})
    return summary, PreparedDataset(output, None, sound=FORM)


def middle(waveform) -> np.ndarray:
    """The 0.8 s in the middle of a window's first second."""
    return waveform[:, 4800:43200].numpy()


@pytest.mark.parametrize(
    ("rate", "layout"), [(48000, "stereo"), (44100, "stereo"), (22050, "mono"), (16000, "stereo"), (48000, "5.1")]
)
def test_every_window_has_the_tone_of_its_second(rate, layout, tmp_path):
    write_files(tmp_path, {"videos/a.mp4": sounding(97, rate=rate, layout=layout)})
    write_rows(tmp_path / "rows.jsonl", [row("a", 97, "tones")])
    summary, dataset = prepared(tmp_path, tmp_path / "out")
    assert summary.sounding == {"train": 4, "heldout": 0} and not summary.silent
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    for place, tone in enumerate(TONES):
        one = dataset.row(place)
        assert one["start"] == 24 * place and one["sound"] == {"rate": rate, "channels": channels}
        found = dataset.waveform(one)
        assert found.shape == (2, 50000) and found.abs().max() < 0.9
        heard = middle(found)
        assert pitch(heard[0], 48000) == pytest.approx(tone, abs=1)
        assert pitch(heard[1], 48000) == pytest.approx(tone + (0 if layout == "mono" else 50), abs=1)
        assert np.array_equal(heard[0], heard[1]) == (layout == "mono")


@pytest.mark.parametrize("start", [0.0, 0.1, 1.0, 1.70833, 2.9])
def test_samples_are_those_of_their_time(start, tmp_path):
    (tmp_path / "a.mov").write_bytes(sounding(96, codec="pcm_s16le", form="mov"))
    (tmp_path / "a.mp4").write_bytes(sounding(96))
    first = round(start * 48000)
    expected = wave(4.0, 48000, 2)[:, first : first + 48000]
    assert np.abs(sound_at(tmp_path, "a.mov", start, 48000, FORM).numpy() - expected).max() < 1e-4
    found = sound_at(tmp_path, "a.mp4", start, 48000, FORM).numpy()
    with av.open(str(tmp_path / "a.mp4")) as container:
        whole = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    # What a decoder gives that has read all before it, but for the noise that AAC puts in place of some bands.
    assert np.abs(found - whole[:, first : first + 48000]).max() < 5e-3
    errors = [np.square(np.roll(found, shift, axis=1) - expected)[:, 1:-1].mean() for shift in (-1, 0, 1)]
    assert errors[1] == min(errors)


def test_a_sound_does_not_depend_on_what_was_read_before_it(tmp_path):
    (tmp_path / "a.mp4").write_bytes(sounding(96))
    times = [0.0, 1.2, 0.4, 2.9, 1.2, 0.0]
    found = [sound_at(tmp_path, "a.mp4", time, 24000, FORM).numpy() for time in times]
    assert np.array_equal(found[0], found[5]) and np.array_equal(found[1], found[4])


@pytest.mark.parametrize(("before", "after"), [(44100, 48000), (48000, 44100), (16000, 48000), (48000, 24000)])
def test_another_rate_keeps_every_samples_time(before, after, tmp_path):
    (tmp_path / "a.mov").write_bytes(sounding(96, rate=before, codec="pcm_s16le", form="mov"))
    for start in (0.0, 1.3):
        count = round(0.6 * after)
        found = sound_at(tmp_path, "a.mov", start, count, SoundForm(after, 1)).numpy()[0]
        expected = wave(4.0, after, 1)[0][round(start * after) :][:count]
        assert np.abs(found - expected)[200:-200].max() < 2e-3


def test_a_sound_that_is_shorter_than_its_video_is_followed_by_silence(tmp_path):
    write_files(tmp_path, {"videos/a.mp4": sounding(121, seconds=2.5)})
    write_rows(tmp_path / "rows.jsonl", [row("a", 121, "tones")])
    summary, dataset = prepared(tmp_path, tmp_path / "out")
    assert summary.silent == {PARTLY: 1, BEYOND_TRACK: 2}
    assert summary.sounding == {"train": 3, "heldout": 0} and summary.windows["train"] == 5
    assert [one["sound"] is not None for one in dataset.iter_rows()] == [True, True, True, False, False]
    assert dataset.sounding("train").tolist() == [0, 1, 2]
    last = dataset.waveform(dataset.row(2)).numpy()
    assert pitch(last[0, 2400:22000], 48000) == pytest.approx(TONES[2], abs=2)
    assert last.shape == (2, 50000) and not last[:, 26000:].any()
    with pytest.raises(UserError, match=r"a\.mp4: no sound from 3\.000 to 4\.042 s"):
        dataset.waveform(dataset.row(3))


def test_a_sound_that_begins_late_is_preceded_by_silence(tmp_path):
    (tmp_path / "a.mp4").write_bytes(sounding(96, late=1.5, seconds=2.0))
    track = track_of(tmp_path, "a.mp4")
    assert track.start == pytest.approx(1.5, abs=0.03) and track.end == pytest.approx(3.5, abs=0.03)
    found = sound_at(tmp_path, "a.mp4", 1.0, 96000, FORM).numpy()
    assert not found[:, :21000].any()
    assert pitch(found[0, 30000:70000], 48000) == pytest.approx(TONES[0], abs=2)
    assert pitch(found[0, 76000:94000], 48000) == pytest.approx(TONES[1], abs=2)


@pytest.mark.parametrize("codec", ["flac", "libopus", "aac"])
def test_containers_that_write_milliseconds_have_no_gaps(codec, tmp_path):
    (tmp_path / "a.mkv").write_bytes(sounding(96, codec=codec, form="matroska"))
    assert track_of(tmp_path, "a.mkv") == pytest.approx(Track(48000, 2, 0.0, 4.0), abs=0.02)
    found = sound_at(tmp_path, "a.mkv", 1.1, 38400, FORM).numpy()[0]
    times = np.arange(38400) / 48000
    basis = np.stack([np.sin(2 * np.pi * 700 * times), np.cos(2 * np.pi * 700 * times)])
    fit = np.linalg.lstsq(basis.T, found, rcond=None)[0] @ basis
    assert np.abs(found - fit).max() < 0.02, "one sine from end to end"


def spoilt(video: bytes, tmp_path) -> bytes:
    """The same file with nothing but 0xFF where its sound was."""
    (tmp_path / "whole").write_bytes(video)
    content = bytearray(video)
    with av.open(str(tmp_path / "whole")) as container:
        for packet in container.demux(audio=0):
            if packet.size:
                content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    return bytes(content)


def test_clips_without_sound_are_counted_and_stay_for_tasks_without_it(tmp_path):
    videos = {
        "videos/mute.mp4": mp4(25),
        "videos/good.mp4": sounding(25),
        "videos/bad.mp4": spoilt(sounding(25), tmp_path),
    }
    write_files(tmp_path, videos)
    write_rows(tmp_path / "rows.jsonl", [row(stem, 25, stem) for stem in ("mute", "good", "bad")])
    summary, dataset = prepared(tmp_path, tmp_path / "out")
    assert summary.windows["train"] == 3 and summary.silent == {NO_TRACK: 1, BAD_TRACK: 1}
    assert summary.examples[NO_TRACK] == "mute" and "bad.mp4" in summary.examples[BAD_TRACK]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["sounding"], card["silent"]) == (summary.sounding, summary.silent)
    assert prepare(video_card(**SECOND), video_card(**SECOND).clips(), tmp_path, tmp_path / "out",
                   heldout_fraction=0.0, progress=False).silent == summary.silent  # fmt: skip
    heard = Dataset(prepared="out", tasks={"text_to_video_sound": 1.0, "text_to_video": 1.0})
    assert usable_windows(dataset, heard, "train") == [1]
    mixture = Mixture({"scenes": (dataset, heard)}, seed=0)
    assert mixture.windows == 1
    samples = [mixture.sample(number) for number in range(8)]
    assert {sample.caption for sample in samples} == {"good"}
    for sample in samples:
        assert (sample.waveform is not None) == (sample.task == "text_to_video_sound")
        assert sample.sound is None and sample.frames.shape[0] == 25
    seen = Mixture({"scenes": (dataset, Dataset(prepared="out", tasks={"text_to_video": 1.0}))}, seed=0)
    assert {seen.sample(number).caption for number in range(9)} == {"mute", "good", "bad"}


def test_a_set_without_any_sound_is_refused_for_a_task_with_it(tmp_path):
    write_files(tmp_path, {"videos/a.mp4": mp4(25)})
    write_rows(tmp_path / "rows.jsonl", [row("a", 25, "words")])
    _, dataset = prepared(tmp_path, tmp_path / "out")
    entry = Dataset(prepared="out", tasks={"image_to_video_sound": 1.0})
    with pytest.raises(UserError, match=r"'image_to_video_sound' needs sound, and none of the 1 windows .*; leave"):
        Mixture({"scenes": (dataset, entry)}, seed=0)


def test_rows_of_before_sound_was_noted_are_read_and_say_so(tmp_path):
    write_files(tmp_path, {"videos/a.mp4": sounding(25)})
    write_rows(tmp_path / "rows.jsonl", [row("a", 25, "words")])
    prepared(tmp_path, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("windows-*.parquet")
    table = pq.read_table(path).drop_columns(["sound", "sound_caption"])
    pq.write_table(table.replace_schema_metadata(None), path)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    del card["sounding"], card["silent"]
    (tmp_path / "out" / "card.json").write_text(json.dumps(card))
    summary, dataset = prepared(tmp_path, tmp_path / "out")
    assert summary.reused and dataset.row(0)["sound"] is None
    assert dataset.sample("train", 0, "text_to_video", 0).frames.shape[0] == 25
    entry = Dataset(prepared="out", tasks={"video_to_sound": 1.0})
    with pytest.raises(UserError, match=r"out does not say which rows have it; prepare it again with --fresh"):
        Mixture({"scenes": (dataset, entry)}, seed=0)


def test_sound_and_its_words_from_archives(tmp_path):
    members = {"1.mp4": sounding(49), "1.json": {"caption": "a bell", "caption_audio": "it rings"}}
    members |= {"2.mp4": sounding(49), "2.json": {"caption": "a horn"}, "3.mp4": mp4(49), "3.json": {"caption": "x"}}
    write_tar(tmp_path / "shard.tar", members)
    card = video_card(format="webdataset", captions=["caption"], sound_captions=["caption_audio"], **SECOND)
    summary, dataset = prepared(tmp_path, tmp_path / "out", card)
    assert summary.silent == {NO_TRACK: 2} and summary.sounding["train"] == 4
    rows = list(dataset.iter_rows())
    assert [one["sound_caption"] for one in rows] == ["it rings", "it rings", "", "", None, None]
    for one in rows[:4]:
        tone = TONES[one["start"] // 24]
        assert pitch(middle(dataset.waveform(one))[0], 48000) == pytest.approx(tone, abs=1)
    sample = dataset.sample("train", 0, "text_to_video_sound", 0)
    assert sample.sound_caption == "it rings" and sample.waveform.shape == (2, 50000)


def test_frames_that_are_left_out_leave_no_sound_out(tmp_path):
    """Every second frame of two seconds: 25 frames at 12 a second, and all that is heard meanwhile."""
    write_files(tmp_path, {"videos/a.mp4": sounding(72)})
    windows = [{"start_frame": 0, "end_frame": 71, "temporal_interval": 2, "caption": "tones"}]
    write_rows(tmp_path / "rows.jsonl", [{**row("a", 72), "t2w_windows": windows}])
    _, dataset = prepared(tmp_path, tmp_path / "out")
    found = dataset.waveform(dataset.row(0)).numpy()
    assert found.shape == (2, 100000)
    assert [pitch(found[0, at : at + 40000], 48000) for at in (4000, 52000)] == pytest.approx(TONES[:2], abs=1)
