"""The schema of an experiment. A default is written once: here, with its unit.

Nothing here knows a tensor or a file. Errors are `UserError`s: one line that names the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from omegaconf import MISSING

KINDS = ("model", "data", "objective", "tuning", "strategy")
"""The kinds of part, each a folder under `configs/` and a node of `Experiment`. Embodiment cards come by name."""

TIERS = (256, 480, 704, 720)
VIEW_POINTS = ("ego_view", "third_person_view", "wrist_view", "concat_view")
MAX_ACTION_WIDTH = 64
DOMAINS = 32


class UserError(ValueError):
    """The user's mistake: one line with the key, the value and the remedy. The command line exits with 2."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, for a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known name closest to `name`, or ' Known: …' when none is close."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names[:24])}{' …' if len(names) > 24 else ''}." if names else ""


def fail(message: str) -> NoReturn:
    """Raise `UserError`."""
    raise UserError(message)


def free_domain(taken: Iterable[int]) -> int | None:
    """The highest slot of the action heads that is not among `taken`; None where all are."""
    return max(set(range(DOMAINS)) - set(taken), default=None)


def _require(section: str, record: object, rule: str, holds: Callable[[float], bool], *keys: str) -> None:
    """Raise `UserError` for the first of the keys whose value breaks the rule. NaN breaks every comparison."""
    for key in keys:
        value = getattr(record, key)
        if not holds(value):
            fail(f"{section}.{key} is {value}; it is {rule}")


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


MOVE_NAMES = ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32")
"""Channels of a move: its translation, then the first two columns of its rotation matrix (r21: row 2, column 1)."""


@dataclass(frozen=True)
class Recorded:
    """A piece of the action that is made from what the log recorded. Columns may name a part: "state[6]", "state[0:3]".

    name:     of the channels: NAME, NAME_x, NAME_0, ...
    kind:     pose: how the body moves from this row to the next, T_i⁻¹·T_{i+1}, nine channels (`MOVE_NAMES`), metres;
              gripper: one channel, 0 closed, 1 open;  values: as they stand
    column:   the gripper, the values, or the position, with `rotation` beside it. "" where the log is not known yet:
              then nothing can be prepared with the card
    rotation: the pose's rotation
    form:     how it is written: quaternion_xyzw, quaternion_wxyz, axis_angle, rot6d (the first two columns), euler,
              matrix (nine numbers, by rows); transform: `column` is the whole pose, sixteen numbers, by rows
    order:    of euler angles: xyz about the fixed axes, x first; XYZ about the body's own, X first
    degrees:  angles are degrees, not radians
    metres:   what one unit of the recorded position is in metres
    tool:     twelve numbers, 3×4 by rows: the frame whose moves the model learns, seen from the recorded one. Empty:
              the recorded one
    moves:    the log has moves already, not poses: only their form changes
    next:     the action of a row is the number of the row after it, for a column that says what an action led to
    closed, open: the log's numbers of the closed and the open gripper
    unit:     of values
    state:    column with the same as measured, for the state row
    """

    name: str = MISSING
    kind: Literal["pose", "gripper", "values"] = "pose"
    column: str = ""
    rotation: str = ""
    form: Literal["quaternion_xyzw", "quaternion_wxyz", "axis_angle", "rot6d", "euler", "matrix", "transform"] = (
        "quaternion_xyzw"
    )
    order: str = "xyz"
    degrees: bool = False
    metres: float = 1.0
    tool: list[float] = field(default_factory=list)
    moves: bool = False
    next: bool = False
    closed: float = 0.0
    open: float = 1.0
    unit: str = ""
    state: str = ""

    def __post_init__(self) -> None:
        where = f"recorded {self.name!r}"
        if sorted(self.order.lower()) != ["x", "y", "z"] or not (self.order.islower() or self.order.isupper()):
            fail(f"{where}: order is {self.order!r}; it is x, y and z in some order, all small or all capital letters")
        if not self.metres > 0:
            fail(f"{where}: metres is {self.metres}; it is above 0")
        if len(self.tool) not in (0, 12):
            fail(f"{where}: tool has {len(self.tool)} numbers; a 3×4 matrix has 12, by rows")
        if self.closed == self.open:
            fail(f"{where}: closed and open are both {self.open}; they are the log's two ends of the gripper")
        if self.kind == "pose" and self.column and bool(self.rotation) == (self.form == "transform"):
            fail(f"{where}: a pose has a rotation column, unless its form is 'transform': then `column` has all of it")
        if self.kind == "pose" and self.state:
            fail(f"{where}: a move has no place in a state row; leave `state` empty")
        for text in (self.column, self.rotation, self.state):
            column_part(text)
        if self.kind == "values" and column_part(self.column)[1] is None:
            fail(f"{where}: column is {self.column!r}; say which of its numbers, such as {self.column or 'NAME'}[0:7]")

    def channels(self) -> list[Channel]:
        """The channels of the action that it becomes."""
        if self.kind == "gripper":
            return [Channel(self.name, "gripper, 0 closed, 1 open", "1", low=-0.1, high=1.1)]
        if self.kind == "values":
            count = self.numbers(self.column)
            assert count is not None
            names = [f"{self.name}_{index}" for index in range(count)] if count > 1 else [self.name]
            return [Channel(name, unit=self.unit) for name in names]
        meaning, frame = f"move of {self.name} to the next row", "its own before the move"
        return [
            Channel(
                f"{self.name}_{axis}",
                meaning,
                unit="metre" if number < 3 else "1",
                frame=frame,
                relative=True,
                rotation=number >= 3,
            )
            for number, axis in enumerate(MOVE_NAMES)
        ]

    @staticmethod
    def numbers(column: str) -> int | None:
        """How many numbers of a row a column with its part names; None for all that there are."""
        _, first, stop = column_part(column)
        return None if first is None or stop is None else stop - first


