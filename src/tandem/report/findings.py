"""What a reader must not overlook: named warnings, from the files and from what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tandem.report.facts import STAGE_TITLES, RunFacts, StageFacts
from tandem.report.results import ROW_LABELS, mapping, model_names, sampling_error
from tandem.report.training import find_key
from tandem.report.wording import count, is_number, number, percent


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
            found += chosen_collapse(stage)
        found += _state(stage)
    found += evaluation_findings(facts.evaluation)
    if facts.missing:
        names = ", ".join(f"{STAGE_TITLES[name]} ({name})" for name in facts.missing)
        found.append(
            Finding("note", "partial run", f"The recipe also asks for: {names}. Not there yet.")
        )
    return sorted(found, key=lambda f: f.level != "warning")


def chosen_collapse(stage: StageFacts) -> list[Finding]:
    """Whether the chosen answers' log-probs fell while the margin grew (trl#800).

    Looks at the last quarter of the logged steps, and at what the same pairs' log-probs are under
    the reference: log-probs of different steps belong to different pairs. A fall of more than a
    quarter, and of more than two nats, with a positive margin is called a collapse.
    """
    beta = find_key(stage.manifest.get("inputs"), "beta")
    keys = ("logps/chosen", "rewards/chosen", "rewards/margins")
    rows = [m for m in stage.metrics if all(is_number(m.get(key)) for key in keys)]
    if not is_number(beta) or len(rows) < 4:
        return []
    last = rows[-(len(rows) // 4) :]
    logp, reward, margin = (sum(float(m[key]) for m in last) / len(last) for key in keys)
    fall = -reward / beta
    reference = logp + fall
    if margin <= 0 or fall <= max(2.0, 0.25 * abs(reference)):
        return []
    return [
        Finding(
            "warning",
            "collapse of the chosen log-probs",
            f"While the margin grew to {number(margin, 3)}, the chosen answers became less "
            f"probable: log-prob {number(reference)} under the reference, {number(logp)} at the "
            f"end. The model unlearns what it should prefer. Fewer steps, a smaller learning rate "
            f"or a larger beta help.",
        )
    ]


def evaluation_findings(evaluation: Mapping[str, Any]) -> list[Finding]:
    """The evaluation's own warnings, and drops that exceed two standard errors of a difference."""
    told = evaluation.get("warnings")
    told = [str(text) for text in told] if isinstance(told, list) else []
    found = [Finding("warning", "Evaluation", text) for text in told]
    models = mapping(evaluation.get("models"))
    counts = mapping(evaluation.get("counts"))
    names = model_names(evaluation)
    for key, title, counted in (
        ("answer_accuracy", "answer accuracy", "questions"),
        ("preference_accuracy", "preference accuracy", "pairs"),
        ("stop_rate", "the share of answers that stop by themselves", "questions"),
    ):
        n = counts.get(counted)
        for before, after in pairwise(names):
            old, new = mapping(models[before]).get(key), mapping(models[after]).get(key)
            # Once is enough when the evaluation itself has named it.
            if told and key == "answer_accuracy" and after == "dpo":
                continue
            if not (is_number(old) and is_number(new) and is_number(n)) or new >= old:
                continue
            error = math.hypot(sampling_error(old, n), sampling_error(new, n))
            if old - new > 2 * error:
                label = ROW_LABELS.get(after, after)
                text = f"{percent(old)} to {percent(new)} on {count(n)} held-out {counted}"
                found.append(_loss(label, title, text, expected=(key, after) == _EXPECTED))
    return found


# Fine-tuning learns the style of its data; when rejected answers are the SFT model's own, it
# must find them likely. To change that is what the preferences are for.
_EXPECTED = ("preference_accuracy", "sft")


def _loss(label: str, title: str, text: str, *, expected: bool) -> Finding:
    if expected:
        why = "the rejected answers are in the style that SFT learnt; DPO is there to change it"
        return Finding("note", f"{label} lowered {title}", f"{text}: {why}.")
    return Finding("warning", f"{label} lost {title}", f"{text}: more than chance explains.")


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
