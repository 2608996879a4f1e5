"""Signs in answers and pairs: refusals, answers that break off, swapped pairs."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tandem.check.findings import Sign, Tally
from tandem.check.text_signs import TOKENS, TextSigns
from tandem.data.records import (
    REASONING,
    ChatRecord,
    Conversation,
    Document,
    Preference,
    Record,
    TokenPair,
    TokenRecord,
    TokenRow,
    Turn,
)
from tandem.data.text.contamination import prompt_digest
from tandem.data.text.text_traits import language_of, refuses, refuses_only

# An answer may be called broken off if it, its last line, and the text behind its last full stop
# have so many words.
_WORDS, _LAST_LINE, _TAIL = 25, 8, 4

BROKEN_OFF = Sign(
    "answer_breaks_off", "answers that seem to end within a sentence", "note",
    "They teach a model to stop there: complete them, or leave them out.", of="answers",
)  # fmt: skip
OPEN_CODE = Sign(
    "code_block_left_open", "answers with a code block that is not closed", "warning",
    "They were cut, most likely: complete them, or leave them out.", of="answers",
)  # fmt: skip
REFUSAL = Sign(
    "refusals", "answers that refuse, or speak of themselves as an AI", "note",
    "A model learns how often to refuse: leave out those that are not meant.", of="answers",
)  # fmt: skip
REPEATS = Sign(
    "answer_repeats_the_prompt", "answers that are the question again", "warning",
    "Correct them, or leave them out.", of="answers",
)  # fmt: skip
SAME_BUT_FOR_SPACES = Sign(
    "nearly_identical_answers", "chosen and rejected differ in spaces, case or punctuation only",
    "warning", "There is little to prefer: leave them out, unless this is what DPO is to teach.",
    of="pairs",
)  # fmt: skip
SWAPPED_REFUSAL = Sign(
    "chosen_refuses", "chosen only refuses, the longer rejected answers", "warning",
    "Swapped, unless the data is about safety: exchange chosen and rejected.", of="pairs",
)  # fmt: skip
SWAPPED_EMPTY = Sign(
    "chosen_says_nothing", "chosen has no word, rejected has several", "warning",
    "Swapped, most likely: exchange chosen and rejected.", of="pairs",
)  # fmt: skip
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
    """Return whether a text ends within a sentence.

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
    """Return whether one of the answer's code blocks is opened and not closed."""
    return answer.count("```") % 2 == 1


def answer_signs(answer: str, question: str) -> Iterator[tuple[Sign, int]]:
    """Yield the signs of one answer, and their positions in it."""
    if refuses(answer):
        yield REFUSAL, 0
    if breaks_off(answer):
        yield BROKEN_OFF, len(answer)
    elif leaves_code_open(answer):
        yield OPEN_CODE, answer.rfind("```")
    if len(answer) > 20 and answer.strip() == question.strip():
        yield REPEATS, 0


def pair_signs(pair: Preference) -> Iterator[tuple[Sign, str]]:
    """Yield signs, with a text, in a pair's own texts that it is swapped, or hardly a pair."""
    chosen, rejected = pair.chosen, pair.rejected
    if abs(len(chosen) - len(rejected)) < 40 and _words(chosen) == _words(rejected):
        yield SAME_BUT_FOR_SPACES, chosen
    if not _WORD.search(chosen) and len(rejected.split()) > 2:
        yield SWAPPED_EMPTY, f"chosen: {chosen.strip()} | rejected: {rejected}"
    if refuses_only(chosen) and not refuses(rejected) and len(rejected) > len(chosen):
        yield SWAPPED_REFUSAL, chosen


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


_SHOWN_IDS = 12
_LONG_ANSWER = 40  # shorter answers ("Yes.") may well be the same
# Yields the signs in the other columns of a record's row, each with a text.
Beside = Callable[[Record], Iterable[tuple[Sign, str]]]