def column_part(text: str) -> tuple[str, int | None, int | None]:
    """("state", 3, 6) of "state[3:6]", ("state", 3, 4) of "state[3]", ("state", None, None) of "state"."""
    found = re.fullmatch(r"([^\[\]]*)(?:\[(\d+)(?::(\d+))?\])?", text)
    if found is None:
        fail(f"column {text!r}: a part of a column is written NAME[3] or NAME[0:3]")
    if found[2] is None:
        return found[1], None, None
    first, stop = int(found[2]), int(found[3] or int(found[2]) + 1)
    if stop <= first:
        fail(f"column {text!r}: the part is empty; NAME[0:3] has the numbers 0, 1 and 2")
    return found[1], first, stop


@dataclass(frozen=True)
class Embodiment:
    """A robot's action and camera contract: everything that the model must know about it (an embodiment card).

    domain_id:       slot of the action heads, 0 .. 31. Upstream's registered ids are kept; a new robot takes a free one
    shares_domain:   the embodiment that already has this slot, upstream's or ours, where two share it on purpose
    initialise_from: domain whose rows a fresh slot starts from; None draws them anew
    control_hz:      actions a second
    chunk:           action rows a window, a multiple of 4 (a window has chunk + 1 frames)
    action_key, state_key: columns of the log
    action:          its channels in order; at most 64. Empty: those of `recorded`
    recorded:        what the action is made from, piece by piece; empty: `action_key` has it as it stands
    state_row:       whether row 0 of the action stream is the robot's state (in the action's own units), given
    cameras:         columns of the log with its views, in the order of `layout`
    layout:          "single", or "row" (side by side), or "column" (one below the other), or "over_two": the first
                     above the two others, which stand side by side at half its size
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
    cameras: list[str] = MISSING
    action: list[Channel] = field(default_factory=list)
    recorded: list[Recorded] = field(default_factory=list)
    shares_domain: str | None = None
    initialise_from: int | None = None
    action_key: str = "action"
    state_key: str | None = None
    state_row: bool = False
    layout: Literal["single", "row", "column", "over_two"] = "single"
    resolution_tier: int = 256
    view_point: str = "ego_view"
    normaliser: Literal["quantile", "minmax", "meanstd", "none"] = "quantile"
    execute: int = 8
    simulator: str | None = None

    def __post_init__(self) -> None:
        where = f"embodiment {self.name!r}"
        made = [channel for piece in self.recorded for channel in piece.channels()]
        if made and not self.action:
            object.__setattr__(self, "action", made)
        if made and len(made) != len(self.action):
            fail(f"{where}: action has {len(self.action)} channels, but recorded makes {len(made)}; leave action empty")
        if not 0 <= self.domain_id < DOMAINS:
            fail(f"{where}: domain_id is {self.domain_id}; the action heads have slots 0 to {DOMAINS - 1}")
        if not 1 <= len(self.action) <= MAX_ACTION_WIDTH:
            fail(f"{where}: action has {len(self.action)} channels; a robot has 1 to {MAX_ACTION_WIDTH}")
        if self.chunk < 4 or self.chunk % 4:
            fail(f"{where}: chunk is {self.chunk}; it is a multiple of 4 (chunk + 1 frames a window)")
        if self.control_hz <= 0:
            fail(f"{where}: control_hz is {self.control_hz}; it is a rate in Hz, above 0")
        if self.resolution_tier not in TIERS:
            fail(f"{where}: resolution_tier is {self.resolution_tier}; it is one of {', '.join(map(str, TIERS))}")
        if self.view_point not in VIEW_POINTS:
            fail(f"{where}: view_point is {self.view_point!r}.{nearest(self.view_point, VIEW_POINTS)}")
        if not self.cameras:
            fail(f"{where}: cameras is empty; name at least one camera column of the log")
        if self.layout == "single" and len(self.cameras) > 1:
            fail(f"{where}: layout is 'single' but there are {len(self.cameras)} cameras; use 'row' or 'column'")
        if self.layout == "over_two" and len(self.cameras) != 3:
            fail(f"{where}: layout is 'over_two' but there are {len(self.cameras)} cameras; it shows three")
        if self.recorded and self.state_row and not self.makes_state:
            fail(f"{where}: state_row is true, but a piece of recorded has no state; give each its `state` column")
        if self.state_row and self.state_key is None and not self.makes_state:
            fail(f"{where}: state_row is true but state_key is empty; name the state column of the log")
        if not 1 <= self.execute <= self.chunk:
            fail(f"{where}: execute is {self.execute}; it is 1 to chunk ({self.chunk})")

    @property
    def makes_state(self) -> bool:
        """Whether the state is made from `recorded` too, in place of `state_key`."""
        return self.state_row and bool(self.recorded) and all(piece.state for piece in self.recorded)

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


@dataclass(frozen=True)
class Clips:
    """How video without a robot is cut into windows and framed: what an embodiment card is to a robot's log.

    frames:          pixel frames of a window, 4k + 1 (1: single images)
    least_frames:    a clip, or the rest of one, of fewer than `frames` but at least these gives a window of its largest
                     4k + 1; shorter ones are left out and counted. None: `frames`, so that all windows are alike
    stride:          frames between the starts of a clip's windows; None: `frames`, so that none overlap
    resolution_tier: 256, 480, 704 or 720: frames are resized to cover the tier's canvas and cropped to its middle
    """

    frames: int = 61
    least_frames: int | None = None
    stride: int | None = None
    resolution_tier: int = 256

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            fail(f"frames is {self.frames}; a window has 4k + 1 frames, such as 61 or 93")
        if self.least_frames is not None and not 1 <= self.least_frames <= self.frames:
            fail(f"least_frames is {self.least_frames}; it is 1 to frames ({self.frames})")
        if self.stride is not None and self.stride < 1:
            fail(f"stride is {self.stride}; it is at least 1")
        if self.resolution_tier not in TIERS:
            fail(f"resolution_tier is {self.resolution_tier}; it is one of {', '.join(map(str, TIERS))}")

    @property
    def least(self) -> int:
        """Frames of the shortest window."""
        return self.frames if self.least_frames is None else self.least_frames

    @property
    def step(self) -> int:
        """Frames between the starts of a clip's windows."""
        return self.frames if self.stride is None else self.stride


