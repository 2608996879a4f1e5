"""What a reader must not overlook: named warnings, from the files and from what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tandem.report.result_rows import ROW_LABELS, mapping, model_names, sampling_error
from tandem.report.run_facts import STAGE_FOLDERS, RunFacts, StageFacts, read_run
from tandem.report.training_section import find_key
from tandem.wording import chosen_collapse, count, is_number, percent

_HELP = (
    " Prefer answers that the model can give, lower the learning rate, take fewer steps or raise "
    "beta."
)


@dataclass(frozen=True)
class Finding:
    """One warning or note: a short name, and what was seen."""

    level: Literal["warning", "note"]
    name: str
    text: str


def find(facts: RunFacts) -> list[Finding]:
    """All findings of a run, warnings first."""
    found = [Finding("warning", "unreadable file", text) for text in facts.problems]
    for stage in facts.stages:
        warnings = stage.summary.get("warnings")
        texts = warnings if isinstance(warnings, list) else []
        found += [Finding("warning", stage.title, str(text)) for text in texts]
        if stage.kind == "dpo" and not any("collapse" in str(text).lower() for text in texts):
            beta = find_key(stage.manifest.get("inputs"), "beta")
            if (text := chosen_collapse(stage.metrics, beta)) is not None:
                found.append(Finding("warning", stage.title, text))
        found += _state(stage)
    found += evaluation_findings(facts.evaluation)
    if facts.missing:
        names = ", ".join(f"{STAGE_FOLDERS[name].title} ({name})" for name in facts.missing)
        found.append(
            Finding("note", "partial run", f"The recipe also asks for: {names}. Not there yet.")
        )
    return sorted(found, key=lambda f: f.level != "warning")


def findings_of_run(run_dir: Path) -> list[Finding]:
    """What `find` finds in a run's folder, for the terminal.

    Raises UserError if the folder holds nothing of tandem's.
    """
    return find(read_run(run_dir))


def evaluation_findings(evaluation: Mapping[str, Any]) -> list[Finding]:
    """What an evaluation shows: measures that fell beyond chance, right answers that were cut.

    A fall counts when it exceeds two standard errors, of the differences item by item where they
    are known: chance alone does that once in 44 times.
    """
    models = mapping(evaluation.get("models"))
    counts = mapping(evaluation.get("counts"))
    names = model_names(evaluation)
    found = []
    for key, title, counted in (
        ("answer_accuracy", "answer accuracy", "questions"),
        ("preference_accuracy", "preference accuracy", "pairs"),
        ("stop_rate", "the share of answers that stop by themselves", "questions"),
    ):
        n = counts.get(counted)
        # Models of other names are not successive stages of one run.
        for before, after in pairwise([name for name in names if name in ROW_LABELS]):
            old, new = mapping(models[before]).get(key), mapping(models[after]).get(key)
            if not (is_number(old) and is_number(new) and is_number(n)) or new >= old:
                continue
            error = _paired_error(mapping(models[after]), key)
            if error is None:
                error = math.hypot(sampling_error(old, n), sampling_error(new, n))
            if old - new > 2 * error:
                label = ROW_LABELS.get(after, after)
                text = f"{percent(old)} to {percent(new)} on {count(n)} held-out {counted}"
                found.append(_loss(label, title, text, (key, after)))
    for name in names:
        found += _cut(name, mapping(models[name]), counts.get("questions"))
    return [*_told(evaluation, found), *found]


def _paired_error(values: Mapping[str, Any], key: str) -> float | None:
    """The standard error of the difference from the model before, item by item."""
    gap = mapping(mapping(values.get("differences")).get(key)).get("previous")
    error = gap[1] if isinstance(gap, list) and len(gap) == 2 else None
    return error if is_number(error) else None


def _cut(name: str, values: Mapping[str, Any], questions: object) -> list[Finding]:
    """Answers that have the right text, did not end, and therefore do not count as right."""
    share = values.get("right_cut")
    if not is_number(share) or not is_number(questions) or share <= 0:
        return []
    label = ROW_LABELS.get(name, name)
    text = (
        f"{count(round(share * questions))} of {count(questions)} answers have the right text and "
        "did not end by themselves, so that they do not count as right: the model talks on until "
        "max_new_tokens."
    )
    # A base model has not learnt to end an answer yet.
    level: Literal["warning", "note"] = "note" if name == "base" else "warning"
    return [Finding(level, f"{label} gives right answers that do not end", text)]


def _told(evaluation: Mapping[str, Any], found: Sequence[Finding]) -> list[Finding]:
    """Warnings in evaluation.json that are not among those found here."""
    told = evaluation.get("warnings")
    known = {in_words(one) for one in found}
    return [
        Finding("warning", "Evaluation", str(text))
        for text in (told if isinstance(told, list) else [])
        # Earlier versions had another measure of a collapse.
        if str(text) not in known and not str(text).startswith("collapse: DPO lost right answers")
    ]


def in_words(finding: Finding) -> str:
    """A finding on one line."""
    return f"{finding.name}: {finding.text}"


# Fine-tuning learns the style of its data; when rejected answers are the SFT model's own, it
# must find them likely. To change that is what the preferences are for.
_EXPECTED = ("preference_accuracy", "sft")


def _loss(label: str, title: str, text: str, which: tuple[str, str]) -> Finding:
    if which == _EXPECTED:
        why = "the rejected answers are in the style that SFT learnt; DPO is there to change it"
        return Finding("note", f"{label} lowered {title}", f"{text}: {why}.")
    help_ = _HELP if which == ("answer_accuracy", "dpo") else ""
    return Finding("warning", f"{label} lost {title}", f"{text}: more than chance explains.{help_}")


def _state(stage: StageFacts) -> list[Finding]:
    if stage.status == "running":
        return [
            Finding(
                "note",
                f"{stage.title} is not finished",
                "It is running, or it was interrupted; the same command goes on from its last "
                "checkpoint. The figures below are those so far.",
            )
        ]
    return []
