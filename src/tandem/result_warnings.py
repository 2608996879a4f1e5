"""Warn of what an evaluation shows: measures that fell, answers that were cut."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tandem.wording import count, is_number, percent

MODEL_LABELS = {"base": "base", "sft": "SFT", "dpo": "DPO"}
# The model of a later round.
_LATER = re.compile(r"dpo-([1-9]\d*)")
_HELP = (
    " Prefer answers that the model can give, lower the learning rate, take fewer steps or raise "
    "beta."
)
# Fine-tuning learns the style of its data, so the SFT model finds its own rejected answers likely.
# The preferences are there to change that.
_EXPECTED = ("preference_accuracy", "sft")
# Measures that should not fall, their names for people, and what they count.
_WATCHED = (
    ("answer_accuracy", "answer accuracy", "questions"),
    ("preference_accuracy", "preference accuracy", "pairs"),
    ("stop_rate", "the share of answers that stop by themselves", "questions"),
)


@dataclass(frozen=True)
class ReportWarning:
    """One warning or note: a short name, and what it is about."""

    level: Literal["warning", "note"]
    name: str
    text: str

    @property
    def line(self) -> str:
        """Name and text in one line."""
        return f"{self.name}: {self.text}"


def evaluation_warnings(evaluation: Mapping[str, Any]) -> list[ReportWarning]:
    """Return warnings about an evaluation.json: its own, measures that fell, answers that were cut.

    A fall counts when it exceeds two standard errors, of the differences item by item where they
    are known: chance alone does that once in 44 times.
    """
    models = mapping(evaluation.get("models"))
    counts = mapping(evaluation.get("counts"))
    names = model_names(evaluation)
    seen = []
    for key, title, counted in _WATCHED:
        n = counts.get(counted)
        # Models of other names are not successive stages of one run.
        for before, after in pairwise([name for name in names if _place(name) is not None]):
            old, new = mapping(models[before]).get(key), mapping(models[after]).get(key)
            if not (is_number(old) and is_number(new) and is_number(n)) or new >= old:
                continue
            error = _paired_error(mapping(models[after]), key)
            if error is None:
                error = math.hypot(sampling_error(old, n), sampling_error(new, n))
            if old - new > 2 * error:
                text = f"{percent(old)} to {percent(new)} on {count(n)} held-out {counted}"
                seen.append(_loss(title, text, (key, after)))
    for name in names:
        seen += _cut(name, mapping(models[name]), counts.get("questions"))
    stated = evaluation.get("warnings")
    known = {one.line for one in seen}
    others = [
        ReportWarning("warning", "Evaluation", str(text))
        for text in (stated if isinstance(stated, list) else [])
        # Earlier versions had another measure of a collapse.
        if str(text) not in known and not str(text).startswith("collapse: DPO lost right answers")
    ]
    return [*others, *seen]


def model_names(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the evaluated models: base, SFT, DPO and its later rounds, then any others."""
    models = [str(name) for name in mapping(evaluation.get("models"))]
    known = {name: place for name in models if (place := _place(name)) is not None}
    return sorted(known, key=known.__getitem__) + [name for name in models if name not in known]


def model_label(name: str) -> str:
    """Return what people call an evaluated model; a name that is not a run's is its own."""
    later = _LATER.fullmatch(name)
    return f"DPO, round {later[1]}" if later else MODEL_LABELS.get(name, name)


def _place(name: str) -> int | None:
    """Return a model's place among the successive models of a run; None for others."""
    later = _LATER.fullmatch(name)
    if later:
        return len(MODEL_LABELS) + int(later[1])
    return list(MODEL_LABELS).index(name) if name in MODEL_LABELS else None


def sampling_error(share: float, n: float) -> float:
    """Return the standard error of a share of `n` independent examples: sqrt(p (1 - p) / n)."""
    return math.sqrt(max(share * (1 - share), 0.0) / n) if n > 0 else math.nan


def mapping(value: object) -> Mapping[str, Any]:
    """Return the value if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _paired_error(values: Mapping[str, Any], key: str) -> float | None:
    """Return the standard error of the difference from the model before, item by item."""
    gap = mapping(mapping(values.get("differences")).get(key)).get("previous")
    error = gap[1] if isinstance(gap, list) and len(gap) == 2 else None
    return error if is_number(error) else None


def _loss(title: str, text: str, which: tuple[str, str]) -> ReportWarning:
    label = model_label(which[1])
    if which == _EXPECTED:
        why = "the rejected answers are in the style that SFT learnt; DPO is there to change it"
        return ReportWarning("note", f"{label} lowered {title}", f"{text}: {why}.")
    help_ = _HELP if which[0] == "answer_accuracy" and which[1] not in ("base", "sft") else ""
    text = f"{text}: more than chance explains.{help_}"
    return ReportWarning("warning", f"{label} lost {title}", text)


def _cut(name: str, values: Mapping[str, Any], questions: object) -> list[ReportWarning]:
    """Warn of answers that have the right text, but count as wrong because they did not end."""
    share = values.get("right_cut")
    if not is_number(share) or not is_number(questions) or share <= 0:
        return []
    text = (
        f"{count(round(share * questions))} of {count(questions)} answers have the right text and "
        "did not end by themselves, so that they do not count as right: the model talks on until "
        "max_new_tokens."
    )
    label = model_label(name)
    # A base model has not learnt to end an answer yet.
    level: Literal["warning", "note"] = "note" if name == "base" else "warning"
    return [ReportWarning(level, f"{label} gives right answers that do not end", text)]