# ------------------------------------------------------------------------------------------------ experiment


@dataclass(frozen=True)
class Model:
    """Which checkpoint, and how it runs.

    path:                   a Cosmos 3 folder in the published diffusers layout, seen from the project's root, or its
                            Hub id (owner/name)
    revision:               Hub revision; None takes the newest
    random:                 sizes of a transformer (keys of upstream's `Cosmos3OmniTransformer`) whose weights are drawn
                            on the device and not read: to measure speed and memory without a download. Tokenizers and
                            scheduler are still the folder's. Empty: the folder's transformer
    random_seed:            of that draw, whatever `training.seed` is
    dtype:                  of the frozen weights and of the arithmetic; trainables are float32 masters either way
    base_precision:         of the decoder layers' frozen matrices: dtype keeps them in that; fp8 rounds them, and what
                            they multiply, to 8 bits (e4m3, a scale a row), for LoRA on a GPU that multiplies those:
                            half the memory with one copy, products in half the time. Cached keys and values of the
                            reasoner are not rounded; those of a tower that runs are
    fp8_copies:             of the generation tower's rounded matrices: 1, turned at every backward, where memory
                            binds; 2, one in each layout, which is faster and gives the same numbers
    vae_dtype:              of the video and the sound tokenizer: trained and served in bf16, faster on a CPU that has
                            it too; on one that has not, weights so rounded run in float32
    attention:              auto picks the fastest that works here and says which
    compile:                generate kernels for the layers (torch.compile): the first steps wait a minute for it,
                            then every step is faster; auto does on a GPU, not on a CPU
    cuda_graphs:            record passes whose shapes come again and launch each as one, where the GPU would wait for a
                            host that launches them kernel by kernel: auto does on a GPU for compiled layers and packs
                            of up to 16,384 tokens, where weights are not sharded and, for what is recorded has memory
                            of its own, a pass fits twice or all are alike; true for packs of every size, whatever
                            memory there is
    checkpoint_activations: what of the layers is computed again in backward, to save memory: true all of it (a third
                            slower); but_attention all but that (Nano: 0.3 MB a generation token), whose cost grows with
                            the square of a clip's length; but_products norms and gates alone (a hundredth slower);
                            false nothing. auto measures at the first step: nothing where the GPU's memory allows it,
                            else norms and gates, and of as few layers as need be all but attention. Where nothing is
                            measured, on a CPU and under ZeRO, it is but_attention
    """

    path: str = MISSING
    revision: str | None = None
    random: dict[str, Any] = field(default_factory=dict)
    random_seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    base_precision: Literal["dtype", "fp8"] = "dtype"
    fp8_copies: int = 2
    vae_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "flash4", "flash3", "flash2", "sdpa"] = "auto"
    compile: Literal["auto", True, False] = "auto"
    cuda_graphs: Literal["auto", True, False] = "auto"
    checkpoint_activations: Literal["auto", True, False, "but_attention", "but_products"] = "auto"

    def __post_init__(self) -> None:
        _require("model", self, "1 or 2", lambda x: x in (1, 2), "fp8_copies")


