"""Conversations with images and videos: the published layouts, what is left out, and what is read."""

import io
import json
import logging
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from cosmos3_train.config import UserError
from cosmos3_train.data.card import DatasetCard, PictureOptions, load_card
from cosmos3_train.data.conversations import open_conversations
from cosmos3_train.data.image_bytes import decode_images
from cosmos3_train.data.scan import Scan, scan_talks
from cosmos3_train.data.talk import NoTalk, Reference, parse_talk
from cosmos3_train.data.talk_index import index_talks
from cosmos3_train.data.talk_pictures import frame_numbers, read_picture
from cosmos3_train.data.unusable import Unusable
from tests.data.talks import (
    llava_row,
    picture_bytes,
    write_llava,
    write_video,
    write_videophy,
    write_videophy_tables,
)
from tests.data.test_fuzz import BYTES, retyped

CARD = DatasetCard(name="seen", format="conversations")
ROOT = Path(__file__).parents[2]
ASK, SAY = {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cup."}
TEXT = {"type": "text", "text": "What?"}
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def of(row):
    talk = parse_talk(row)
    return talk.messages[0]["content"], [(r.kind, r.path or r.content) for r in talk.pictures]


@pytest.mark.parametrize(
    ("row", "content", "pictures"),
    [
        ({"messages": [ASK, SAY], "image": "a.jpg"}, [IMAGE, TEXT], [("image", "a.jpg")]),
        ({"messages": [ASK, SAY], "images": [{"bytes": b"x"}]}, [IMAGE, TEXT], [("image", b"x")]),
        ({"messages": [ASK, SAY], "images": [{"bytes": None, "path": "b/c.png"}]},
         [IMAGE, TEXT], [("image", "b/c.png")]),
        ({"messages": [{**ASK, "content": "What?"}, SAY], "video": "v.mp4"}, [VIDEO, TEXT], [("video", "v.mp4")]),
        ([{**ASK, "content": [{**IMAGE, "image": "a.jpg"}, TEXT]}, SAY], [IMAGE, TEXT], [("image", "a.jpg")]),
        ({"messages": [{**ASK, "content": [{**VIDEO, "video": "video_0"}, TEXT]}, SAY], "videos": ["m/7.mp4"]},
         [VIDEO, TEXT], [("video", "m/7.mp4")]),
        ({"conversations": [{"from": "human", "value": "A <image>\nB\n<image>"}, {"from": "gpt", "value": "C"}],
          "image": ["1.jpg", "2.jpg"]},
         [{"type": "text", "text": "A "}, IMAGE, {"type": "text", "text": "B"}, IMAGE],
         [("image", "1.jpg"), ("image", "2.jpg")]),
        ({"conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "C"}],
          "video": "v.mp4"}, [VIDEO, TEXT], [("video", "v.mp4")]),
        ([{**ASK, "content": "The tag <image> is HTML?"}, SAY], "The tag <image> is HTML?", []),
        ([{**ASK, "content": [TEXT]}, SAY], "What?", []),
        ([{**ASK, "weight": None, "content": [{**TEXT, "image": None}]}, SAY], "What?", []),
        ({"messages": [{**ASK, "content": "<video><image>What?"}, SAY], "image": "a.jpg", "video": "v.mp4"},
         [VIDEO, IMAGE, TEXT], [("video", "v.mp4"), ("image", "a.jpg")]),
        *(({"messages": [{**ASK, "content": "What?"}, SAY], key: value}, "What?", [])
          for key in ("image", "images", "video", "videos")
          for value in (None, [], "", {}, {"bytes": None, "path": None})),
        ({"messages": [ASK, SAY], "image": [], "images": ["a.jpg"]}, [IMAGE, TEXT], [("image", "a.jpg")]),
        ({"messages": None, "conversations": [ASK, SAY], "image": "a.jpg"}, [IMAGE, TEXT], [("image", "a.jpg")]),
        ({"messages": [{**ASK, "content": [{**IMAGE, "image": "a.jpg"}, TEXT]}, SAY], "images": None},
         [IMAGE, TEXT], [("image", "a.jpg")]),
    ],
)  # fmt: skip
def test_rows(row, content, pictures):
    assert of(row) == (content, pictures)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ASK, SAY], "images": ["a.jpg", "b.jpg"]}, "do not match: 1 pictures more"),
        ({"messages": [{**ASK, "content": "<image><image>"}, SAY], "images": ["a.jpg"]}, "fewer images"),
        ([{**ASK, "content": [IMAGE]}, SAY], "the words name an image that is not there"),
        ({"messages": [ASK, SAY], "image": "../a.jpg"}, "outside the set's folder: '../a.jpg'"),
        ({"messages": [ASK, SAY], "image": "/etc/passwd"}, "outside"),
        ({"messages": [ASK, SAY], "image": "file:///etc/passwd"}, "outside"),
        ({"messages": [ASK, SAY], "image": "https://a.b/c.jpg"}, "outside"),
        ({"messages": [ASK, SAY], "image": "x/../../a.jpg"}, "outside"),
        ({"messages": [ASK, SAY], "image": "..\\a.jpg"}, "outside"),
        ({"messages": [ASK, SAY], "image": 7}, "that is not there"),
        *(
            ({"messages": [ASK, SAY], "image": value}, "the words name an image that is not there")
            for value in (None, [], "", {}, {"bytes": None, "path": None}, False, {"url": "a"})
        ),
        *(
            ({"messages": [{**ASK, "content": "<video>What?"}, SAY], key: value}, "a video that is not there")
            for key in ("video", "videos")
            for value in (None, [])
        ),
        *(
            ({"messages": [ASK, SAY], "images": [value, "a.jpg"]}, "'images' holds an empty entry")
            for value in (None, "", {})
        ),
        ({"messages": [{**ASK, "content": "What?"}, SAY], "image": [None]}, "'image' holds an empty entry"),
        *(
            ([{**ASK, "content": [{**IMAGE, "image": value}]}, SAY], "that is not there")
            for value in (None, [], "", {})
        ),
    ],
)
def test_pictures_that_cannot_be_used(row, words):
    with pytest.raises(Unusable, match=words):
        parse_talk(row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": []}, "a non-empty list of messages is expected"),
        ({"conversations": None}, "'conversations' is null"),
        ({"messages": None, "conversations": None}, "'messages' is null"),
        (None, "a non-empty list"),
        (7, "a non-empty list"),
        ([None], "message 0: exactly the keys"),
        ([{**ASK, "content": None}], "message 0: exactly the keys"),
        ([{**ASK, "content": []}], "message 0: content is neither words nor a list"),
        ([{**ASK, "content": [None]}], "message 0: a part is none of"),
        ([{**ASK, "content": [{"type": None}]}], "message 0: a part is none of"),
        ([{"from": "bot", "value": "a"}], "role 'bot'"),
    ],
)
def test_rows_that_are_no_conversation(row, words):
    with pytest.raises(NoTalk, match=words):
        parse_talk(row)


