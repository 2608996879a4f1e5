"""Cut records of tokens beyond their limits: their beginning or their end.

Where a turn begins is unknown, so nothing can be dropped turn by turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem.data.records import TokenPair, TokenRecord, TokenRow
from tandem.data.tokenize.template_capabilities import Refused
from tandem.data.truncation.limits import (
    ANSWER_BEYOND,
    BEYOND,
    NO_TURNS,
    NOTHING_LEFT,
    PROMPT_BEYOND,
    Limits,
    Unfit,
)

BEGINNING_CUT, END_CUT = "beginning cut", "end cut"


@dataclass(frozen=True, slots=True)
class FittedTokens:
    """A record of tokens within the limits; `reason` is empty when nothing was cut."""

    record: TokenRecord
    reason: str = ""
    detail: str = ""


def fit_tokens(record: TokenRecord, limits: Limits) -> FittedTokens | Refused:
    """Shorten a record of tokens as `limits.too_long` says.

    `keep_start` cuts the end, `keep_end` the beginning; with `drop` and `drop_old_turns`, which
    needs turns, the record is refused. A prompt beyond its own limit loses its beginning, that of a
    pair always, that of another record where the whole is too long.
    """
    try:
        return (
            _fit_row(record, limits) if isinstance(record, TokenRow) else _fit_pair(record, limits)
        )
    except Unfit as reason:
        return reason.refused


def _refuse(reason: str, limits: Limits, detail: str) -> Unfit:
    """Return why a record that is too long cannot be cut."""
    return Unfit(reason if limits.too_long == "drop" else NO_TURNS, detail)


def _fit_row(row: TokenRow, limits: Limits) -> FittedTokens:
    size, most = len(row.ids), limits.sequence
    if size <= most:
        return FittedTokens(row)
    if limits.too_long in ("drop", "drop_old_turns"):
        raise _refuse(BEYOND, limits, f"sequence {size} tokens, max_length {most}")
    reasons = []
    start, stop = 0, size
    prompt = size if limits.prompt is None else limits.prompt
    if limits.too_long == "keep_end":
        answer = size - _last_answer(row)
        if answer >= most:
            raise Unfit(ANSWER_BEYOND, f"answer {answer} tokens, max_length {most}")
        start = size - most
        start = max(start, row.trained.index(True, start + 1) - prompt)
    else:
        start = max(0, row.start - prompt)
        stop = min(size, start + most)
    reasons = [BEGINNING_CUT] * (start > 0) + [END_CUT] * (stop < size)
    trained = [False, *row.trained[start + 1 : stop]]
    if not any(trained):
        raise Unfit(NOTHING_LEFT, f"there is no target within {most} tokens")
    kept = len(trained) - trained[::-1].index(True)
    ids = row.ids[start : start + kept]
    shorter = replace(row, ids=ids, trained=tuple(trained[:kept]))
    return FittedTokens(shorter, " and ".join(reasons), f"sequence {size} -> {kept} tokens")


def _last_answer(row: TokenRow) -> int:
    """Return where the last targets without a gap begin."""
    backwards = row.trained[::-1]
    return len(backwards) - (backwards.index(False) if False in backwards else len(backwards))


def _fit_pair(pair: TokenPair, limits: Limits) -> FittedTokens:
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    before, larger = len(pair.prompt), max(map(len, answers.values()))
    most = limits.sequence
    too_long = before + larger > most
    if not too_long and (limits.prompt is None or before <= limits.prompt):
        return FittedTokens(pair)
    if limits.too_long in ("drop", "drop_old_turns"):
        if too_long:
            raise _refuse(BEYOND, limits, f"sequence {before + larger} tokens, max_length {most}")
        detail = f"prompt {before} tokens, max_prompt_length {limits.prompt}"
        raise _refuse(PROMPT_BEYOND, limits, detail)
    room = limits.for_prompt(larger)
    if room <= 0:
        raise Unfit(ANSWER_BEYOND, f"answer {larger} tokens, max_length {most}")
    if before > room and limits.too_long == "keep_start" and limits.prompt is None:
        raise Unfit(NOTHING_LEFT, f"the prompt alone fills {most} tokens")
    reasons, details = [], []
    if before > room:
        reasons, details = ["prompt cut"], [f"prompt {before} -> {room} tokens"]
    prompt = pair.prompt[-room:]
    left = most - len(prompt)
    for name, answer in answers.items():
        if len(answer) > left:
            details.append(f"{name} {len(answer)} -> {left} tokens")
    if larger > left:
        reasons.append("answer cut")
    shorter = replace(pair, prompt=prompt, chosen=pair.chosen[:left], rejected=pair.rejected[:left])
    if shorter.chosen == shorter.rejected:
        raise Unfit(NOTHING_LEFT, f"the answers are the same within {most} tokens")
    return FittedTokens(shorter, " and ".join(reasons), ", ".join(details))
