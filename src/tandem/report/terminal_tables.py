"""The result at the end of `tandem run`: a table of the models, and their answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tandem.report.result_rows import Cell, compared_rows, result_rows, shown_measures, task_notes
from tandem.result_warnings import ReportWarning, mapping, model_label, model_names

_STYLES = {"good": "green", "bad": "red", "": "dim"}
_LEFT_OUT = {"mean_answer_tokens"}
_SAMPLES = 3  # sample questions that are shown


def result_table(evaluation: Mapping[str, Any]) -> Table:
    """Return base, SFT and DPO as rows, with the change from the row above.

    `evaluation` is the content of evaluation.json. The base also has its answers in completion
    form: the ceiling that fine-tuning can reach.
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    measures = shown_measures(evaluation)
    shown = [i for i, m in enumerate(measures) if m.key not in _LEFT_OUT]
    table.add_column("model", style="bold", no_wrap=True)
    for i in shown:
        table.add_column(measures[i].title, justify="right", min_width=7)
    for row in result_rows(evaluation):
        table.add_row(Text(row.label), *(cell_text(row.cells[i]) for i in shown))
    return table


def comparison_table(evaluation: Mapping[str, Any]) -> Table:
    """Return measures as rows, models as columns: values and changes with standard errors.

    Changes are from the first model, item by item; only those of more than two standard errors
    have a colour.
    """
    names = model_names(evaluation)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("measure", overflow="fold")
    for name in names:
        table.add_column(Text(model_label(name)), justify="right", overflow="fold")
    for row in compared_rows(evaluation, "first"):
        title = Text(row.measure.title, "bold")
        if row.details:
            title.append(f"\n{row.details}", "not bold dim")
        table.add_row(title, *map(cell_text, row.cells))
    return table


def comparison_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Return notes on `comparison_table`, a line each."""
    names = model_names(evaluation)
    notes = ["± is one standard error."]
    if len(names) > 1:
        first = model_label(names[0])
        notes.append(f"Changes are from {first}, item by item, shares in percentage points.")
    return [" ".join(notes), *task_notes(evaluation)]


def samples_table(evaluation: Mapping[str, Any], most: int = _SAMPLES) -> Table:
    """Return up to `most` sample questions with the expected answer and each model's own."""
    raw = evaluation.get("samples")
    samples = [mapping(s) for s in raw][:most] if isinstance(raw, list) else []
    answered = {name for sample in samples for name in mapping(sample.get("answers"))}
    names = [name for name in model_names(evaluation) if name in answered]
    table = Table(box=box.ROUNDED, header_style="bold", show_lines=True, expand=True)
    for title in ("question", "expected", *map(model_label, names)):
        table.add_column(Text(title), ratio=1, overflow="fold")
    for sample in samples:
        answers = mapping(sample.get("answers"))
        texts = [sample.get("prompt"), sample.get("expected"), *(answers.get(n) for n in names)]
        # Text, not str, so that an answer is not read as rich's markup.
        table.add_row(
            *(Text("–" if text is None else str(text).strip() or "(nothing)") for text in texts)
        )
    return table


def warning_lines(warnings: Sequence[ReportWarning]) -> list[Text]:
    """Return the page's warnings and notes, a line each, warnings in yellow."""
    return [
        Text(f"{one.level}: {one.line}", "yellow" if one.level == "warning" else "dim")
        for one in warnings
    ]


def cell_text(cell: Cell) -> Text:
    """A cell with its change and note below."""
    text = Text(cell.text)
    if cell.change:
        text.append("\n" + f"{cell.arrow} {cell.change}".strip(), _STYLES[cell.verdict])
    if cell.note:
        text.append(f"\n{cell.note}", "dim")
    return text
