"""The page's section on rounds: how each round's model does, and what it wrote for the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.report.plots import Series, line_chart
from tandem.report.run_facts import RunFacts
from tandem.report.training_section import Figure
from tandem.result_warnings import mapping
from tandem.storage.run_folder import Stage
from tandem.wording import count, is_number, number, percent


@dataclass(frozen=True)
class RoundModel:
    """The model after a number of rounds, 0 for the one that the first round began with."""

    label: str
    rounds: int
    pairs: Mapping[str, Any]  # the summary of the pairs that it was trained on; empty for the first
    written: Mapping[str, Any]  # the summary of the pairs that it wrote; empty for the last
    measured: Mapping[str, Any]  # its results in the evaluation


@dataclass(frozen=True)
class RoundsTable:
    """What is known of the models: the titles with their meanings, and a row of texts each."""

    head: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # label, then value and its error


@dataclass(frozen=True)
class _Column:
    title: str
    meaning: str
    value: Callable[[RoundModel], object]
    show: Callable[[float], str]
    error: Callable[[RoundModel], object] = lambda _: None


def _measure(key: str) -> Callable[[RoundModel], object]:
    return lambda model: model.measured.get(key)


def _measure_error(key: str) -> Callable[[RoundModel], object]:
    return lambda model: mapping(model.measured.get("errors")).get(key)


def _written(section: str, key: str) -> Callable[[RoundModel], object]:
    return lambda model: mapping(model.written.get(section)).get(key)


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _short(value: float) -> str:
    return number(value, 3)


_COLUMNS = (
    _Column("pairs", "pairs that the round trained on",
            lambda model: model.pairs.get("kept"), lambda value: count(value)),
    _Column("preference accuracy ↑", "held-out pairs whose chosen answer has the higher log-prob "
            "per token; the same pairs for all models", _measure("preference_accuracy"), percent,
            _measure_error("preference_accuracy")),
    _Column("margin ↑", "log-prob per token of the chosen answer minus the rejected one's, mean",
            _measure("preference_margin"), number, _measure_error("preference_margin")),
    _Column("answer accuracy ↑", "held-out questions whose answer is right",
            _measure("answer_accuracy"), percent, _measure_error("answer_accuracy")),
    _Column("win rate ↑", "a judge's verdicts against the first model's answers",
            _measure("win_rate"), percent, _measure_error("win_rate")),
    _Column("answer tokens", "mean length of its answers to the held-out questions",
            _measure("mean_answer_tokens"), lambda value: f"{value:.1f}"),
    _Column("score ↑", "mean score of the answers that it wrote for the next round",
            _written("scores", "answers"), _short, _written("scores", "error")),
    _Column("characters", "mean length of the answers that it wrote for the next round",
            _written("characters", "answers"), lambda value: f"{value:.0f}"),
    _Column("gave a pair", "share of the prompts it was asked that gave a pair",
            lambda model: _share(model.written), percent),
)  # fmt: skip

# Charts over the rounds: title, caption, format, and lines of (name, value, colour).
_CHARTS: tuple[tuple[str, str, Callable[[float], str], tuple[tuple[str, Any, str], ...]], ...] = (
    ("Scores", "means of the answers that the model wrote for the next round, and of its pairs",
     _short, (("chosen", _written("scores", "chosen"), "teal"),
              ("all answers", _written("scores", "answers"), "blue"),
              ("rejected", _written("scores", "rejected"), "rose"))),
    ("Held-out preference accuracy", "of the same pairs for all models", percent,
     (("accuracy", _measure("preference_accuracy"), "teal"),)),
    ("Held-out margin", "log-prob per token, chosen minus rejected, of the same pairs for all",
     number, (("margin", _measure("preference_margin"), "violet"),)),
    ("Answer accuracy", "of held-out questions", percent,
     (("accuracy", _measure("answer_accuracy"), "teal"),)),
    ("Win rate", "a judge's verdicts against the first model's answers", percent,
     (("win rate", _measure("win_rate"), "violet"),)),
    ("Length of answers", "characters of the answers that the model wrote for the next round; "
     "chosen answers that grow longer teach length", _short,
     (("chosen", _written("characters", "chosen"), "teal"),
      ("all answers", _written("characters", "answers"), "blue"),
      ("rejected", _written("characters", "rejected"), "rose"))),
)  # fmt: skip


def round_models(facts: RunFacts) -> list[RoundModel]:
    """Return the models of a run with several rounds, in order; none of a run with one."""
    rounds = max((stage.round for stage in (*facts.known, *facts.missing)), default=1)
    if rounds == 1:
        return []
    pairs = {stage.in_round: stage.summary for stage in facts.stages if stage.kind == "pairs"}
    measured = mapping(facts.evaluation.get("models"))
    first = "sft" if any(stage.kind == "sft" for stage in facts.stages) else "base"
    names = [first, *(Stage("dpo", number).name for number in range(1, rounds + 1))]
    return [
        RoundModel(
            "before" if n == 0 else f"round {n}",
            n,
            pairs.get(n, {}) if n else {},
            pairs.get(n + 1, {}),
            mapping(measured.get(name)),
        )
        for n, name in enumerate(names)
    ]


def rounds_table(models: Sequence[RoundModel]) -> RoundsTable | None:
    """Return what is known of the models over the rounds; None without any figure."""
    shown = [c for c in _COLUMNS if any(is_number(c.value(model)) for model in models)]
    if not shown:
        return None
    rows = [(model.label, tuple(_cell(column, model) for column in shown)) for model in models]
    return RoundsTable(tuple((c.title, c.meaning) for c in shown), tuple(rows))


def rounds_charts(models: Sequence[RoundModel]) -> list[Figure]:
    """Return a chart of each figure that two models or more have."""
    figures = []
    for title, caption, show, lines in _CHARTS:
        series = []
        for name, value, tone in lines:
            known = [(m.rounds, v) for m in models if is_number(v := value(m))]
            if len(known) > 1:
                xs, ys = zip(*known, strict=True)
                series.append(Series(name, [float(x) for x in xs], [float(y) for y in ys], tone))
        svg = line_chart(series, label=f"{title} by round", x_label="rounds", y_format=show)
        if svg:
            figures.append(Figure(title, caption, svg))
    return figures


def _cell(column: _Column, model: RoundModel) -> tuple[str, str]:
    value, error = column.value(model), column.error(model)
    if not is_number(value):
        return "–", ""
    if not is_number(error):
        return column.show(value), ""
    return column.show(value), f"± {_points(error) if column.show is percent else _short(error)}"


def _share(summary: Mapping[str, Any]) -> float | None:
    kept, prompts = summary.get("kept"), summary.get("prompts")
    return kept / prompts if is_number(kept) and is_number(prompts) and prompts else None
