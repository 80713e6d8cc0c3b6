"""cosmos3 check EXPERIMENT: what would go wrong, said in seconds, without a GPU and without reading a weight.

Every check ends in rows of a table (what was looked at, what was found) or in a problem; all problems are told, not the
first alone. A model that is not on this disk is no problem: what needs it is left out, and the table says so.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cosmos3_train.commands.check_data import CheckedData, check_dataset, missing_caches
from cosmos3_train.commands.check_model import CheckedModel, check_model, longest_sample, reasoner_rows
from cosmos3_train.commands.console import FINISHED, USER_ERROR, say, say_error, say_table
from cosmos3_train.commands.delivery import refuse_form
from cosmos3_train.config import Data, Dataset, Loaded, UserError
from cosmos3_train.data.mixture import refuse_few_samples
from cosmos3_train.data.reader import SOUND_LATENTS
from cosmos3_train.evaluation.closed_loop import make_simulator
from cosmos3_train.flow.tasks import sound_task
from cosmos3_train.model.domains import refuse_taken_domains
from cosmos3_train.model.loading import fetched_folder
from cosmos3_train.model.reasoner_cache import size_in_words as _size
from cosmos3_train.model.sound import check_sound
from cosmos3_train.training.datamodule import caches_reasoner, refuse_two_scales
from cosmos3_train.training.strategy import refuse_remainders

LATENT_BYTES, SOUND_BYTES = 48 * 2, 2
"""Of one cell of a cached latent, 48 channels in bf16; of one number of a cached sound."""


@dataclass
class Findings:
    """rows: (what, found) of the table;  problems: one line each;  model: None where it is not on this disk

    reasoner_cached: the run recalls keys and values from caches;  reasoner_bytes: that these still lack
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)
    data: dict[str, CheckedData] = field(default_factory=dict)
    model: CheckedModel | None = None
    reasoner_cached: bool = False
    reasoner_bytes: int = 0

    def look(self, check: Callable[[], None]) -> None:
        """Run a check; what it raises is a problem among others."""
        try:
            check()
        except UserError as error:
            self.problems.append(error)


def run(loaded: Loaded) -> int:
    """Check everything that can be checked here. Exit code 2 where there is a problem."""
    findings = examine(loaded)
    say_table(findings.rows, widest=40)
    for problem in findings.problems:
        say_error(problem)
    if findings.problems:
        return USER_ERROR
    say(f"nothing wrong was found; cosmos3 train writes to {loaded.run_folder}")
    return FINISHED


def examine(loaded: Loaded) -> Findings:
    """Every check that needs no GPU, no network and no weight. Writes nothing."""
    experiment, findings = loaded.experiment, Findings()
    findings.rows.append(("experiment", f"{experiment.name}: every key and value is of the schema"))
    findings.look(lambda: refuse_form(experiment, experiment.export))
    findings.look(lambda: refuse_taken_domains(experiment.embodiments.values()))
    for name, entry in experiment.data.datasets.items():
        findings.look(lambda name=name, entry=entry: _look_at_data(loaded, name, entry, findings))
    findings.look(lambda: _look_at_scales(loaded, findings))
    if not experiment.data.datasets:
        findings.problems.append(UserError("data.datasets is empty; name at least one dataset"))
    findings.look(lambda: _check_processes(loaded))
    findings.look(lambda: _check_simulators(loaded, findings))
    findings.look(lambda: setattr(findings, "reasoner_cached", caches_reasoner(loaded)))
    findings.look(lambda: _look_at_model(loaded, findings))
    findings.look(lambda: _look_at_sound(loaded, findings))
    findings.look(lambda: _check_disk(loaded, findings))
    return findings


def _look_at_data(loaded: Loaded, name: str, entry: Dataset, findings: Findings) -> None:
    findings.data[name] = check_dataset(loaded, name, entry)
    findings.rows.extend(findings.data[name].rows)


def _look_at_scales(loaded: Loaded, findings: Findings) -> None:
    """Whether each robot has one scale, as far as its logs are prepared and were found in order; of others, how they
    become so."""
    datasets, robots = loaded.experiment.data.datasets, {}
    sharing = Counter(entry.embodiment for entry in datasets.values())
    for name, entry in datasets.items():
        other = entry.statistics or name
        whose = findings.data.get(other)
        if name not in findings.data or whose is None or not entry.embodiment:
            continue
        if whose.statistics is not None:
            robots[name] = (entry.embodiment, entry, whose.statistics)
        elif entry.statistics or sharing[entry.embodiment] > 1:
            words = f"not checked: {other} is not prepared yet; first {_prepare_command(loaded, other)}"
            findings.rows.append((f"statistics {name}", words))
    refuse_two_scales(robots)


def _prepare_command(loaded: Loaded, name: str) -> str:
    """The line that prepares a robot's log as the run would."""
    data, entry = loaded.experiment.data, loaded.experiment.data.datasets[name]
    said = {
        "embodiment": entry.embodiment,
        "source": entry.source,
        "stride": None if data.window_stride == 1 else data.window_stride,
        "heldout": None if data.heldout_fraction == Data().heldout_fraction else data.heldout_fraction,
        "output": entry.prepared,
    }
    options = [f"--{key} {shlex.quote(str(value))}" for key, value in said.items() if value is not None]
    return " ".join(["cosmos3 prepare", shlex.quote(str(entry.card)), *options])


