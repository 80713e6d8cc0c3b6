"""Dataset cards: the least one, the spelling of keys, and every card that ships."""

from pathlib import Path

import pytest

from cosmos3_train.config import UserError
from cosmos3_train.data.card import load_card
from cosmos3_train.data.conversations import open_conversations
from cosmos3_train.data.sources import open_clips, open_log
from cosmos3_train.flow.tasks import CONVERSATION, TASKS

ROOT = Path(__file__).parents[2]


def write(tmp_path, text):
    path = tmp_path / "card.yaml"
    path.write_text(text)
    return path


def test_the_least_card(tmp_path):
    card = load_card(write(tmp_path, "name: moves\nformat: lerobot_v3\n"))
    assert card.embodiment is None and card.tasks == []
    with pytest.raises(UserError, match="names no source; give --source"):
        card.source_folder(tmp_path)


def test_source_is_relative_to_the_project(tmp_path):
    card = load_card(write(tmp_path, "name: moves\nformat: lerobot_v3\nsource: data/moves\n"))
    assert card.source_folder(tmp_path) == tmp_path / "data" / "moves"
    card = load_card(write(tmp_path, "name: moves\nformat: lerobot_v3\nsource: /elsewhere/moves\n"))
    assert card.source_folder(tmp_path) == Path("/elsewhere/moves")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: moves\nformat: lerobot_v3\nlicense: MIT\n", "unknown key 'license'. Did you mean 'licence'"),
        ("name: moves\n", "format has no value"),
        ("format: lerobot_v3\n", "name has no value"),
        ("name: moves\nformat: lerobot\n", "format is 'lerobot'. Did you mean 'lerobot_v3'"),
        ("name: moves\nformat: lerobot_v3\nrate_hz: fast\n", "rate_hz"),
        ("name: a/b\nformat: lerobot_v3\n", "name holds '/'"),
        (
            "name: m\nformat: lerobot_v3\npictures: {video_frames: 8}\n",
            "pictures are of conversations; lerobot_v3 has none",
        ),
        (
            "name: m\nformat: conversations\npictures: {video_frames: 1}\n",
            "pictures.video_frames is 1; it is at least 2",
        ),
        (
            "name: m\nformat: conversations\npictures: {least_pixels: 9, most_pixels: 4}\n",
            "above most_pixels, 4; lower",
        ),
        ("name: m\nformat: conversations\npictures: {video_fps: 0}\n", "pictures.video_fps is 0.0; it is above 0"),
        ("- name\n", "a mapping of keys is expected"),
    ],
)
def test_wrong_cards(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        load_card(write(tmp_path, text))


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("*.yaml")), ids=lambda path: path.name)
def test_cards_that_ship(path):
    card = load_card(path)
    assert card.licence and card.tasks and card.known_faults
    assert all(task in {*TASKS, CONVERSATION} for task in card.tasks)
    if card.hub_id is None:
        assert card.source_folder(ROOT).exists()
        return
    assert card.size and card.layout and card.columns
    assert all(f"hf download {card.hub_id} " in line for line in card.download.values())
    assert "--include" in card.download["subset"] and card.download.keys() & {"all", "look"}
    talks, log = card.format == "conversations", card.format.startswith("lerobot")
    assert card.captions or card.caption_template or card.constant_caption or log or talks, "where its words are"
    if card.rate_hz is None and not talks:
        assert any(words in str(card.known_faults) for words in ("rate is taken from each video", "unverified"))


PUBLISHED = (
    *(f"nvidia/PhysicalAI-WorldModel-Synthetic-{name}" for name in (
        "Embodied-Robot-Scenes", "Physical-Interaction-Scenes", "Spatial-Reasoning", "Digital-Human-Scenes",
        "Autonomous-Driving-Scenarios", "Warehouse-Operations-Scenes",
    )),
    "nvidia/BridgeData2-Subset-Synthetic-Captions", "nvidia/LIBERO_LeRobot_v3", "nvidia/BridgeData2_LeRobot_v3",
    "nvidia/Cosmos3-DROID", "videophysics/videophy2_train", "lmms-lab/LLaVA-OneVision-Data",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "data/published").glob("*.yaml")), ids=lambda path: path.stem)
def test_where_a_published_set_is_not_here_its_commands_are_told(tmp_path, path):
    card, nowhere = load_card(path), tmp_path / "nowhere"
    talks = card.format == "conversations"
    opener = open_conversations if talks else open_clips if card.shows_clips else open_log
    with pytest.raises(UserError, match=r"nowhere: not there; name its place with --source, or fetch it\. ") as told:
        opener(card, nowhere)
    assert all(f"{what}: {command}" in str(told.value) for what, command in card.download.items())
    assert "\n" not in str(told.value)


def test_every_published_set_has_its_card():
    assert {load_card(path).hub_id for path in (ROOT / "data/published").glob("*.yaml")} == set(PUBLISHED)