@dataclass(slots=True)
class Roles:
    """Counts the texts and languages of each role, and the turns of records."""

    languages: dict[str, Counter[str]] = field(default_factory=dict)
    turns: Counter[int] = field(default_factory=Counter)

    def add(self, role: str, text: str) -> None:
        self.languages.setdefault(role, Counter())[language_of(text) or "unknown"] += 1

    def merge(self, later: Roles) -> None:
        """Count the texts and turns of records that follow."""
        for role, counts in later.languages.items():
            self.languages.setdefault(role, Counter()).update(counts)
        self.turns.update(later.turns)


def texts_of(record: Record) -> list[tuple[str, str]]:
    """Return a record's texts in order, each with its role, or `chosen`, `reasoning` and so on.

    A record of tokens has none; a document's is `text`.
    """
    if isinstance(record, Document):
        return [("text", record.text)]
    if isinstance(record, TokenRow | TokenPair):
        return []
    if isinstance(record, Conversation):
        return [text for turn in record.turns for text in _texts_of_turn(turn)]
    prompt = [text for turn in record.prompt for text in _texts_of_turn(turn)]
    return [*prompt, *record.named]


def _texts_of_turn(turn: Turn) -> list[tuple[str, str]]:
    more = turn.more()
    reasoning = [("reasoning", more[REASONING])] if REASONING in more else []
    calls = [
        ("call", json.dumps(call["function"], ensure_ascii=False))
        for call in more.get("tool_calls", ())
    ]
    own = [(turn.role, turn.content)] if turn.content or not calls else []
    return [*reasoning, *own, *calls]


