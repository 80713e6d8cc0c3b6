"""A run's result for people and for programs: `report.html`, one file with its pictures inside, and `report.json`.

The page loads nothing: no script, no font, no address. Every number says what it means and how many trials it is of.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_train.data.files import write_whole

MEANINGS: dict[str, str] = {
    "action_error_before": "Error of sampled actions on held-out windows before training, in the robot's own units: of "
    "those inferred from the window's video where the run trains inverse dynamics, else of the policy's.",
    "action_error_after": "The same error after training.",
    "action_error_constant": "The same error of the better of two policies without a model: always the mean action, or "
    "staying where the robot is.",
    "policy_error_before": "Error of what the policy does from a first picture of a held-out window, untrained: more "
    "than one thing may be right there, so a perfect policy differs from the log too.",
    "policy_error": "Error of what the policy does from a held-out window's first picture, in the robot's own units: "
    "more than one thing may be right there, so a perfect policy differs from the log too.",
    "policy_error_after": "The same after training; what needs no model errs as above.",
    "coverage_before": "Mean over episodes of the largest share of the goal that the block covered, before training.",
    "coverage_after": "The same after training, from the same seeds.",
    "coverage_still": "The same for a robot that stands still.",
    "export_relative_difference": "How far the exported model's velocities, loaded upstream, are from the trained "
    "model's: ‖a−b‖ / ‖b‖.",
    "seconds": "Time from the start of the command to this report, in seconds.",
}
"""The headline numbers in the order in which they are shown, and what each means."""

Number = float | int | str | bool | None


@dataclass(frozen=True)
class Picture:
    """A PNG file of the report, with a sentence below it."""

    path: Path
    caption: str


def write_report(
    folder: Path,
    numbers: Mapping[str, Any],
    pictures: Sequence[Picture],
    *,
    title: str,
    summary: str = "",
    facts: Mapping[str, Number] | None = None,
    units: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.json` and `report.html`, each whole or not at all.

    Args:
        folder: made if it is not there.
        numbers: the keys of `MEANINGS` that were measured, and any others; nested lists and dicts are welcome. Numbers
            that are not finite are written as null.
        pictures: inlined into the page; the files stay where they are.
        title, summary: the page's heading and the sentences below it, plain text; an empty line parts paragraphs.
        facts: seeds, trials, episodes, steps and other circumstances, shown in a table of their own; they are in
            `report.json` under "facts".
        units: of numbers, shown beside them (the robot's own, for action errors).

    Returns:
        The path of `report.html`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**_plain(numbers), **({"facts": _plain(facts)} if facts else {})}
    text = json.dumps(content, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(folder / "report.json", text.encode())
    page = _page(title, summary, numbers, facts or {}, pictures, {"seconds": "s", **(units or {})})
    write_whole(folder / "report.html", page.encode())
    return folder / "report.html"


def shown(value: Any) -> str:
    """A number as the page shows it: four significant digits, an exponent only where it is far from 1."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ------------------------------------------------------------------------------------------------ details

STYLE = """
:root { color-scheme: light; }
body { margin: 2.5rem auto; max-width: 60rem; padding: 0 1.2rem; color: #22272d; background: #fff;
       font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .45rem .8rem .45rem 0; border-bottom: 1px solid #e3e7eb; }
th { font-weight: 600; color: #5a636d; font-size: .88rem; }
td.number { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }
code { font: .88em ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; white-space: nowrap; }
figure { margin: 1.6rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #5a636d; font-size: .92rem; margin-top: .4rem; }
"""


def _page(
    title: str,
    summary: str,
    numbers: Mapping[str, Any],
    facts: Mapping[str, Number],
    pictures: Sequence[Picture],
    units: Mapping[str, str],
) -> str:
    paragraphs = [part.strip() for part in summary.split("\n\n") if part.strip()]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(part)}</p>" for part in paragraphs),
        _headline(numbers, units),
        *(_figure(picture) for picture in pictures),
        _table("How it was measured", ("", ""), [(name, shown(value)) for name, value in facts.items()]),
        _others(numbers),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _headline(numbers: Mapping[str, Any], units: Mapping[str, str]) -> str:
    rows = []
    for key, meaning in MEANINGS.items():
        if key in numbers:
            value = html.escape(f"{shown(numbers[key])} {units.get(key, '')}".strip())
            rows.append(
                f'<tr><td><code>{key}</code></td><td class="number">{value}</td><td>{html.escape(meaning)}</td></tr>'
            )
    if not rows:
        return ""
    return "<table><tr><th>Number</th><th>Value</th><th>What it means</th></tr>" + "".join(rows) + "</table>"


def _others(numbers: Mapping[str, Any]) -> str:
    """Single numbers without a meaning of their own here; lists and dicts are in report.json alone."""
    rows = [
        (key, shown(value))
        for key, value in sorted(numbers.items())
        if key not in MEANINGS and not isinstance(value, Mapping | list | tuple)
    ]
    return _table("Further numbers", ("Number", "Value"), rows)


def _table(title: str, heads: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    head = f"<tr><th>{heads[0]}</th><th>{heads[1]}</th></tr>" if any(heads) else ""
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<h2>{html.escape(title)}</h2><table>{head}{body}</table>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _plain(value: Any) -> Any:
    """What JSON can hold; numpy's and torch's scalars become Python's, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
