"""Words in the names of columns, and the columns that they select from a row's keys.

A pair's answers are called `chosen` and `rejected`, or as a recipe's `fields` say: with
`chosen: response_0, rejected: response_1` the sides are 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

from tandem.data.formats.format import Kind

Words = tuple[str, ...]

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Scores, verdicts and labels of a pair's two answers.
SCORES = _words(
    "score scores rating ratings reward rewards grade grades winner votes upvotes quality"
)
# Numbers beside `chosen` and `rejected` that measure something else.
NO_SCORES = re.compile(r"rank|len|token|logp|_id$|index|count|size|position|loss|toxic|hash")
SIDE_VERDICTS = _words("safe safer correct better good preferred winner accepted")
# Columns that name the preferred answer, and words beside which they name something else.
PREFERENCE_LABELS = _words(
    "prefer preferred preference winner better safer choice best label labels"
)
NO_PREFERENCE_LABELS = _words(
    "strength score scores margin count elaboration statement model rate ratio prob probability "
    "confidence type token tokens len length reason reasoning of n"
)
# Columns whose numbers are of a scale, a class or a truth value, not the number of an answer.
SCALES = _words("preference label labels tie")
# What answers are called, before the letter or number of one.
ANSWER_NOUNS = _words("response answer model assistant option completion output candidate")
TIES = _words("tie tied draw equal")

# Verdicts on one answer, good and bad ones, and those whose numbers may be classes or grades.
ANSWER_VERDICTS = _words(
    "label correct correctness good accepted acceptable preferred passed safe valid desirable "
    "solved resolved success successful"
)
BAD_ANSWER_VERDICTS = _words("incorrect wrong unsafe")
VERDICT_TAGS = _words("kto_tag")
GRADES = _words("label correctness")

# Columns that change what is asked or answered, each with a format's key for the same.
PARTS_OF_A_RECORD = {
    "history": "history", "system_prompt": "system", "system_message": "system",
    "functions": "tools", "context": "input", "choices": "", "options": "",
}  # fmt: skip
MEDIA = re.compile(r"(?:image|video|audio)s?(?:_(?:path|url|file|bytes)s?)?")
TEMPLATE_OPTIONS = "chat_template_kwargs"
REASONING_WORDS = _words("cot reasoning thinking thought thoughts")
# A name with one of these as well is not an answer's reasoning; nor is one with a fact about
# reasoning, unless its last word is a reasoning word.
NO_REASONING_WORDS = _words("is has use num number count enable enabled budget judge finish")
REASONING_FACTS = _words(
    "type language lang token tokens length len effort mode level model complete completed score "
    "id source time category version rating quality difficulty topic domain"
)
# Beside `rejected`: a fact about an answer, not the answer.
ANSWER_FACTS = _words(
    "model models source score scores rating ratings reward rewards reason by at rank id token "
    "tokens length len logp logps policy generator type count"
)
# Texts that switch reasoning on and off, or say that there is none.
SWITCHES = frozenset({
    "", "on", "off", "true", "false", "yes", "no", "none", "null", "n/a", "auto", "low", "medium",
    "high",
})  # fmt: skip
# A value that names an answer is no longer than this.
LONGEST_NAME = 64


def words_in(name: str) -> Words:
    """Return the words of a key in lower case: `response_0`, `responseA`, `is-safe`."""
    return tuple(word.lower() for word in _WORD.findall(name))


@dataclass(frozen=True, slots=True)
class Sides:
    """The names of the two answers of a source's pairs."""

    names: tuple[tuple[str, bool], ...]  # each whole name, with whether it is the rejected answer's
    # the words in which the names differ, of chosen and of rejected, for each naming
    parts: tuple[tuple[Words, Words], ...]

    def rejects(self, value: object, *, numbers: bool) -> bool | None:
        """Return whether a value names the rejected answer; None when it names neither.

        `numbers`: a number may name an answer.
        """
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        text = value.strip() if isinstance(value, str) else written(value)
        if len(text) > LONGEST_NAME or (not numbers and text.isdigit()):
            return None
        for name, rejected in self.names:
            if text.lower() == name.lower():
                return rejected
        words = words_in(text)
        part = tuple(word for word in words if word not in ANSWER_NOUNS) or words
        for good, bad in self.parts:
            if part in (good, bad):
                return part == bad
        return None