def prompt_of(record: Record) -> tuple[Turn, ...]:
    """Return the turns before a record's first answer, or before both answers of a pair.

    A record without turns has none.
    """
    if not isinstance(record, Conversation | Preference):
        return ()
    if isinstance(record, Preference):
        return record.prompt
    first = next(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
    return record.turns[:first]


def question_of(record: Record) -> str:
    """Return the last text of the user in a record's prompt."""
    return next((turn.content for turn in reversed(prompt_of(record)) if turn.role == "user"), "")


def shown_of(record: Record) -> str:
    """Return what shows a record in a line: its question, its text, or the first of its tokens."""
    if isinstance(record, Document):
        return record.text
    if isinstance(record, TokenRow | TokenPair):
        ids = record.ids if isinstance(record, TokenRow) else record.prompt
        return f"tokens {' '.join(map(str, ids[:_SHOWN_IDS]))}"
    return question_of(record)


def answer_of(record: ChatRecord) -> str:
    """Return a record's last answer, or the chosen one of a pair."""
    return record.chosen if isinstance(record, Preference) else record.turns[-1].content


def body_of(record: Record) -> str:
    """Return all texts of a record but the system's, which many records share."""
    return "\n".join(text for role, text in texts_of(record) if role != "system")


def digests_of(record: Record) -> tuple[int, int, int, int]:
    """Return 64 bits each: of the record (a pair's answers in any order), prompt, last answer.

    The fourth is of that answer's text alone, 0 for a short one and for tokens. A document has
    neither prompt nor answer.
    """
    if isinstance(record, Document):
        return _digest(record.text), 0, 0, 0
    if isinstance(record, TokenRow | TokenPair):
        return _token_digests(record)
    prompt = "\0".join((record.tools, *map(_spelt, prompt_of(record))))
    if isinstance(record, Preference):
        whole = "\0".join((prompt, *sorted(record.answers)))
        own = record.chosen
    else:
        whole = "\0".join((record.tools, *map(_spelt, record.turns)))
        own = _spelt(record.turns[-1])
    answer = answer_of(record)
    long = _digest(answer) if len(answer) >= _LONG_ANSWER else 0
    return _digest(whole), prompt_digest(prompt), _digest(own), long


def _token_digests(record: TokenRecord) -> tuple[int, int, int, int]:
    if isinstance(record, TokenPair):
        answers = (record.chosen, record.rejected)
        whole = json.dumps([record.prompt, *sorted(answers)])
        prompt, own = record.prompt, record.chosen
    else:
        whole = json.dumps([record.ids, record.trained])
        prompt, own = record.ids[: record.start], record.ids[record.start :]
    return _digest(whole), _digest(json.dumps(prompt)), _digest(json.dumps(own)), 0


def _spelt(turn: Turn) -> str:
    """Return all content of a turn, calls and reasoning included."""
    return f"{turn.role}\1{turn.content}\1{turn.extra}"


def look_at(
    records: Sequence[Record], texts: TextSigns, tally: Tally, roles: Roles, beside: Beside
) -> None:
    """Count the roles of some records, and their signs, also those in other columns."""
    all_texts: list[str] = []
    owners: list[Record] = []
    for record in records:
        for role, text in texts_of(record):
            roles.add(role, text)
            all_texts.append(text)
            owners.append(record)
        if not isinstance(record, Conversation | Preference):
            continue
        turns = record.turns if isinstance(record, Conversation) else record.prompt
        count = len(turns) + isinstance(record, Preference)  # a pair's answer is a turn, too
        roles.turns[count] += 1
        for sign, text, at in _of_one(record):
            tally.add(sign, record.origin, text, at)
        for sign, text in beside(record):
            tally.add(sign, record.origin, text)
    seen: set[tuple[str, int]] = set()  # a record counts once for each sign of its texts
    for number, sign, at, kind in texts.find(all_texts):
        key = (sign.name, id(owners[number]))
        # A document may well be about templates, or a transcript: it is trained as it is.
        if key not in seen and not (sign is TOKENS and isinstance(owners[number], Document)):
            seen.add(key)
            tally.add(sign, owners[number].origin, all_texts[number], at, kind)


def _of_one(record: ChatRecord) -> Iterator[tuple[Sign, str, int]]:
    """Yield signs of a record's trained answers, or of a pair and its chosen answer."""
    if isinstance(record, Preference):
        yield from ((sign, text, 0) for sign, text in pair_signs(record))
        answers = [(record.chosen, question_of(record))]
    else:
        answers = [
            # A tool's result may well be the answer.
            (turn.content, before.content if before.role == "user" else "")
            for before, turn in pairwise(record.turns)
            if turn.role == "assistant" and turn.trained
        ]
    for answer, question in answers:
        yield from ((sign, answer, at) for sign, at in answer_signs(answer, question))


def answers_of(record: Record) -> int:
    """Count the answers of a record that are inspected: trained ones, or a pair's chosen one.

    Those of tokens are not, and a document has none.
    """
    if not isinstance(record, Conversation | Preference):
        return 0
    if isinstance(record, Preference):
        return 1
    return sum(turn.role == "assistant" and turn.trained for turn in record.turns)


def _digest(text: str) -> int:
    content = text.encode("utf-8", "replace")
    # Never 0, which stands for no digest.
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") | 1


def character_lengths(records: Sequence[Record]) -> dict[str, NDArray[np.int32]]:
    """Return the lengths of records in characters: whole (the longer path), prompt and answers.

    Records of tokens are left out.
    """
    parts: dict[str, list[int]] = {}
    for record in records:
        if isinstance(record, TokenRow | TokenPair):
            continue
        if isinstance(record, Document):
            size = len(record.text)
            lengths = {"whole": size, "prompt": 0, "answers": size}
        elif isinstance(record, Preference):
            prompt = sum(map(_length, record.prompt))
            answers = {"chosen": len(record.chosen), "rejected": len(record.rejected)}
            lengths = {"whole": prompt + max(answers.values()), "prompt": prompt, **answers}
        else:
            trained = sum(
                _length(turn) for turn in record.turns if turn.role == "assistant" and turn.trained
            )
            whole = sum(map(_length, record.turns))
            lengths = {"whole": whole, "prompt": whole - trained, "answers": trained}
        for name, length in lengths.items():
            parts.setdefault(name, []).append(length)
    return {name: np.array(values, dtype=np.int32) for name, values in parts.items()}


def _length(turn: Turn) -> int:
    return sum(len(text) for _, text in _texts_of_turn(turn))