@dataclass(frozen=True)
class Augment:
    """Random changes of a training window's frames, alike in all of its frames and views. All off: as they are.

    crop:     share of each side that is left by a crop anywhere in the frame, which is then resized to the whole
    brightness, contrast, saturation: factors are drawn from 1 ± this
    hue:      turn drawn from ± this, in whole turns, at most 0.5. Costs five times what the others do together
    variants: with cached latents, how many latents of each window are cached, the first of it as it is; a sample
              takes one of them. Without, every sample is changed anew, and encoded where it is trained on
    """

    crop: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    variants: int = 0

    def __post_init__(self) -> None:
        _require("augment", self, "a share of the frame, above 0 to 1 (1: no crop)", lambda x: 0 < x <= 1, "crop")
        spread = ("brightness", "contrast", "saturation")
        _require("augment", self, "from 0 (as it is) to 1", lambda x: 0 <= x <= 1, *spread)
        _require("augment", self, "from 0 (as it is) to 0.5", lambda x: 0 <= x <= 0.5, "hue")
        _require(
            "augment",
            self,
            "0, or at least 2: the window as it is and a changed one",
            lambda x: x == 0 or x > 1,
            "variants",
        )

    @property
    def changes(self) -> bool:
        """Whether anything is changed at all."""
        return self.crop < 1 or any((self.brightness, self.contrast, self.saturation, self.hue))


