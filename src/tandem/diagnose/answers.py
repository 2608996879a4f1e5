"""Signs in answers and pairs: refusals, answers that break off, pairs the wrong way round."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tandem.data.answers import refuses, refuses_only
from tandem.data.records import PreferencePair
from tandem.diagnose.findings import Sign

# Words that an answer must have, its last line, and what follows its last full stop, to be called
# broken off.
_WORDS, _LAST_LINE, _TAIL = 25, 8, 4

BROKEN_OFF = Sign(
    "answer_breaks_off",
    "answers that seem to end within a sentence",
    "note",
    "They teach a model to stop there: complete them, or leave them out.",
    of="answers",
)
OPEN_CODE = Sign(
    "code_block_left_open",
    "answers with a code block that is not closed",
    "warning",
    "They were cut, most likely: complete them, or leave them out.",
    of="answers",
)
REFUSAL = Sign(
    "refusals",
    "answers that refuse, or speak of themselves as an AI",
    "note",
    "A model learns how often to refuse: leave out those that are not meant.",
    of="answers",
)
REPEATS = Sign(
    "answer_repeats_the_prompt",
    "answers that are the question again",
    "warning",
    "Correct them, or leave them out.",
    of="answers",
)
SAME_BUT_FOR_SPACES = Sign(
    "nearly_identical_answers",
    "chosen and rejected differ in spaces, case or punctuation only",
    "warning",
    "There is little to prefer: leave them out, unless this is what DPO is to teach.",
    of="pairs",
)
SWAPPED_REFUSAL = Sign(
    "chosen_refuses",
    "chosen only refuses, the longer rejected answers",
    "warning",
    "Swapped, unless the data is about safety: exchange chosen and rejected.",
    of="pairs",
)
SWAPPED_EMPTY = Sign(
    "chosen_says_nothing",
    "chosen has no word, rejected has several",
    "warning",
    "Swapped, most likely: exchange chosen and rejected.",
    of="pairs",
)
_LIST_ITEM = re.compile(r"\s*(?:[-*+•#|>]|\d+[.)]|[A-Za-z][.)]\s|Step \d)")
_SENTENCE_END = re.compile(r"[.!?]\s")
_WORD = re.compile(r"\w+")
# Endings of an answer that goes on: a letter, a comma, an open bracket.
_GOES_ON = re.compile(r"[^\W\d_]$|[,(\[{–-]$")
# Code, formulas, addresses, hashtags and the ends of letters need no full stop.
_NO_SENTENCE = re.compile(
    r"[{};=<>\\$_]|\w\(|https?://|\w\.\w|#\w|\b(?:sincerely|regards|cheers|yours|love|wishes)\b",
    re.IGNORECASE,
)


def breaks_off(answer: str) -> bool:
    """Whether a text of sentences ends within one.

    Short answers, lists, tables, code, formulas and names at the end do not count.
    """
    text = answer.rstrip()
    if not _GOES_ON.search(text[-1:]) or len(text) < 3 * _WORDS:
        return False
    last = text[text.rfind("\n") + 1 :]
    if len(last.split(None, _LAST_LINE)) <= _LAST_LINE or _LIST_ITEM.match(last) or "```" in text:
        return False
    if len(text.split(None, _WORDS)) <= _WORDS or _SENTENCE_END.search(text) is None:
        return False
    tail = _SENTENCE_END.split(last[-400:])[-1]
    return len(tail.split()) >= _TAIL and not _NO_SENTENCE.search(tail)


def leaves_code_open(answer: str) -> bool:
    """Whether one of the answer's code blocks is opened and not closed."""
    return answer.count("```") % 2 == 1


def answer_signs(answer: str, question: str) -> Iterator[tuple[Sign, int]]:
    """The signs of one answer, and where in it they show."""
    if refuses(answer):
        yield REFUSAL, 0
    if breaks_off(answer):
        yield BROKEN_OFF, len(answer)
    elif leaves_code_open(answer):
        yield OPEN_CODE, answer.rfind("```")
    if len(answer) > 20 and answer.strip() == question.strip():
        yield REPEATS, 0


def pair_signs(pair: PreferencePair) -> Iterator[tuple[Sign, str]]:
    """The signs in a pair's own texts that it is no pair, or the wrong way round, with a text."""
    chosen, rejected = pair.chosen, pair.rejected
    if abs(len(chosen) - len(rejected)) < 40 and _words(chosen) == _words(rejected):
        yield SAME_BUT_FOR_SPACES, chosen
    if not _WORD.search(chosen) and len(rejected.split()) > 2:
        yield SWAPPED_EMPTY, f"chosen: {chosen.strip()} | rejected: {rejected}"
    if refuses_only(chosen) and not refuses(rejected) and len(rejected) > len(chosen):
        yield SWAPPED_REFUSAL, chosen


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
