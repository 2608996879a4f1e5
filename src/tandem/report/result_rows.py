"""The evaluation as rows of cells, for the page, the terminal and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem.result_warnings import mapping, model_label, model_names
from tandem.wording import is_number, number, percent


@dataclass(frozen=True)
class Measure:
    """One column: the key in evaluation.json, its title, and which way is better."""

    key: str
    title: str
    kind: Literal["share", "number", "tokens"]
    better: Literal["higher", "lower", "neither"]
    meaning: str


MEASURES = (
    Measure("answer_accuracy", "answer accuracy", "share", "higher",
            "held-out questions, asked through the chat template, whose answer is right"),
    Measure("right_cut", "right text, cut", "share", "lower",
            "answers with the right text that did not end by themselves; they do not count as "
            "right"),
    Measure("loss", "held-out loss", "number", "lower",
            "mean negative log-prob of a right answer's token"),
    Measure("heldout_loss", "conversation loss", "number", "lower",
            "mean negative log-prob of an answer's token in held-out conversations"),
    Measure("preference_accuracy", "preference accuracy", "share", "higher",
            "held-out pairs whose chosen answer has the higher log-prob per token"),
    Measure("preference_margin", "margin", "number", "higher",
            "log-prob per token of the chosen answer minus the rejected one's, mean, in nats"),
    Measure("stop_rate", "stops by itself", "share", "higher",
            "answers that end with the end-of-turn token and not at the length limit"),
    Measure("win_rate", "win rate", "share", "higher",
            "a judge's verdicts against the first model's answers, in both orders; ties count "
            "half"),
    Measure("mean_answer_tokens", "answer tokens", "tokens", "neither",
            "mean length of an answer"),
)  # fmt: skip
# Measures that are not shown where every model has 0.
_CASES = ("right_cut",)
# Metrics of tasks that are shares, and metrics that are better when lower.
_SHARES = ("acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "f1", "mcc")
_LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
_CLEAR = 2.0  # a difference of fewer standard errors is neither good nor bad


@dataclass(frozen=True)
class Cell:
    """A value as text, its change from the row above, and whether that is better."""

    text: str
    change: str = ""
    arrow: Literal["▲", "▼", ""] = ""
    verdict: Literal["good", "bad", ""] = ""
    note: str = ""


@dataclass(frozen=True)
class ComparedRow:
    """One measure over all models, a cell each, with errors in their texts."""

    measure: Measure
    details: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ResultRow:
    """One model's results, in the order of the measures shown."""

    name: str
    label: str
    path: str
    cells: tuple[Cell, ...]


def shown_measures(evaluation: Mapping[str, Any]) -> list[Measure]:
    """Return the measures of which a model has a value; those in `_CASES` need one other than 0."""
    models = [mapping(m) for m in mapping(evaluation.get("models")).values()]
    values = {m.key: [v for one in models if is_number(v := one.get(m.key))] for m in MEASURES}
    return [m for m in MEASURES if any(values[m.key]) or (values[m.key] and m.key not in _CASES)]


def result_rows(evaluation: Mapping[str, Any]) -> list[ResultRow]:
    """Return one row a model; changes are from the nearest row above with a value."""
    models = mapping(evaluation.get("models"))
    measures = shown_measures(evaluation)
    before: dict[str, float] = {}
    rows = []
    for name in model_names(evaluation):
        values = mapping(models[name])
        cells = tuple(_cell(m, values, before) for m in measures)
        before |= {m.key: values[m.key] for m in measures if is_number(values.get(m.key))}
        label, path = model_label(name), str(values.get("path", ""))
        rows.append(ResultRow(name, label, path, cells))
    return rows


def task_measures(evaluation: Mapping[str, Any]) -> list[Measure]:
    """Return the harness's tasks as measures; their keys begin with `task:`."""
    measures = []
    for task in _tasks(evaluation):
        metric = str(task.get("metric", "")).partition(",")[0]
        meaning = f"{metric}, {task.get('shots')}-shot, {task.get('items')} items"
        meaning += ", chat template" if task.get("chat") else ""
        title = str(task.get("title", task.get("task")))
        kind: Literal["share", "number"] = "share" if metric in _SHARES else "number"
        better: Literal["lower", "higher"] = "lower" if metric in _LOWER else "higher"
        measures.append(Measure(f"task:{task.get('task')}", title, kind, better, meaning))
    return measures


