"""Cut preference records beyond their limits: their prompt first, then their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tandem.data.records import Preference
from tandem.data.tokenize.encode import ChatTokenizer, Encoded, answer_exchanges, encode_exchanges
from tandem.data.tokenize.template_capabilities import Refused
from tandem.data.truncation.limits import (
    ANSWER_BEYOND,
    BEYOND,
    NOTHING_LEFT,
    PROMPT_BEYOND,
    Fitted,
    Limits,
    Unfit,
    fitted,
    longest,
    require_encoded,
)
from tandem.data.truncation.prompt import cut_prompt


def fit_pair(
    chat: ChatTokenizer, pair: Preference, encoded: Sequence[Encoded | Refused], limits: Limits
) -> Fitted | Refused:
    """Shorten the prompt (the same for all answers) and the answers as `limits.too_long` says.

    With a prompt limit, every longer prompt is cut to it; without, only that of a long sequence.
    """
    try:
        return _fit(chat, pair, require_encoded(encoded), limits)
    except Unfit as reason:
        return reason.refused


def _fit(
    chat: ChatTokenizer, pair: Preference, answers: tuple[Encoded, ...], limits: Limits
) -> Fitted:
    too_long = longest(answers) > limits.sequence
    if not too_long and (limits.prompt is None or answers[0].start <= limits.prompt):
        return Fitted(answers)
    if limits.too_long == "drop":
        if too_long:
            length = limits.length_in_words(answers)
            raise Unfit(BEYOND, f"sequence {length} tokens, max_length {limits.sequence}")
        detail = f"prompt {answers[0].start} tokens, max_prompt_length {limits.prompt}"
        raise Unfit(PROMPT_BEYOND, detail)
    kept = _cut_texts(chat, pair, answers, limits)
    if len({tuple(answer.ids) for answer in kept.encoded}) < len(kept.encoded):
        raise Unfit(NOTHING_LEFT, f"the answers are the same within {limits.sequence} tokens")
    return kept


def _cut_texts(
    chat: ChatTokenizer, pair: Preference, answers: tuple[Encoded, ...], limits: Limits
) -> Fitted:
    """Cut the prompt of all answers, then (unless they stay whole) the answers' ends."""
    before = answers[0]
    larger = max(answers, key=lambda answer: answer.size)
    room = limits.for_prompt(larger.size)
    keep_end = limits.too_long == "keep_end"
    if room <= 0:
        size = limits.in_words(larger.size, larger)
        raise Unfit(ANSWER_BEYOND, f"answer {size} tokens, max_length {limits.sequence}")
    reasons: list[str] = []
    details: list[str] = []
    while answers[0].start > room or (keep_end and longest(answers) > limits.sequence):
        if reasons:  # prompt and answer together have a token more than apart
            room -= max(1, longest(answers) - limits.sequence)
        if limits.too_long == "keep_start" and limits.prompt is None:
            raise Unfit(NOTHING_LEFT, f"the prompt alone fills {limits.sequence} tokens")
        cut = cut_prompt(chat, pair, pair.prompt, room, by_text=limits.by_text)
        if cut is None:
            raise Unfit(NOTHING_LEFT, f"the template alone exceeds {room} tokens")
        exchanges = answer_exchanges(replace(pair, prompt=cut[0]))
        answers = require_encoded(encode_exchanges(chat, exchanges, limits.sequence))
        length = limits.in_words(before.start, before)
        reasons = [cut[1]]
        details = [f"prompt {length} -> {answers[0].start} tokens"]
    for (name, _), answer in zip(pair.named, answers, strict=True):
        if len(answer.ids) > limits.sequence:
            length = limits.in_words(answer.size, answer)
            details.append(f"{name} {length} -> {limits.sequence - answer.start} tokens")
    if longest(answers) > limits.sequence:
        reasons.append("answer cut")
    return fitted(answers, limits.sequence, reasons, details)
