"""The comparison of a sweep's trials: one page, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tandem.errors import UserError
from tandem.report.html import page_template
from tandem.report.plots import Series, line_chart, swatch
from tandem.report.result_rows import Cell, Measure, compared_cell
from tandem.report.terminal_tables import cell_text
from tandem.report.training_section import Figure
from tandem.result_warnings import ReportWarning, mapping, sampling_error
from tandem.storage.atomic_files import atomic_write_text, read_jsonl
from tandem.storage.hashing import read_object
from tandem.wording import count, duration, is_number, number, percent

FACTS, PAGE = "sweep.json", "sweep.html"

_MEASURES = {
    "accuracy": Measure(
        "accuracy", "held-out accuracy", "share", "higher",
        "held-out pairs whose chosen answer gained more log-prob since before the first step than "
        "the rejected one",
    ),
    "margin": Measure(
        "margin", "held-out margin", "number", "higher",
        "log-prob that the chosen answer gained since before the first step, less the rejected "
        "one's, in nats a pair; beta and loss have no part in it",
    ),
    "loss": Measure(
        "loss", "held-out loss", "number", "lower",
        "each trial's own loss; trials of other losses or betas cannot be compared by it",
    ),
}  # fmt: skip
_TONES = ("blue", "rose", "teal", "amber", "violet")
_STROKES = ("", "dashed", "dotted")
# Fewer records than this leave an accuracy with an error of five points.
_FEW = 100
_CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class _Row:
    """A trial in the table."""

    name: str
    series: Series
    cells: tuple[Cell, ...]
    steps: str
    state: str
    time: str
    best: bool


def write_page(folder: Path) -> Path:
    """Build `sweep.html` in a sweep's folder, and return its path.

    Raises UserError for a folder without a sweep.
    """
    facts = read_sweep(folder)
    rows = _rows(facts)
    page = page_template("sweep.html.jinja").render(
        facts=facts,
        title=facts["name"],
        keys=[(key, ", ".join(map(_plain, values))) for key, values in facts["keys"].items()],
        findings=sweep_notes(facts),
        measures=_shown(facts),
        rows=rows,
        swatches=[swatch(row.series) for row in rows],
        curves=_curves(facts, rows),
    )
    path = folder / PAGE
    atomic_write_text(path, page)
    return path


def read_sweep(folder: Path) -> dict[str, Any]:
    """What sweep.json in a sweep's folder says; UserError where it is missing or damaged."""
    if not (folder / FACTS).is_file():
        raise UserError(f"{folder} has no {FACTS}; name the folder of a sweep")
    kinds = {"name": str, "keys": dict, "trials": list, "metric": str}
    return read_object(folder / FACTS, kinds, "The command of the sweep writes it again.")


