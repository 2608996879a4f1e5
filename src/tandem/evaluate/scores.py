"""Measures item by item: their errors, comparisons in pairs, and what is kept of them on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.storage.atomic_files import atomic_write_json
from tandem.storage.hashing import Damaged, hash_json, read_object, sealed


@dataclass(frozen=True)
class Score:
    """One measure of one model over some items."""

    # what each value belongs to; models are compared on the same items alone
    items: tuple[str, ...]
    values: tuple[float, ...]  # of each item; their sum over the sum of the weights is the measure
    # of each item, its number of tokens for instance; empty: every item counts once
    weights: tuple[float, ...] = ()
    # value and standard error as the harness gives them, in place of our own
    stated: tuple[float, float | None] | None = None

    @property
    def value(self) -> float:
        """The measure."""
        return self.stated[0] if self.stated is not None else self.mean

    @property
    def mean(self) -> float:
        """The items' own mean."""
        return sum(self.values) / self._weight if self.values else math.nan

    @property
    def error(self) -> float | None:
        """Its standard error, None for fewer than two items."""
        if self.stated is not None:
            return self.stated[1]
        return _error(self._residuals())

    def _residuals(self) -> list[float]:
        """What each item adds to the measure's deviation; they sum to zero."""
        mean, total = self.mean, self._weight
        weights = self.weights or (1.0,) * len(self.values)
        return [(v - mean * w) / total for v, w in zip(self.values, weights, strict=True)]

    @property
    def _weight(self) -> float:
        return sum(self.weights) if self.weights else float(len(self.values))

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file; see `score_of`."""
        return {key: value and list(value) for key, value in vars(self).items()}


def score_of(plain: Mapping[str, Any]) -> Score:
    """A score from what `Score.as_json` gave."""
    values: dict[str, Any] = {k: v if v is None else tuple(v) for k, v in plain.items()}
    return Score(**values)


@dataclass(frozen=True)
class ModelScores:
    """One model's scores by measure, and its answers to the questions."""

    scores: Mapping[str, Score]
    answers: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file; see `model_scores_of`."""
        scores = {key: score.as_json() for key, score in self.scores.items()}
        return {"scores": scores, "answers": list(self.answers)}


def model_scores_of(plain: Mapping[str, Any]) -> ModelScores:
    """What `ModelScores.as_json` gave."""
    scores = {key: score_of(score) for key, score in plain["scores"].items()}
    return ModelScores(scores, plain["answers"])


def per_item(values: Sequence[float], weights: Sequence[float] = ()) -> Score:
    """A score whose items are told apart by their position alone."""
    return Score(tuple(str(i) for i in range(len(values))), tuple(values), tuple(weights))


def difference(one: Score, other: Score) -> tuple[float, float | None] | None:
    """How much larger `one` is than `other`, with the standard error of that difference.

    Both share the items and their difficulty: the error is that of the items' differences,
    sqrt(n / (n - 1) * sum(d^2)) with d an item's share of the difference less the mean one. It is
    smaller than what two separate errors would give. Returns None where the items are not the same,
    and where a measure is no mean of its items.
    """
    if one.items != other.items or not one.items:
        return None
    if not (_is_mean(one) and _is_mean(other)):
        return None
    pairs = zip(one._residuals(), other._residuals(), strict=True)
    return one.value - other.value, _error([a - b for a, b in pairs])


def _is_mean(score: Score) -> bool:
    return math.isclose(score.mean, score.value, rel_tol=1e-9, abs_tol=1e-12)


def _error(residuals: Sequence[float]) -> float | None:
    count = len(residuals)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(d * d for d in residuals))


def compared(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, Any]]:
    """What evaluation.json says of each model's figures; `scores` are by model, then by measure.

    Returns by model: each measure's value under its name; `errors`, their standard errors; and
    `differences`, by measure: from the first model and from the nearest one before that has the
    measure, each as [difference, its standard error].
    """
    names = list(scores)
    figures: dict[str, dict[str, Any]] = {}
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
        figures[name] = {
            **{key: score.value for key, score in own.items()},
            "errors": {k: e for k, s in own.items() if (e := _finite(s.error)) is not None},
            "differences": differences,
        }
    return figures


def items_of(scores: Sequence[Mapping[str, Score]], key: str) -> int:
    """How many items a measure was taken on, in the first model that has it."""
    return next((len(one[key].items) for one in scores if key in one), 0)


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None


@dataclass(frozen=True)
class MeasurementStore:
    """A folder of finished measurements; `log` is told of a damaged file, measured again."""

    folder: Path
    log: Callable[[str], None] = lambda _: None

    def find(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was kept under a key; None for nothing, for another key, and for a damaged file.

        Raises Damaged for a folder in the file's place.
        """
        path = self._path(name, key)
        if not path.exists():
            return None
        try:
            kept = read_object(path, {"key": dict, "result": dict}, "It is measured again.")
        except Damaged as error:
            if path.is_dir():
                raise Damaged(f"{path} is a folder, and a file belongs there. Remove it.") from None
            self.log(str(error))
            return None
        result: dict[str, Any] = kept["result"]
        return result if kept["key"] == _plain(key) else None

    def keep(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a finished measurement; a reader sees all of it or nothing."""
        value = {"name": name, "key": _plain(key), "result": dict(result)}
        atomic_write_json(self._path(name, key), sealed(value))

    def _path(self, name: str, key: Mapping[str, Any]) -> Path:
        readable = re.sub(r"[^\w.-]+", "-", name)[:80]
        return self.folder / f"{readable}-{hash_json(_plain(key))[:16]}.json"


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    # Tuples are lists in a file.
    return {k: list(v) if isinstance(v, tuple) else v for k, v in key.items()}
