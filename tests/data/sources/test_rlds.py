"""RLDS logs, written here record by record: opened, prepared and read back, whole and damaged.

The records are framed by the test's own CRC-32C, and the examples are serialised by Google's library, so that the
parser meets another's bytes.
"""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from cosmos3_train import cli
from cosmos3_train.config import UserError, to_plain
from cosmos3_train.data.prepare import SHORT, prepare
from cosmos3_train.data.reader import PreparedDataset
from cosmos3_train.data.sources import open_log
from cosmos3_train.data.tfrecord import Example, NotAnExample, record_places
from tests.data.logs import dataset_card, default_actions, embodiment, frame_number, numbered_frame

CAMERA = "observation/image"
LENGTHS = [6, 9, 7, 5]
CARD = dataset_card(format="rlds", rate_hz=10.0)
ROBOT = embodiment(cameras=[CAMERA], state_key="observation/state")
FIRST_SHARD = "1.0.0/mover-train.tfrecord-00000-of-00002"


# ------------------------------------------------------------------------------------------------ an own writer

_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def crc32c(content):
    register = 0xFFFFFFFF
    for byte in content:
        register = register >> 8 ^ _TABLE[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF


def checksum(content):
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def framed(payload):
    length = struct.pack("<Q", len(payload))
    return length + checksum(length) + payload + checksum(payload)


def example_class(packed):
    """`tf.train.Example`, declared as TensorFlow does; packed or one value a tag, as older writers have it."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"example_{packed}.proto", package="tf", syntax="proto3")

    def message(name, *fields):
        made = file.message_type.add(name=name)
        for number, (field, kind, label, typename) in enumerate(fields, start=1):
            added = made.field.add(name=field, number=number, type=kind, label=label, type_name=typename)
            if label == kinds.LABEL_REPEATED and kind in (kinds.TYPE_FLOAT, kinds.TYPE_INT64):
                added.options.packed = packed
        return made

    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    message("BytesList", ("value", kinds.TYPE_BYTES, many, None))
    message("FloatList", ("value", kinds.TYPE_FLOAT, many, None))
    message("Int64List", ("value", kinds.TYPE_INT64, many, None))
    lists = [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")]
    feature = message("Feature", *((name, kinds.TYPE_MESSAGE, one, f".tf.{kind}") for name, kind in lists))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", ("feature", kinds.TYPE_MESSAGE, many, ".tf.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=kinds.TYPE_MESSAGE, label=one, type_name=".tf.Feature")
    message("Example", ("features", kinds.TYPE_MESSAGE, one, ".tf.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


EXAMPLES = {packed: example_class(packed) for packed in (True, False)}


def serialised(values, packed=True):
    example = EXAMPLES[packed]()
    for key, value in values.items():
        feature = example.features.feature[key]
        if isinstance(value, list):
            feature.bytes_list.value.extend(value)
        elif value.dtype.kind == "f":
            feature.float_list.value.extend(value.ravel().tolist())
        else:
            feature.int64_list.value.extend(value.astype(np.int64).ravel().tolist())
    return example.SerializeToString()


def jpeg(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=90)
    return file.getvalue()


def png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def episode_values(episode, length):
    """Frame i of episode e shows number 100·e + i; the instruction changes with the episode."""
    actions = default_actions(episode, length)
    frames = [numbered_frame(100 * episode + frame) for frame in range(length)]
    return {
        "steps/action": actions,
        "steps/observation/image": [jpeg(frame) for frame in frames],
        "steps/observation/wrist": [png(frame[:, ::-1]) for frame in frames],
        "steps/observation/depth": [png(frame[..., 0].astype(np.uint16)) for frame in frames],
        "steps/observation/state": actions + 1,
        "steps/observation/packed_state": [zlib.compress(row.astype(np.float64).tobytes()) for row in actions],
        "steps/part/x": actions[:, 0],
        "steps/part/y": actions[:, 1],
        "steps/count": np.arange(length) * 1000 - 3000,  # negative and of several bytes
        "steps/reward": np.zeros(length, np.float32),
        "steps/is_first": np.arange(length) == 0,
        "steps/is_last": np.arange(length) == length - 1,
        "steps/is_terminal": np.arange(length) == length - 1,
        "steps/language_instruction": [f"do task {episode} – ü".encode()] * length,
        "episode_metadata/file_path": [f"/raw/{episode}.h5".encode()],
    }


def tensor(dtype, *shape, encoding="none"):
    return {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {
            "shape": {"dimensions": [str(size) for size in shape]} if shape else {},
            "dtype": dtype,
            "encoding": encoding,
        },
    }


def image(dtype="uint8", channels=3):
    inner = {"shape": {"dimensions": ["96", "96", str(channels)]}, "dtype": dtype, "encodingFormat": "jpeg"}
    return {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image", "image": inner}


def mapping_of(**features):
    return {"featuresDict": {"features": features}}


TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
STEP = mapping_of(
    action=tensor("float32", 2),
    observation=mapping_of(
        image=image(), wrist=image(), depth=image("uint16", 1), state=tensor("float32", 2),
        packed_state=tensor("float64", 2, encoding="zlib"), ragged={"sequence": {"feature": tensor("float32")}},
    ),
    part=mapping_of(x=tensor("float32"), y=tensor("float32")),
    count=tensor("int64"), reward=tensor("float32"),
    is_first=tensor("bool"), is_last=tensor("bool"), is_terminal=tensor("bool"),
    language_instruction=TEXT,
)  # fmt: skip
FEATURES = mapping_of(
    steps={
        "pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset",
        "sequence": {"feature": STEP, "length": "-1"},
    },
    episode_metadata=mapping_of(file_path=TEXT),
)


def make_rlds(root, episodes=None, *, packed=True, split="train"):
    """A log of two shards in `root`/1.0.0; `episodes` are the values of each."""
    episodes = [episode_values(e, length) for e, length in enumerate(LENGTHS)] if episodes is None else episodes
    folder = root / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    half = (len(episodes) + 1) // 2
    shards = [episodes[:half], episodes[half:]]
    for number, shard in enumerate(shards):
        content = b"".join(framed(serialised(values, packed)) for values in shard)
        (folder / f"mover-{split}.tfrecord-{number:05d}-of-00002").write_bytes(content)
    splits = [{"name": split, "shardLengths": [str(len(shard)) for shard in shards], "numBytes": "1"}]
    info = {"name": "mover", "version": "1.0.0", "fileFormat": "tfrecord", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(FEATURES))
    return root


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_rlds(tmp_path_factory.mktemp("source") / "mover")


def copy_of(log, folder):
    for path in log.glob("*/*"):
        target = folder / path.relative_to(log)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def read_all(log, card=CARD, columns=("action",)):
    opened = open_log(card, log)
    return list(opened.records(opened.episodes, columns))


# ------------------------------------------------------------------------------------------------ whole logs


def test_the_writers_checksum_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", [".", "1.0.0"])
def test_windows_are_the_logs(tmp_path, packed, folder):
    source = make_rlds(tmp_path / "mover", packed=packed) / folder
    summary = prepare(CARD, ROBOT, source, tmp_path / "out", progress=False)
    dataset = PreparedDataset(tmp_path / "out", ROBOT)
    assert sum(summary.windows.values()) == dataset.rows == 2 + 5 + 3 + 1
    for row in dataset.iter_rows():
        episode, start = row["episode_index"], row["start"]
        shown = [frame_number(frame.numpy()) for frame in dataset.frames(row)]
        assert shown == list(range(100 * episode + start, 100 * episode + start + 5))
        actions = default_actions(episode, LENGTHS[episode])[start : start + 4]
        assert np.array_equal(np.float32(row["action"]), actions)
        assert row["state"] == (actions[0] + 1).tolist()
        assert row["instruction"] == f"do task {episode} – ü"


def test_columns(log):
    opened = open_log(dataset_card(format="rlds", rate_hz=10.0, mapping={"columns": {"xy": ["part/x", "part/y"]}}), log)
    assert opened.cameras == (CAMERA, "observation/wrist")
    assert [opened.width(name) for name in ("action", "part/x", "xy")] == [2, 1, 2]
    names = ["observation/packed_state", "xy", "count", "is_last", "episode_metadata/file_path"]
    record = next(opened.records(opened.episodes[1:2], names))
    actions = default_actions(1, 9)
    assert np.array_equal(record.columns["observation/packed_state"], actions)
    assert np.array_equal(record.columns["xy"], actions)
    assert record.columns["count"][:, 0].tolist() == (np.arange(9) * 1000 - 3000).tolist()
    assert record.columns["is_last"][:, 0].tolist() == [0] * 8 + [1]
    assert record.columns["episode_metadata/file_path"] == ["/raw/1.h5"] * 9
    assert np.allclose(record.timestamps, np.arange(9) / 10)


def test_a_record_of_several_episodes_is_cut_where_its_steps_say(tmp_path):
    values = episode_values(3, 17)
    values["steps/is_first"] = np.isin(np.arange(17), [0, 6])
    values["steps/is_last"] = np.isin(np.arange(17), [5, 15, 16])
    log = make_rlds(tmp_path / "mover", [values, episode_values(4, 5)])
    opened = open_log(CARD, log)
    assert [(episode.index, episode.length) for episode in opened.episodes] == [(0, 6), (1, 10), (2, 1), (3, 5)]
    summary = prepare(CARD, ROBOT, log, tmp_path / "out", progress=False)
    assert summary.dropped[SHORT] == 1
    dataset = PreparedDataset(tmp_path / "out", ROBOT)
    shown = {frame_number(dataset.frames(row, first_only=True)[0].numpy()) for row in dataset.iter_rows()}
    assert shown == {300, 301, *range(306, 312), 400}
    for row in dataset.iter_rows():
        if row["episode_index"] == 1:
            assert row["action"][0][0] == row["start"] + 6


def test_an_empty_episode_is_counted(tmp_path):
    nothing = {key: value[:0] for key, value in episode_values(0, 5).items() if key.startswith("steps/")}
    log = make_rlds(tmp_path / "mover", [nothing, episode_values(1, 9)])
    assert prepare(CARD, ROBOT, log, tmp_path / "out", progress=False).dropped[SHORT] == 1


def test_splits(tmp_path, log):
    both = copy_of(log, tmp_path / "mover")
    make_rlds(both, [episode_values(7, 6)], split="val")
    assert len(open_log(CARD, both).episodes) == 4
    card = dataset_card(format="rlds", rate_hz=10, mapping={"split": ["train", "val"]})
    assert [record.index for record in read_all(both, card)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"there are splits train, val: name one in mapping\.split"):
        open_log(dataset_card(format="rlds", rate_hz=10, mapping={"split": "test"}), both)


def test_some_of_the_files(tmp_path, log):
    some = copy_of(log, tmp_path / "mover")
    (some / FIRST_SHARD).unlink()
    with pytest.raises(UserError, match=r"1 of 2 files of split 'train' are missing, the first is number 0; .*partial"):
        open_log(CARD, some)
    card = dataset_card(format="rlds", rate_hz=10, mapping={"partial": True})
    assert [record.index for record in read_all(some, card)] == [2, 3], "as in a whole copy"


def test_thousands_of_episodes_open_without_reading_pictures(tmp_path, monkeypatch):
    values = {key: value for key, value in episode_values(0, 5).items() if "wrist" not in key and "depth" not in key}
    one = framed(serialised(values))
    folder = make_rlds(tmp_path / "mover", []) / "1.0.0"
    (folder / "dataset_info.json").unlink()
    for number in range(2):
        (folder / f"mover-train.tfrecord-{number:05d}-of-00002").write_bytes(one * 1500)
    monkeypatch.setattr(Example, "bytes", lambda *_: pytest.fail("bytes were read"))
    opened = open_log(CARD, folder)
    assert len(opened.episodes) == 3000
    assert opened.episodes[-1].length == 5


def test_the_command(log, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs" / "embodiment").mkdir(parents=True)
    (tmp_path / "configs" / "embodiment" / "mover.yaml").write_text(yaml.safe_dump(to_plain(ROBOT)))
    (tmp_path / "moves.yaml").write_text(f"name: moves\nformat: rlds\nrate_hz: 10\nsource: {log}\n")
    monkeypatch.chdir(tmp_path)
    line = ["prepare", "moves.yaml", "--embodiment", "mover", "--output", "out"]
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 0
    assert "windows of" in capsys.readouterr().out
    (tmp_path / "moves.yaml").write_text(f"name: moves\nformat: rlds\nsource: {log}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main([*line[:-1], "other"])
    assert ended.value.code == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and "set rate_hz" in errors[0]


# ------------------------------------------------------------------------------------------------ damaged ones


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda shard: flip(shard, 0), "record 0 at byte 0: its length has a wrong checksum"),
        (lambda shard: flip(shard, 9), "record 0 at byte 0: its length has a wrong checksum"),
        (lambda shard: flip(shard, -1), "has a wrong checksum; copy the file again"),
        (lambda shard: flip(shard, -300), "wrong checksum|is not an episode"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1]), "cut off in record 1"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:5]), "cut off in record 0"),
        (lambda shard: shard.write_bytes(b""), "holds 0 records, but dataset_info.json says 2"),
        (lambda shard: shard.write_bytes(b"\x1f\x8b" + bytes(100)), "it is compressed"),
        (lambda shard: shard.write_bytes(framed(b"\xff" * 40) * 2), "is not an episode"),
        (lambda shard: shard.write_bytes(framed(b"") * 2), "none of the steps"),
        (lambda shard: shard.unlink(), "1 of 2 files"),
        (lambda shard: (shard.parent / "features.json").unlink(), "features.json is missing"),
        (lambda shard: (shard.parent / "features.json").write_text("{"), "features.json: not valid JSON"),
        (lambda shard: (shard.parent / "features.json").write_text("{}"), "declares no steps"),
        (lambda shard: (shard.parent / "dataset_info.json").write_text("[]"), "holds a list"),
        (
            lambda shard: (shard.parent / "dataset_info.json").write_text('{"fileFormat": "array_record"}'),
            "fileFormat is 'array_record'; tfrecord is read",
        ),
    ],
)
def test_damaged_logs(log, tmp_path, damage, message):
    broken = copy_of(log, tmp_path / "mover")
    damage(broken / FIRST_SHARD)
    with pytest.raises(UserError, match=message) as raised:
        prepare(CARD, ROBOT, broken, tmp_path / "out", progress=False)
    assert "\n" not in str(raised.value)


def test_every_flipped_byte_is_noticed(log, tmp_path):
    """Whatever byte of a file is changed, reading it all says so, and never with anything else than a `UserError`."""
    broken = copy_of(log, tmp_path / "mover")
    shard = broken / FIRST_SHARD
    whole = shard.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 150).astype(int):
        shard.unlink()
        shard.write_bytes(whole)
        flip(shard, place)
        with pytest.raises(UserError):
            read_all(broken)


def test_damage_under_a_right_checksum(log, tmp_path):
    """Such as a faulty writer's: whatever stands in a record, it is read or refused by a `UserError`."""
    broken = copy_of(log, tmp_path / "mover")
    (broken / "1.0.0" / "dataset_info.json").unlink()
    shard = broken / FIRST_SHARD
    small = {key: value for key, value in episode_values(0, 5).items() if "image" not in key and "depth" not in key}
    payload = serialised({**small, "steps/observation/wrist": [b"x"] * 5})
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        content = np.frombuffer(payload, np.uint8).copy()
        content[rng.integers(0, len(content), rng.integers(1, 4))] = rng.integers(0, 256)
        whole = rng.random() < 0.8
        shard.unlink()
        shard.write_bytes(framed(content[: None if whole else rng.integers(len(content))].tobytes()))
        try:
            read_all(broken, columns=["action", "count", "observation/packed_state", "is_last"])
        except UserError:
            refused += 1
    assert 50 < refused < 200


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("steps/action", np.zeros(11, np.float32), "'steps/action' has 11 values, its steps need 12"),
        ("steps/action", [b"x"] * 6, "'steps/action' holds bytes"),
        ("steps/language_instruction", [b"\xff"] * 6, "not UTF-8"),
        ("steps/language_instruction", [b"x"] * 5, "has 5 values, its steps need 6"),
        ("steps/observation/image", [b"no picture"] * 6, "'steps/observation/image', picture 0: not a readable"),
        ("steps/observation/image", [jpeg(numbered_frame(0))] * 3, "has 3 pictures, number 5 is asked for"),
        ("steps/observation/image", np.zeros(6), "no such pictures .* holds numbers"),
        ("steps/observation/state", None, "is not there, though features.json declares it"),
    ],
)
def test_records_that_are_not_as_declared(tmp_path, key, value, message):
    values = {**episode_values(0, 6), key: value}
    if value is None:
        del values[key]
    log = make_rlds(tmp_path / "mover", [values, episode_values(1, 9)])
    with pytest.raises(UserError, match=message):
        prepare(CARD, ROBOT, log, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rate_hz": None}, "set rate_hz in the dataset card"),
        ({"mapping": {"splits": "train"}}, r"unknown key mapping\.splits.* Did you mean 'split'"),
        ({"mapping": {"task": "language_instructions"}}, "Did you mean 'language_instruction'"),
        ({"mapping": {"columns": {"action": ["part/z"]}}}, r"mapping\.columns\.action: no numbers 'part/z'"),
        ({"mapping": {"partial": "yes"}}, r"mapping\.partial is 'yes'"),
    ],
)
def test_mistakes_in_the_dataset_card(log, changes, message):
    with pytest.raises(UserError, match=message):
        open_log(dataset_card(**{"format": "rlds", "rate_hz": 10.0, **changes}), log)


