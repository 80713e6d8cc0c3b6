"""Floors, every YAML, and the README: what a change in one place easily breaks in another."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _EMBODIMENT_TO_RAW_ACTION_DIM

from cosmos3_train import cli
from cosmos3_train.config import (
    KINDS,
    Embodiment,
    Experiment,
    UserError,
    check_keys,
    from_plain,
    load_embodiment,
    load_experiment,
    read_yaml,
    to_plain,
)
from cosmos3_train.data.card import load_card
from cosmos3_train.model.domains import REGISTERED, refuse_taken_domains

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))
PARTS = sorted((ROOT / "configs").glob("*/*.yaml"))
ROBOTS = [path for path in PARTS if path.parent.name == "embodiment"]
CARDS = sorted((ROOT / "data").glob("*/*.yaml"))
TEXTS = (ROOT / "README.md", ROOT / "launch" / "README.md", ROOT / "experiments" / "README.md")


def test_imports_go_down_floors_only():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_load_and_say_what_they_are(path):
    experiment = load_experiment(path).experiment
    assert experiment.name == path.stem
    head = path.read_text().splitlines()[0]
    assert head.startswith("# Question:"), "an experiment begins with the question that it answers"


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_parts_are_of_the_schema(path):
    kind = path.parent.name
    if kind == "embodiment":
        assert isinstance(load_embodiment(path, ROOT), Embodiment)
        assert read_yaml(path)["name"] == path.stem
    else:
        assert kind in KINDS
        check_keys(Experiment, {kind: read_yaml(path)}, str(path))


@pytest.mark.parametrize("path", ROBOTS, ids=lambda path: path.stem)
def test_robots_have_upstreams_domain_and_width_or_a_domain_of_their_own(path):
    card = load_embodiment(path, ROOT)
    cards = {card.name: card}
    if card.shares_domain and card.shares_domain not in REGISTERED:
        cards[card.shares_domain] = load_embodiment(card.shares_domain, ROOT)
    refuse_taken_domains(cards.values())
    assert card.width == _EMBODIMENT_TO_RAW_ACTION_DIM.get(card.name, card.width)
    assert from_plain(Embodiment, to_plain(card), "card") == card, "a prepared folder keeps it whole"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_dataset_cards_load_and_their_sources_exist(path):
    card = load_card(path)
    assert card.source_folder(ROOT).exists() or card.hub_id
    assert card.licence and (card.how_made or card.download) and card.known_faults


def test_every_part_is_used_by_an_experiment_or_named_in_the_readme():
    used: set[tuple[str, str]] = set()
    for file in EXPERIMENTS:
        experiment = load_experiment(file).experiment
        used |= {(kind, name) for kind, name in experiment.parts.items()}
        used |= {("embodiment", name) for name in experiment.embodiments}
    readme = (ROOT / "README.md").read_text()
    unused = [path for path in PARTS if (path.parent.name, path.stem) not in used and f"`{path.stem}`" not in readme]
    assert not unused


def test_every_experiment_is_in_the_ledgers_list():
    ledger = (ROOT / "experiments" / "README.md").read_text()
    assert [path.stem for path in EXPERIMENTS if f"`{path.stem}`" not in ledger] == []


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_lines_of_the_texts_are_real(text):
    for line in shell_lines(text.read_text()):
        words = shlex.split(line, comments=True)
        for number, word in enumerate(words):
            if word == "cosmos3":
                cli.parse(words[number + 1 :])
        for word in words:
            if word.startswith(("experiments/", "data/", "configs/", "launch/", ".ci/")):
                assert any(ROOT.glob(word)), f"{line}: {word} is not there"


def test_the_readme_has_command_lines_for_every_command():
    words = {
        word for line in shell_lines((ROOT / "README.md").read_text()) for word in re.findall(r"cosmos3 ([\w-]+)", line)
    }
    commands = "train evaluate export new-embodiment prepare check show benchmark plan replay"
    assert words == set(commands.split())


def test_the_readmes_tree_names_real_files():
    text = (ROOT / "README.md").read_text()
    tree = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)[0]
    folder = ROOT
    seen = 0
    for line in tree.splitlines():
        name = line.split()[0] if line.split() else ""
        if not name:
            continue
        path = (ROOT if not line.startswith(" ") else folder) / name
        assert path.exists(), f"README.md's tree: {name}"
        seen += 1
        if not line.startswith(" "):
            folder = path
    assert seen > 20


def test_nothing_reads_the_environment_but_runtime():
    for path in (ROOT / "cosmos3_train").rglob("*.py"):
        if path.name != "runtime.py":
            assert not re.search(r"os\.environ|os\.getenv", path.read_text()), path


def test_nothing_unpickles_unpacks_or_runs_what_it_reads():
    """Names of all that could; diffusers and torch read safetensors alone, archives are read in place."""
    risky = (
        r"torch\.load\(|\.extract(?:all)?\(|unpack_archive|allow_pickle=True|trust_remote_code"
        r"|^\s*(?:import|from) (?:pickle|dill|shelve)\b|(?<![.\w])(?:exec|eval)\("
    )
    for path in (ROOT / "cosmos3_train").rglob("*.py"):
        text = path.read_text()
        assert not re.findall(risky, text, flags=re.MULTILINE), path
        for call in re.findall(r"yaml\.(?:load|unsafe_load|full_load)\([^\n]*", text):
            assert "Loader=_UniqueKeyLoader" in call, f"{path}: {call}"
        for call in re.findall(r"(?:Transformer|Wan|Tokenizer)\.from_pretrained\((?:[^()]|\([^()]*\))*\)", text):
            texts = "AutoTokenizer" in text and "text_tokenizer" in call
            assert texts or "use_safetensors=True" in call or path.parent.name == "export", f"{path}: {call}"


def test_yaml_that_would_run_something_is_refused(tmp_path):
    (tmp_path / "card.yaml").write_text(f"name: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\nformat: zarr\n")
    with pytest.raises(UserError, match=r"card\.yaml"):
        load_card(tmp_path / "card.yaml")
    assert not (tmp_path / "made").exists()


def test_direct_dependencies_have_exact_versions_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    constrained = {re.split(r"[=<>]", line)[0] for line in project["tool"]["uv"]["constraint-dependencies"]}
    direct = {re.split(r"[=<>;\[]", line)[0] for line in project["project"]["dependencies"]}
    assert direct <= constrained