@dataclass(frozen=True)
class Dataset:
    """One entry of the mixture.

    card:       dataset card; with it, a missing prepared folder is made before the run
    prepared:   folder of prepared rows (`cosmos3 prepare`)
    source:     folder of the log; None takes the card's
    embodiment: embodiment card by name (a file under configs/embodiment/); conversations and video without a robot have
                none
    frames, least_frames, stride, resolution_tier: of video without a robot (`Clips`); None takes the dataset card's
    statistics: another entry, of the same robot, whose statistics normalise this one's actions too: a deployed robot is
                de-normalised by one file. None: its own
    weight:     share of the samples drawn, relative to the other entries
    tasks:      rows of the mask table and their relative weights; none named: policy alone, which video without a robot
                cannot feed. A conversation has one task, its own, whatever is named here
                A task with sound draws only from windows that have it, and so do then the entry's other tasks
    cache_latents: encode every window, and its sound for a task with sound, once instead of at every step
    cache_reasoner: run the understanding tower once on every distinct prompt, while preparing, and keep its keys and
                values; then no step runs it and the run does not load it. For all datasets of a run or none, and not
                where that tower trains
    augment:    random changes of its frames in training
    """

    prepared: str = MISSING
    card: str | None = None
    source: str | None = None
    embodiment: str | None = None
    frames: int | None = None
    least_frames: int | None = None
    stride: int | None = None
    resolution_tier: int | None = None
    statistics: str | None = None
    weight: float = 1.0
    tasks: dict[str, float] = field(default_factory=dict)
    cache_latents: bool = False
    cache_reasoner: bool = False
    augment: Augment = field(default_factory=Augment)

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

    def __post_init__(self) -> None:
        _require("data", self, "at least 0 (0: the training process reads by itself)", lambda x: x >= 0, "workers")
        _require("data", self, "at least 1", lambda x: x >= 1, "window_stride")
        _require("data", self, "a probability, 0 to 1", lambda x: 0 <= x <= 1, "caption_dropout")
        _require("data", self, "a share from 0 to below 1", lambda x: 0 <= x < 1, "heldout_fraction")
        for name, entry in self.datasets.items():
            if entry.statistics is not None:
                self._check_shared_statistics(name, entry)
            where, variants = f"data.datasets.{name}.augment", entry.augment.variants
            if entry.augment.changes and entry.cache_latents and not variants:
                fail(
                    f"{where} changes frames, but cache_latents keeps one latent of each window: set {where}.variants "
                    "to how many are to be cached, or cache_latents to false, which encodes at every step"
                )
            if variants and not (entry.augment.changes and entry.cache_latents):
                fail(f"{where}.variants is {variants}, but it is of cached latents of changed frames; leave it out")

    def _check_shared_statistics(self, name: str, entry: Dataset) -> None:
        where, other = f"data.datasets.{name}.statistics", self.datasets.get(entry.statistics or "")
        if other is None or other is entry:
            others = [key for key in self.datasets if key != name]
            fail(f"{where} is {entry.statistics!r}; it names another entry.{nearest(entry.statistics or '', others)}")
        if other.statistics is not None:
            fail(f"{where} is {entry.statistics!r}, which takes those of {other.statistics!r}; name that one")
        if entry.embodiment is None or other.embodiment != entry.embodiment:
            fail(
                f"{where} is {entry.statistics!r} of robot {other.embodiment}, but {name} is of {entry.embodiment}; "
                "name an entry of the same robot"
            )


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

    def __post_init__(self) -> None:
        _require("objective", self, "a weight, at least 0", lambda x: x >= 0, "video", "action", "sound", "text")
        _require("objective", self, "at least 1", lambda x: x >= 1, "logits_chunk")
        for tier in TIERS:
            if not self.shift.get(tier, 0) > 0:
                fail(f"objective.shift.{tier} is {self.shift.get(tier)}; every tier has a shift above 0 (1: none)")


