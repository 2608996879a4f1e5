"""The evaluation as rows of cells: what the page, the terminal and the model card all show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem.report.wording import is_number, number, percent

ROW_LABELS = {"base": "base", "sft": "SFT", "dpo": "DPO"}


@dataclass(frozen=True)
class Measure:
    """One column: the key in evaluation.json, its title, and which way is better."""

    key: str
    title: str
    kind: Literal["share", "number", "tokens"]
    better: Literal["higher", "lower", "neither"]
    meaning: str


MEASURES = (
    Measure(
        "answer_accuracy",
        "answer accuracy",
        "share",
        "higher",
        "held-out questions, asked through the chat template, whose answer is right",
    ),
    Measure(
        "loss",
        "held-out loss",
        "number",
        "lower",
        "mean negative log-prob of a right answer's token",
    ),
    Measure(
        "preference_accuracy",
        "preference accuracy",
        "share",
        "higher",
        "held-out pairs whose chosen answer has the higher log-prob per token",
    ),
    Measure(
        "preference_margin",
        "margin",
        "number",
        "higher",
        "log-prob per token of the chosen answer minus the rejected one's, mean, in nats",
    ),
    Measure(
        "stop_rate",
        "stops by itself",
        "share",
        "higher",
        "answers that end with the end-of-turn token and not at the length limit",
    ),
    Measure("mean_answer_tokens", "answer tokens", "tokens", "neither", "mean length of an answer"),
)


@dataclass(frozen=True)
class Cell:
    """A value as text, its change from the row above, and whether that is for the better."""

    text: str
    change: str = ""
    arrow: Literal["▲", "▼", ""] = ""
    verdict: Literal["good", "bad", ""] = ""
    note: str = ""


@dataclass(frozen=True)
class ResultRow:
    """One model's results, in the order of the measures shown."""

    name: str
    label: str
    path: str
    cells: tuple[Cell, ...]


def model_names(evaluation: Mapping[str, Any]) -> list[str]:
    """The evaluated models, base first, then SFT, DPO and whatever else was measured."""
    models = mapping(evaluation.get("models"))
    known = [name for name in ROW_LABELS if name in models]
    return known + [str(name) for name in models if name not in ROW_LABELS]


def shown_measures(evaluation: Mapping[str, Any]) -> list[Measure]:
    """The measures that at least one model has a value for."""
    models = [mapping(m) for m in mapping(evaluation.get("models")).values()]
    return [m for m in MEASURES if any(is_number(model.get(m.key)) for model in models)]


def result_rows(evaluation: Mapping[str, Any]) -> list[ResultRow]:
    """One row a model; changes are from the nearest row above that has a value."""
    models = mapping(evaluation.get("models"))
    measures = shown_measures(evaluation)
    before: dict[str, float] = {}
    rows = []
    for name in model_names(evaluation):
        values = mapping(models[name])
        cells = tuple(_cell(m, values, before) for m in measures)
        before |= {m.key: values[m.key] for m in measures if is_number(values.get(m.key))}
        rows.append(ResultRow(name, ROW_LABELS.get(name, name), str(values.get("path", "")), cells))
    return rows


def sampling_error(share: float, n: float) -> float:
    """Standard error of a share measured on `n` independent examples: sqrt(p (1 - p) / n)."""
    return math.sqrt(max(share * (1 - share), 0.0) / n) if n > 0 else math.nan


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a JSON object, an empty one otherwise."""
    return value if isinstance(value, Mapping) else {}


def _cell(measure: Measure, values: Mapping[str, Any], before: Mapping[str, float]) -> Cell:
    value = values.get(measure.key)
    if not is_number(value):
        return Cell("–")
    shown = _shown(measure, value)
    note = ""
    if measure.key == "answer_accuracy" and is_number(values.get("completion_accuracy")):
        note = f"as completion {percent(values['completion_accuracy'])}"
    if measure.key not in before:
        return Cell(shown, note=note)
    step = value - before[measure.key]
    change = _change(measure, step)
    if float(change) == 0:
        return Cell(shown, "±0", note=note)
    change = change.replace("-", "−")
    arrow: Literal["▲", "▼"] = "▲" if step > 0 else "▼"
    if measure.better == "neither":
        return Cell(shown, change, arrow, "", note)
    good = (step > 0) == (measure.better == "higher")
    return Cell(shown, change, arrow, "good" if good else "bad", note)


def _shown(measure: Measure, value: float) -> str:
    if measure.kind == "share":
        return percent(value)
    return f"{value:.1f}" if measure.kind == "tokens" else number(value)


def _change(measure: Measure, step: float) -> str:
    if measure.kind == "share":
        return f"{100 * step:+.1f}"
    if measure.kind == "tokens":
        return f"{step:+.1f}"
    return ("+" if step >= 0 else "-") + number(abs(step), 3 if abs(step) >= 1 else 4)
