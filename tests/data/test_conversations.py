"""Conversations as JSON lines: both forms, and every line that is none."""

import json

import pytest

from cosmos3_train.config import UserError
from cosmos3_train.data.conversations import ConversationDataset

ASK = {"role": "user", "content": "Où est le T ? 目標"}
SAY = {"role": "assistant", "content": "On the left."}


def write(tmp_path, lines):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_forms_and_empty_lines(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    bare, named = json.dumps([ASK, SAY], ensure_ascii=False), json.dumps({"messages": [system, ASK, SAY]})
    dataset = ConversationDataset(write(tmp_path, [bare, "", named]))
    assert dataset.count("train") == 2 and dataset.count("heldout") == 0
    first, second = (dataset.sample("train", index, "conversation", 9) for index in range(2))
    assert first.messages == [ASK, SAY]
    assert second.messages == [system, ASK, SAY]
    assert (first.key, second.key, first.number) == ("talk/line_000001", "talk/line_000003", 9)


def test_heldout_lines(tmp_path):
    path = write(tmp_path, [json.dumps([ASK, {**SAY, "content": str(i)}]) for i in range(50)])
    dataset = ConversationDataset(path, heldout_fraction=0.2)
    said = {
        split: {dataset.sample(split, i, "conversation", 0).messages[1]["content"] for i in range(dataset.count(split))}
        for split in ("train", "heldout")
    }
    assert len(said["train"]) + len(said["heldout"]) == 50
    assert 0 < len(said["heldout"]) < 25
    assert ConversationDataset(path, heldout_fraction=0.001).count("heldout") == 1


def test_a_folder_with_one_file(tmp_path):
    path = write(tmp_path, [json.dumps([ASK, SAY])])
    assert ConversationDataset(tmp_path).path == path
    (tmp_path / "more.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds 2 \.jsonl files"):
        ConversationDataset(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not valid JSON"),
        (json.dumps({"mesages": []}), "line 2: no 'messages'"),
        (json.dumps([]), "line 2: a non-empty list"),
        (json.dumps([{"role": "user"}]), "line 2, message 0: exactly the keys"),
        (json.dumps([{**ASK, "role": "usr"}, SAY]), "message 0: role 'usr'. Did you mean 'user'"),
        (json.dumps([{**ASK, "content": [{"type": "image"}]}, SAY]), "message 0: content is not text"),
        (json.dumps([SAY, ASK]), "the last message is not the assistant's"),
    ],
)
def test_lines_that_are_none(tmp_path, line, words):
    with pytest.raises(UserError, match=words):
        ConversationDataset(write(tmp_path, [json.dumps([ASK, SAY]), line]))


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        ConversationDataset(tmp_path / "talk.jsonl")
    with pytest.raises(UserError, match="has no conversation"):
        ConversationDataset(write(tmp_path, ["", ""]))