@dataclass(frozen=True)
class Tuning:
    """What trains.

    method:   lora; hybrid: LoRA and the robot's own rows of the action heads; tower: every weight of `towers`;
              full: every weight of both towers and the heads; `action_modality_embed` stays frozen in every method
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

    @property
    def trains_understanding(self) -> bool:
        """Whether something of the understanding tower trains, so that what it gives changes from step to step."""
        return self.method == "full" or "understanding" in self.towers

    def __post_init__(self) -> None:
        for key, values, known in (
            ("towers", self.towers, ("understanding", "generation")),
            ("modules", self.modules, ("attention", "mlp")),
        ):
            for value in values:
                if value not in known:
                    fail(f"tuning.{key}: {value!r} is unknown.{nearest(value, known)}")
            if not values:
                fail(f"tuning.{key} is empty; choose among {', '.join(known)}")
        _require("tuning", self, "at least 1", lambda x: x >= 1, "rank")
        _require("tuning", self, "above 0", lambda x: x > 0, "alpha")
        _require("tuning", self, "a probability below 1", lambda x: 0 <= x < 1, "dropout")
        for pattern, factor in self.learning_rate_multipliers.items():
            if not factor >= 0:
                fail(f"tuning.learning_rate_multipliers.{pattern} is {factor}; a factor is at least 0")


@dataclass(frozen=True)
class Optimizer:
    """Fused AdamW and its schedule.

    learning_rate: peak;  betas, eps, weight_decay: AdamW's
    schedule:      after the warmup: cosine or linear to `final_fraction` of the peak at the last step, or constant
    warmup_steps:  steps of linear rise from 0
    clip:          largest norm of the whole gradient; 0 never clips
    spike:         a step is skipped whose gradient's norm is above this many times the usual one of the steps before,
                   as one is whose gradient is not finite; 0: only that is
    patience:      consecutive skipped steps after which the run is aborted
    """

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 50
    final_fraction: float = 0.0
    clip: float = 1.0
    spike: float = 10.0
    patience: int = 20

    def __post_init__(self) -> None:
        _require("optimizer", self, "at least 0", lambda x: x >= 0, "learning_rate", "weight_decay", "warmup_steps")
        _require("optimizer", self, "above 0", lambda x: x > 0, "eps")
        _require("optimizer", self, "at least 0 (0: never clip)", lambda x: x >= 0, "clip")
        _require("optimizer", self, "at least 1", lambda x: x >= 1, "patience")
        _require("optimizer", self, "above 1, or 0 (none is skipped for it)", lambda x: x > 1 or x == 0, "spike")
        _require("optimizer", self, "a fraction, 0 to 1", lambda x: 0 <= x <= 1, "final_fraction")
        if not all(0 <= beta < 1 for beta in self.betas):
            fail(f"optimizer.betas is {list(self.betas)}; both are from 0 to below 1")


@dataclass(frozen=True)
class Training:
    """How long, how much at a time, and what is written on the way.

    steps:                    optimizer steps
    samples_per_step:         samples of one optimizer step over all ranks; a step's samples are a function of the seed
                              and the step alone, however they are split into micro-batches
    tokens_per_micro_batch:   token budget of one forward, both streams together; a rank's share of a step is cut into
                              as few packs as fit, all full but the last
    seed:                     of everything that is drawn
    ema_decay:                of the average of the trainables (0: none); it is what is evaluated and exported
    *_every_n_steps:          0 turns it off (of evaluating and saving; the last step is always evaluated and saved)
    keep_checkpoints:         how many of the newest to keep
    keep_every_n_steps:       beside these, the checkpoints whose step this divides (0: none)
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
    keep_every_n_steps: int = 0

    def __post_init__(self) -> None:
        positive = ("steps", "samples_per_step", "tokens_per_micro_batch", "log_every_n_steps", "keep_checkpoints")
        _require("training", self, "at least 1", lambda x: x >= 1, *positive)
        _require("training", self, "0 (none) to below 1", lambda x: 0 <= x < 1, "ema_decay")
        every = ("evaluate_every_n_steps", "checkpoint_every_n_steps", "keep_every_n_steps")
        _require("training", self, "at least 0 (0: never)", lambda x: x >= 0, *every)
        saved = self.checkpoint_every_n_steps
        if self.keep_every_n_steps and (not saved or self.keep_every_n_steps % saved):
            fail(
                f"training.keep_every_n_steps is {self.keep_every_n_steps}; it is a multiple of "
                f"training.checkpoint_every_n_steps, {saved}, for only what was saved is kept"
            )