def _tasks(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    tasks = evaluation.get("tasks")
    return [mapping(task) for task in tasks] if isinstance(tasks, list) else []


def compared_rows(
    evaluation: Mapping[str, Any], against: Literal["first", "previous"]
) -> list[ComparedRow]:
    """Return one row a measure: values, and changes `against` a model, with standard errors.

    A change is good or bad from two standard errors on; a smaller one is neither.
    """
    models = mapping(evaluation.get("models"))
    tasks = task_measures(evaluation)
    rows = []
    for measure in [*tasks, *shown_measures(evaluation)]:
        cells = tuple(
            compared_cell(measure, mapping(models[name]), against)
            for name in model_names(evaluation)
        )
        details = measure.meaning if measure in tasks else ""
        rows.append(ComparedRow(measure, details, cells))
    return rows


def task_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Return notes on the tasks' scores, a line each."""
    notes: dict[str, list[str]] = {}
    for task in _tasks(evaluation):
        own = [str(note) for note in task.get("notes") or []]
        cut = {k: n for k, n in mapping(task.get("cut")).items() if is_number(n) and n}
        if cut:
            counts = ", ".join(f"{name} {n}" for name, n in cut.items())
            own.append(f"requests cut to the model's context at their beginning ({counts})")
        if is_number(task.get("limit")):
            own.append(f"only the first {task['limit']} items")
        for note in own:
            notes.setdefault(note, []).append(str(task.get("title")))
    lines = [f"{', '.join(titles)}: {note}" for note, titles in notes.items()]
    lines += _judge_notes(mapping(evaluation.get("judge")))
    left_out = evaluation.get("left_out")
    for one in left_out if isinstance(left_out, list) else []:
        lines.append(f"{one[0]} was not measured: {one[1]}")
    return lines


def _judge_notes(judge: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, one in mapping(judge.get("models")).items():
        verdicts = mapping(one)
        label, first = map(model_label, (str(name), str(judge.get("against"))))
        line = (
            f"{judge.get('name')} on {label} against {first}: {verdicts.get('wins')} won, "
            f"{verdicts.get('ties')} tied, {verdicts.get('losses')} lost"
        )
        if is_number(verdicts.get("consistent")):
            line += (
                f"; the same verdict in both orders {percent(verdicts['consistent'])}, for the "
                f"answer shown first {percent(verdicts.get('first_shown'))}"
            )
        if verdicts.get("unread"):
            line += f"; {verdicts['unread']} without a verdict"
        lines.append(line)
    return lines


def _cell(measure: Measure, values: Mapping[str, Any], before: Mapping[str, float]) -> Cell:
    value = values.get(measure.key)
    if not is_number(value):
        return Cell("–")
    note = ""
    if measure.key == "answer_accuracy" and is_number(values.get("completion_accuracy")):
        note = f"as completion {percent(values['completion_accuracy'])}"
    if measure.key not in before:
        return Cell(_shown(measure, value), note=note)
    step = value - before[measure.key]
    change = _change(measure, step)
    if float(change) == 0:
        return Cell(_shown(measure, value), "±0", note=note)
    return Cell(_shown(measure, value), change.replace("-", "−"), *_marks(measure, step), note)


def compared_cell(measure: Measure, values: Mapping[str, Any], against: str) -> Cell:
    """A value with its error, and its difference from another model's.

    `values` are those of one model as in evaluation.json, `against` is the key of the difference.
    """
    value = values.get(measure.key)
    if not is_number(value):
        return Cell("–")
    error = mapping(values.get("errors")).get(measure.key)
    text = f"{_shown(measure, value)}{_plus_minus(measure, error)}"
    gap = mapping(mapping(values.get("differences")).get(measure.key)).get(against)
    if not isinstance(gap, list):
        return Cell(text)
    step, doubt = gap
    if step == 0:
        return Cell(text, "±0" + _plus_minus(measure, doubt))
    change = _change(measure, step).replace("-", "−") + _plus_minus(measure, doubt)
    arrow, verdict = _marks(measure, step)
    clear = is_number(doubt) and abs(step) > _CLEAR * doubt
    return Cell(text, change, arrow, verdict if clear else "")


def _marks(measure: Measure, step: float) -> tuple[Literal["▲", "▼"], Literal["good", "bad", ""]]:
    """Return which way a measure went, and whether that is better."""
    arrow: Literal["▲", "▼"] = "▲" if step > 0 else "▼"
    if measure.better == "neither":
        return arrow, ""
    return arrow, "good" if (step > 0) == (measure.better == "higher") else "bad"


def _plus_minus(measure: Measure, error: object) -> str:
    if not is_number(error):
        return ""
    if measure.kind == "share":
        return f" ± {100 * error:.1f}"
    return f" ± {error:.1f}" if measure.kind == "tokens" else f" ± {number(error, 3)}"


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
