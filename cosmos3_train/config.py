"""The schema of an experiment, and how one is read. A default is written once: here, with its unit.

Layers merge in one order: schema < parts < experiment < command line. A part is a file under `configs/<kind>/` that
gives the node of its kind; an experiment is a file under `experiments/` that names its parts and says what differs.
`Loaded.origin` remembers which layer set each value, for `cosmos3 show`.

Nothing here knows a tensor. Errors are `UserError`s: one line that names the key, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

KINDS = ("model", "data", "objective", "tuning", "strategy")
"""The kinds of part, each a folder under `configs/` and a node of `Experiment`. Embodiment cards come by name."""

TIERS = (256, 480, 704, 720)
VIEW_POINTS = ("ego_view", "third_person_view", "wrist_view", "concat_view")
MAX_ACTION_WIDTH = 64
DOMAINS = 32


class UserError(ValueError):
    """The user's mistake: one line with the key, the value and the remedy. The command line exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known name closest to `name`, or ' Known: …' when none is close."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names[:24])}{' …' if len(names) > 24 else ''}." if names else ""


# ------------------------------------------------------------------------------------------------ embodiment


@dataclass(frozen=True)
class Channel:
    """One action channel, in the robot's own units.

    low, high: the range outside which a value is an error, in `unit`; None leaves that side open
    relative:  the value is a change, not a place (drives the "hold" baseline: hold is zero for a change)
    rotation:  part of a rotation given by the first two columns of its matrix
    """

    name: str = MISSING
    meaning: str = ""
    unit: str = ""
    frame: str = ""
    low: float | None = None
    high: float | None = None
    relative: bool = False
    rotation: bool = False


@dataclass(frozen=True)
class Embodiment:
    """A robot's action and camera contract: everything that the model must know about it (an embodiment card).

    domain_id:       slot of the action heads, 0 .. 31. Upstream's registered ids are kept; a new robot takes a free one
    shares_domain:   the embodiment that already has this slot, where two share it on purpose
    initialise_from: domain whose rows a fresh slot starts from; None draws them anew
    control_hz:      actions a second
    chunk:           action rows a window, a multiple of 4 (a window has chunk + 1 frames)
    action_key, state_key: columns of the log
    action:          its channels in order; at most 64
    state_row:       whether row 0 of the action stream is the robot's state (in the action's own units), given
    cameras:         columns of the log with its views, in the order of `layout`
    layout:          "single", or "row" (side by side), or "column" (one below the other)
    resolution_tier: 256, 480, 704 or 720: frames are padded, never enlarged, to the tier's canvas
    view_point:      one of upstream's four labels, which fills the caption's framing sentence
    normaliser:      quantile: q01..q99 to [-1, 1]; minmax: min..max to [-1, 1]; meanstd; none
    execute:         actions of a chunk that are carried out before the next look, in closed loop
    simulator:       name of the simulator for the closed loop; None without one
    """

    name: str = MISSING
    domain_id: int = MISSING
    control_hz: float = MISSING
    chunk: int = MISSING
    action: list[Channel] = MISSING
    cameras: list[str] = MISSING
    shares_domain: str | None = None
    initialise_from: int | None = None
    action_key: str = "action"
    state_key: str | None = None
    state_row: bool = False
    layout: Literal["single", "row", "column"] = "single"
    resolution_tier: int = 256
    view_point: str = "ego_view"
    normaliser: Literal["quantile", "minmax", "meanstd", "none"] = "quantile"
    execute: int = 8
    simulator: str | None = None

    def __post_init__(self) -> None:
        where = f"embodiment {self.name!r}"
        if not 0 <= self.domain_id < DOMAINS:
            _fail(f"{where}: domain_id is {self.domain_id}; the action heads have slots 0 to {DOMAINS - 1}")
        if not 1 <= len(self.action) <= MAX_ACTION_WIDTH:
            _fail(f"{where}: action has {len(self.action)} channels; a robot has 1 to {MAX_ACTION_WIDTH}")
        if self.chunk < 4 or self.chunk % 4:
            _fail(f"{where}: chunk is {self.chunk}; it is a multiple of 4 (chunk + 1 frames a window)")
        if self.control_hz <= 0:
            _fail(f"{where}: control_hz is {self.control_hz}; it is a rate in Hz, above 0")
        if self.resolution_tier not in TIERS:
            _fail(f"{where}: resolution_tier is {self.resolution_tier}; it is one of {', '.join(map(str, TIERS))}")
        if self.view_point not in VIEW_POINTS:
            _fail(f"{where}: view_point is {self.view_point!r}.{nearest(self.view_point, VIEW_POINTS)}")
        if not self.cameras:
            _fail(f"{where}: cameras is empty; name at least one camera column of the log")
        if self.layout == "single" and len(self.cameras) > 1:
            _fail(f"{where}: layout is 'single' but there are {len(self.cameras)} cameras; use 'row' or 'column'")
        if self.state_row and self.state_key is None:
            _fail(f"{where}: state_row is true but state_key is empty; name the state column of the log")
        if not 1 <= self.execute <= self.chunk:
            _fail(f"{where}: execute is {self.execute}; it is 1 to chunk ({self.chunk})")

    @property
    def width(self) -> int:
        """How many action channels the robot has."""
        return len(self.action)

    @property
    def rows(self) -> int:
        """Action rows of a window: the chunk, and the state row where there is one."""
        return self.chunk + int(self.state_row)

    @property
    def frames(self) -> int:
        """Pixel frames of a window."""
        return self.chunk + 1