@dataclass(frozen=True)
class Strategy:
    """How the run is spread.

    name:        single; ddp (every process holds the model); fsdp2 (each holds a part of every layer's weights, and
                 gathers a layer while it runs); hsdp (several copies of the model, each spread as in fsdp2);
                 deepspeed_zero2 (every process holds the model, and a part of the masters, moments and gradients of
                 what trains), deepspeed_zero3 (a part of every layer's weights too); auto is single for one process and
                 ddp for several
    devices:     processes on each machine; under torchrun it must equal what torchrun started
    shards:      hsdp: processes that share one copy of the model; 0: those of a machine
    offload:     deepspeed_zero2 and 3: masters and moments stay in the host's memory, which updates them
    hold_gradients: deepspeed_zero2 and 3: of weights that train, each process holds whole gradients until a step's last
                 micro-batch, so that those before exchange none, as ddp and fsdp2 do; false parts them after every one:
                 up to 4 bytes a weight less, and as many sums as micro-batches. Adapters' are always held
    context_parallel: neighbouring processes that share packs, each with a slice of their tokens: for clips that do not
                 fit one GPU; it divides the processes, and the model's key/value heads
    accelerator: auto takes a GPU where there is one
    collective_timeout_seconds:  how long processes wait for one that does not come to a step's collective, before the
                 run ends with its rank in the error; not while the first rank measures, which takes what it takes
    """

    name: Literal["auto", "single", "ddp", "fsdp2", "hsdp", "deepspeed_zero2", "deepspeed_zero3"] = "auto"
    devices: int = 1
    shards: int = 0
    offload: bool = False
    hold_gradients: bool = True
    context_parallel: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    collective_timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        least_one = ("devices", "context_parallel", "collective_timeout_seconds")
        _require("strategy", self, "at least 1", lambda x: x >= 1, *least_one)
        _require("strategy", self, "at least 0", lambda x: x >= 0, "shards")
        if self.shards and self.name != "hsdp":
            fail(f"strategy.shards is {self.shards}; hsdp alone reads it, not {self.name!r}: leave it out")
        if self.offload and not self.is_zero:
            fail(
                f"strategy.offload is true; deepspeed_zero2 and deepspeed_zero3 alone read it, not {self.name!r}: "
                "leave it out"
            )
        if not self.hold_gradients and not self.is_zero:
            fail(
                "strategy.hold_gradients is false; deepspeed_zero2 and deepspeed_zero3 alone read it, not "
                f"{self.name!r}: leave it out"
            )
        if self.context_parallel > 1 and self.is_zero:
            fail(
                f"strategy.context_parallel is {self.context_parallel}, which strategy.name {self.name!r} does not do; "
                "use ddp or fsdp2"
            )

    @property
    def is_zero(self) -> bool:
        """Whether it is DeepSpeed's."""
        return self.name.startswith("deepspeed")

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all of a run: of its weights, or of what ZeRO keeps for them."""
        return self.name not in ("auto", "single", "ddp")


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

    def __post_init__(self) -> None:
        _require("evaluation", self, "at least 1", lambda x: x >= 1, "solver_steps")
        counts = ("heldout_samples", "action_samples", "closed_loop_episodes", "closed_loop_first_seed")
        _require("evaluation", self, "at least 0", lambda x: x >= 0, *counts)


@dataclass(frozen=True)
class Logging:
    """Where numbers go besides metrics.csv, which is always written.

    wandb:   also send them to Weights & Biases, as its own settings say (WANDB_API_KEY, WANDB_MODE, `wandb login`)
    project: its project;  offline: write its files into the run's folder and send nothing, whatever those say
    """

    wandb: bool = False
    project: str = "cosmos3_train"
    offline: bool = False


@dataclass(frozen=True)
class Benchmark:
    """What `cosmos3 benchmark` measures, and the log that it makes to measure on.

    first_step:    the median is over this step and all later ones; those before it warm up (compilation, loader)
    height, width: of the log's frames, pixels
    text_tokens:   of every prompt, whose instruction is filled up with words; `cosmos3 plan` takes it for prompts that
                   it cannot count
    windows:       of the log
    instructions:  distinct ones, at most one a window; of many, each step reads others from the reasoner cache
    loader_seconds: how long each way of reading is measured, with --loader
    """

    first_step: int = 20
    height: int = 256
    width: int = 256
    text_tokens: int = 180
    windows: int = 256
    instructions: int = 1
    loader_seconds: float = 5.0

    def __post_init__(self) -> None:
        _require("benchmark", self, "above 0", lambda x: x > 0, "loader_seconds")
        _require("benchmark", self, "at least 1", lambda x: x >= 1, "first_step", "text_tokens", "windows")
        _require(
            "benchmark", self, f"from 1 to {self.windows} (windows)", lambda x: 1 <= x <= self.windows, "instructions"
        )
        _require("benchmark", self, "even and above 0 (video)", lambda x: x > 0 and x % 2 == 0, "height", "width")


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
    benchmark: Benchmark = field(default_factory=Benchmark)
    export: Literal["none", "adapter", "merged"] = "adapter"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            fail(f"name is {self.name!r}; it is a folder under runs/: letters, digits, '.', '_' and '-', no path")
        obstacle = self.pass_is_not_one()
        if self.model.cuda_graphs is True and obstacle:
            fail(f"model.cuda_graphs is true, but {obstacle}; use auto")
        obstacle = self.fp8_is_refused()
        if self.model.base_precision == "fp8" and obstacle:
            fail(f"model.base_precision is 'fp8', but {obstacle}, or base_precision=dtype")

    def fp8_is_refused(self) -> str | None:
        """Why such a run cannot round its frozen weights (`model.base_precision`), and what could, or None."""
        method, strategy = self.tuning.method, self.strategy.name
        if method in ("tower", "full"):
            return f"tuning.method {method!r} trains the weights that it would round; use lora or hybrid"
        if self.tuning.dora:
            return "tuning.dora needs the norms of the exact weights; use dora=false"
        if strategy == "deepspeed_zero2":
            return f"with it strategy.name {strategy!r} was never run; use ddp"
        if self.strategy.is_sharded:
            return (
                f"strategy.name {strategy!r} spreads weights over processes in their own dtype; use ddp, where each "
                "holds all of them"
            )
        return None

    def pass_is_not_one(self) -> str | None:
        """Why a pass of such a run cannot be one launch, as far as its settings tell, or None."""
        strategy = self.strategy
        if strategy.context_parallel > 1:
            return f"under strategy.context_parallel={strategy.context_parallel} ranks exchange something within a pass"
        if strategy.is_sharded:
            return f"under strategy.name={strategy.name} ranks exchange something within a pass"
        if self.model.compile is False:
            return "model.compile is false"
        return "tuning.dropout draws in every pass" if self.tuning.dropout else None
