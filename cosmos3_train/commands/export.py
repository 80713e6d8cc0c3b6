"""cosmos3 export RUN --to adapter|merged: the run's newest checkpoint in a form that upstream loads, verified."""

from __future__ import annotations

from pathlib import Path

from cosmos3_train.commands.console import FAILED, FINISHED, say, say_error
from cosmos3_train.commands.runs import find_run
from cosmos3_train.config import UserError


def run(name_or_path: str, form: str, output: Path | None) -> int:
    """Write the export, verify it, and say what it is worth.

    Raises:
        UserError: no such run, no checkpoint, or the run has no such form.
    """
    loaded = find_run(name_or_path)
    if not list((loaded.run_folder / "checkpoints").glob("step_*")):
        raise UserError(f"{loaded.run_folder}: the run has no checkpoint yet; start it with 'cosmos3 train'")
    from cosmos3_train.commands.delivery import export, refuse_form
    from cosmos3_train.export.verify import VerificationError
    from cosmos3_train.training.run import build

    assert form == "adapter" or form == "merged"
    refuse_form(loaded.experiment, form)
    try:
        built = build(loaded, "export")
        folder, report = export(built, form, output)
    except VerificationError as error:
        say_error(error)
        return FAILED
    say(f"{folder}: {form} of {loaded.experiment.name} at step {built.module.position.step}")
    say(
        f"  differs by {report.relative_difference:.1e} from the trained model ({report.dtype}), limit {report.limit:g}"
    )
    say(f"  how: {report.how}; {report.samples} samples; it changes the base by {report.change:.1e}")
    say(f"  how to load it: {folder / 'README.md'}")
    return FINISHED
