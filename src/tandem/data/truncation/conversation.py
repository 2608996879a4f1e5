"""Very long conversations: turns that surely cannot stay go before any answer is rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from tandem.data.records import Conversation, PreferencePair
from tandem.data.tokenize.behind_prompt import Refused
from tandem.data.tokenize.encode import (
    END_INSIDE,
    UNTRAINED,
    ChatTokenizer,
    Encoded,
    Exchange,
    LossOn,
    encode_conversation,
    encode_exchanges,
    is_answer,
    is_trained,
    pair_exchanges,
    render,
    room_for,
    until_last_trained,
)
from tandem.data.truncation.limits import Limits
from tandem.data.truncation.prompt import (
    Turns,
    cut_prompt,
    cut_turn,
    first_user,
    prompt_tokens,
    skip_hopeless,
    users,
    without_oldest,
)


@dataclass(frozen=True, slots=True)
class Light:
    """A conversation that can be encoded answer by answer, and how many old exchanges it lost."""

    conversation: Conversation
    dropped: int = 0


def skip_old_turns(
    chat: ChatTokenizer, conversation: Conversation, limits: Limits, loss_on: LossOn = "answers"
) -> Light | Refused:
    """Leave out the turns of a very long conversation that surely cannot stay.

    Each answer is rendered with all that stands before it, which would be too much of many turns.
    """
    turns = conversation.turns
    size = sum(len(turn.content) for turn in turns)
    most = chat.codec.most_characters(2 * limits.sequence) if size > limits.sequence else None
    if most is None or size <= most or users(turns) == 1:
        return Light(conversation)
    end = chat.ending_for(conversation.tools).token
    if any(is_trained(turn) and end in turn.content for turn in turns):
        return Refused(END_INSIDE, end)
    if not any(is_answer(turn, loss_on) for turn in turns):
        return Refused(UNTRAINED)
    if limits.too_long in ("drop", "keep_start"):
        return Light(
            replace(conversation, turns=_until_beyond(chat, conversation, limits, loss_on))
        )

    if loss_on == "answers":
        turns = until_last_trained(turns)
    by_text = limits.too_long == "keep_end"
    shown = partial(
        render, chat, origin=conversation.origin, tools=conversation.tools, prompt=False
    )
    turns, dropped = skip_hopeless(chat, turns, limits.sequence, shown, by_text=by_text)
    return Light(replace(conversation, turns=turns), dropped)


def _until_beyond(
    chat: ChatTokenizer, conversation: Conversation, limits: Limits, loss_on: LossOn
) -> Turns:
    """The turns up to the first answer whose prompt alone is too long, for it ends there."""
    turns = conversation.turns
    most = chat.codec.most_characters(2 * limits.sequence)
    assert most is not None
    first = next(i for i, turn in enumerate(turns) if is_answer(turn, loss_on))
    before = turns[:first]
    if limits.too_long == "keep_start" and limits.prompt is not None:
        # The first prompt may be cut to next to nothing.
        start = first_user(turns)
        before = (*turns[:start], replace(turns[start], content=turns[start].content[:1]))
    size = 0
    for index in range(first, len(turns)):
        if size > most and is_answer(turns[index], loss_on):
            prompt = before + turns[first:index]
            text = render(chat, prompt, conversation.origin, conversation.tools, prompt=True)
            if room_for(chat, text, limits.sequence) is not None:
                return turns[: index + 1]
        size += len(turns[index].content)
    return turns


NOTHING_LEFT = "nothing left to train"
BEYOND = "longer than max_length"
PROMPT_BEYOND = "prompt longer than max_prompt_length"
ANSWER_BEYOND = "the answer alone is longer than max_length"


@dataclass(frozen=True, slots=True)
class Fitted:
    """Encoded answers within the limits; `reason` is empty when nothing was cut."""

    encoded: tuple[Encoded, ...]
    reason: str = ""
    detail: str = ""


def fit_conversation(
    chat: ChatTokenizer,
    conversation: Conversation,
    encoded: Sequence[Encoded | Refused],
    limits: Limits,
    loss_on: LossOn = "answers",
    dropped: int = 0,
) -> Fitted | Refused:
    """Shorten a conversation beyond the sequence limit by policy; shorter ones are never cut.

    It may have lost some exchanges already, see `lighten.skip_old_turns`.
    """
    answers = _all_encoded(encoded)
    if isinstance(answers, Refused):
        return answers
    if not answers:
        return Refused(UNTRAINED)
    if _longest(answers) <= limits.sequence and not dropped:
        return Fitted(answers)
    before = f"over {limits.sequence}" if dropped else _sequence(answers, limits)
    if limits.too_long == "drop":
        return Refused(BEYOND, f"sequence {before} tokens, max_length {limits.sequence}")
    if loss_on == "answers":  # nothing behind the last trained answer can influence training
        conversation = replace(conversation, turns=until_last_trained(conversation.turns))
    work = _Work(chat, conversation, limits, loss_on)
    if limits.too_long == "keep_start":
        fitted = _keep_start(work, answers)
    else:
        fitted = _keep_newest(work, answers, dropped)
    if isinstance(fitted, Refused):
        return fitted
    told = f"sequence {before} -> {_longest(fitted.encoded)} tokens"
    return replace(fitted, detail=", ".join(filter(None, (fitted.detail, told))))


def fit_pair(
    chat: ChatTokenizer, pair: PreferencePair, encoded: Sequence[Encoded | Refused], limits: Limits
) -> Fitted | Refused:
    """Shorten the prompt (the same for both answers) and the answers by policy.

    With a prompt limit, every longer prompt is cut to it; without, only one in the way.
    """
    answers = _all_encoded(encoded)
    if isinstance(answers, Refused):
        return answers
    too_long = _longest(answers) > limits.sequence
    if not too_long and (limits.prompt is None or answers[0].start <= limits.prompt):
        return Fitted(answers)
    if limits.too_long == "drop":
        if too_long:
            told = _sequence(answers, limits)
            return Refused(BEYOND, f"sequence {told} tokens, max_length {limits.sequence}")
        detail = f"prompt {answers[0].start} tokens, max_prompt_length {limits.prompt}"
        return Refused(PROMPT_BEYOND, detail)
    fitted = _fit_pair_prompt(chat, pair, answers, limits)
    if not isinstance(fitted, Refused) and fitted.encoded[0].ids == fitted.encoded[1].ids:
        return Refused(NOTHING_LEFT, f"the answers are the same within {limits.sequence} tokens")
    return fitted


@dataclass(frozen=True, slots=True)
class _Work:
    """A conversation that is too long, and what to make of it."""

    chat: ChatTokenizer
    conversation: Conversation
    limits: Limits
    loss_on: LossOn

    @property
    def turns(self) -> Turns:
        return self.conversation.turns

    def encoded(self, turns: Turns) -> tuple[Encoded, ...] | Refused:
        """What is trained of some turns of the conversation."""
        conversation = replace(self.conversation, turns=turns)
        return _all_encoded(encode_conversation(self.chat, conversation, self.limits, self.loss_on))

    def prompt(self, turns: Turns) -> int:
        """Tokens of some turns as a prompt, more than the limit if they are many."""
        record = self.conversation
        return prompt_tokens(self.chat, turns, record.origin, record.tools, self.limits.sequence)

    def cut_prompt(self, turns: Turns, limit: int, *, by_text: bool) -> tuple[Turns, str] | None:
        """See `shorten.cut_prompt`."""
        record = self.conversation
        return cut_prompt(
            self.chat, turns, limit, origin=record.origin, tools=record.tools, by_text=by_text
        )


def _keep_start(work: _Work, answers: tuple[Encoded, ...]) -> Fitted | Refused:
    """Cut the sequence at its end; its prompt first, where it has a limit of its own."""
    limits, turns = work.limits, work.turns
    reasons: list[str] = []
    details: list[str] = []
    first = next(i for i, turn in enumerate(turns) if is_answer(turn, work.loss_on))
    if limits.prompt is not None and work.prompt(turns[:first]) > limits.prompt:
        cut = work.cut_prompt(turns[:first], limits.prompt, by_text=_by_text(limits))
        if cut is None:
            return Refused(NOTHING_LEFT, f"the template alone exceeds {limits.prompt} tokens")
        again = work.encoded(cut[0] + turns[first:])
        if isinstance(again, Refused):
            return again
        answers = again
        reasons.append(cut[1])
        details.append(f"prompt cut to {limits.prompt} tokens")
    kept = [answer for answer in answers if max(answer.start, 1) < limits.sequence]
    if not kept:
        return Refused(NOTHING_LEFT, f"the prompt alone fills {limits.sequence} tokens")
    if _longest(kept) > limits.sequence:
        reasons.append("answer cut" if work.loss_on == "answers" else "text cut")
    if len(kept) < len(answers):
        reasons.append("later turns dropped")
    return _cut(kept, limits.sequence, reasons, details)


def _keep_newest(work: _Work, answers: tuple[Encoded, ...], dropped: int) -> Fitted | Refused:
    """Drop the oldest exchanges; then the last one's prompt loses its beginning.

    With `keep_end` the oldest exchange may lose only the beginning of its question.
    """
    limits, turns = work.limits, work.turns
    reasons: list[str] = []
    details: list[str] = []
    while _longest(answers) > limits.sequence and users(turns) > 1:
        if limits.too_long == "keep_end" and (cut := _cut_oldest(work, turns)):
            turns = cut
            reasons.append("prompt cut")
        else:
            turns = without_oldest(turns)
            dropped += 1
        again = work.encoded(turns)
        if isinstance(again, Refused):
            return again
        answers = again
    if dropped:
        reasons.insert(0, "old turns dropped")
        details.append(f"{dropped} oldest exchange{'s' * (dropped > 1)}")
    if _longest(answers) <= limits.sequence:
        return Fitted(answers, " and ".join(reasons), ", ".join(details))
    fitted = _last_exchange(work, turns)
    if isinstance(fitted, Refused):
        return fitted
    reasons.append(fitted.reason)
    details.append(fitted.detail)
    return replace(fitted, reason=" and ".join(reasons), detail=", ".join(details))


def _cut_oldest(work: _Work, turns: Turns) -> Turns | None:
    """The turns with the beginning of the oldest question cut until all fit; None if they can't."""

    def over(turns: Turns) -> int:
        answers = work.encoded(turns)
        if isinstance(answers, Refused):
            return work.limits.sequence
        return _longest(answers) - work.limits.sequence

    return cut_turn(work.chat, turns, first_user(turns), work.limits.sequence, over)


