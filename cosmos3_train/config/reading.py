"""How an experiment is read: layers merged, keys checked, and the layer that set each value remembered.

Layers merge in one order: schema < parts < experiment < command line. A part is a file under `configs/<kind>/` that
gives the node of its kind; an experiment is a file under `experiments/` that names its parts and says what differs.
`Loaded.origin` remembers which layer set each value, for `cosmos3 show`.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cosmos3_train.config.schema import KINDS, Embodiment, Experiment, Model, fail, first_line, free_domain, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Loaded:
    """An experiment as resolved, and the layer that set each value ('schema', 'configs/…', 'experiments/…')."""

    experiment: Experiment
    origin: dict[str, str]
    root: Path

    @property
    def run_folder(self) -> Path:
        return self.root / "runs" / self.experiment.name

    @property
    def model(self) -> Model:
        """The experiment's model, placed (`place_model`): what is loaded. The experiment keeps what the user wrote."""
        return place_model(self.experiment.model, self.root)


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Loaded:
    """Read an experiment file and everything that it names.

    Args:
        path: the experiment's YAML file.
        overrides: `key=value` pairs of the command line, dotted keys.

    Raises:
        UserError: the file, a part, a key or a value is wrong; one line says which and what would be right.
    """
    path = Path(path)
    root = project_root(path)
    own = read_yaml(path)
    if "format" in own:
        fail(f"{path}: a dataset card, where an experiment is expected; `prepare` and `check --scan` take it")
    layers: list[tuple[str, dict]] = []
    parts = own.get("parts") or {}
    if not isinstance(parts, Mapping):
        fail(f"{path}: parts is {parts!r}; it maps a kind to a file's name, such as 'model: cosmos3_nano'")
    line = _from_command_line(overrides)
    parts = {**parts, **(line.get("parts") or {})}
    for kind, name in parts.items():
        if kind not in KINDS:
            fail(f"{path}: parts.{kind} is not a kind of part.{nearest(str(kind), KINDS)}")
        part = find_part(root, kind, str(name))
        layers.append((_shown(part, root), {kind: read_yaml(part)}))
    layers.append((_shown(path, root), own))
    if line:
        layers.append(("command line", line))
    cards = _embodiment_layers(layers, root)
    layers = cards + layers
    for shown, content in layers:
        check_keys(Experiment, content, shown)
    experiment = _merge(Experiment, [content for _, content in layers])
    _check_references(experiment, _shown(path, root))
    return Loaded(experiment=experiment, origin=_origins(experiment, layers), root=root)


def load_embodiment(name_or_path: str | Path, root: Path) -> Embodiment:
    """Read one embodiment card, by name (configs/embodiment/NAME.yaml) or by path."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = find_part(root, "embodiment", str(name_or_path))
    content = _read_embodiment(path, root)
    check_keys(Embodiment, content, _shown(path, root))
    return _merge(Embodiment, [content])


def place_model(model: Model, root: Path) -> Model:
    """The model with the path of its folder seen from `root`; a Hub id (owner/name) stays.

    A path that looks like an id is a folder's all the same where its first part is a folder of `root`: then the second
    part is more likely misspelt than published.

    Raises:
        UserError: neither a folder nor a Hub id.
    """
    folder = root / model.path
    if folder.is_dir():
        return dataclasses.replace(model, path=str(folder))
    if HUB_ID.fullmatch(model.path) and not folder.parent.is_dir():
        return model
    beside = [str(Path(model.path).with_name(other.name)) for other in folder.parent.glob("*") if other.is_dir()]
    fail(
        f"model.path is {model.path!r}: no such folder ({folder}), and not a Hub id such as nvidia/Cosmos3-Nano."
        f"{nearest(model.path, beside)}"
    )


def to_yaml(record: Any) -> str:
    """A dataclass of this module as YAML, every value written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(record))


def to_plain(record: Any) -> dict[str, Any]:
    """A dataclass of this module as plain dicts and lists."""
    plain = _without_tuples(OmegaConf.to_container(OmegaConf.structured(record), throw_on_missing=False))
    assert isinstance(plain, dict)
    return typing.cast(dict[str, Any], plain)