def written(number: float) -> str:
    """Write a number in short; whole ones may be too large for a float."""
    return str(number) if isinstance(number, int) else f"{number:g}"


@lru_cache(maxsize=256)
def sides_of(fields: tuple[tuple[str, str], ...]) -> Sides:
    """Return the sides of a source with a recipe's names (key of the format, data's name)."""
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
    """Return two names without their common first and last words."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return a, b


@dataclass(frozen=True, slots=True)
class SideColumns:
    """The columns about the two answers, by their names alone.

    `scores` are the columns of chosen and rejected, and whether their names say `score`; `verdicts`
    are such pairs of columns, too; `labels` are columns that name the preferred answer, and whether
    a number there is the name of one.
    """

    scores: tuple[tuple[str, str, bool], ...]
    verdicts: tuple[tuple[str, str], ...]
    labels: tuple[tuple[str, bool], ...]


@lru_cache(maxsize=1024)
def side_columns(names: Words, sides: Sides) -> SideColumns:
    """Return the columns about the answers among some keys."""
    words = {name: words_in(name) for name in names}
    scores: list[tuple[str, str, bool]] = []
    verdicts: list[tuple[str, str]] = []
    taken: set[str] = set()
    # `chosen` and `rejected` themselves count within a word, too, without a word for scores.
    for name in names:
        other = name.replace("chosen", "rejected").replace("Chosen", "Rejected")
        if other != name and other in words and not NO_SCORES.search(name.lower()):
            scores.append((name, other, bool(SCORES.intersection(words[name]))))
    for good, bad in sides.parts:
        for name, other in _beside(words, good, bad):
            taken |= {name, other}
            if SIDE_VERDICTS.intersection(words[name]):
                verdicts.append((name, other))
            if good != ("chosen",) and SCORES.intersection(words[name]):
                scores.append((name, other, True))
    labels = [
        (name, not SCALES.intersection(own))
        for name, own in words.items()
        if name not in taken
        and (PREFERENCE_LABELS.intersection(own) or {"chosen", "id"} <= set(own))
        and not NO_PREFERENCE_LABELS.intersection(own)
    ]
    return SideColumns(tuple(scores), tuple(verdicts), tuple(labels))


def _beside(words: Mapping[str, Words], good: Words, bad: Words) -> Iterator[tuple[str, str]]:
    """Yield pairs of columns whose names differ as those of the answers do."""
    named = {own: name for name, own in words.items()}
    for name, own in words.items():
        for at in range(len(own) - len(good) + 1):
            if own[at : at + len(good)] == good:
                other = named.get(own[:at] + bad + own[at + len(good) :])
                if other is not None:
                    yield name, other


def verdict_columns(names: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield columns with names of verdicts, and whether true is bad in them."""
    for name in names:
        words = words_in(name)
        # `is_response_safe`, `tests_passed`; but not `label_source`.
        if name.lower() in VERDICT_TAGS or (words and words[-1] in ANSWER_VERDICTS):
            yield name, False
        elif words and words[-1] in BAD_ANSWER_VERDICTS:
            yield name, True


def meaning_columns(names: Sequence[str], kind: Kind) -> Iterator[tuple[str, str]]:
    """Yield columns with names of parts of a question or an answer, and a format's key for each."""
    for name in names:
        plain = name.lower().replace("-", "_")
        parts = re.split(r"[^a-z0-9]+", plain)
        own = words_in(name)
        rejected = "rejected" in (*own[:1], *own[-1:]) and ANSWER_FACTS.isdisjoint(own)
        if plain in PARTS_OF_A_RECORD:
            yield name, PARTS_OF_A_RECORD[plain]
        elif (
            plain == TEMPLATE_OPTIONS
            or MEDIA.fullmatch(plain)
            # Both ways of splitting, because CoT is one word.
            or _is_reasoning({*own, *parts}, parts[-1], kind)
            or (kind == "conversations" and rejected)
        ):
            yield name, ""


def _is_reasoning(words: Set[str], last: str, kind: Kind) -> bool:
    """Return whether a name of these words is that of an answer's reasoning."""
    # Beside pairs it is most often a judge's, unless the name says that it is an answer's.
    if kind == "preference pairs" and words.isdisjoint(("chosen", "rejected")):
        return False
    if words.isdisjoint(REASONING_WORDS) or not words.isdisjoint(NO_REASONING_WORDS):
        return False
    return last in REASONING_WORDS or words.isdisjoint(REASONING_FACTS)