def sweep_table(facts: Mapping[str, Any]) -> Table:
    """Return the trials as rows; differences from the best have their standard errors.

    The metric that decides stands first, one other beside it: the page has all.
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    rows = _rows(facts)
    wide = max((len(row.name) + 2 for row in rows), default=0)
    table.add_column("trial", style="bold", overflow="fold", min_width=min(wide, 32))
    shown = _shown(facts)[:2]
    for measure in shown:
        table.add_column(measure.title, justify="right", min_width=16)
    table.add_column("steps", justify="right", min_width=8)
    for row in rows:
        name = Text(f"{row.name} ★" if row.best else row.name)
        beside = row.time if row.state == "finished" else row.state.removeprefix("stopped at ")
        steps = Text(f"{row.steps}\n{beside}")
        table.add_row(name, *map(cell_text, row.cells[: len(shown)]), steps)
    return table


def sweep_notes(facts: Mapping[str, Any]) -> list[ReportWarning]:
    """Return what a reader should know before believing the table."""
    trials = [mapping(one) for one in facts["trials"]]
    notes = [
        ReportWarning("warning", f"{one['name']} failed", str(one.get("reason")))
        for one in trials
        if one["state"] == "failed"
    ]
    if not facts.get("complete"):
        text = "It is running, or it was interrupted; the same command goes on with it."
        notes.append(ReportWarning("note", "The sweep is not finished", text))
    best = next((one for one in trials if one["name"] == facts.get("best")), None)
    if best is None:
        return notes
    notes += _few(best)
    if text := _close(facts, trials, best):
        notes.append(ReportWarning("note", "Not told apart from the best", text))
    text = (
        "The best trial was chosen by these figures, so that its own are somewhat too good. "
        "Evaluate it on other data."
    )
    if len(trials) > 1:
        notes.append(ReportWarning("note", "Chosen by what is shown", text))
    if others := facts.get("others"):
        text = (
            f"The folder also has {', '.join(map(str, others))}, which this command did not list."
        )
        notes.append(ReportWarning("note", "Other trials", text))
    return notes


def _few(best: Mapping[str, Any]) -> list[ReportWarning]:
    """Say what few records, or an accuracy without a mistake, leave open."""
    notes, records = [], best["records"]
    if records < _FEW:
        text = (
            f"With {count(records)} held-out records the standard error of an accuracy is up to "
            f"{100 * sampling_error(0.5, records):.0f} points. Hold out more before you trust an "
            "order."
        )
        notes.append(ReportWarning("warning", "Few held-out records", text))
    if mapping(best["scores"])["accuracy"]["value"] == 1:
        text = (
            f"The best trial has all {count(records)} right, so that its accuracy has no error to "
            f"show and cannot be beaten; the true one may still be as low as "
            f"{percent(max(0.0, 1 - 3 / records), 0)} (95 %). Trials with the same accuracy are "
            "ordered by their margin."
        )
        notes.append(ReportWarning("note", "No mistake left to count", text))
    return notes


def _close(
    facts: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], best: Mapping[str, Any]
) -> str:
    """Name the trials that are within two standard errors of the best one."""
    near = []
    for one in trials:
        gap = mapping(mapping(one.get("scores")).get(facts["metric"])).get("difference")
        if one["name"] == best["name"] or one["state"] == "failed" or not isinstance(gap, list):
            continue
        if not is_number(gap[1]) or abs(gap[0]) <= _CLEAR * gap[1]:
            near.append(str(one["name"]))
    if not near:
        return ""
    measure = _MEASURES[facts["metric"]].title
    return (
        f"{', '.join(near)}: the {measure} is within two standard errors of that of "
        f"{best['name']}, on the same records."
    )


def _shown(facts: Mapping[str, Any]) -> list[Measure]:
    """Return the measures, the one that decides first."""
    first = facts["metric"]
    return [_MEASURES[first], *(m for key, m in _MEASURES.items() if key != first)]


def _rows(facts: Mapping[str, Any]) -> list[_Row]:
    rows = []
    for place, each in enumerate(facts["trials"]):
        one = mapping(each)
        tone = _TONES[place % len(_TONES)]
        stroke = _STROKES[place // len(_TONES) % len(_STROKES)]
        series = Series(str(one["name"]), (), (), tone, stroke)
        steps = f"{one['step']} of {one['of']}" if is_number(one.get("step")) else "–"
        if is_number(one.get("scored_step")) and one["scored_step"] != one["step"]:
            steps += f", best {one['scored_step']}"
        cells = tuple(_cell(measure, one, facts) for measure in _shown(facts))
        state = str(one["state"])
        if state in ("stopped", "paused"):
            state += f" at rung {one['rung']}"
        best = one["name"] == facts.get("best")
        time = duration(one.get("seconds"))
        rows.append(_Row(str(one["name"]), series, cells, steps, state, time, best))
    return rows


def _cell(measure: Measure, trial: Mapping[str, Any], facts: Mapping[str, Any]) -> Cell:
    """A trial's score; a loss has a difference only where it is the same function for all."""
    score = mapping(mapping(trial.get("scores")).get(measure.key))
    if not score:
        return Cell("–")
    comparable = measure.key != "loss" or facts.get("losses_compare")
    gap = score.get("difference") if comparable else None
    values = {
        measure.key: score["value"],
        "errors": {measure.key: score["error"]},
        "differences": {measure.key: {} if gap is None else {"best": gap}},
    }
    return compared_cell(measure, values, "best")


def _curves(facts: Mapping[str, Any], rows: Sequence[_Row]) -> list[Figure]:
    """Return the held-out scores of all trials by step."""
    lines = [read_jsonl(Path(one["folder"]) / "validation.jsonl") for one in facts["trials"]]
    figures = []
    for title, caption, key, form in (
        ("Held-out accuracy", "as each loss defines its reward", "eval_rewards/accuracies",
         percent),
        ("Held-out margin", "the loss's own reward divided by beta", "eval_rewards/margins",
         number),
        ("Held-out chosen answers", "log-prob summed over an answer; a fall is a warning sign",
         "eval_logps/chosen", number),
        ("Held-out loss", "the same function of log-probs in all trials", "eval_loss", number),
    ):  # fmt: skip
        if key == "eval_loss" and not facts.get("losses_compare"):
            continue
        series = []
        for trial, row, own in zip(facts["trials"], rows, lines, strict=True):
            scored = [line for line in own if is_number(line.get(key))]
            unit = trial["beta"] if key.endswith("margins") else 1.0
            xs = [float(line["step"]) for line in scored]
            ys = [line[key] / unit for line in scored]
            series.append(Series(row.name, xs, ys, row.series.tone, row.series.stroke))
        svg = line_chart(series, label=f"{title} by step", y_format=form, named=False)
        if svg:
            figures.append(Figure(title, caption, svg))
    return figures


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