def from_plain(schema: type, content: Mapping[str, Any], where: str) -> Any:
    """The inverse of `to_plain`, checking keys and types; `where` names the file in errors."""
    check_keys(schema, content, where)
    return _merge(schema, [dict(content)])


def numbered(content: Any) -> Any:
    """Lists of mappings as mappings by number, so that a key names the item."""
    if isinstance(content, Mapping):
        return {key: numbered(value) for key, value in content.items()}
    if isinstance(content, list) and any(isinstance(item, Mapping) for item in content):
        return {str(index): numbered(item) for index, item in enumerate(content)}
    return content


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → leaf value of nested mappings (lists are leaves)."""
    if isinstance(content, Mapping) and content:
        flat: dict[str, Any] = {}
        for key, value in content.items():
            flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: content}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, safely loaded. Repeated keys are errors, for the second would silently win."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        beside = [p.stem for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        fail(f"{path}: no such file.{nearest(path.stem, beside)}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"{path}: not valid YAML: {' '.join(str(error).split())}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        fail(f"{path}: the file holds a {type(content).__name__}; a mapping of keys is expected")
    return content


def read_experiment(path: Path) -> Experiment:
    """The experiment of a run, from the file in its folder that holds every value; a key that came since has its
    default."""
    return from_plain(Experiment, read_yaml(path), str(path))


def project_root(path: Path) -> Path:
    """The folder that holds `configs/`: above the file, or the working folder."""
    for folder in (*path.resolve().parents, *Path.cwd().resolve().parents, Path.cwd()):
        if (folder / "configs" / "embodiment").is_dir():
            return folder
    return Path.cwd()


def find_part(root: Path, kind: str, name: str) -> Path:
    """The file of a part, by kind and name.

    Raises:
        UserError: there is none; names the nearest one.
    """
    path = root / "configs" / kind / f"{name}.yaml"
    if not path.is_file():
        known = [p.stem for p in (root / "configs" / kind).glob("*.yaml")]
        fail(f"configs/{kind}/{name}.yaml does not exist.{nearest(name, known)}")
    return path


def check_keys(schema: Any, content: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Raise `UserError` for the first key that the schema does not have, naming the nearest right spelling."""
    hints = typing.get_type_hints(schema)
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in hints:
            fail(f"{where}: unknown key {name!r}.{nearest(str(key), hints)}")
        inner = _inner_schema(hints[key])
        if inner is None or value is None:
            continue
        kind, element = inner
        nested: dict[str, Any]
        if kind == "list" and isinstance(value, list):
            nested = {f"{name}[{place}]": item for place, item in enumerate(value)}
        elif kind != "list" and isinstance(value, Mapping):
            nested = {name: value} if kind == "node" else {f"{name}.{item}": entry for item, entry in value.items()}
        else:
            expected = "a list of mappings" if kind == "list" else "a mapping of keys"
            fail(f"{where}: {name} is {value!r}; {expected} is expected there")
        for place, item in nested.items():
            if not isinstance(item, Mapping):
                fail(f"{where}: {place} is {item!r}; a mapping of keys is expected there")
            check_keys(element, item, where, f"{place}.")


# ------------------------------------------------------------------------------------------------ details


def _without_tuples(content: Any) -> Any:
    """YAML has no tuples: what is written as one is read back as a list, and would differ from itself."""
    if isinstance(content, dict):
        return {key: _without_tuples(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_tuples(value) for value in content]
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing a mapping that has a key twice; '1e-4' is a number, as people expect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} stands twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _shown(path: Path, root: Path) -> str:
    resolved = path.resolve()
    return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else str(path)


def _from_command_line(overrides: Iterable[str]) -> dict[str, Any]:
    """Nested mapping of `key=value` pairs; values are read as YAML."""
    content: dict[str, Any] = {}
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            fail(f"command line: {pair!r} is not of the form key=value, such as training.steps=200")
        try:
            value = yaml.load(text, Loader=_UniqueKeyLoader) if text else None
        except yaml.YAMLError:
            fail(f"command line: {key} has the value {text!r}, which is not valid YAML")
        node = content
        *above, last = key.split(".")
        for name in above:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                fail(f"command line: {key} is set below a key that already has a value")
        node[last] = value
    return content