def test_nulls_in_files_of_each_layout(tmp_path):
    def change(row):
        number = int(row["id"][4:])
        return row | ({"conversations": None} if number == 0 else {"image": None} if number == 1 else {})

    index = index_talks(CARD, write_llava(tmp_path / "llava", 6, change), None)
    assert index.dropped == {"no conversation": 1, "its words and its pictures do not match": 1}
    assert "row 0: 'conversations' is null" in index.examples["no conversation"]
    root = write_videophy(tmp_path / "phy", train=3, val=0) / "videophy2_train"
    (root / "text" / "conversation_0.json").write_text('{"conversations": null}')
    entries = json.loads((root / "meta.json").read_text())
    entries[1] |= {"media": [None]}
    entries[2] |= {"media": None, "conversation": None}  # where the layout puts them
    (root / "meta.json").write_text(json.dumps(entries))
    index = index_talks(CARD, root, None)
    assert index.dropped == {"no conversation": 1, "its words and its pictures do not match": 1}
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": null}')
    with pytest.raises(UserError, match="line 1: 'messages' is null"):
        index_talks(CARD, path, None)
    path.write_text(json.dumps({"messages": [ASK, SAY], "image": []}))
    with pytest.raises(UserError, match=r"its words and its pictures do not match, such as .*that is not there"):
        index_talks(CARD, path, None)


def shown(dataset, split="train"):
    return [dataset.sample(split, place, "conversation", place) for place in range(dataset.count(split))]


