"""Conversations as JSON lines: both forms, and every line that is none."""

import json

import pytest

from cosmos3_train.config import UserError
from cosmos3_train.data.card import DatasetCard
from cosmos3_train.data.conversations import open_conversations

CARD = DatasetCard(name="talk", format="conversations")

ASK = {"role": "user", "content": "Où est le T ? 目標"}
SAY = {"role": "assistant", "content": "On the left."}


def write(tmp_path, lines):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def said(dataset):
    """The assistant's words of each split."""
    return {
        split: [dataset.sample(split, i, "conversation", 0).messages[1]["content"] for i in range(dataset.count(split))]
        for split in ("train", "heldout")
    }


def test_both_forms_and_empty_lines(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    bare, named = json.dumps([ASK, SAY], ensure_ascii=False), json.dumps({"messages": [system, ASK, SAY]})
    dataset = open_conversations(CARD, write(tmp_path, [bare, "", named]))
    assert dataset.count("train") == 2 and dataset.count("heldout") == 0
    first, second = (dataset.sample("train", index, "conversation", 9) for index in range(2))
    assert first.messages == [ASK, SAY]
    assert second.messages == [system, ASK, SAY]
    assert (first.key, second.key, first.number) == ("talk/line_000001", "talk/line_000003", 9)


def test_heldout_lines(tmp_path):
    path = write(tmp_path, [json.dumps([ASK, {**SAY, "content": str(i)}]) for i in range(50)])
    words = said(open_conversations(CARD, path, heldout_fraction=0.2))
    assert sorted(int(word) for split in words.values() for word in split) == list(range(50))
    assert 0 < len(words["heldout"]) < 25
    assert open_conversations(CARD, path, heldout_fraction=0.001).count("heldout") == 1


def test_adding_and_moving_lines_moves_no_other(tmp_path):
    lines = [json.dumps([ASK, {**SAY, "content": str(i)}]) for i in range(60)]
    before = said(open_conversations(CARD, write(tmp_path, lines[:50]), heldout_fraction=0.2))
    more = said(
        open_conversations(CARD, write(tmp_path, [lines[55], *lines[49::-1], *lines[50:55]]), heldout_fraction=0.2)
    )
    for split in ("train", "heldout"):
        assert set(before[split]) == {words for words in more[split] if int(words) < 50}


def test_copies_of_a_conversation_are_on_one_side_however_they_are_written(tmp_path):
    turns = [[ASK, {**SAY, "content": str(i)}] for i in range(40)]
    forms = (
        json.dumps,
        lambda talk: json.dumps({"messages": talk}, ensure_ascii=False, indent=None, separators=(",", ":")),
        lambda talk: json.dumps([dict(reversed(message.items())) for message in talk]),
    )
    (tmp_path / "one").mkdir()
    first = said(
        open_conversations(CARD, write(tmp_path, [form(t) for form in forms for t in turns]), heldout_fraction=0.3)
    )
    assert not set(first["train"]) & set(first["heldout"])
    assert len(first["heldout"]) == 3 * len(set(first["heldout"])) > 0
    path = write(tmp_path / "one", [json.dumps(t) for t in turns])
    assert set(
        said(open_conversations(CARD, path.rename(path.with_name("b.jsonl")), heldout_fraction=0.3))["heldout"]
    ) == (set(first["heldout"])), "nor does it matter which file it stands in"


def test_copies_alone_are_never_held_out(tmp_path):
    for number in range(8):
        line = json.dumps([ASK, {**SAY, "content": str(number)}])
        dataset = open_conversations(CARD, write(tmp_path, [line] * 5), heldout_fraction=0.9)
        assert (dataset.count("train"), dataset.count("heldout")) == (5, 0)


def test_a_folder_with_one_file(tmp_path):
    path = write(tmp_path, [json.dumps([ASK, SAY])])
    (tmp_path / "ratings.csv").write_text("of,another\n1,2\n")
    assert open_conversations(CARD, tmp_path).source.files == (path.name,)
    (tmp_path / "more.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds 2 \.jsonl files"):
        open_conversations(CARD, tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not valid JSON"),
        (json.dumps({"mesages": []}), "line 2: no 'messages'"),
        (json.dumps([]), "line 2: a non-empty list"),
        (json.dumps([{"role": "user"}]), "line 2: message 0: exactly the keys"),
        (json.dumps([{**ASK, "role": "usr"}, SAY]), "message 0: role 'usr'. Did you mean 'user'"),
        (json.dumps([{**ASK, "content": [{"type": "sound"}]}, SAY]), "message 0: a part is none of text, image and"),
        (json.dumps([{**ASK, "content": 7}, SAY]), "message 0: content is neither words nor a list"),
        (json.dumps([SAY, ASK]), "the last message is not the assistant's"),
    ],
)
def test_lines_that_are_none(tmp_path, line, words):
    with pytest.raises(UserError, match=words):
        open_conversations(CARD, write(tmp_path, [json.dumps([ASK, SAY]), line]))


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_conversations(CARD, tmp_path / "talk.jsonl")
    with pytest.raises(UserError, match="has no conversation"):
        open_conversations(CARD, write(tmp_path, ["", ""]))