def _last_exchange(work: _Work, turns: Turns) -> Fitted | Refused:
    """Cut the prompt of the last answer, then (unless answers stay whole) what is still beyond."""
    limits, chat = work.limits, work.chat
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    answer = turns[last]
    origin, tools = work.conversation.origin, work.conversation.tools
    exchange = Exchange(turns[:last], answer.content, origin, answer.extra, tools)
    (alone,) = encode_exchanges(chat, [exchange], limits.sequence)
    if isinstance(alone, Refused):
        return alone
    keep_end = limits.too_long == "keep_end"
    size = _size(alone)
    trailer = chat.ending_for(tools).trailer
    if work.loss_on == "text" and trailer:
        size += len(chat.codec.tokenize([trailer])[0])
    room = limits.for_prompt(size)
    if room <= 0:
        detail = f"answer {_told(size, alone, limits)} tokens, max_length {limits.sequence}"
        return Refused(ANSWER_BEYOND, detail)
    reasons: list[str] = []
    details: list[str] = []
    answers = work.encoded(turns)
    while not isinstance(answers, Refused):
        over = _longest(answers) - limits.sequence
        if over <= 0 if keep_end else reasons or alone.start <= room:
            break
        if reasons:  # one more token at the seam of prompt and answer
            room -= over
        cut = work.cut_prompt(turns[:last], room, by_text=keep_end)
        if cut is None:
            return Refused(NOTHING_LEFT, f"the template alone exceeds {room} tokens")
        answers = work.encoded(cut[0] + turns[last:])
        reasons = [cut[1] or "prompt cut"]
        details = [f"prompt {_told(alone.start, alone, limits)} -> {work.prompt(cut[0])} tokens"]
    if isinstance(answers, Refused):
        return answers
    if _longest(answers) > limits.sequence:
        reasons.append("answer cut")
        kept = limits.sequence - answers[-1].start
        if work.loss_on == "answers":
            details.append(f"answer {_told(size, alone, limits)} -> {kept} tokens")
    return _cut(answers, limits.sequence, reasons, details)