def test_llava_onevision(tmp_path):
    dataset = open_conversations(CARD, write_llava(tmp_path))
    assert (dataset.count("train"), dataset.shows_pictures) == (24, True)
    for number, sample in enumerate(shown(dataset)):
        row = llava_row(number)
        assert sample.messages[1] == {"role": "assistant", "content": f"A thing, {number}."}
        assert sample.key == f"seen/ai2d(gpt4v)/train-0000{number // 12}-of-00002.parquet/{number % 12:06d}"
        if row["image"] is None:
            assert sample.messages[0]["content"] == f"What is {number}?" and not sample.pictures
            continue
        assert sample.messages[0]["content"] == [IMAGE, {"type": "text", "text": f"What is in place {number}?"}]
        (picture,) = sample.pictures
        expected = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert torch.equal(picture.frames[0].permute(1, 2, 0), torch.tensor(expected))


def test_videophy2(tmp_path):
    dataset = open_conversations(CARD, write_videophy(tmp_path), heldout_fraction=0.3)
    assert (dataset.count("train"), dataset.count("heldout")) == (6, 2), "its validation part is what is held out"
    for place, sample in enumerate(shown(dataset)):
        count = 20 + 3 * place
        assert sample.key == f"seen/videophy2_train/{place}"
        assert sample.messages[0]["content"][0] == VIDEO
        (film,) = sample.pictures
        assert film.numbers == frame_numbers(count, 10.0, CARD.pictures) and film.fps == 10.0
        lightness = film.frames.float().mean(dim=(1, 2, 3))
        assert torch.allclose(lightness, 40 + 5.0 * torch.tensor(film.numbers), atol=4)
    alone = open_conversations(CARD, tmp_path / "videophy2_train", heldout_fraction=0.3)
    assert (alone.count("train") + alone.count("heldout"), alone.count("heldout") > 0) == (6, True)


def test_videophy2_s_tables_by_its_card(tmp_path):
    card = load_card(ROOT / "data" / "published" / "videophy2.yaml")
    root = write_videophy_tables(tmp_path / "phy", 6)
    dataset = open_conversations(card, root)
    for place, sample in enumerate(shown(dataset)):
        question = f'It was made for this caption: A cup, number {place},\nfalls "slowly"\n'
        assert sample.key == f"videophy2/train.csv/{place:06d}"
        assert sample.messages[0]["content"][0] == VIDEO and sample.messages[0]["content"][1]["text"].startswith(
            question
        )
        assert sample.messages[1] == {"role": "assistant", "content": str(place % 5 + 1)}
        assert sample.pictures[0].numbers == frame_numbers(20 + 3 * place, 10.0, card.pictures)
    other = replace(card, mapping={**card.mapping, "assistant": "{sa}"})
    assert open_conversations(other, root).fingerprint != dataset.fingerprint
    (root / "videos" / "videos.example.org" / "model_1" / "2.mp4").unlink()
    text = (root / "train.csv").read_text()
    (root / "train.csv").write_text(text.replace("model_0/1.mp4,4,3", "model_0/1.mp4,4,"))
    index = index_talks(card, root, None)
    assert (index.rows.num_rows, sum(index.dropped.values())) == (4, 2), "a video that is gone, a rating that is none"
    wrong = [
        ({}, "train.csv: a CSV table; say in the dataset card's mapping what its rows ask and answer"),
        ({"user": "?"}, "say in the dataset card's mapping"),
        ({**card.mapping, "vide": "x"}, "unknown key 'vide'. Did you mean 'video'"),
        ({**card.mapping, "assistant": "{phys}"}, "no column 'phys', which the card's mapping names"),
    ]
    for mapping, words in wrong:
        with pytest.raises(UserError, match=words):
            open_conversations(replace(card, mapping=mapping), root)
    (root / "train.csv").write_bytes(text.encode()[:-3] + b"\xff\n")
    with pytest.raises(UserError, match=r"train.csv: not a readable CSV table .* fetch it again"):
        open_conversations(card, root)
    with pytest.raises(UserError, match="has a mapping, which is of CSV tables"):
        open_conversations(card, write_llava(tmp_path / "llava", 2))


