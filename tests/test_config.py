"""Reading experiments: layers in their order, and one line with key, value and remedy for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos3_train.config import (
    Channel,
    Embodiment,
    Experiment,
    Tuning,
    UserError,
    flatten,
    from_plain,
    load_embodiment,
    load_experiment,
    nearest,
    read_yaml,
    to_plain,
    to_yaml,
)

ROBOT = """\
name: arm
domain_id: 4
control_hz: 10
chunk: 8
action: [{name: x, low: -1, high: 1}, {name: y}]
cameras: [top]
"""
TINY = """\
path: data/tiny
dtype: float32
"""
RUN = """\
name: run
parts: {model: tiny, tuning: mine}
data:
  datasets:
    moves: {prepared: prepared/moves, embodiment: arm}
tuning: {rank: 8}
"""


@pytest.fixture
def root(tmp_path) -> Path:
    for path, text in (
        ("configs/embodiment/arm.yaml", ROBOT),
        ("configs/model/tiny.yaml", TINY),
        ("configs/tuning/mine.yaml", "method: hybrid\nrank: 16\nalpha: 16\n"),
        ("experiments/run.yaml", RUN),
    ):
        write(tmp_path / path, text)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(root: Path, *overrides: str):
    return load_experiment(root / "experiments" / "run.yaml", overrides)


def fails(root: Path, pattern: str, *overrides: str, run: str = "") -> None:
    if run:
        write(root / "experiments" / "run.yaml", run)
    with pytest.raises(UserError, match=pattern) as caught:
        load(root, *overrides)
    assert "\n" not in str(caught.value), "one line"


# ------------------------------------------------------------------------------------------------ layers


def test_layers_go_schema_part_experiment_command_line(root):
    loaded = load(root, "tuning.alpha=4", "training.steps=7")
    tuning = loaded.experiment.tuning
    assert (tuning.method, tuning.rank, tuning.alpha, tuning.dropout) == ("hybrid", 8, 4.0, 0.0)
    assert loaded.experiment.model.dtype == "float32"
    origin = loaded.origin
    assert origin["tuning.dropout"] == "schema"
    assert origin["tuning.method"] == "configs/tuning/mine.yaml"
    assert origin["tuning.rank"] == "experiments/run.yaml"
    assert origin["tuning.alpha"] == origin["training.steps"] == "command line"
    assert origin["model.path"] == "configs/model/tiny.yaml"
    assert origin["embodiments.arm.domain_id"] == "configs/embodiment/arm.yaml"
    assert origin["data.datasets.moves.prepared"] == "experiments/run.yaml"
    assert origin.keys() == flatten(to_plain(loaded.experiment)).keys()
    assert loaded.root == root and loaded.run_folder == root / "runs" / "run"


def test_the_model_s_folder_is_seen_from_the_project_wherever_the_command_is_given(root, tmp_path_factory, monkeypatch):
    (root / "data" / "tiny").mkdir(parents=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "data" / "tiny").mkdir(parents=True)
    (elsewhere / "nvidia" / "Cosmos3-Nano").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    loaded = load(root)
    assert loaded.model.path == str(root / "data" / "tiny")
    assert loaded.experiment.model.path == "data/tiny", "the run remembers what was written"
    assert loaded.model.dtype == "float32"
    for path in ("nvidia/Cosmos3-Nano", "owner/a.name_of-1"):
        assert load(root, f"model.path={path}").model.path == path, "a Hub id, whatever the working folder holds"
    assert load(root, f"model.path={elsewhere}").model.path == str(elsewhere)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("data/tny", "model.path is 'data/tny': no such folder.* not a Hub id .*Did you mean 'data/tiny'"),
        ("./tiny", "no such folder .*/tiny.*, and not a Hub id such as nvidia/Cosmos3-Nano"),
        ("a/b/c", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("tiny", "no such folder"),
    ],
)
def test_a_model_that_is_neither_a_folder_nor_a_hub_id(root, path, words):
    (root / "data" / "tiny").mkdir(parents=True)
    with pytest.raises(UserError, match=words):
        _ = load(root, f"model.path={path}").model


def test_the_command_line_may_choose_another_part_and_change_a_card(root):
    write(root / "configs" / "tuning" / "other.yaml", "method: lora\n")
    loaded = load(root, "parts.tuning=other", "embodiments.arm.domain_id=9", "embodiments.arm.control_hz=5")
    assert loaded.experiment.tuning.method == "lora" and loaded.experiment.tuning.rank == 8
    assert loaded.experiment.embodiments["arm"].domain_id == 9
    assert loaded.origin["embodiments.arm.domain_id"] == "command line"


def test_numbers_in_scientific_notation_are_numbers(root):
    assert load(root, "optimizer.learning_rate=1e-4").experiment.optimizer.learning_rate == 1e-4
    write(root / "experiments" / "run.yaml", RUN + "optimizer: {eps: 1e-6}\n")
    assert load(root).experiment.optimizer.eps == 1e-6


def test_what_is_written_is_read_back_the_same(root):
    experiment = load(root).experiment
    path = write(root / "kept.yaml", to_yaml(experiment))
    plain = to_plain(experiment)
    assert flatten(read_yaml(path)) == flatten(plain)
    assert from_plain(Experiment, read_yaml(path), "kept.yaml") == experiment
    assert plain["optimizer"]["betas"] == [0.9, 0.95], "a tuple would differ from what is read back"


def test_an_embodiment_card_by_name_and_by_path(root):
    card = load_embodiment("arm", root)
    assert card == load_embodiment(root / "configs" / "embodiment" / "arm.yaml", root)
    assert (card.width, card.rows, card.frames) == (2, 8, 9)
    assert card.action[0] == Channel(name="x", low=-1.0, high=1.0)


# ------------------------------------------------------------------------------------------------ mistakes


def test_unknown_keys_name_the_nearest(root):
    fails(root, r"command line: unknown key 'training.stepz'. Did you mean 'steps'\?", "training.stepz=1")
    fails(root, r"experiments/run.yaml: unknown key 'optimiser'. Did you mean 'optimizer'\?", run=RUN + "optimiser: {}")
    nested = RUN.replace("prepared: prepared/moves", "prepard: prepared/moves")
    fails(root, r"unknown key 'data.datasets.moves.prepard'. Did you mean 'prepared'\?", run=nested)


def test_unknown_keys_in_parts_and_cards_name_their_file(root):
    write(root / "configs" / "model" / "tiny.yaml", TINY + "dtyp: float32\n")
    fails(root, r"configs/model/tiny.yaml: unknown key 'model.dtyp'. Did you mean 'dtype'\?")
    write(root / "configs" / "model" / "tiny.yaml", TINY)
    write(root / "configs" / "embodiment" / "arm.yaml", ROBOT.replace("low:", "lowest:"))
    fails(root, r"configs/embodiment/arm.yaml: unknown key 'embodiments.arm.action\[0\].lowest'. Did you mean 'low'\?")


def test_unknown_kinds_parts_files_and_cards(root):
    fails(root, r"parts.modle is not a kind of part. Did you mean 'model'\?", "parts.modle=tiny")
    fails(root, r"configs/model/tyny.yaml does not exist. Did you mean 'tiny'\?", "parts.model=tyny")
    fails(
        root, r"configs/embodiment/amr.yaml does not exist. Did you mean 'arm'\?", "data.datasets.moves.embodiment=amr"
    )
    with pytest.raises(UserError, match=r"rum.yaml: no such file. Did you mean 'run'\?"):
        load_experiment(root / "experiments" / "rum.yaml")


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("training.steps=many", r"training.steps: .*'many'.*"),
        ("tuning.method=lore", r"tuning.method: .*lore"),
        ("model.dtype=float16", r"model.dtype: .*float16"),
        ("training=5", r"command line: training is 5; a mapping of keys is expected there"),
        ("data.datasets.moves=5", r"data.datasets.moves is 5; a mapping of keys is expected there"),
        ("embodiments.arm.action=x", r"embodiments.arm.action is 'x'; a list of mappings is expected there"),
        ("embodiments.arm.action=[x]", r"embodiments.arm.action\[0\] is 'x'; a mapping of keys is expected there"),
        ("training.steps=0", r"training.steps is 0; it is at least 1"),
        ("training.ema_decay=1", r"training.ema_decay is 1.0; it is 0 \(none\) to below 1"),
        ("tuning.towers=[generatoin]", r"tuning.towers: 'generatoin' is unknown. Did you mean 'generation'\?"),
        ("tuning.towers=[]", r"tuning.towers is empty"),
        ("tuning.rank=0", r"tuning.rank is 0"),
        ("tuning.dropout=1.0", r"tuning.dropout is 1.0"),
        ("optimizer.betas=[0.9]", r"optimizer.betas"),
    ],
)
def test_wrong_values_name_key_and_value(root, override, pattern):
    fails(root, pattern, override)


def test_the_command_line_s_form(root):
    fails(root, r"command line: 'training.steps' is not of the form key=value", "training.steps")
    fails(root, r"command line: tuning.towers has the value '\[a', which is not valid YAML", "tuning.towers=[a")
    fails(root, r"command line: name.x is set below a key that already has a value", "name=a", "name.x=b")


def test_a_key_that_stands_twice_is_told_with_its_line(root):
    fails(root, r"run.yaml: not valid YAML: key 'tuning' stands twice \(line 7\)", run=RUN + "tuning: {rank: 4}\n")


def test_files_that_are_not_mappings(root):
    fails(root, r"run.yaml: the file holds a list; a mapping of keys is expected", run="- a\n")
    fails(root, r"run.yaml: not valid YAML", run="a: [\n")
    fails(root, r"run.yaml: parts is \['a'\]; it maps a kind", run="name: run\nparts: [a]\n")


def test_what_has_no_value_is_named(root):
    fails(root, r"name has no value", run=RUN.replace("name: run\n", ""))
    fails(root, r"data.datasets.moves.prepared has no value", run=RUN.replace("prepared: prepared/moves, ", ""))
    fails(root, r"model.path has no value", run=RUN.replace("model: tiny, ", ""))
    write(root / "experiments" / "run.yaml", RUN)
    write(root / "configs" / "embodiment" / "arm.yaml", ROBOT.replace("domain_id: 4\n", ""))
    fails(root, r"embodiments.arm.domain_id|domain_id")


# ------------------------------------------------------------------------------------------------ embodiments


def card(**changes) -> Embodiment:
    fields = dict(name="arm", domain_id=4, control_hz=10.0, chunk=8, action=[Channel("x")], cameras=["top"])
    return Embodiment(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"domain_id": 32}, "domain_id is 32; the action heads have slots 0 to 31"),
        ({"domain_id": -1}, "domain_id is -1"),
        ({"action": [Channel(str(n)) for n in range(65)]}, "action has 65 channels; a robot has 1 to 64"),
        ({"action": []}, "action has 0 channels"),
        ({"chunk": 6}, "chunk is 6; it is a multiple of 4"),
        ({"chunk": 0}, "chunk is 0"),
        ({"control_hz": 0.0}, "control_hz is 0.0"),
        ({"resolution_tier": 300}, "resolution_tier is 300; it is one of 256, 480, 704, 720"),
        ({"view_point": "ego_veiw"}, "view_point is 'ego_veiw'. Did you mean 'ego_view'"),
        ({"cameras": []}, "cameras is empty"),
        ({"cameras": ["a", "b"]}, "layout is 'single' but there are 2 cameras"),
        ({"state_row": True}, "state_row is true but state_key is empty"),
        ({"execute": 9}, r"execute is 9; it is 1 to chunk \(8\)"),
        ({"execute": 0}, "execute is 0"),
    ],
)
def test_a_card_that_contradicts_itself(changes, pattern):
    with pytest.raises(UserError, match=rf"embodiment 'arm': {pattern}"):
        card(**changes)


def test_a_card_that_does_not():
    made = card(cameras=["a", "b"], layout="row", state_row=True, state_key="state", action=[Channel("x")] * 64)
    assert (made.width, made.rows, made.frames) == (64, 9, 9)


TWO = RUN.replace(
    "    moves: {prepared: prepared/moves, embodiment: arm}\n",
    "    moves: {prepared: prepared/moves, embodiment: arm}\n    more: {prepared: prepared/more, embodiment: leg}\n",
)


def test_a_domain_belongs_to_one_robot_unless_it_is_shared_on_purpose(root):
    leg = write(root / "configs" / "embodiment" / "leg.yaml", ROBOT.replace("name: arm", "name: leg"))
    fails(root, r"embodiments.leg.domain_id is 4, which is taken by 'arm'; .*such as 31, .*shares_domain: arm", run=TWO)
    leg.write_text(leg.read_text() + "shares_domain: arm\n")
    assert set(load(root).experiment.embodiments) == {"arm", "leg"}
    leg.write_text(ROBOT.replace("name: arm", "name: leg").replace("domain_id: 4", "domain_id: 5"))
    assert load(root).experiment.embodiments["leg"].domain_id == 5


def test_a_third_robot_shares_with_each_that_has_the_slot(root):
    """Sharing is said by name: a third that shares with the second alone still takes the first one's slot."""
    for name, shares in (("leg", "arm"), ("tail", "arm")):
        text = ROBOT.replace("name: arm", f"name: {name}") + f"shares_domain: {shares}\n"
        write(root / "configs" / "embodiment" / f"{name}.yaml", text)
    three = TWO.replace("tuning: {rank", "    last: {prepared: prepared/last, embodiment: tail}\ntuning: {rank")
    write(root / "experiments" / "run.yaml", three)
    assert set(load(root).experiment.embodiments) == {"arm", "leg", "tail"}


def test_cards_that_nobody_reads_or_that_have_another_name(root):
    unread = (
        RUN
        + "embodiments: {leg: {name: leg, domain_id: 5, control_hz: 1, chunk: 8, action: [{name: x}], cameras: [a]}}\n"
    )
    fails(root, r"embodiments.leg is never read; no dataset names it", run=unread)
    write(root / "experiments" / "run.yaml", RUN)
    write(root / "configs" / "embodiment" / "arm.yaml", ROBOT.replace("name: arm", "name: hand"))
    fails(root, r"embodiments.arm.name is 'hand'; a card's name is its key")


def test_the_command_line_may_name_another_robot(root):
    write(root / "configs" / "embodiment" / "leg.yaml", ROBOT.replace("name: arm", "name: leg"))
    (dataset,) = load(root).experiment.data.datasets
    assert set(load(root, f"data.datasets.{dataset}.embodiment=leg").experiment.embodiments) == {"leg"}


def test_nearest():
    assert nearest("stpes", ["steps", "seed"]) == " Did you mean 'steps'?"
    assert nearest("zzz", ["b", "a"]) == " Known: a, b."
    assert nearest("zzz", []) == ""
    assert Tuning().towers == ["generation"]
