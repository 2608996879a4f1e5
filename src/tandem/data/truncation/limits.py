"""How many tokens a record may have, and what is cut of a longer one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.data.tokenize.encode import Encoded
from tandem.data.tokenize.template_capabilities import Refused
from tandem.recipe.choices import TooLong

NOTHING_LEFT = "nothing left to train"
BEYOND = "longer than max_length"
NO_TURNS = (
    "too long, and tokens have no turns to drop (`too_long` keep_start or keep_end cuts them)"
)
PROMPT_BEYOND = "prompt longer than max_prompt_length"
ANSWER_BEYOND = "the answer alone is longer than max_length"


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits of a whole sequence and of its prompt, and what is cut beyond them.

    `prompt` None gives a prompt half of `sequence`, or what the answer leaves if that is more.
    """

    sequence: int
    prompt: int | None
    too_long: TooLong = "drop_old_turns"

    def for_prompt(self, answer_tokens: int) -> int:
        """Return how many tokens a prompt may keep in a sequence that is too long."""
        if self.too_long == "keep_end":
            room = self.sequence - answer_tokens
            return room if self.prompt is None else min(self.prompt, room)
        if self.prompt is not None:
            return min(self.prompt, self.sequence - 1)
        if self.too_long == "keep_start":
            return self.sequence - 1
        return min(max(self.sequence // 2, self.sequence - answer_tokens), self.sequence - 1)

    @property
    def by_text(self) -> bool:
        """Whether an old exchange loses only as much text as necessary, not all of it."""
        return self.too_long != "drop_old_turns"

    def in_words(self, tokens: int, answer: Encoded) -> str:
        """Return a count for messages; a text that was not tokenised whole has only a bound."""
        if answer.whole or tokens <= self.sequence:
            return str(tokens)
        return f"over {self.sequence}"

    def length_in_words(self, answers: Sequence[Encoded]) -> str:
        """Return the length of the longest answer with its prompt, for messages."""
        most = max(answers, key=lambda answer: len(answer.ids))
        return self.in_words(len(most.ids), most)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Encoded answers within the limits; `reason` is empty when nothing was cut."""

    encoded: tuple[Encoded, ...]
    reason: str = ""
    detail: str = ""


class Unfit(Exception):  # noqa: N818 - caught where a record is fitted
    """A record that cannot be fitted; `refused` says why."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.refused = Refused(reason, detail)


def fitted(
    answers: Sequence[Encoded], length: int, reasons: Sequence[str], details: Sequence[str]
) -> Fitted:
    """Return the first `length` tokens of some answers, with the reasons for what was cut."""
    kept = tuple(answer.cut(length) for answer in answers)
    return Fitted(kept, " and ".join(reasons), ", ".join(details))


def require_encoded(encoded: Sequence[Encoded | Refused]) -> tuple[Encoded, ...]:
    """Return the answers; raise `Unfit` with the first reason why one cannot be encoded."""
    answers = []
    for answer in encoded:
        if isinstance(answer, Refused):
            raise Unfit(answer.reason, answer.detail)
        answers.append(answer)
    return tuple(answers)


def longest(answers: Sequence[Encoded]) -> int:
    """Return the tokens of the longest answer with its prompt."""
    return max(len(answer.ids) for answer in answers)