# ------------------------------------------------------------------------------------------------ experiment


@dataclass(frozen=True)
class Model:
    """Which checkpoint, and how it runs.

    path:                   a Cosmos 3 folder in the published diffusers layout, or its Hub id
    revision:               Hub revision; None takes the newest
    dtype:                  of the frozen weights and of the arithmetic; trainables are float32 masters either way
    vae_dtype:              of the video tokenizer: trained and served in bf16, which is faster on a CPU too
    attention:              auto picks the fastest that works here and says which
    checkpoint_activations: recompute the generation tower's layers in backward: less memory, about a third slower
    """

    path: str = MISSING
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    vae_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "flash4", "flash3", "flash2", "sdpa"] = "auto"
    checkpoint_activations: bool = True


@dataclass(frozen=True)
class Dataset:
    """One entry of the mixture.

    card:       dataset card; with it, a missing prepared folder is made before the run
    prepared:   folder of prepared rows (`cosmos3 prepare`)
    source:     folder of the log; None takes the card's
    embodiment: embodiment card by name (a file under configs/embodiment/), None for conversations and plain video
    weight:     share of the samples drawn, relative to the other entries
    tasks:      rows of the mask table and their relative weights; none named: policy alone
    cache_latents: encode every window once, while preparing, instead of at every step
    """

    prepared: str = MISSING
    card: str | None = None
    source: str | None = None
    embodiment: str | None = None
    weight: float = 1.0
    tasks: dict[str, float] = field(default_factory=dict)
    cache_latents: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:  # not the field's default, for layers merge: "policy" would stay beside the tasks named
            object.__setattr__(self, "tasks", {"policy": 1.0})


@dataclass(frozen=True)
class Data:
    """The mixture and how it is read.

    workers:          processes that read and decode, a rank
    caption_dropout:  probability that a sample's caption is emptied (trains guidance)
    window_stride:    steps between the starts of neighbouring windows, while preparing
    heldout_fraction: share of episodes, chosen by hash, that never trains
    """

    datasets: dict[str, Dataset] = field(default_factory=dict)
    workers: int = 2
    caption_dropout: float = 0.1
    window_stride: int = 1
    heldout_fraction: float = 0.05


@dataclass(frozen=True)
class Objective:
    """What is minimised: a weighted sum of the losses of each modality, each a mean over the step's samples.

    video, action, sound: weights of the denoising losses (10, 10 and 2 as the checkpoints were trained)
    text:                 weight of the next-token loss on labelled text
    mean_over:            elements of a sample's mean: all, as published, or only the generated ones
    shift:                of σ by resolution tier
    image_levels, video_levels: the base distribution of σ
    independent_action, independent_sound: draw a σ of their own instead of the video's
    logits_chunk:         labelled tokens whose logits exist at a time (a 152k vocabulary: 1024 tokens are 0.6 GB)
    """

    video: float = 10.0
    action: float = 10.0
    sound: float = 2.0
    text: float = 1.0
    mean_over: Literal["all", "generated"] = "all"
    shift: dict[int, float] = field(default_factory=lambda: {256: 3.0, 480: 5.0, 704: 10.0, 720: 10.0})
    image_levels: Literal["logit_normal", "mode", "uniform"] = "logit_normal"
    video_levels: Literal["logit_normal", "mode", "uniform"] = "mode"
    independent_action: bool = False
    independent_sound: bool = False
    logits_chunk: int = 1024


