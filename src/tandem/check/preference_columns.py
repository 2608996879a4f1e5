"""Columns that say which answer of a pair is the better one, where they say that it is rejected.

They call the answers `chosen` and `rejected`, or as the data does where a recipe's `fields` say
which is which: with `chosen: response_0, rejected: response_1` the sides are 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tandem.check.findings import Sign
from tandem.data.records import PreferencePair

SWAPPED_SCORE = Sign(
    "chosen_scored_lower",
    "a column scores chosen below rejected",
    "warning",
    "Swapped, unless lower is better in it: exchange chosen and rejected.",
    of="pairs",
)
SWAPPED_LABEL = Sign(
    "label_prefers_rejected",
    "a column says that rejected is the preferred answer",
    "warning",
    "Swapped, most likely: exchange chosen and rejected.",
    of="pairs",
)
EQUAL = Sign(
    "equal_scores",
    "a column scores chosen and rejected alike, or calls them a tie",
    "note",
    "There is nothing to prefer by it: leave them out, unless another column decides.",
    of="pairs",
)

Words = tuple[str, ...]

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
# Of the columns for chosen and rejected, those that are numbers of something else.
_NOT_SCORES = re.compile(r"rank|len|token|logp|_id$|index|count|size|position|loss|toxic|hash")
_SCORES = frozenset({
    "score", "scores", "rating", "ratings", "reward", "rewards", "grade", "grades", "winner",
    "votes", "upvotes", "quality",
})  # fmt: skip
_VERDICTS = frozenset({
    "safe", "safer", "correct", "better", "good", "preferred", "winner", "accepted",
})  # fmt: skip
# Columns whose names say that they name the preferred answer, and words that say something else.
_LABELS = frozenset({
    "prefer", "preferred", "preference", "winner", "better", "safer", "choice", "best", "label",
    "labels",
})  # fmt: skip
_NOT_LABELS = frozenset({
    "strength", "score", "scores", "margin", "count", "elaboration", "statement", "model",
    "rate", "ratio", "prob", "probability", "confidence", "type", "token", "tokens", "len",
    "length", "reason", "reasoning", "of", "n",
})  # fmt: skip
# Where a number is one of a scale, a class or a truth value rather than the number of an answer.
_NOT_NUMBERS = frozenset({"preference", "label", "labels", "tie"})
# What answers are called, before the letter or number of one.
_NOUNS = frozenset({
    "response", "answer", "model", "assistant", "option", "completion", "output", "candidate",
})  # fmt: skip
_TIES = frozenset({"tie", "tied", "draw", "equal"})
# A name of an answer is no longer than this.
_NAME = 64


def words_in(name: str) -> Words:
    """The words of a key, in lower case: `response_0`, `responseA`, `is-safe`."""
    return tuple(word.lower() for word in _WORD.findall(name))


@dataclass(frozen=True, slots=True)
class Sides:
    """What the two answers of a source's pairs are called.

    Attributes:
        names: each whole name, with whether it is the rejected answer's.
        parts: the words in which the names differ, of chosen and of rejected; a pair of them for
            each way the answers are called.
    """

    names: tuple[tuple[str, bool], ...]
    parts: tuple[tuple[Words, Words], ...]

    def rejects(self, value: object, *, numbers: bool) -> bool | None:
        """Whether a value names the rejected answer; None when it names neither.

        Args:
            value: of a column.
            numbers: whether a number names an answer.
        """
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        said = value.strip() if isinstance(value, str) else _written(value)
        if len(said) > _NAME or (not numbers and said.isdigit()):
            return None
        for name, rejected in self.names:
            if said.lower() == name.lower():
                return rejected
        words = words_in(said)
        spoken = tuple(word for word in words if word not in _NOUNS) or words
        for good, bad in self.parts:
            if spoken in (good, bad):
                return spoken == bad
        return None


@lru_cache(maxsize=256)
def sides_of(fields: tuple[tuple[str, str], ...]) -> Sides:
    """The sides of a source whose recipe gives these names (key of the format, data's name)."""
    own = dict(fields)
    names = [("chosen", False), ("rejected", True)]
    parts: list[tuple[Words, Words]] = [(("chosen",), ("rejected",))]
    good = own.get("chosen") or own.get("chosen_response")
    bad = own.get("rejected") or own.get("rejected_response")
    if good and bad:
        names += [(good, False), (bad, True)]
        differ = _differing(words_in(good), words_in(bad))
        if all(differ) and differ not in parts:
            parts.append(differ)
    return Sides(tuple(names), tuple(parts))


def _differing(a: Words, b: Words) -> tuple[Words, Words]:
    """Two names without the words that both begin and end with."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return a, b


@dataclass(frozen=True, slots=True)
class SideColumns:
    """Which columns say something about the two answers, by their names alone.

    Attributes:
        scores: a number of chosen and one of rejected; whether the names say that it is a score.
        verdicts: a truth value of chosen and one of rejected.
        labels: the name of an answer, and whether a number is one.
    """

    scores: tuple[tuple[str, str, bool], ...]
    verdicts: tuple[tuple[str, str], ...]
    labels: tuple[tuple[str, bool], ...]


@lru_cache(maxsize=1024)
def side_columns(names: Words, sides: Sides) -> SideColumns:
    """The columns among some keys that say something about the answers."""
    words = {name: words_in(name) for name in names}
    scores: list[tuple[str, str, bool]] = []
    verdicts: list[tuple[str, str]] = []
    taken: set[str] = set()
    # Chosen and rejected themselves: also within a word, and whatever is counted.
    for name in names:
        other = name.replace("chosen", "rejected").replace("Chosen", "Rejected")
        if other != name and other in words and not _NOT_SCORES.search(name.lower()):
            scores.append((name, other, bool(_SCORES.intersection(words[name]))))
    for good, bad in sides.parts:
        for name, other in _beside(words, good, bad):
            taken |= {name, other}
            if _VERDICTS.intersection(words[name]):
                verdicts.append((name, other))
            if good != ("chosen",) and _SCORES.intersection(words[name]):
                scores.append((name, other, True))
    labels = [
        (name, not _NOT_NUMBERS.intersection(own))
        for name, own in words.items()
        if name not in taken
        and (_LABELS.intersection(own) or {"chosen", "id"} <= set(own))
        and not _NOT_LABELS.intersection(own)
    ]
    return SideColumns(tuple(scores), tuple(verdicts), tuple(labels))


def _beside(words: Mapping[str, Words], good: Words, bad: Words) -> Iterator[tuple[str, str]]:
    """Columns whose names differ as those of the answers do."""
    named = {own: name for name, own in words.items()}
    for name, own in words.items():
        for at in range(len(own) - len(good) + 1):
            if own[at : at + len(good)] == good:
                other = named.get(own[:at] + bad + own[at + len(good) :])
                if other is not None:
                    yield name, other


def column_signs(
    fields: Mapping[str, object], pair: PreferencePair, sides: Sides
) -> Iterator[tuple[Sign, str]]:
    """The signs in other columns that a pair is the wrong way round, with what they say.

    Args:
        fields: the pair's row.
        pair: what was read of it.
        sides: what its answers are called, see `sides_of`.
    """
    columns = side_columns(tuple(fields), sides)
    scored = scores_in(fields, columns)
    lower = next((one for one in scored if one[2] < one[3]), None)
    if lower is not None:
        yield SWAPPED_SCORE, _scores(lower)
    named = _named(fields, pair, sides, columns)
    if named is not None:
        yield SWAPPED_LABEL, named
    if lower is not None or named is not None:
        return
    # A column that does not call itself a score is equal by nature: turns, answers.
    meant = [one for one in scored if one[4]]
    if meant and all(one[2] == one[3] for one in meant):
        yield EQUAL, _scores(meant[0])
    elif (tie := _tie(fields, columns)) is not None:
        yield EQUAL, tie


def scores_in(
    fields: Mapping[str, object], columns: SideColumns
) -> list[tuple[str, str, float, float, bool]]:
    """Both columns and numbers of each score that a row has for both answers."""
    found = []
    for good, bad, meant in columns.scores:
        a, b = fields[good], fields[bad]
        if _is_number(a) and _is_number(b):
            assert isinstance(a, int | float)
            assert isinstance(b, int | float)
            found.append((good, bad, a, b, meant))
    return found


def _scores(one: tuple[str, str, float, float, bool]) -> str:
    good, bad, a, b, _ = one
    return f"{good} {_written(a)}, {bad} {_written(b)}"


def _written(number: float) -> str:
    """A number in short; whole ones may be too large for a float."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def _named(
    fields: Mapping[str, object], pair: PreferencePair, sides: Sides, columns: SideColumns
) -> str | None:
    """What a column says by which the rejected answer is the preferred one."""
    for name, numbers in columns.labels:
        value = fields[name]
        rejects = sides.rejects(value, numbers=numbers)
        if rejects or (rejects is None and _is_text(value, pair.rejected)):
            return f"{name}: {value}"
    for good, bad in columns.verdicts:
        if fields[good] is False and fields[bad] is True:
            return f"{good}: false, {bad}: true"
    return None


def _tie(fields: Mapping[str, object], columns: SideColumns) -> str | None:
    """What a column says that calls the answers a tie."""
    names: Sequence[str] = [*(name for name, _ in columns.labels), "status"]
    for name in names:
        value = fields.get(name)
        if isinstance(value, str):
            tied = len(value) <= _NAME and not _TIES.isdisjoint(words_in(value)[:1])
        else:
            tied = value in (True, 1) and "tie" in words_in(name)
        if tied:
            return f"{name}: {value}"
    return None


def _is_text(value: object, text: str) -> bool:
    return isinstance(value, str) and len(value.strip()) > 1 and value.strip() == text.strip()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
