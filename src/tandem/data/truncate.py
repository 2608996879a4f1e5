"""Making records fit: what is cut first, and how it is told.

Oldest first: exchanges at the beginning of a conversation, then the beginning of the last user
turn; the system turn stays. An answer is cut at the limit and then has no end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tandem.data.encode import Chat, Encoded, Exchange, Refused, encode_exchanges
from tandem.data.records import Conversation, PreferencePair, Turn


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits: a whole sequence, and its prompt part when that must give way.

    `prompt` None lets a prompt have half of `sequence`, or what the answer leaves if more.
    """

    sequence: int
    prompt: int | None

    def for_prompt(self, answer_tokens: int) -> int:
        """How many tokens a prompt may keep in a sequence that is too long."""
        if self.prompt is not None:
            return min(self.prompt, self.sequence - 1)
        return min(max(self.sequence // 2, self.sequence - answer_tokens), self.sequence - 1)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Encoded answers within the limits; `reason` is empty when nothing was cut."""

    encoded: tuple[Encoded, ...]
    reason: str = ""
    detail: str = ""


NOTHING_LEFT = "nothing left to train"


def trained_exchanges(conversation: Conversation) -> list[Exchange]:
    """The answers of a conversation that are trained, each with the turns before it."""
    turns = conversation.turns
    return [
        Exchange(turns[:index], turn.content, conversation.origin)
        for index, turn in enumerate(turns)
        if turn.role == "assistant" and turn.trained
    ]


def fit_conversation(
    chat: Chat, conversation: Conversation, encoded: Sequence[Encoded | Refused], limits: Limits
) -> Fitted | Refused:
    """Drop the oldest exchanges, then cut the last prompt, then its answer, until it fits."""
    answers = _all_encoded(encoded)
    if isinstance(answers, Refused) or _longest(answers) <= limits.sequence:
        return answers if isinstance(answers, Refused) else Fitted(answers)
    before = _longest(answers)
    dropped = 0
    while _longest(answers) > limits.sequence and _exchanges(conversation.turns) > 1:
        conversation = replace(conversation, turns=_without_oldest(conversation.turns))
        dropped += 1
        again = _all_encoded(encode_exchanges(chat, trained_exchanges(conversation)))
        if isinstance(again, Refused):
            return again
        answers = again
    reasons = ["old turns dropped"] if dropped else []
    details = [f"{dropped} oldest exchanges"] if dropped else []
    if _longest(answers) > limits.sequence:
        exchange = trained_exchanges(conversation)[-1]
        fitted = _fit_exchanges(
            chat, [exchange], answers[-1:], limits.for_prompt(_size(answers[-1])), limits.sequence
        )
        if isinstance(fitted, Refused):
            return fitted
        answers = fitted.encoded
        reasons.append(fitted.reason)
        details.append(fitted.detail)
    details.append(f"sequence {before} -> {_longest(answers)} tokens")
    return Fitted(answers, " and ".join(reasons), ", ".join(details))


def fit_pair(
    chat: Chat, pair: PreferencePair, encoded: Sequence[Encoded | Refused], limits: Limits
) -> Fitted | Refused:
    """Cut the prompt (the same for both answers), then each answer at the sequence limit.

    With a prompt limit, every longer prompt is cut to it; without, only one in the way.
    """
    answers = _all_encoded(encoded)
    if isinstance(answers, Refused):
        return answers
    prompt_limit = limits.for_prompt(max(_size(answer) for answer in answers))
    too_long = _longest(answers) > limits.sequence
    if not too_long and (limits.prompt is None or answers[0].start <= limits.prompt):
        return Fitted(answers)
    exchanges = [Exchange(pair.prompt, text, pair.origin) for text in (pair.chosen, pair.rejected)]
    fitted = _fit_exchanges(chat, exchanges, answers, prompt_limit, limits.sequence)
    if not isinstance(fitted, Refused) and fitted.encoded[0].ids == fitted.encoded[1].ids:
        return Refused(NOTHING_LEFT, f"the answers are the same within {limits.sequence} tokens")
    return fitted


def _fit_exchanges(
    chat: Chat,
    exchanges: Sequence[Exchange],
    answers: tuple[Encoded, ...],
    prompt_limit: int,
    length: int,
) -> Fitted | Refused:
    """Cut the one prompt of some answers to `prompt_limit`, then the answers at `length`."""
    reasons, details = [], []
    names = ("answer",) if len(exchanges) == 1 else ("chosen", "rejected")
    if answers[0].start > prompt_limit:
        cut = fit_prompt(chat, exchanges[0].before, prompt_limit)
        if cut is None:
            return Refused(NOTHING_LEFT, f"the template alone exceeds {prompt_limit} tokens")
        before = answers[0].start
        again = _all_encoded(
            encode_exchanges(chat, [replace(exchange, before=cut[0]) for exchange in exchanges])
        )
        if isinstance(again, Refused):
            return again
        answers = again
        reasons.append(cut[1])
        details.append(f"prompt {before} -> {answers[0].start} tokens")
    for name, answer in zip(names, answers, strict=True):
        if len(answer.ids) > length:
            details.append(f"{name} {_size(answer)} -> {length - answer.start} tokens")
    if _longest(answers) > length:
        reasons.append("answer cut")
    cut_answers = tuple(answer.cut(length) for answer in answers)
    return Fitted(cut_answers, " and ".join(reasons), ", ".join(details))


def fit_prompt(
    chat: Chat, turns: tuple[Turn, ...], limit: int
) -> tuple[tuple[Turn, ...], str] | None:
    """The turns of a prompt within `limit` tokens and what was cut, or None if impossible.

    The oldest exchanges go first, then the beginning of the last user turn. Only when the system
    turn leaves no room at all, its end is cut so that the question keeps up to half the limit.
    """
    reasons = []

    def excess() -> int:
        return _prompt_tokens(chat, turns) - limit

    while excess() > 0 and sum(turn.role == "user" for turn in turns) > 1:
        turns = _without_oldest(turns)
        reasons = ["old turns dropped"]
    if excess() <= 0:
        return turns, " and ".join(reasons)
    question = turns[-1]
    shortened = _cut_turn(chat, turns, len(turns) - 1, limit, keep_end=True)
    if shortened is None and turns[0].role == "system":
        question_tokens = chat.codec.spans(question.content)
        room = limit - min(len(question_tokens), limit // 2)
        bare: tuple[Turn, ...] = (turns[0], replace(question, content=""))
        bare = _cut_turn(chat, bare, 0, room, keep_end=False) or bare
        turns = (bare[0], question)
        reasons.append("system turn cut")
        if excess() <= 0:
            return turns, " and ".join(reasons)
        shortened = _cut_turn(chat, turns, 1, limit, keep_end=True)
    if shortened is None:
        return None
    return shortened, " and ".join([*reasons, "prompt cut"])


def _cut_turn(
    chat: Chat, turns: tuple[Turn, ...], index: int, limit: int, *, keep_end: bool
) -> tuple[Turn, ...] | None:
    """Shorten one turn's text at its beginning (or end) until the prompt fits; None if it can't.

    Cuts fall between tokens of the text; the prompt is rendered anew each time, so that headers
    stay whole and counts are those of the real prompt.
    """
    text = turns[index].content
    spans = chat.codec.spans(text)
    gone = 0
    while True:
        over = _prompt_tokens(chat, turns) - limit
        if over <= 0:
            return turns if turns[index].content.strip() else None
        gone += over
        if gone >= len(spans):
            return None
        kept = text[spans[gone][0] :] if keep_end else text[: spans[len(spans) - 1 - gone][1]]
        turns = (*turns[:index], replace(turns[index], content=kept), *turns[index + 1 :])


def _prompt_tokens(chat: Chat, turns: tuple[Turn, ...]) -> int:
    return len(chat.codec.tokenize([chat.codec.render(turns, prompt=True)])[0])


def _without_oldest(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns without the first user turn and its answer."""
    start = 1 if turns[0].role == "system" else 0
    return turns[:start] + turns[start + 2 :]


def _exchanges(turns: tuple[Turn, ...]) -> int:
    return sum(turn.role == "user" for turn in turns)


def _all_encoded(encoded: Sequence[Encoded | Refused]) -> tuple[Encoded, ...] | Refused:
    answers = []
    for answer in encoded:
        if isinstance(answer, Refused):
            return answer
        answers.append(answer)
    return tuple(answers)


def _longest(answers: Sequence[Encoded]) -> int:
    return max(len(answer.ids) for answer in answers)


def _size(answer: Encoded) -> int:
    return len(answer.ids) - answer.start
