"""Which answers become rejected ones, and why the others do not."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tandem.data.records import Origin
from tandem.data.text.text_traits import contains_accepted, language_of, refuses
from tandem.errors import UserError
from tandem.pairs.prompts import Prompt
from tandem.recipe.pairs_settings import FilterSettings
from tandem.runtime.user_code import imported, is_missing_file
from tandem.storage.hashing import hash_file

# In scripts without spaces between words, each character is a word.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def similarity(one: str, other: str) -> float:
    """How alike two texts are, 0 to 1, case and punctuation aside.

    That is the Dice coefficient of their multisets of pairs of neighbouring words; of single words
    where one text has fewer than two. Texts without any word are compared as a whole.
    """
    a, b = words_of(one), words_of(other)
    if not a or not b:
        return float(one.split() == other.split())
    if min(len(a), len(b)) > 1:
        a, b = (list(map(" ".join, pairwise(x))) for x in (a, b))
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b))


@dataclass(frozen=True)
class Candidate:
    """A generated answer and whether the model ended it by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Filters:
    """What rejected answers must pass; the user's check comes last."""

    settings: FilterSettings
    # different: any answer that differs from the chosen one; wrong: only one that lacks every
    # accepted text or did not stop
    keep: str = "different"
    check: UserCheck | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected answer."""

    prompt: Prompt
    chosen: str
    rejected: str

    def row(self) -> dict[str, str]:
        """The pair in the orca_dpo_pairs form."""
        prompt = {"system": self.prompt.system, "question": self.prompt.question}
        return {**prompt, "chosen": self.chosen, "rejected": self.rejected}


def first_pair(
    prompt: Prompt, candidates: Sequence[Candidate], filters: Filters, dropped: Counter[str]
) -> Pair | str:
    """The set's answer against the first candidate that passes the filters, or why there is none.

    `dropped` counts the candidates passed over, by reason. Raises UserError for a user's check that
    fails.
    """
    reasons: list[str] = []
    for candidate in candidates:
        reason = against_answer(candidate, filters.settings, prompt.answer)
        pair = Pair(prompt, prompt.answer, candidate.text.strip())
        reason = reason or against_pair(pair, filters)
        reason = reason or _right(pair, candidate, filters) or _checked(pair, filters)
        if reason is None:
            return pair
        dropped[reason] += 1
        reasons.append(reason)
    if not reasons:
        return "no answer"
    return reasons[0] if len(set(reasons)) == 1 else "no answer passes"


def against_answer(
    candidate: Candidate, filters: FilterSettings, chosen: str | None = None
) -> str | None:
    """Why an answer by itself is left out, or None; the language "same" is that of `chosen`."""
    text = candidate.text.strip()
    if not text:
        return "empty"
    if filters.drop_unfinished and not candidate.stopped:
        return "not finished"
    if filters.max_characters is not None and len(text) > filters.max_characters:
        return "too long"
    if filters.drop_refusals and refuses(text):
        return "refusal"
    language: str | None = filters.language
    if language == "same":
        language = language_of(chosen) if chosen is not None else None
    if language is not None and language_of(text) not in (None, language):
        return "in another language"
    return None


def against_pair(pair: Pair, filters: Filters) -> str | None:
    """Why two answers together are left out, or None, the user's check aside."""
    if pair.chosen.split() == pair.rejected.split():
        return "same as chosen"
    most = filters.settings.max_similarity
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

    Their scores differ by more than `margin`. `dropped` counts prompts without a pair, by reason.
    """
    if len(scored) < 2:
        result: Pair | str = "fewer than two answers to rank"
    else:
        best, high = max(scored, key=lambda item: item[1])
        worst, low = min(scored, key=lambda item: item[1])
        pair = Pair(prompt, best.text.strip(), worst.text.strip())
        close = "scores too close" if high - low <= margin else None
        result = close or against_pair(pair, filters) or _checked(pair, filters) or pair
    if isinstance(result, str):
        dropped[result] += 1
    return result


def _right(pair: Pair, candidate: Candidate, filters: Filters) -> str | None:
    if filters.keep != "wrong" or not candidate.stopped:
        return None
    return "right" if contains_accepted(pair.rejected, pair.prompt.accepted) else None


def _checked(pair: Pair, filters: Filters) -> str | None:
    return filters.check(pair.row(), pair.prompt.origin) if filters.check is not None else None


_HOW = (
    "Write `module:function` or `path/to/file.py:function`; the function takes "
    "a pair as a dict of system, question, chosen and rejected, and returns True to keep it, or "
    "False or a reason (a text) to leave it out."
)


class UserCheck:
    """A user's function, called with each pair that all other filters let through.

    `place` is `module:function` or `file.py:function`, `identity` the hash of its file. Raises
    UserError for one that cannot be imported.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        name, colon, function = place.rpartition(":")
        if not colon or not name or not function.isidentifier():
            raise UserError(f"pairs.filters.check: {place!r} does not name a function. {_HOW}")
        if is_missing_file(name):
            raise UserError(f"pairs.filters.check: there is no file {name}. {_HOW}")
        try:
            module = imported(name)
        except Exception as error:  # a user's module may do anything
            raise UserError(
                f"pairs.filters.check: {place} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        self._function: Any = getattr(module, function, None)
        if not callable(self._function):
            raise UserError(f"pairs.filters.check: {name} has no function {function}. {_HOW}")
        file = getattr(module, "__file__", None)
        self.identity = hash_file(Path(file)) if file else place

    def __call__(self, row: dict[str, str], origin: Origin) -> str | None:
        """None to keep a pair, else the reason to drop it; UserError where the function fails."""
        try:
            verdict = self._function(dict(row))
        except Exception as error:  # whatever a user's function may raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{origin}: pairs.filters.check {self.place} raised {type(error).__name__}: "
                f"{error} ({Path(frame.filename).name}, line {frame.lineno})"
            ) from error
        if verdict is True:
            return None
        if verdict is False:
            return "check"
        if isinstance(verdict, str) and verdict.strip():
            return f"check: {' '.join(verdict.split())}"
        raise UserError(
            f"{origin}: pairs.filters.check {self.place} returned {verdict!r}, which is neither "
            "True, False nor a reason."
        )
