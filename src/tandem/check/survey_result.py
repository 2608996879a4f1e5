"""What a survey inspects, and its result: counts, findings, lengths of records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tandem.check.findings import Finding
from tandem.check.record_signs import Roles
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.encoded.example import Example
from tandem.data.formats.format import Kind
from tandem.data.text.contamination import Other
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.recipe.choices import TrainingStageName

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource

Unit = Literal["tokens", "characters"]
Counts = NDArray[np.int64]
Measures = dict[str, NDArray[np.int32]]  # lengths of n records by the name of the part, [n] each
_BARS = 14
_QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class LengthQuantiles:
    """A summary of the lengths of one part of all records."""

    mean: float
    least: int
    median: int
    p95: int
    p99: int
    most: int
    total: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many records are of `edges[i]` to `edges[i + 1]` - 1; the last edge counts as well."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckTarget:
    """The data to inspect, and how a run would use it."""

    stage: TrainingStageName | None  # sft or dpo, where a recipe or a flag says so
    sources: tuple[DataSource, ...]
    options: EncodingOptions  # how a run would encode records
    max_dropped: float  # the share of records that a run may drop
    # tokenizer and template; without one, lengths are in characters and nothing is cut
    chat: ChatTokenizer | None = None
    special: tuple[str, ...] = ()  # the tokenizer's special tokens
    validation: tuple[DataSource, ...] = ()  # data sets that a run would hold out
    limited: bool = False  # whether the limits are a recipe's; otherwise there are none
    held_out: bool = False  # whether a run would score the data, not train on it


@dataclass(frozen=True, slots=True)
class Survey:
    """The result of a survey.

    `examples` is how many a recipe's stage would make of the records, 0 without a recipe;
    `looked_at` is how many of the sources the pass reached; `unread` are the keys of rows, and of
    turns as `messages[].key`, that a run ignores, and `unread_cut` says that there are more;
    `problem` is the error with which a run would stop, None if it would not.
    """

    target: CheckTarget
    limit: int | None
    looked_at: int
    formats: dict[str, str]
    unread: tuple[str, ...]
    unread_cut: bool
    counts: dict[str, int]
    examples: int
    reasons: dict[str, int]
    roles: Roles
    unit: str
    measures: dict[str, LengthQuantiles]
    histogram: Histogram | None
    findings: tuple[Finding, ...]
    others: tuple[Other, ...]
    problem: str | None


class Lengths:
    """Collects lengths by the name of the part, and summarises them."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self._found: dict[str, list[NDArray[np.int32]]] = {}

    def add(self, measures: Measures) -> None:
        for name, values in measures.items():
            self._found.setdefault(name, []).append(values)

    def measures(self) -> dict[str, LengthQuantiles]:
        """Return a summary of each part."""
        return {
            name: _measure(np.concatenate(parts).astype(np.int64))
            for name, parts in self._found.items()
            if sum(map(len, parts))
        }

    def histogram(self) -> Histogram | None:
        """Return the histogram of whole records; None without records."""
        parts = self._found.get("whole", [])
        return _histogram(np.concatenate(parts)) if sum(map(len, parts)) else None


def token_lengths(examples: Sequence[Example], kind: Kind) -> Measures:
    """Return the lengths of n examples in tokens: whole (the longest path), prompt and answers.

    A prompt is that of the first path, where there are several.
    """
    if not examples:
        return {}
    parts: tuple[str, ...] = ("whole", "prompt", "answers")
    if kind == "preference pairs":
        parts = ("whole", "prompt", "chosen", "rejected")
    lengths = np.array([_paths(example, kind) for example in examples], dtype=np.int32)
    return dict(zip(parts, lengths.T, strict=True))


def _paths(example: Example, kind: Kind) -> tuple[int, ...]:
    """Return an example's longest path, its first prompt, and its answers, a pair's apart."""
    shared = len(example.prefix.input_ids)
    before = np.count_nonzero(example.prefix.trained)
    paths = [shared + len(branch.input_ids) for branch in example.branches]
    trained = [before + np.count_nonzero(branch.trained) for branch in example.branches]
    # Of a whole row, the best answer and the worst one.
    answers = [trained[0], trained[-1]] if kind == "preference pairs" else [sum(trained)]
    return max(paths), paths[0] - trained[0], *answers


def _measure(values: Counts) -> LengthQuantiles:
    quantiles: dict[str, Any] = {
        name: int(np.quantile(values, share, method="lower")) for name, share in _QUANTILES.items()
    }
    return LengthQuantiles(
        mean=round(float(values.mean()), 1),
        least=int(values.min()),
        most=int(values.max()),
        total=int(values.sum()),
        **quantiles,
    )


def _histogram(values: NDArray[np.int32]) -> Histogram:
    """Make equal bars from the shortest to about the 99th percentile, and one for the rest."""
    least, most = int(values.min()), int(values.max())
    high = int(np.quantile(values, 0.99, method="higher")) + 1
    width = _round_up(max(1, -(-(high - least) // _BARS)))
    edges = np.arange(least - least % width, high + width, width)
    below = edges[edges < most]
    edges = np.append(below if len(below) else most, most)
    counts, _ = np.histogram(values, bins=edges)
    return Histogram(tuple(map(int, edges)), tuple(map(int, counts)))


def _round_up(width: int) -> int:
    """Round up to one of 1, 2, 5, 10, 20, 50, ..."""
    unit = 10 ** (len(str(width)) - 1)
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= width)