def test_a_validation_folder_is_never_trained_on(tmp_path):
    write_videophy(tmp_path, train=1, val=2)
    open_conversations(CARD, tmp_path).check_trains()
    (tmp_path / "videophy2_train" / "media" / "video_0.mp4").unlink()
    for source in (tmp_path, tmp_path / "videophy2_val"):
        dataset = open_conversations(CARD, source)
        assert (dataset.count("train"), len(shown(dataset, "heldout"))) == (0, 2)
        with pytest.raises(UserError, match="videophy2_val, which is held out whole by its name; add a folder"):
            dataset.check_trains()


def test_one_bad_row_is_counted_and_ends_nothing(tmp_path):
    root = write_videophy(tmp_path, train=5, val=0) / "videophy2_train"
    entries = json.loads((root / "meta.json").read_text())
    entries[0]["conversation"] = "text/\0.json"
    entries[1]["media"] = "media/\0.mp4"
    entries[2]["media"] = "media/\ud800.mp4"
    (root / "meta.json").write_text(json.dumps(entries))
    talk = root / "text" / "conversation_3.json"
    talk.write_text(talk.read_text().replace("Score", "\\ud800"))
    index = index_talks(CARD, root, tmp_path / "index")
    assert index.rows.num_rows == 1
    assert index.dropped == {"no conversation": 3, "a picture is missing": 1}


@pytest.mark.parametrize("count", [2, 3, 7, 48, 500, 5000])
@pytest.mark.parametrize("fps", [1.0, 12.0, 29.97])
def test_frames_are_those_that_transformers_takes(count, fps):
    processor = Qwen3VLVideoProcessor(max_frames=32)
    theirs = processor.sample_frames(VideoMetadata(total_num_frames=count, fps=fps), fps=2)
    assert frame_numbers(count, fps, PictureOptions()) == tuple(theirs.tolist())


def test_pictures_beside_json_lines_turned_and_of_every_mode(tmp_path):
    turned = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[274] = 6  # to be seen a quarter turned
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("L", (5, 3), 70).save(tmp_path / "grey.png")
    rows = [{"messages": [ASK, SAY], "image": name} for name in ("turned.png", "grey.png")]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = shown(open_conversations(CARD, tmp_path))
    assert first.pictures[0].frames.shape == (1, 3, 6, 4)
    assert second.pictures[0].frames.shape == (1, 3, 3, 5) and second.pictures[0].frames.unique().tolist() == [70]


