"""True facts: the tables of facts.toml, and how a row becomes a fact with wording."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Fact:
    """One true statement with its wordings."""

    relation: str  # the table that it comes from, such as `capital`
    subject: str  # unique within the relation
    questions: tuple[str, ...]  # ways to ask for it
    answer: str  # a whole sentence that answers every question
    accepted: tuple[str, ...]  # words of which one must appear in a right answer
    completion: str  # the answer up to, and without, the accepted words
    statements: tuple[str, ...]  # ways to state it, the answer included
    value: str  # of the subject, article included

    @property
    def key(self) -> str:
        """A unique name."""
        return f"{self.relation}:{self.subject}"


@dataclass(frozen=True, slots=True)
class Relation:
    """A table of subjects and values, with sentence patterns over `{s}`, `{v}`, `{a_s}`.

    `{a_s}` is the subject after "a" or "an". A row is `(subject, value)` or `(subject, value,
    other accepted words, ...)`. `answer` must have `{v}` after everything that identifies the fact.
    """

    name: str
    rows: tuple[tuple[str, ...], ...]
    questions: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]

    def facts(self) -> Iterator[Fact]:
        """Yield every row as a fact, in the table's order."""
        prefix = self.answer[: self.answer.index("{v}")].rstrip()
        for subject, value, *others in self.rows:
            patterns = (self.answer, *self.statements)
            yield Fact(
                relation=self.name,
                subject=subject,
                questions=tuple(_sentence(text, subject, value) for text in self.questions),
                answer=_sentence(self.answer, subject, value),
                accepted=(_without_article(value), *others),
                completion=_sentence(prefix, subject, value),
                statements=tuple(_sentence(text, subject, value) for text in patterns),
                value=value,
            )


def _sentence(pattern: str, subject: str, value: str) -> str:
    article = "an" if subject[0].lower() in "aeiou" else "a"
    text = pattern.format(s=subject, v=value, a_s=f"{article} {subject}")
    return text[0].upper() + text[1:]


def _without_article(value: str) -> str:
    article, _, rest = value.partition(" ")
    return rest if rest and article in ("a", "an", "the") else value


_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """Write a whole number from 0 to 99 in English words; raise ValueError for others."""
    if not 0 <= number <= 99:
        raise ValueError(f"{number} is outside 0..99")
    if number < 20:
        return _SMALL[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] if ones == 0 else f"{_TENS[tens]}-{_SMALL[ones]}"


def _sum(first: int, sign: str, second: int, result: int) -> tuple[str, ...]:
    return (f"{in_words(first)} {sign} {in_words(second)}", in_words(result), str(result))


_COMPUTED = {
    "sum": tuple(_sum(a, "plus", b, a + b) for a in range(3, 10) for b in range(a, 10)),
    "product": tuple(_sum(a, "times", b, a * b) for a in range(3, 9) for b in range(a, 9)),
}


def _relation(table: dict[str, Any]) -> Relation:
    rows = (tuple(row.split(" | ")) for row in table.get("rows", "").splitlines())
    return Relation(
        name=table["name"],
        rows=_COMPUTED.get(table["name"]) or tuple(rows),
        questions=tuple(table["questions"]),
        answer=table["answer"],
        statements=tuple(table["statements"]),
    )


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RELATIONS: tuple[Relation, ...] = tuple(map(_relation, _TABLES["relation"]))


@cache
def all_facts() -> tuple[Fact, ...]:
    """Return every fact of the demo, in the order of the tables."""
    return tuple(fact for relation in RELATIONS for fact in relation.facts())
