"""The published sets of conversations with pictures, from their files to two steps, on small files of their layout."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.torch import load_file
from transformers import Cosmos3OmniForConditionalGeneration

from cosmos3_train.commands import prepare
from cosmos3_train.data.files import exclusive
from cosmos3_train.evaluation.pictures import read_metrics
from tests.commands.tiny import QUICK, ROOT, make_model, numbers_of_two_steps
from tests.data.talks import picture_bytes, write_llava, write_videophy, write_videophy_tables
from tests.parity.eyes import add_eyes

SETS = {"llava_onevision": write_llava, "videophy2": write_videophy_tables}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return add_eyes(make_model(tmp_path_factory.mktemp("model") / "seeing"))


def settings(model, *more):
    return [f"model.path={model}", *QUICK, "training.tokens_per_micro_batch=200", "data.heldout_fraction=0.2", *more]


@pytest.mark.parametrize("name", ["llava_onevision", pytest.param("videophy2", marks=pytest.mark.slow)])
def test_two_steps_on_a_tiny_model(name, cosmos3, project, seeing, capsys):
    experiment = f"experiments/nano_reasoner_{name}.yaml"
    SETS[name](project / "downloads" / name)
    line = settings(seeing, "export=none")
    assert cosmos3("check", experiment, *line) == 0
    assert "conversations to train on" in capsys.readouterr().out
    assert cosmos3("train", experiment, *line) == 0
    run = project / "runs" / f"nano_reasoner_{name}"
    numbers_of_two_steps(run)
    index = json.loads((project / "prepared" / name / "card.json").read_text())
    assert (index["rows"], index["dropped"]) == ({"llava_onevision": 24, "videophy2": 6}[name], {})


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("llava_onevision", marks=pytest.mark.long), "videophy2"])
def test_every_command_takes_such_a_set(name, cosmos3, project, seeing, capsys):
    card, experiment = f"data/published/{name}.yaml", f"experiments/nano_reasoner_{name}.yaml"
    SETS[name](project / "downloads" / name)
    assert cosmos3("check", "--scan", card, "--source", f"downloads/{name}") == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    line = settings(seeing, "export=adapter", f"name=all_{name}", f"data.datasets.{name}.prepared=prepared/all_{name}")
    assert cosmos3("train", experiment, *line) == 0
    run = project / "runs" / f"all_{name}"
    assert json.loads((run / "report.json").read_text())["export_relative_difference"] <= 1e-5
    (adapter,) = (run / "export" / "adapter").glob("*.safetensors")
    assert all(key.startswith("transformer.layers.") for key in load_file(adapter)), "the vision encoder trains nothing"
    assert cosmos3("export", f"all_{name}", "--to", "merged") == 0
    merged = run / "export" / "merged"
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (merged / file).read_bytes() == (seeing / file).read_bytes()
    _, told = Cosmos3OmniForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not any(told.values()), told
    capsys.readouterr()
    assert cosmos3("evaluate", f"all_{name}", "--on", card) == 0
    assert "heldout/loss: " in capsys.readouterr().out
    assert cosmos3("plan", experiment, f"model.path={seeing}", "--gpu", "h100-80g") == 0
    told = capsys.readouterr().out
    assert "conversation: 0 generation and" in told and "vision encoder" in told
    assert cosmos3("show", experiment) == 0
    moved = ["prepare", card, "--source", f"downloads/{name}", "--output", f"prepared/{name}"]
    assert cosmos3(*moved) == 0


def test_prepare_counts_tokens_and_what_is_over_the_cap(cosmos3, project, seeing, capsys):
    def change(row):
        if row["id"] == "row_3":
            row["image"]["bytes"] = picture_bytes(3, (256, 256))
        if row["id"] == "row_4":
            row["image"]["bytes"] = b"no picture"
        return row

    write_llava(project / "llava", change=change)
    part = project / "seeing.yaml"
    part.write_text(f"path: {seeing}\n")
    line = ["prepare", "data/published/llava_onevision.yaml", "--source", "llava", "--output", "prepared/llava"]
    assert cosmos3(*line, "--model", part, "--tokens", "37") == 0
    told = capsys.readouterr().out
    assert (
        "left out: 1 × a picture cannot be read, such as " in told
        and "row 4: of no kind of image that is known" in told
    )
    assert "left out: 1 × more than 37 tokens" in told
    assert cosmos3(*line) == 0
    assert "was prepared already" in capsys.readouterr().out
    assert cosmos3(*line, "--tokens", "40") == 2 and "needs --model" in capsys.readouterr().err
    for words, told in (
        (("--embodiment", "pusht"), "--embodiment pusht: conversations have none"),
        (("--cache", "latents,reasoner"), "--cache latents,reasoner: conversations have none"),
        (("--stride", "0"), "--stride 0: conversations have none"),
        (("--tasks", "policy"), "--tasks policy: conversations have none"),
        (("--heldout", "1"), "--heldout is 1.0; it is a share from 0 to below 1"),
        (("--heldout", "nan"), "--heldout is nan; it is a share from 0 to below 1"),
        (("--heldout", "-0.1"), "--heldout is -0.1; it is a share"),
        (("--workers", "0"), "--workers is 0; it is at least 1"),
    ):
        assert cosmos3(*line, *words) == 2
        assert [text for text in capsys.readouterr().err.splitlines() if text.startswith(f"error: {told}")], words
    assert cosmos3("check", "--scan", "data/published/llava_onevision.yaml", "--source", "llava") == 2
    assert "found: 1 × a picture cannot be read" in capsys.readouterr().out


def test_a_model_without_eyes_is_refused_before_any_work(cosmos3, project, tiny_model, capsys):
    write_videophy_tables(project / "downloads" / "videophy2")
    experiment = "experiments/nano_reasoner_videophy2.yaml"
    line = settings(tiny_model, "name=blind", "data.datasets.videophy2.prepared=prepared/blind")
    for command in (("check", experiment, *line), ("train", experiment, *line)):
        assert cosmos3(*command) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "data.datasets.videophy2 shows pictures, but model.path" in error
        assert "has no vision encoder (vision_encoder/); take Cosmos3-Nano or Cosmos3-Super" in error


@pytest.mark.slow
def test_pictures_and_robots_train_together(cosmos3, project, seeing):
    write_videophy_tables(project / "downloads" / "videophy2")
    line = settings(
        seeing, "name=mixed", "export=none", "training.samples_per_step=6", "model.checkpoint_activations=true"
    )
    line += ["data.datasets.pusht.card=data/pusht/log.yaml", "data.datasets.pusht.prepared=prepared/quick_pusht"]
    line += ["data.datasets.pusht.embodiment=pusht", "data.workers=1"]
    line += ["tuning.towers=[understanding,generation]", "training.tokens_per_micro_batch=500"]
    assert cosmos3("train", "experiments/nano_reasoner_videophy2.yaml", *line) == 0
    columns = read_metrics(project / "runs" / "mixed" / "metrics.csv")
    assert {"loss/text", "loss/action"} <= set(columns)


def test_the_cards_say_what_is_read():
    for name in SETS:
        assert "not read yet" not in (ROOT / "data" / "published" / f"{name}.yaml").read_text()


def test_prepare_waits_for_another_at_the_same_folder(project):
    write_llava(project / "waiting", rows=3)
    output = project / "prepared" / "waiting"

    def prepare_it():
        prepare.run(
            project / "data/published/llava_onevision.yaml", None, project / "waiting", output, workers=1, stride=None,
            heldout=0.0, fresh=False, cache=[], model=None, tasks=None, tokens=None,
        )  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        with exclusive(output):
            other = pool.submit(prepare_it)
            with pytest.raises(TimeoutError):
                other.result(timeout=0.5)
            assert not output.exists()
        other.result(timeout=60)
    assert (output / "card.json").is_file()


def test_a_set_for_validation_alone_is_measured_on_and_not_trained(cosmos3, project, seeing, capsys):
    write_videophy(project / "downloads" / "val_alone", train=0, val=2)
    source = "downloads/val_alone/videophy2_val"
    card = project / "val_alone.yaml"
    card.write_text(f"name: val_alone\nformat: conversations\nsource: {source}\n")
    assert cosmos3("evaluate", seeing, "--on", card) == 0
    assert "heldout/loss: " in capsys.readouterr().out
    line = ("experiments/nano_reasoner_videophy2.yaml", *settings(seeing, "export=none", "name=val_alone"))
    own = (f"data.datasets.videophy2.source={source}", "data.datasets.videophy2.prepared=prepared/of_val_alone")
    for command in ("check", "train"):
        assert cosmos3(command, *line, *own) == 2
        assert "videophy2_val, which is held out whole by its name" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_keeps_to_its_rows_when_a_missing_picture_comes(cosmos3, project, seeing, capsys):
    folder = project / "downloads" / "coming"
    folder.mkdir(parents=True)
    rows = []
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(picture_bytes(number))
        ask = {"role": "user", "content": f"<image>What is {number}?"}
        rows.append({"messages": [ask, {"role": "assistant", "content": "A cup."}], "image": f"{number}.jpg"})
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    late = (folder / "5.jpg").rename(project / "late.jpg")
    card, prepared = project / "coming.yaml", project / "prepared" / "coming"
    card.write_text("name: coming\nformat: conversations\nsource: downloads/coming\n")
    name = "data.datasets.llava_onevision"
    own = ("name=coming", f"{name}.card={card}", f"{name}.prepared={prepared}")

    def usable():
        return json.loads((prepared / "card.json").read_text())["rows"]

    assert (
        cosmos3("train", "experiments/nano_reasoner_llava_onevision.yaml", *settings(seeing, "export=none"), *own) == 0
    )
    assert usable() == 5
    late.rename(folder / "5.jpg")
    assert cosmos3("evaluate", "coming", "--on", card) == 0
    assert usable() == 5
    assert cosmos3("prepare", card, "--output", prepared) == 0
    assert usable() == 6