class Area:
    """Counts tokens by area alone, and does `before` first."""

    fingerprint = "area"

    def __init__(self, before=lambda where: None):
        self.before = before

    def __call__(self, talk, shapes, where):
        self.before(where)
        return 10 + sum(shape.size[0] * shape.size[1] // 1024 for shape in shapes)


def test_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "here.png").write_bytes(picture_bytes(0, form="PNG"))
    (tmp_path / "large.png").write_bytes(picture_bytes(0, (320, 320), "PNG"))
    (tmp_path / "cut.png").write_bytes(picture_bytes(0, form="PNG")[:20])
    write_video(tmp_path / "one.mp4", frames=1)
    rows = [
        {"messages": [ASK, SAY], "image": "here.png"},
        {"messages": [ASK, SAY], "image": "gone.png"},
        {"messages": [ASK, SAY], "image": "gone too.png" + 300 * "x"},
        {"messages": [ASK, SAY], "image": "../here.png"},
        {"messages": [ASK, SAY], "image": "cut.png"},
        {"messages": [ASK, SAY], "image": "large.png"},
        {"messages": [ASK, SAY], "images": ["here.png", "here.png"]},
        {"messages": [{**ASK, "content": "What?"}, SAY], "video": "one.mp4"},
        {"messages": [{**ASK, "content": "What?"}, SAY]},
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = index_talks(CARD, tmp_path, None, measure=Area())
    assert index.dropped == {
        "a picture is missing": 2,
        "a picture is outside the set's folder": 1,
        "a picture cannot be read": 2,
        "its words and its pictures do not match": 1,
    }
    assert "line 2: gone.png" in index.examples["a picture is missing"]
    assert index.rows.num_rows + sum(index.dropped.values()) == len(rows)
    dataset = open_conversations(CARD, tmp_path, measure=Area(), most_tokens=50)
    assert (dataset.count("train"), dataset.left_out) == (2, 1)
    assert dataset.fingerprint != open_conversations(CARD, tmp_path, measure=Area()).fingerprint
    with pytest.raises(UserError, match="all 3 conversations have more than 9 tokens, the shortest 10"):
        open_conversations(CARD, tmp_path, measure=Area(), most_tokens=9)


def test_damage_that_a_header_does_not_show_is_named_when_it_is_read(tmp_path):
    content = picture_bytes(0, (200, 200))
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": [ASK, SAY], "image": "cut.jpg"}))
    dataset = open_conversations(CARD, tmp_path)
    with pytest.raises(UserError, match=r"talk\.jsonl, line 1: a picture cannot be read: cut\.jpg.*check CARD --scan"):
        dataset.sample("train", 0, "conversation", 0)


@pytest.mark.slow  # its workers import torch
def test_an_index_is_the_same_for_any_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("cosmos3_train.data.talk_index.BLOCK_ROWS", 5)
    source = write_llava(tmp_path / "set")
    one, two = tmp_path / "one", tmp_path / "two"
    index_talks(CARD, source, one)
    index_talks(CARD, source, two, workers=2)
    assert [path.read_bytes() for path in sorted(one.iterdir())] == [p.read_bytes() for p in sorted(two.iterdir())]
    assert not list(tmp_path.glob("*.partial"))


def test_an_index_is_kept_and_made_anew_of_other_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("cosmos3_train.data.talk_index.BLOCK_ROWS", 5)
    source, one = write_llava(tmp_path / "set"), tmp_path / "one"
    assert not index_talks(CARD, source, one).reused
    assert index_talks(CARD, source, one).reused
    counted = index_talks(CARD, source, one, measure=Area())
    assert not counted.reused and counted.column("tokens").min() == 10
    assert index_talks(CARD, source, one).column("tokens").min() == 10
    other = Area()
    other.fingerprint = "of another model"
    assert not index_talks(CARD, source, one, measure=other).reused
    other = replace(CARD, pictures=PictureOptions(most_pixels=10_000))
    assert not index_talks(other, source, one).reused
    assert not index_talks(other, source, one, fresh=True).reused
    write_llava(tmp_path / "set", rows=20)
    assert index_talks(other, source, one).rows.num_rows == 20
    (one / "card.json").write_text('{"settings": {}, "fingerprint": ""}')
    with pytest.raises(UserError, match="holds rows that are no conversations; name another"):
        index_talks(other, source, one)


def test_a_killed_index_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("cosmos3_train.data.talk_index.BLOCK_ROWS", 5)
    source, seen = write_llava(tmp_path / "set"), []

    def killed(where):
        if len(seen) == 8:
            raise KeyboardInterrupt
        seen.append(where)

    with pytest.raises(KeyboardInterrupt):
        index_talks(CARD, source, tmp_path / "index", measure=Area(killed))
    again = []
    index_talks(CARD, source, tmp_path / "index", measure=Area(again.append))
    assert len(again) == 24 - 5 and len(set(again) | set(seen)) == 24


def test_a_picture_that_was_missing_is_taken_when_it_comes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cosmos3_train.data.talk_index.MOST_FAULTY", 3)
    source, folder = tmp_path / "set", tmp_path / "index"
    source.mkdir()
    names = ["a.png", "b.png", "b.png", "x\0.png", f"{'y' * 5000}.png", *(f"c/{number}.png" for number in range(4))]
    rows = [{"messages": [ASK, SAY], "image": name} for name in names]
    (source / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):  # an index that nothing is in keeps no block that would be believed
        with pytest.raises(
            UserError, match=r"9 × a picture is missing.*; fetch or mend them: cosmos3 check CARD --scan"
        ):
            index_talks(CARD, source, folder)
    (source / "a.png").write_bytes(picture_bytes(0, form="PNG"))
    assert index_talks(CARD, source, folder).rows.num_rows == 1
    told = json.loads((folder / "card.json").read_text())["faulty"]
    assert told == {"b.png": [], "x\0.png": [], "c/0.png": []}
    monkeypatch.setattr(logging.getLogger("cosmos3_train"), "propagate", True)  # a command's test turns it off
    with caplog.at_level("INFO", "cosmos3_train"):
        dataset = open_conversations(CARD, source, folder)
    assert dataset.index.reused and "left out 8 × a picture is missing, such as" in caplog.text
    (source / "b.png").write_bytes(picture_bytes(1, form="PNG"))
    with caplog.at_level("INFO", "cosmos3_train"):
        assert open_conversations(CARD, source, folder, settled=True).count("train") == 1
    assert "pictures that were left out have come or changed; cosmos3 prepare looks again" in caplog.text
    index = index_talks(CARD, source, folder)
    assert (index.reused, index.rows.num_rows, index.dropped) == (False, 3, {"a picture is missing": 6})
    assert index_talks(CARD, source, folder).reused


def test_a_picture_that_could_not_be_read_is_taken_when_it_is_mended(tmp_path):
    source, folder = tmp_path / "set", tmp_path / "index"
    source.mkdir()
    (source / "here.png").write_bytes(picture_bytes(0, form="PNG"))
    (source / "cut.png").write_bytes(picture_bytes(1, form="PNG")[:20])
    write_video(source / "film.mp4", frames=1)
    rows = [{"messages": [ASK, SAY], "image": name} for name in ("here.png", "cut.png")]
    rows.append({"messages": [{**ASK, "content": "What?"}, SAY], "video": "film.mp4"})
    (source / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = index_talks(CARD, source, folder, measure=Area())
    assert (index.rows.num_rows, index.dropped) == (1, {"a picture cannot be read": 2})
    assert index_talks(CARD, source, folder, measure=Area()).reused
    (source / "cut.png").write_bytes(picture_bytes(1, form="PNG"))
    assert index_talks(CARD, source, folder, measure=Area()).rows.num_rows == 2
    (source / "film.mp4").unlink()  # as a copy does that is whole or not there
    write_video(source / "film.mp4", frames=8)
    index = index_talks(CARD, source, folder, measure=Area())
    assert (index.reused, index.rows.num_rows, index.dropped) == (False, 3, {})


def test_unfinished_blocks_see_a_picture_that_came_and_fresh_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("cosmos3_train.data.talk_index.BLOCK_ROWS", 1)
    source = tmp_path / "set"
    source.mkdir()
    for name in "ac":
        (source / f"{name}.png").write_bytes(picture_bytes(0, form="PNG"))
    rows = [{"messages": [ASK, SAY], "image": f"{name}.png"} for name in "abc"]
    (source / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def stop(where):
        if "line 3" in where:
            raise KeyboardInterrupt

    def killed(**options):
        with pytest.raises(KeyboardInterrupt):
            index_talks(CARD, source, tmp_path / "index", measure=Area(stop), **options)

    killed()
    (source / "b.png").write_bytes(picture_bytes(1, form="PNG"))
    seen = []
    index = index_talks(CARD, source, tmp_path / "index", measure=Area(seen.append))
    assert (index.rows.num_rows, index.dropped) == (3, {})
    assert [where[-6:] for where in seen] == ["line 2", "line 3"], "the first block was kept"
    killed(fresh=True)
    seen.clear()
    index_talks(CARD, source, tmp_path / "index", measure=Area(seen.append), fresh=True)
    assert len(seen) == 3


def test_what_was_prepared_inside_a_set_is_no_part_of_it(tmp_path):
    part = write_llava(tmp_path) / "ai2d(gpt4v)"
    (part / "card.json").write_text('{"settings": {}}')  # of the set's own
    for folder in (tmp_path / "index", tmp_path / "index2", part / "index3"):
        assert index_talks(CARD, tmp_path, folder).rows.num_rows == 24
        assert open_conversations(CARD, tmp_path, folder).index.reused
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "talk.jsonl").write_text(json.dumps([{**ASK, "content": "What?"}, SAY]))
    work = lines / "index.partial"  # of a command that was killed
    (work / "blocks").mkdir(parents=True)
    (work / "fingerprint").write_text("")
    shutil.copy(tmp_path / "index" / "conversations.parquet", work / "blocks" / "00000.parquet")
    for _ in range(2):
        assert open_conversations(CARD, lines, lines / "index").source.files == ("talk.jsonl",)
    for source in (lines, lines / "talk.jsonl"):
        with pytest.raises(UserError, match="holds the set itself; name another folder"):
            index_talks(CARD, source, lines)


def test_rows_of_a_command_that_was_killed_are_no_part_of_the_set_they_lie_in(tmp_path, monkeypatch):
    source, replace_file = write_llava(tmp_path), Path.replace

    def killed(self, target):
        if target.name == "conversations.parquet":
            replace_file(self, target)
            raise KeyboardInterrupt
        return replace_file(self, target)

    for fresh in (False, True):  # the second over an index that is whole
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(Path, "replace", killed)
            index_talks(CARD, source, source / "index", fresh=fresh)
        index = index_talks(CARD, source, source / "index")
        assert (index.reused, index.rows.num_rows) == (False, 24)


def test_a_folder_is_no_meta_json(tmp_path):
    (tmp_path / "meta.json").mkdir()
    with pytest.raises(UserError, match="holds no rows that are read here"):
        index_talks(CARD, tmp_path, None)


def test_other_peoples_folders_hold_no_index(tmp_path):
    source = write_llava(tmp_path / "set")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a prepared folder; choose another"):
        index_talks(CARD, source, tmp_path / "mine", fresh=True)
    mine = tmp_path / "out.partial" / "half_a_download"
    mine.parent.mkdir()
    mine.write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"out\.partial: blocks are kept there while they are made; move it away"):
            index_talks(CARD, source, tmp_path / "out", fresh=fresh)
    assert mine.read_text() == "mine"
    mine.rename(tmp_path / "moved")
    assert index_talks(CARD, source, tmp_path / "out").rows.num_rows and not mine.parent.exists()


def test_names_may_hold_a_hash(tmp_path):
    (tmp_path / "a#1.png").write_bytes(picture_bytes(0, form="PNG"))
    write_video(tmp_path / "part#2" / "v#3.mp4")
    row = {"messages": [{**ASK, "content": "<video><image>What?"}, SAY], "image": "a#1.png", "video": "part#2/v#3.mp4"}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row))
    dataset = open_conversations(CARD, tmp_path, measure=Area())
    (sample,) = shown(dataset)
    assert [picture.frames.shape for picture in sample.pictures] == [(6, 3, 48, 64), (1, 3, 48, 64)]
    scan = Scan()
    assert not list(scan_talks(dataset.source, CARD.pictures, scan)) and scan.frames == 2