@dataclass(frozen=True)
class Tuning:
    """What trains.

    method:   lora; hybrid: LoRA and the robot's own rows of the action heads; tower: every weight of `towers`;
              full: every weight
    towers:   understanding, generation
    modules:  attention, mlp: the projections that get LoRA
    rank, alpha, dropout: of LoRA (its update is scaled by alpha / rank)
    rslora:   scale by alpha / √rank instead;  dora: decompose into magnitude and direction (slower)
    learning_rate_multipliers: pattern (shell-style, over parameter names) → factor of the learning rate
    """

    method: Literal["lora", "hybrid", "tower", "full"] = "lora"
    towers: list[str] = field(default_factory=lambda: ["generation"])
    modules: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    learning_rate_multipliers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, values, known in (
            ("towers", self.towers, ("understanding", "generation")),
            ("modules", self.modules, ("attention", "mlp")),
        ):
            for value in values:
                if value not in known:
                    _fail(f"tuning.{key}: {value!r} is unknown.{nearest(value, known)}")
            if not values:
                _fail(f"tuning.{key} is empty; choose among {', '.join(known)}")
        if self.rank < 1:
            _fail(f"tuning.rank is {self.rank}; it is at least 1")
        if not 0 <= self.dropout < 1:
            _fail(f"tuning.dropout is {self.dropout}; it is a probability below 1")


@dataclass(frozen=True)
class Optimizer:
    """Fused AdamW and its schedule.

    learning_rate: peak;  betas, eps, weight_decay: AdamW's
    schedule:      after the warmup: cosine or linear to `final_fraction` of the peak at the last step, or constant
    warmup_steps:  steps of linear rise from 0
    clip:          largest norm of the whole gradient; 0 never clips
    patience:      consecutive steps with a non-finite gradient after which the run is aborted
    """

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 50
    final_fraction: float = 0.0
    clip: float = 1.0
    patience: int = 20


@dataclass(frozen=True)
class Training:
    """How long, how much at a time, and what is written on the way.

    steps:                    optimizer steps
    samples_per_step:         samples of one optimizer step over all ranks; a step's samples are a function of the seed
                              and the step alone, however they are split into micro-batches
    tokens_per_micro_batch:   token budget of one forward, both streams together; a rank's share of a step is cut into
                              as few packs as fit
    seed:                     of everything that is drawn
    ema_decay:                of the average of the trainables (0: none); it is what is evaluated and exported
    *_every_n_steps:          0 turns it off
    keep_checkpoints:         how many of the newest to keep
    """

    steps: int = 1000
    samples_per_step: int = 32
    tokens_per_micro_batch: int = 16384
    seed: int = 0
    ema_decay: float = 0.0
    log_every_n_steps: int = 10
    evaluate_every_n_steps: int = 200
    checkpoint_every_n_steps: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for key in ("steps", "samples_per_step", "tokens_per_micro_batch", "log_every_n_steps", "keep_checkpoints"):
            if getattr(self, key) < 1:
                _fail(f"training.{key} is {getattr(self, key)}; it is at least 1")
        if not 0 <= self.ema_decay < 1:
            _fail(f"training.ema_decay is {self.ema_decay}; it is 0 (none) to below 1")


@dataclass(frozen=True)
class Strategy:
    """How the run is spread.

    name:        single, or ddp (every rank holds the model, gradients are averaged)
    devices:     processes on this machine; under torchrun it must equal what torchrun started
    accelerator: auto takes a GPU where there is one
    """

    name: Literal["single", "ddp"] = "single"
    devices: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


@dataclass(frozen=True)
class Evaluation:
    """What is measured on held-out episodes, and in closed loop.

    heldout_samples:  windows of the held-out episodes that every evaluation looks at (the same ones)
    action_samples:   of those, how many have their actions sampled in full, for the action error
    solver_steps:     steps of the sampler
    closed_loop_episodes, closed_loop_first_seed: rollouts, before and after training (0: none)
    before:           also measure the untrained model, so that the report can compare
    """

    heldout_samples: int = 64
    action_samples: int = 32
    solver_steps: int = 10
    closed_loop_episodes: int = 0
    closed_loop_first_seed: int = 100000
    before: bool = True


@dataclass(frozen=True)
class Logging:
    """Where numbers go besides metrics.csv, which is always written.

    wandb:   also send them to Weights & Biases;  project: its project;  offline: write its files, send nothing
    """

    wandb: bool = False
    project: str = "cosmos3_train"
    offline: bool = False


@dataclass(frozen=True)
class Experiment:
    """A run: parts plus differences. `question`, `hardware` and `duration` are for the reader of the ledger.

    export: form of the result written and verified when training ends; none leaves it to `cosmos3 export`
    """

    name: str = MISSING
    question: str = ""
    hardware: str = ""
    duration: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    embodiments: dict[str, Embodiment] = field(default_factory=dict)
    objective: Objective = field(default_factory=Objective)
    tuning: Tuning = field(default_factory=Tuning)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    strategy: Strategy = field(default_factory=Strategy)
    evaluation: Evaluation = field(default_factory=Evaluation)
    logging: Logging = field(default_factory=Logging)
    export: Literal["none", "adapter", "merged"] = "adapter"