def test_wrong_names(log, tmp_path):
    opened = open_log(CARD, log)
    with pytest.raises(UserError, match=r"no camera 'observation/imag' .* Did you mean 'observation/image'"):
        opened.check_camera("observation/imag")
    with pytest.raises(UserError, match=r"is uint16 .* no picture of 8 bits"):
        opened.check_camera("observation/depth")
    with pytest.raises(
        UserError, match=r"'part' holds several columns; .* mapping\.columns: {part: \[part/x, part/y\]}"
    ):
        opened.check_column("part")
    with pytest.raises(UserError, match="cannot be read"):
        opened.check_column("observation/ragged")
    with pytest.raises(UserError, match="no such folder"):
        open_log(CARD, tmp_path / "nowhere")
    (tmp_path / "b" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match="not an RLDS log"):
        open_log(CARD, tmp_path / "b")
    for version in ("1.0.0", "2.0.0"):
        (tmp_path / "two" / version).mkdir(parents=True)
        (tmp_path / "two" / version / "features.json").write_text("{}")
    with pytest.raises(UserError, match="holds 2 versions; name one as source"):
        open_log(CARD, tmp_path / "two")


def test_numbers_of_both_signs(tmp_path):
    numbers = np.array([0, 127, 128, -1, 2**62, -(2**63), 300], np.int64)
    for packed in (True, False):
        path = tmp_path / f"{packed}.tfrecord"
        path.write_bytes(framed(serialised({"a": numbers, "b": np.float32([1.5, -2])}, packed)))
        ((start, _),) = record_places(path)
        example = Example(path, start)
        assert example.numbers("a").tolist() == numbers.tolist() and example.count("a") == 7
        assert example.numbers("b").tolist() == [1.5, -2] and example.count("b") == 2
        with pytest.raises(NotAnExample):
            example.bytes("a")