def _embodiment_layers(layers: list[tuple[str, dict]], root: Path) -> list[tuple[str, dict]]:
    """One layer for each embodiment card that a dataset names, where the last layer that speaks of it has its say."""
    named: dict[str, str | None] = {}
    for _, content in layers:
        datasets = (content.get("data") or {}).get("datasets") or {}
        for dataset, entry in datasets.items() if isinstance(datasets, Mapping) else ():
            if isinstance(entry, Mapping) and "embodiment" in entry:
                named[dataset] = entry["embodiment"]
    found = []
    for name in dict.fromkeys(str(name) for name in named.values() if name):
        own = {name} & {key for _, content in layers for key in (content.get("embodiments") or {})}
        path = root / "configs" / "embodiment" / f"{name}.yaml"
        if own and not path.is_file():
            continue  # the experiment defines the card in full
        path = find_part(root, "embodiment", name)
        found.append((_shown(path, root), {"embodiments": {name: _read_embodiment(path, root)}}))
    return found


def _read_embodiment(path: Path, root: Path) -> dict[str, Any]:
    """The card's content. A value of ??? that a draft left open is refused: merging would pass over it to a default."""
    content = read_yaml(path)
    for key, value in flatten(numbered(content)).items():
        if value == MISSING:
            fail(f"{_shown(path, root)}: {key} has no value yet (???); fill it in")
    return content


def _merge(schema: type, contents: list[dict]) -> Any:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *(OmegaConf.create(c) for c in contents))
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        fail(f"{error.full_key} has no value; set it in the experiment, a part, or on the command line")
    except OmegaConfBaseException as error:
        reason = first_line(error)
        key = getattr(error, "full_key", "") or _culprit(schema, contents)
        fail(f"{key}: {reason}" if key else reason)


def _culprit(schema: type, contents: list[dict]) -> str:
    """The first key whose value the schema does not take by itself, '' where they only fail together."""
    for key, value in (pair for content in contents for pair in flatten(content).items()):
        alone = OmegaConf.create()
        OmegaConf.update(alone, key, value, force_add=True)
        try:
            OmegaConf.merge(OmegaConf.structured(schema), alone)
        except OmegaConfBaseException:
            return key
    return ""


def _check_references(experiment: Experiment, where: str) -> None:
    """Errors that need two places at once: domains taken twice, embodiments that no dataset reads."""
    used = {entry.embodiment for entry in experiment.data.datasets.values() if entry.embodiment}
    for name, card in experiment.embodiments.items():
        if name not in used:
            fail(f"{where}: embodiments.{name} is never read; no dataset names it.{nearest(name, used)}")
        if card.name != name:
            fail(f"{where}: embodiments.{name}.name is {card.name!r}; a card's name is its key")
    owners: dict[int, Embodiment] = {}
    for card in experiment.embodiments.values():
        other = owners.setdefault(card.domain_id, card)
        if other is not card and card.shares_domain != other.name and other.shares_domain != card.name:
            free = free_domain(known.domain_id for known in experiment.embodiments.values())
            fail(
                f"{where}: embodiments.{card.name}.domain_id is {card.domain_id}, which is taken by {other.name!r}; "
                f"give one a free slot, such as {free}, or say shares_domain: {other.name} on the card"
            )


def _origins(experiment: Experiment, layers: list[tuple[str, dict]]) -> dict[str, str]:
    origin = dict.fromkeys(flatten(to_plain(experiment)), "schema")
    for shown, content in layers:
        for key in flatten(content):
            for known in origin:
                if known == key or known.startswith(f"{key}."):
                    origin[known] = shown
    return origin


def _inner_schema(hint: Any) -> tuple[str, Any] | None:
    """('node' | 'dict' | 'list', dataclass) of a field's type, None where it holds plain values."""
    if dataclasses.is_dataclass(hint):
        return "node", hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict and dataclasses.is_dataclass(arguments[1]):
        return "dict", arguments[1]
    if origin is list and dataclasses.is_dataclass(arguments[0]):
        return "list", arguments[0]
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return _inner_schema(inner[0]) if len(inner) == 1 else None
    return None
