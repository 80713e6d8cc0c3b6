"""cosmos3 show EXPERIMENT: every resolved value and the layer that set it."""

from __future__ import annotations

import json
from typing import Any

from cosmos3_train.commands.console import FINISHED, say, say_table
from cosmos3_train.config import Loaded, flatten, to_plain


def run(loaded: Loaded) -> int:
    """Print the experiment section by section: key, value, and the file (or 'schema', or 'command line') it is from."""
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, value in flatten(to_plain(loaded.experiment)).items():
        head, _, rest = key.partition(".")
        section = head if rest else ""
        origin = loaded.origin.get(key, "schema")
        sections.setdefault(section, []).append((key, _shown(value), "" if origin == "schema" else f"# {origin}"))
    say(f"# {loaded.experiment.question or loaded.experiment.name}")
    say("# A value without a note is the schema's default.")
    for rows in sections.values():
        say()
        say_table(rows, widest=48)
    say()
    say(f"# run folder: {loaded.run_folder}")
    return FINISHED


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(str(item.get("name", item)) for item in value)
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value)
