"""cosmos3 train EXPERIMENT: the run, then its export, verified, then its report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos3_train.commands.console import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    LAUNCHER_ENDS_US_SECONDS,
    QUIET,
    USER_ERROR,
    first_tells,
    leave_to_first,
    say,
    say_error,
)
from cosmos3_train.config import Loaded
from cosmos3_train.runtime import is_first_rank, log_to_file, record_failure, wait_for_sigterm

if TYPE_CHECKING:
    from cosmos3_train.export.verify import VerifyReport
    from cosmos3_train.training.run import Run

REPORT = "report.html"


def run(loaded: Loaded, *, fresh: bool, began: float) -> int:
    """Carry out an experiment, or go on with it, and hand over its result.

    Args:
        began: `time.monotonic()` at which the command began.

    Raises:
        UserError: the configuration, the data or a checkpoint does not allow it.
    """
    from cosmos3_train.export.verify import VerificationError
    from cosmos3_train.training.measures import measure
    from cosmos3_train.training.run import LOGS, TrainingFailed, build, is_finished, quieten_lightning, train
    from cosmos3_train.training.strategy import PeerLost, RankMissing

    if (fresh or not is_finished(loaded.run_folder)) and _mistakes(loaded):
        return USER_ERROR
    log_to_file(loaded.run_folder / LOGS)
    quieten_lightning()
    try:
        ended = train(loaded, fresh=fresh, evaluate=measure, deliver=lambda run: _deliver(run, began))
        if ended == "interrupted":
            return INTERRUPTED
        if is_first_rank():
            if not (loaded.run_folder / REPORT).is_file():  # killed between the last step and the report
                _deliver(build(loaded, "export"), began)
            elif not _exported(loaded):  # it was finished when another form was asked for, or none
                _export(build(loaded, "export"))
            _summary(loaded)
    except PeerLost as error:
        # The one that went away has the error; its launcher finds it, tells, and ends us. Whoever goes first is taken
        # for the culprit, and what is said first for the reason: so neither go nor speak before.
        if error.asked_to_stop or wait_for_sigterm(LAUNCHER_ENDS_US_SECONDS):
            return FAILED
        say_error(error)
        return FAILED
    except (RankMissing, TrainingFailed, VerificationError) as error:
        record_failure(error, f"error: {error}")
        say_error(error)
        return FAILED
    except SystemExit as stopped:  # how Lightning passes Ctrl-C on
        if isinstance(stopped.__context__, KeyboardInterrupt):
            return QUIET
        raise
    return FINISHED


def _mistakes(loaded: Loaded) -> bool:
    """Whether `cosmos3 check` finds something wrong; it is said. Nothing of the run is written before."""
    from cosmos3_train.commands.check import examine
    from cosmos3_train.model.loading import model_folder
    from cosmos3_train.training.strategy import device_for

    with first_tells():
        device_for(loaded.experiment.strategy)
        findings = examine(loaded)
        if findings.model is None and not findings.problems:  # what is cheap to know is known before a model is fetched
            model_folder(loaded.model)
            findings = examine(loaded)
    if findings.problems:
        leave_to_first()
    for problem in findings.problems:
        say_error(problem)
    return bool(findings.problems)


def _deliver(run: Run, began: float) -> None:
    from cosmos3_train.commands.delivery import report

    report(run, _export(run), time.monotonic() - began)


def _export(run: Run) -> VerifyReport | None:
    from cosmos3_train.commands.delivery import export

    form = run.experiment.export
    return None if form == "none" else export(run, form)[1]


def _exported(loaded: Loaded) -> bool:
    from cosmos3_train.commands.delivery import refuse_form
    from cosmos3_train.export.verify import REPORT as VERIFICATION

    form = loaded.experiment.export
    refuse_form(loaded.experiment, form)
    return form == "none" or (loaded.run_folder / "export" / form / VERIFICATION).is_file()


def _summary(loaded: Loaded) -> None:
    """The headline numbers, and where everything lies."""
    from cosmos3_train.export.verify import REPORT as VERIFICATION

    folder, form = loaded.run_folder, loaded.experiment.export
    numbers = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    say()
    say(f"{loaded.experiment.name}: finished")
    _line(numbers, "action error, held-out", "action_error_before", "action_error_after", "action_error_constant")
    _line(numbers, "policy's error, held-out", "policy_error_before", "policy_error_after")
    _line(numbers, "coverage, closed loop", "coverage_before", "coverage_after", "coverage_still")
    _line(numbers, "loss, held-out", "heldout_loss_before", "heldout_loss_after")
    if form != "none":
        verified = json.loads((folder / "export" / form / VERIFICATION).read_text(encoding="utf-8"))
        say(f"  export differs by {verified['relative_difference']:.1e} from the trained model, loaded upstream")
    say(f"  report  {_near(folder / REPORT)}")
    if form != "none":
        say(f"  {form:<7} {_near(folder / 'export' / form)}")


def _line(numbers: Mapping[str, Any], title: str, *keys: str) -> None:
    words = {"constant": "without a model", "still": "standing still"}
    parts = []
    for key in keys:
        if numbers.get(key) is not None:
            when = key.rpartition("_")[2]
            parts.append(f"{words.get(when, when)} {numbers[key]:.4g}")
    if parts:
        say(f"  {title}: {', '.join(parts)}")


def _near(path: Path) -> Path:
    """The path as seen from here, where it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