@dataclass(frozen=True)
class Loaded:
    """An experiment as resolved, and the layer that set each value ('schema', 'configs/…', 'experiments/…')."""

    experiment: Experiment
    origin: dict[str, str]
    root: Path

    @property
    def run_folder(self) -> Path:
        return self.root / "runs" / self.experiment.name


# ------------------------------------------------------------------------------------------------ reading


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
    layers: list[tuple[str, dict]] = []
    parts = own.get("parts") or {}
    if not isinstance(parts, Mapping):
        _fail(f"{path}: parts is {parts!r}; it maps a kind to a file's name, such as 'model: cosmos3_nano'")
    line = _from_command_line(overrides)
    parts = {**parts, **(line.get("parts") or {})}
    for kind, name in parts.items():
        if kind not in KINDS:
            _fail(f"{path}: parts.{kind} is not a kind of part.{nearest(str(kind), KINDS)}")
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
    content = read_yaml(path)
    check_keys(Embodiment, content, _shown(path, root))
    return _merge(Embodiment, [content])


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
        _fail(f"{path}: no such file.{nearest(path.stem, beside)}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _fail(f"{path}: not valid YAML: {' '.join(str(error).split())}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        _fail(f"{path}: the file holds a {type(content).__name__}; a mapping of keys is expected")
    return content


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
        _fail(f"configs/{kind}/{name}.yaml does not exist.{nearest(name, known)}")
    return path


def check_keys(schema: Any, content: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Raise `UserError` for the first key that the schema does not have, naming the nearest right spelling."""
    hints = typing.get_type_hints(schema)
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in hints:
            _fail(f"{where}: unknown key {name!r}.{nearest(str(key), hints)}")
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
            _fail(f"{where}: {name} is {value!r}; {expected} is expected there")
        for place, item in nested.items():
            if not isinstance(item, Mapping):
                _fail(f"{where}: {place} is {item!r}; a mapping of keys is expected there")
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


def _fail(message: str) -> NoReturn:
    raise UserError(message)


def _shown(path: Path, root: Path) -> str:
    resolved = path.resolve()
    return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else str(path)


def _from_command_line(overrides: Iterable[str]) -> dict[str, Any]:
    """Nested mapping of `key=value` pairs; values are read as YAML."""
    content: dict[str, Any] = {}
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            _fail(f"command line: {pair!r} is not of the form key=value, such as training.steps=200")
        try:
            value = yaml.load(text, Loader=_UniqueKeyLoader) if text else None
        except yaml.YAMLError:
            _fail(f"command line: {key} has the value {text!r}, which is not valid YAML")
        node = content
        *above, last = key.split(".")
        for name in above:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                _fail(f"command line: {key} is set below a key that already has a value")
        node[last] = value
    return content


def _embodiment_layers(layers: list[tuple[str, dict]], root: Path) -> list[tuple[str, dict]]:
    """One layer for each embodiment card that a dataset of any layer names."""
    names: list[str] = []
    for _, content in layers:
        datasets = (content.get("data") or {}).get("datasets") or {}
        for entry in datasets.values() if isinstance(datasets, Mapping) else ():
            name = entry.get("embodiment") if isinstance(entry, Mapping) else None
            if name and name not in names:
                names.append(str(name))
    found = []
    for name in names:
        own = {name} & {key for _, content in layers for key in (content.get("embodiments") or {})}
        path = root / "configs" / "embodiment" / f"{name}.yaml"
        if own and not path.is_file():
            continue  # the experiment defines the card in full
        path = find_part(root, "embodiment", name)
        found.append((_shown(path, root), {"embodiments": {name: read_yaml(path)}}))
    return found


def _merge(schema: type, contents: list[dict]) -> Any:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *(OmegaConf.create(c) for c in contents))
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        _fail(f"{error.full_key} has no value; set it in the experiment, a part, or on the command line")
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = getattr(error, "full_key", "") or _culprit(schema, contents)
        _fail(f"{key}: {reason}" if key else reason)


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
            _fail(f"{where}: embodiments.{name} is never read; no dataset names it.{nearest(name, used)}")
        if card.name != name:
            _fail(f"{where}: embodiments.{name}.name is {card.name!r}; a card's name is its key")
    owners: dict[int, Embodiment] = {}
    for card in experiment.embodiments.values():
        other = owners.setdefault(card.domain_id, card)
        if other is not card and card.shares_domain != other.name and other.shares_domain != card.name:
            _fail(
                f"{where}: domain_id {card.domain_id} is taken by both {other.name!r} and {card.name!r}; give one a "
                f"free slot, or say shares_domain: {other.name}"
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