def png(width, height, compressed=b""):
    """A PNG's header and what stands behind it: no more bytes, however large the picture."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8192), (30_000, 30_000)])  # over ours, and over Pillow's own
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_counted_and_never_decoded(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    (tmp_path / "least.png").write_bytes(png(8192, 8192))
    rows = [{"messages": [ASK, SAY], "image": name} for name in ("bomb.png", "least.png")]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = index_talks(CARD, tmp_path, None, measure=Area())
    assert (index.rows.num_rows, index.dropped) == (1, {"a picture has more pixels than are read": 1})
    assert "line 1: bomb.png: " in index.examples["a picture has more pixels than are read"]
    (tmp_path / "least.png").write_bytes(picture_bytes(0, form="PNG"))
    dataset = open_conversations(CARD, tmp_path)
    with pytest.raises(UserError, match=r"line 1: a picture has more pixels than are read: bomb\.png"):
        dataset.sample("train", 0, "conversation", 0)
    found = [finding.kind for finding in scan_talks(dataset.source, CARD.pictures, Scan())]
    assert found == ["a picture has more pixels than are read"]


def test_a_log_s_picture_of_too_many_pixels_is_never_decoded():
    with pytest.raises(UserError, match=r"camera, picture 1: .*Image size .900000000 pixels. exceeds"):
        decode_images([picture_bytes(0), png(30_000, 30_000)], "camera")
    with pytest.raises(UserError, match="camera, picture 0: 8193 x 8192 pixels"):
        decode_images([png(8192, 8193)], "camera")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pictures_are_turned_as_they_are_to_be_seen(tmp_path, orientation, mode):
    image = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)).convert(mode)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path, Reference("image", "a.png"), PictureOptions())
    rgb = torch.tensor(np.array(image.convert("RGB")))
    turned = {
        1: rgb, 2: rgb.flip(1), 3: rgb.rot90(2), 4: rgb.flip(0), 5: rgb.transpose(0, 1), 6: rgb.rot90(-1),
        7: rgb.rot90(2).transpose(0, 1), 8: rgb.rot90(1),
    }  # fmt: skip
    assert torch.equal(picture.frames[0].permute(1, 2, 0), turned[orientation])


def test_a_folder_of_two_sets(tmp_path):
    write_llava(tmp_path)
    (tmp_path / "talk.jsonl").write_text(json.dumps([{**ASK, "content": "What?"}, SAY]))
    with pytest.raises(UserError, match=r"holds talk\.jsonl and ai2d\(gpt4v\)/train-00000-.* name one of the"):
        open_conversations(CARD, tmp_path)
    assert open_conversations(CARD, tmp_path / "talk.jsonl").count("train") == 1


def test_an_index_is_made_anew_of_other_words_of_the_same_length(tmp_path):
    root, folder = write_videophy(tmp_path, train=2, val=0) / "videophy2_train", tmp_path / "index"
    before = index_talks(CARD, root, folder).column("content").tolist()
    text = root / "text" / "conversation_1.json"
    text.write_text(text.read_text().replace("Score", "Judge"))
    index = index_talks(CARD, root, folder)
    assert not index.reused and index.column("content")[0] == before[0] and index.column("content")[1] != before[1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "meta.json").write_text("{"), r"meta\.json: not valid JSON"),
        (lambda root: (root / "meta.json").write_text("[7]"), r"meta\.json: a list of mappings"),
        (lambda root: (root / "meta.json").write_text('[{"id": 0, "conversation": "../../x.json"}]'), "no path inside"),
        (lambda root: (root / "text" / "conversation_0.json").unlink(), "cannot be read"),
        (lambda root: (root / "text" / "conversation_0.json").write_text("[1"), "not valid JSON"),
    ],
)
def test_damaged_videophy(tmp_path, damage, words):
    write_videophy(tmp_path, train=1, val=0)
    damage(tmp_path / "videophy2_train")
    with pytest.raises(UserError, match=words):
        open_conversations(CARD, tmp_path / "videophy2_train")


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = sorted(write_llava(tmp_path).rglob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet: not a readable Parquet file"):
        open_conversations(CARD, tmp_path)


def beside(folder):
    """JSON lines with a JPEG, a PNG and an mp4 beside."""
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture_bytes(1))
    (folder / "b.png").write_bytes(picture_bytes(2, form="PNG"))
    write_video(folder / "c.mp4")
    rows = [
        {"messages": [ASK, SAY], "image": "a.jpg"},
        {"messages": [ASK, SAY], "image": "b.png"},
        {"messages": [{**ASK, "content": [VIDEO, TEXT]}, SAY], "video": "c.mp4"},
    ]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "pattern", "damages"),
    [
        (write_llava, "**/*.parquet", BYTES),
        pytest.param(write_videophy, "**/*.mp4", BYTES, marks=pytest.mark.long),
        (write_videophy, "**/*.json", (*BYTES, retyped)),
        (beside, "*.jsonl", (*BYTES, retyped)),
        (beside, "*.jpg", BYTES),
        pytest.param(beside, "*.png", BYTES, marks=pytest.mark.long),
        pytest.param(beside, "*.mp4", BYTES, marks=pytest.mark.long),
    ],
)
def test_damage_is_an_error_in_one_line_or_counted(tmp_path, make, pattern, damages):
    pristine, outcomes = make(tmp_path / "pristine"), Counter()
    whole = open_conversations(CARD, pristine, measure=Area()).index.rows.num_rows
    for number in range(30):
        random, folder = Random(f"{pattern} {number}"), tmp_path / str(number)
        shutil.copytree(pristine, folder)
        path = random.choice(sorted(folder.glob(pattern)))
        path.write_bytes(random.choice(damages)(path.read_bytes(), random))
        try:
            dataset = open_conversations(CARD, folder, measure=Area())
            index = dataset.index
            gone = whole - index.rows.num_rows
            assert gone <= sum(index.dropped.values()) or pattern.endswith("l") or "meta" in path.name, "gone, not told"
            shown(dataset), shown(dataset, "heldout")
            outcomes["read" if not gone else "counted"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            outcomes["refused"] += 1
        shutil.rmtree(folder)
    assert outcomes["refused"] + outcomes["counted"] > 5, outcomes