def _fit_pair_prompt(
    chat: ChatTokenizer, pair: PreferencePair, answers: tuple[Encoded, ...], limits: Limits
) -> Fitted | Refused:
    """Cut the one prompt of both answers, then (unless they stay whole) the answers' ends."""
    before = answers
    sizes = [_size(answer) for answer in answers]
    room = limits.for_prompt(max(sizes))
    keep_end = limits.too_long == "keep_end"
    if room <= 0:
        longest = max(answers, key=_size)
        told = _told(max(sizes), longest, limits)
        return Refused(ANSWER_BEYOND, f"answer {told} tokens, max_length {limits.sequence}")
    reasons: list[str] = []
    details: list[str] = []
    while answers[0].start > room or (keep_end and _longest(answers) > limits.sequence):
        if reasons:  # one more token at the seam of prompt and answer
            room -= max(1, _longest(answers) - limits.sequence)
        if limits.too_long == "keep_start" and limits.prompt is None:
            return Refused(NOTHING_LEFT, f"the prompt alone fills {limits.sequence} tokens")
        cut = cut_prompt(
            chat,
            pair.prompt,
            room,
            origin=pair.origin,
            tools=pair.tools,
            by_text=_by_text(limits),
        )
        if cut is None:
            return Refused(NOTHING_LEFT, f"the template alone exceeds {room} tokens")
        shortened = replace(pair, prompt=cut[0])
        again = _all_encoded(encode_exchanges(chat, pair_exchanges(shortened), limits.sequence))
        if isinstance(again, Refused):
            return again
        answers = again
        told = _told(before[0].start, before[0], limits)
        reasons = [cut[1]]
        details = [f"prompt {told} -> {answers[0].start} tokens"]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if len(answer.ids) > limits.sequence:
            told = _told(_size(answer), answer, limits)
            details.append(f"{name} {told} -> {limits.sequence - answer.start} tokens")
    if _longest(answers) > limits.sequence:
        reasons.append("answer cut")
    return _cut(answers, limits.sequence, reasons, details)


def _by_text(limits: Limits) -> bool:
    """Whether old exchanges lose only as much text as must go, and not all of theirs."""
    return limits.too_long != "drop_old_turns"


def _cut(
    answers: Sequence[Encoded], length: int, reasons: Sequence[str], details: Sequence[str]
) -> Fitted:
    kept = tuple(answer.cut(length) for answer in answers)
    return Fitted(kept, " and ".join(reasons), ", ".join(details))


def _told(tokens: int, answer: Encoded, limits: Limits) -> str:
    """A count for messages; of a text that was not tokenised whole only a bound is known."""
    if answer.whole or tokens <= limits.sequence:
        return str(tokens)
    return f"over {limits.sequence}"


def _sequence(answers: Sequence[Encoded], limits: Limits) -> str:
    longest = max(answers, key=lambda answer: len(answer.ids))
    return _told(len(longest.ids), longest, limits)


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
