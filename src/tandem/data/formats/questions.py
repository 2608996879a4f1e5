"""Rows that hold an evaluation question."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.data.formats.rows import Fields, Unusable, text
from tandem.data.formats.turns import prompt_of
from tandem.data.records import Origin, Turn

QUESTION_KEYS = frozenset({"question", "answer"})
QUESTION_OPTIONS = frozenset({"system", "accepted", "completion"})


@dataclass(frozen=True, slots=True)
class Question:
    """An evaluation record: what is asked, the right answer, and how a base model is asked it.

    `accepted` are texts any of which makes an answer right (never empty); `completion` is the
    beginning of a text that a base model completes with the answer.
    """

    turns: tuple[Turn, ...]
    answer: str
    accepted: tuple[str, ...]
    completion: str | None
    origin: Origin


def read_question(fields: Fields, origin: Origin) -> Question:
    """Read `{"question", "answer", "system"?, "accepted"?, "completion"?}`.

    Raises `Unusable` for missing or empty texts.
    """
    answer = text(fields, "answer")
    accepted = fields.get("accepted")
    if accepted is None:
        accepted = [answer]
    if not isinstance(accepted, list) or not all(isinstance(a, str) and a for a in accepted):
        raise Unusable("`accepted` is not a list of texts")
    completion = None if fields.get("completion") is None else text(fields, "completion")
    turns = prompt_of(fields.get("system"), text(fields, "question"))
    return Question(turns, answer, tuple(accepted) or (answer,), completion, origin)
