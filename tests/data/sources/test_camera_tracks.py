"""Clips with a camera track: the track in every way it may be written becomes the same nine channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cosmos3_train.config import Recorded, UserError, load_embodiment
from cosmos3_train.data import poses
from cosmos3_train.data.card import DatasetCard, load_card
from cosmos3_train.data.prepare import SHORT, prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.scan import Scan, scan_log
from cosmos3_train.data.sources import open_log
from cosmos3_train.data.sources.camera_tracks import COLUMN, NO_TRACK, UNEVEN
from cosmos3_train.data.sources.clips import NO_CAPTION
from tests.commands.tiny import ROOT
from tests.data.clips import mp4, numbers, write_files, write_tar
from tests.data.logs import embodiment

ROBOT = embodiment(
    action=[],
    recorded=[Recorded("camera", column=COLUMN, form="transform")],
    cameras=["video"],
    state_key=None,
    normaliser="none",
)


def track(seed: int, length: int = 12) -> np.ndarray:
    """[length, 4, 4]: a camera that turns about all axes and drifts."""
    rng = np.random.default_rng(seed)
    angles = np.cumsum(rng.normal(0, 0.05, (length, 3)), axis=0)
    return poses.to_poses(np.cumsum(rng.normal(0, 0.1, (length, 3)), axis=0), poses.to_matrices(angles, "axis_angle"))


def card(**changes) -> DatasetCard:
    mapping = {
        "video": "*video/*.mp4",
        "text": "*meta/*_camera.json",
        "key": "(?:.*/)?([0-9a-f-]+)",
        "track": "camera.frames",
        **changes.pop("mapping", {}),
    }
    given = {"name": "tracks", "format": "camera_tracks", "rate_hz": 10, "constant_caption": "a walk"}
    return DatasetCard(**{**given, "mapping": mapping, **changes})


def make(root, entries, frames=12):
    """A shard with a clip for each list of entries; None for a clip without a track."""
    members = {}
    for number, one in enumerate(entries):
        members[f"video/{number:04x}-ab.mp4"] = mp4(frames, 100 * number, fps=10, size=(96, 96))
        if one is not None:
            members[f"meta/{number:04x}-ab_camera.json"] = {"camera": {"frames": one}, "caption": f"walk {number}"}
    write_tar(root / "shards" / "00000.tar", members)
    return root


def rows_of(source, output, dataset, robot=ROBOT):
    summary = prepare(dataset, robot, source, output, heldout_fraction=0, progress=False)
    prepared = PreparedDataset(output, robot)
    return summary, prepared, list(prepared.iter_rows())


@pytest.mark.parametrize("world_to_camera", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["nested", "flat", "twelve", "keyed"])
def test_however_it_is_written(tmp_path, world_to_camera, transposed, form):
    tracks = [track(0), track(1)]
    written = []
    for places in tracks:
        stored = poses.inverse(places) if world_to_camera else places
        stored = stored[:, :3] if form == "twelve" else stored
        stored = stored.swapaxes(1, 2) if transposed else stored
        rows = stored.tolist() if form in ("nested", "keyed") else stored.reshape(len(stored), -1).tolist()
        written.append([{"k": 1, "extrinsics": row} for row in rows] if form == "keyed" else rows)
    mapping = {"world_to_camera": world_to_camera, "transposed": transposed}
    mapping |= {"pose": "extrinsics"} if form == "keyed" else {}
    _, dataset, rows = rows_of(make(tmp_path / "log", written), tmp_path / "out", card(mapping=mapping))
    assert [(row["episode_index"], row["start"]) for row in rows] == [(e, s) for e in range(2) for s in range(8)]
    for row in rows:
        start = row["start"]
        moves = poses.moves_between(tracks[row["episode_index"]][start : start + 5])
        assert np.allclose(row["action"], moves, atol=1e-5)
        assert row["instruction"] == "a walk"
        first = 100 * row["episode_index"] + start
        assert numbers(dataset.frames(row)) == list(range(first, first + 5))


def test_what_is_left_out_is_counted(tmp_path):
    """A clip without a track, one whose track is shorter than its video; loose files as well as shards."""
    make(tmp_path / "log", [track(0).tolist(), None, track(2, 9).tolist()])
    summary, _, rows = rows_of(tmp_path / "log", tmp_path / "out", card(constant_caption=None, captions=["caption"]))
    assert summary.dropped[NO_TRACK] == 1 and "0001-ab.mp4: no list 'camera.frames'" in summary.examples[NO_TRACK]
    assert summary.dropped[UNEVEN] == 3 and "9 poses, 12 frames" in summary.examples[UNEVEN]
    assert [row["episode_index"] for row in rows] == [0] * 8 + [2] * 5
    assert {row["instruction"] for row in rows} == {"walk 0", "walk 2"}
    loose = {"video/ab.mp4": mp4(12, fps=10), "meta/ab_camera.json": {"camera": {"frames": track(4).tolist()}}}
    write_files(tmp_path / "loose", loose)
    mapping = {"videos": "video/*.mp4", "captions": "meta/*.json"}
    assert len(rows_of(tmp_path / "loose", tmp_path / "out2", card(mapping=mapping))[2]) == 8


def test_left_out_though_the_first_episode_is_short(tmp_path):
    """What opening leaves out is of the log, not of an episode; preparing and scanning tell it once."""
    source = make(tmp_path / "log", [track(0, 3).tolist(), None, track(2).tolist(), track(3).tolist()])
    summary, _, rows = rows_of(source, tmp_path / "out", card())
    assert summary.dropped[NO_TRACK] == 1 and summary.dropped[SHORT] == 1 and len(rows) == 16
    opened = open_log(card(), source)
    found = [finding for finding in scan_log(opened, card(), ROBOT, Scan()) if finding.kind == NO_TRACK]
    assert len(found) == 1 and "0001-ab.mp4: no list" in found[0].words


def test_words_are_as_of_clips(tmp_path):
    """A mapping is one line of JSON, a template is filled, and a clip without what is asked for is counted."""
    source = make(tmp_path / "log", [track(0).tolist(), track(1).tolist()])

    def words(name, **changes):
        summary, _, rows = rows_of(source, tmp_path / name, card(constant_caption=None, **changes))
        return summary, {row["instruction"] for row in rows}

    for number, more in enumerate([{"place": {"kind": "old_hall"}}, {}]):
        entry = {"camera": {"frames": track(number).tolist()}, **more}
        write_files(source, {f"loose/{number:04x}-cd.mp4": mp4(12, fps=10), f"loose/{number:04x}-cd.json": entry})
    loose = {"videos": "loose/*.mp4", "captions": "loose/*.json", "text": "*.json"}
    summary, found = words("json", captions=["place"], mapping=loose)
    assert found == {'{"kind": "old_hall"}'} and summary.dropped[NO_CAPTION] == 1
    assert "0001-cd.mp4: asked for place; it has camera" in summary.examples[NO_CAPTION]
    summary, found = words("template", caption_template="through an {place.kind}", mapping=loose)
    assert found == {"through an old hall"} and summary.dropped[NO_CAPTION] == 1
    assert words("nothing")[1] == {""}
    with pytest.raises(UserError, match="none of 2 clips can be used: 2 × clip or caption window without a caption"):
        words("none", captions=["captoin"])


def test_other_captions_are_another_folder(tmp_path):
    source = make(tmp_path / "log", [track(0).tolist()])
    silent = card(constant_caption=None)
    rows_of(source, tmp_path / "out", silent)
    assert rows_of(source, tmp_path / "out", silent)[0].reused
    with pytest.raises(UserError, match=r"prepared with captions None, now \['caption'\]"):
        rows_of(source, tmp_path / "out", card(constant_caption=None, captions=["caption"]))


@pytest.mark.parametrize(
    ("entries", "changes", "words"),
    [
        ([None], {}, "none of 1 clips can be used: 1 × clip without a camera track .*no JSON at all"),
        ([track(0).tolist()], {"mapping": {"track": "camera.frame"}}, "no list 'camera.frame' in camera, caption"),
        ([track(0).tolist()], {"mapping": {"track": None}}, "mapping.track has no value"),
        ([track(0).tolist()], {"mapping": {"tracks": "x"}}, "mapping.tracks is not known here. Did you mean 'track'"),
        ([track(0).tolist()], {"rate_hz": None}, "rate_hz has no value"),
        ([[[1, 2, 3]] * 12], {}, "frame 0: no pose of 12 or 16 numbers"),
        ([[{"extrinsic": 1}] * 12], {"mapping": {"pose": "extrinsics"}}, "Did you mean 'extrinsic'"),
        ([(2 * track(0)).tolist()], {}, "row 0: .* is no rotation"),
    ],
)
def test_mistakes(tmp_path, entries, changes, words):
    source = make(tmp_path / "log", entries)
    with pytest.raises(UserError, match=words):
        rows_of(source, tmp_path / "out", card(**changes))


def test_the_published_card(tmp_path):
    """The layout that the paper gives, by the card as it stands, at the rate and chunk of its embodiment."""
    published = load_card(ROOT / "data" / "published" / "digital_human_tracks.yaml")
    robot = replace(load_embodiment("camera_tracks", ROOT), chunk=8)
    uuid = "123e4567-e89b-12d3-a456-426614174000"
    entries = [{"intrinsics": [1], "extrinsics": one} for one in poses.inverse(track(3, 20)).tolist()]
    members = {f"video/{uuid}.mp4": mp4(20, fps=30), f"meta/{uuid}_camera.json": {"frames": entries}}
    members |= {f"metas/{uuid}.json": {"lighting": "day"}, f"depth/{uuid}.json": {"fps": 30}}
    write_tar(tmp_path / "log" / "shards" / "a.tar", members)
    _, _, rows = rows_of(tmp_path / "log", tmp_path / "out", published, robot)
    assert robot.width == 9 and len(rows) == 12
    assert np.allclose(rows[5]["action"], poses.moves_between(track(3, 20)[5:14]), atol=1e-5)


def test_every_file_of_a_clip_counts_for_the_fingerprint(tmp_path):
    """The track stands in the second of two files, whose words are the first's."""

    def write(seed):
        files = {
            "meta/ab.json": {"caption": "walk"},
            "meta/ab_camera.json": {"camera": {"frames": track(seed).round(2).tolist()}},
        }
        write_files(tmp_path / "log", {"video/ab.mp4": mp4(12, fps=10), **files})

    dataset = card(mapping={"videos": "video/*.mp4", "captions": "meta/*.json", "key": "(?:.*/)?([0-9a-f]+)"})
    write(0)
    rows_of(tmp_path / "log", tmp_path / "out", dataset)
    assert rows_of(tmp_path / "log", tmp_path / "out", dataset)[0].reused
    write(1)
    with pytest.raises(UserError, match="the log has changed since"):
        rows_of(tmp_path / "log", tmp_path / "out", dataset)
