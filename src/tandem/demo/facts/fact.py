"""What a fact is, and how a table of pairs becomes facts with wording."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_ARTICLES = ("a ", "an ", "the ")


@dataclass(frozen=True, slots=True)
class Fact:
    """One true statement with everything that the demo says or asks about it.

    Attributes:
        relation: Which table it comes from, such as `capital`.
        subject: What it is about, unique within the relation.
        questions: Ways to ask for it.
        answer: A whole sentence that answers every question.
        accepted: The words of which one must appear in a right answer.
        completion: The answer up to, and without, the accepted words.
        statements: Ways to state it, the answer included.
        value: What the subject is mapped to, article included.
    """

    relation: str
    subject: str
    questions: tuple[str, ...]
    answer: str
    accepted: tuple[str, ...]
    completion: str
    statements: tuple[str, ...]
    value: str

    @property
    def key(self) -> str:
        """A name that no other fact has."""
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
        """Every row as a fact, in the table's order."""
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
    for article in _ARTICLES:
        if value.startswith(article):
            return value[len(article) :]
    return value
