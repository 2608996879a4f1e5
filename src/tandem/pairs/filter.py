"""Which generated answers make a pair: every one that is passed over is counted, with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.data.answers import refuses
from tandem.data.languages import language_of
from tandem.evaluate.answers import contains_accepted
from tandem.pairs.check import Check
from tandem.pairs.prompts import Prompt
from tandem.pairs.words import similarity


@dataclass(frozen=True)
class Candidate:
    """A generated answer and whether the model ended it by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Filters:
    """What an answer must not be; None and False ask for nothing.

    Attributes:
        keep: "different" takes any answer that differs from the chosen one, "wrong" only one that
            lacks every accepted text or did not stop.
        max_similarity: an answer that is more like the chosen one is left out; see
            `words.similarity`.
        drop_refusals: leaves out refusals.
        language: a language, or "same": that of the chosen answer. Texts that do not say pass.
        max_characters: of an answer.
        drop_unfinished: leaves out answers that the length limit ended.
        check: the user's own, asked last.
    """

    keep: str = "different"
    max_similarity: float | None = None
    drop_refusals: bool = False
    language: str | None = None
    max_characters: int | None = None
    drop_unfinished: bool = False
    check: Check | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected answer."""

    prompt: Prompt
    chosen: str
    rejected: str

    def row(self) -> dict[str, str]:
        """The pair in the orca_dpo_pairs form."""
        return {
            "system": self.prompt.system,
            "question": self.prompt.question,
            "chosen": self.chosen,
            "rejected": self.rejected,
        }


def first_pair(
    prompt: Prompt, candidates: Sequence[Candidate], filters: Filters, dropped: Counter[str]
) -> Pair | str:
    """The set's answer against the first candidate that may stand against it, or why there is none.

    Args:
        prompt: with the preferred answer.
        candidates: what the weaker model wrote.
        filters: what is passed over.
        dropped: counts the candidates passed over, by reason.

    Raises UserError for a check of the user's that fails.
    """
    reasons: list[str] = []
    for candidate in candidates:
        reason = against_answer(candidate, filters, prompt.answer)
        pair = Pair(prompt, prompt.answer, candidate.text.strip())
        reason = reason or against_pair(pair, filters)
        reason = reason or _right(pair, candidate, filters) or _checked(pair, filters)
        if reason is None:
            return pair
        dropped[reason] += 1
        reasons.append(reason)
    return _together(reasons)


def against_answer(candidate: Candidate, filters: Filters, chosen: str | None = None) -> str | None:
    """What speaks against an answer by itself; `chosen` gives the language that is "same"."""
    text = candidate.text.strip()
    if not text:
        return "empty"
    if filters.drop_unfinished and not candidate.stopped:
        return "not finished"
    if filters.max_characters is not None and len(text) > filters.max_characters:
        return "too long"
    if filters.drop_refusals and refuses(text):
        return "refusal"
    language = filters.language
    if language == "same":
        language = language_of(chosen) if chosen is not None else None
    if language is not None and language_of(text) not in (None, language):
        return "in another language"
    return None


def against_pair(pair: Pair, filters: Filters) -> str | None:
    """What speaks against two answers together, the user's check aside."""
    if pair.chosen.split() == pair.rejected.split():
        return "same as chosen"
    most = filters.max_similarity
    if most is not None and similarity(pair.chosen, pair.rejected) > most:
        return "nearly the same"
    return None


def ranked_pair(
    prompt: Prompt,
    scored: Sequence[tuple[Candidate, float]],
    margin: float,
    filters: Filters,
    dropped: Counter[str],
) -> Pair | str:
    """The answer with the highest score against the one with the lowest, or why there is none.

    Args:
        prompt: what was asked; the set's own answer plays no part.
        scored: answers that passed `against_answer`, with their scores.
        margin: the scores differ by more than this.
        filters: what is asked of the pair.
        dropped: counts prompts that get no pair here, by reason.
    """
    reason: str | None = None
    if len(scored) < 2:
        reason = "fewer than two answers to rank"
    else:
        (best, high), (worst, low) = (
            max(scored, key=lambda item: item[1]),
            min(scored, key=lambda item: item[1]),
        )
        pair = Pair(prompt, best.text.strip(), worst.text.strip())
        if high - low <= margin:
            reason = "scores too close"
        reason = reason or against_pair(pair, filters) or _checked(pair, filters)
    if reason is None:
        return pair
    dropped[reason] += 1
    return reason


def _right(pair: Pair, candidate: Candidate, filters: Filters) -> str | None:
    if filters.keep != "wrong" or not candidate.stopped:
        return None
    return "right" if contains_accepted(pair.rejected, pair.prompt.accepted) else None


def _checked(pair: Pair, filters: Filters) -> str | None:
    return filters.check(pair.row(), pair.prompt.origin) if filters.check is not None else None


def _together(reasons: Sequence[str]) -> str:
    if not reasons:
        return "no answer"
    return reasons[0] if len(set(reasons)) == 1 else "no answer passes"