def _look_at_model(loaded: Loaded, findings: Findings) -> None:
    experiment, folder = loaded.experiment, fetched_folder(loaded.model)
    if folder is None:
        findings.rows.append(("model", f"model not fetched: hf download {experiment.model.path}"))
        findings.rows.append(("trains, tokens", "not checked without the model"))
        return
    findings.model = check_model(folder, experiment, reasoner_cached=findings.reasoner_cached)
    findings.rows.extend(findings.model.rows)
    findings.rows.append(("longest sample", longest_sample(folder, findings.model.layout, experiment, findings.data)))
    if findings.reasoner_cached:
        rows, findings.reasoner_bytes = reasoner_rows(folder, loaded, findings.data)
        findings.rows.extend(rows)


def _look_at_sound(loaded: Loaded, findings: Findings) -> None:
    """Whether the model can do with sound what the datasets that were found in order ask of it."""
    datasets, folder = loaded.experiment.data.datasets, fetched_folder(loaded.model) if findings.model else None
    heard = next((task for name in findings.data if (task := sound_task(datasets[name].tasks))), None)
    if heard is not None and folder is not None:
        form = check_sound(folder, loaded.experiment.model, heard)
        findings.rows.append(("sound", f"the model's tokenizer takes {form.rate:,} Hz, {form.channels} channels"))


def _check_processes(loaded: Loaded) -> None:
    """Whether the processes of a machine can share a step, where the experiment says how many there are."""
    strategy, processes = loaded.experiment.strategy, loaded.experiment.strategy.devices
    if processes == 1:
        return
    if max(strategy.context_parallel, strategy.shards) <= processes:  # else groups are of several machines
        refuse_remainders(strategy, processes, strategy.shards or processes)
    refuse_few_samples(loaded.experiment.training.samples_per_step, max(1, processes // strategy.context_parallel))


def _check_simulators(loaded: Loaded, findings: Findings) -> None:
    evaluation = loaded.experiment.evaluation
    if evaluation.closed_loop_episodes == 0:
        return
    for card in loaded.experiment.embodiments.values():
        if card.simulator:
            make_simulator(card.simulator, card)
            seeds = f"{evaluation.closed_loop_episodes} episodes, seeds from {evaluation.closed_loop_first_seed}"
            findings.rows.append(("closed loop", f"{card.simulator}: {seeds}"))


def _check_disk(loaded: Loaded, findings: Findings) -> None:
    """Checkpoints and export of what trains, and latents, keys and values that are not cached yet, on their disks.

    What an interrupted run has written already is not asked for again.

    Raises:
        UserError: more than is free.
    """
    experiment, model = loaded.experiment, findings.model
    needs: list[tuple[Path, int, str]] = []  # where, bytes still to be written, what
    if model is not None:
        # float32: weights, two moments and the average; one checkpoint more than are kept while it is written.
        one = model.trained * 4 * (3 + int(experiment.training.ema_decay > 0))
        training = experiment.training
        copies = training.keep_checkpoints + 1
        if training.keep_every_n_steps:
            newest = training.keep_checkpoints * training.checkpoint_every_n_steps  # steps that these reach back
            copies += max(0, training.steps - newest) // training.keep_every_n_steps
        exports = {"none": 0, "adapter": 8 * model.trained, "merged": model.stored_bytes}[experiment.export]
        there, exported = (_bytes_under(loaded.run_folder / name) for name in ("checkpoints", "export"))
        needs.append((loaded.run_folder, max(one, one * copies - there), f"{_size(one)} a checkpoint"))
        needs.append((loaded.run_folder, max(0, exports - exported), f"{_size(exports)} the export"))
    for name, checked in findings.data.items():
        entry = experiment.data.datasets[name]
        for place in missing_caches(loaded.root / entry.prepared, entry):
            of_sound, caches = place == SOUND_LATENTS, loaded.root / entry.prepared / place.parent
            shape, cell = (checked.sound, SOUND_BYTES) if of_sound else (checked.latent, LATENT_BYTES)
            if shape is not None:
                size = checked.windows * math.prod(shape) * cell
                left = max(0, size - sum(_bytes_under(part) for part in caches.glob(f"{place.name}.partial-*")))
                needs.append((caches, left, f"{_size(size)} cached {place.name}"))
    if findings.reasoner_bytes:
        first = next(entry for entry in experiment.data.datasets.values() if entry.cache_reasoner)
        words = f"{_size(findings.reasoner_bytes)} cached keys and values"
        needs.append((loaded.root / first.prepared, findings.reasoner_bytes, words))
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for need in needs:
        disks.setdefault(_existing(need[0]).stat().st_dev, []).append(need)
    for here in disks.values():
        needed, words = sum(size for _, size, _ in here), ", ".join(what for _, _, what in here)
        free = shutil.disk_usage(_existing(here[0][0])).free
        if needed > free:
            raise UserError(
                f"{here[0][0]}: the run needs about {_size(needed)} of disk ({words}) and {_size(free)} are free; free "
                "some space, or lower training.keep_checkpoints"
            )
        findings.rows.append(("disk", f"about {_size(needed)} of {_size(free)} free ({words})"))


def _existing(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place


def _bytes_under(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
