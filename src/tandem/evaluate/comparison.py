"""Several models' scores side by side: values, standard errors, differences in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.evaluate.scores import Score, difference


def compared(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, Any]]:
    """What evaluation.json says of each model's figures.

    Args:
        scores: by model, then by measure; models in the order of the table.

    Returns:
        By model: each measure's value under its name; `errors`, their standard errors; and
        `differences`, by measure: from the first model and from the nearest one before that has
        the measure, each as [difference, its standard error].
    """
    names = list(scores)
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        before = [scores[other] for other in names[:number]]
        own = scores[name]
        differences = {}
        for key, score in own.items():
            against = {}
            having = [other[key] for other in before if key in other]
            for which, others in (("first", having[:1]), ("previous", having[-1:])):
                if others and (gap := difference(score, others[0])) is not None:
                    against[which] = [gap[0], _finite(gap[1])]
            if against:
                differences[key] = against
        found[name] = {
            **{key: score.value for key, score in own.items()},
            "errors": {k: e for k, s in own.items() if (e := _finite(s.error)) is not None},
            "differences": differences,
        }
    return found


def items_of(scores: Sequence[Mapping[str, Score]], key: str) -> int:
    """How many items a measure was taken on, in the first model that has it."""
    return next((len(one[key].items) for one in scores if key in one), 0)


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None
