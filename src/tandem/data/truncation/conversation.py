"""Cut conversations beyond their limits: their oldest exchanges, or their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from tandem.data.records import Conversation
from tandem.data.tokenize import encode
from tandem.data.tokenize.encode import ChatTokenizer, Encoded, is_answer, until_last_trained
from tandem.data.tokenize.template_capabilities import Refused
from tandem.data.truncation import prompt as prompts
from tandem.data.truncation.limits import (
    ANSWER_BEYOND,
    BEYOND,
    NOTHING_LEFT,
    Fitted,
    Limits,
    Unfit,
    fitted,
    longest,
    require_encoded,
)
from tandem.data.truncation.prompt import Turns, first_user, users
from tandem.recipe.choices import LossOn


def skip_old_turns(
    chat: ChatTokenizer, conversation: Conversation, limits: Limits, loss_on: LossOn = "answers"
) -> tuple[Conversation, int] | Refused:
    """Return a conversation without turns that surely cannot fit, and how many exchanges it lost.

    Each answer is rendered with all turns before it, which would take too long for many turns.
    """
    turns = conversation.turns
    size = sum(len(turn.content) for turn in turns)
    most = chat.codec.most_characters(2 * limits.sequence) if size > limits.sequence else None
    if most is None or size <= most or users(turns) == 1:
        return conversation, 0
    end = chat.ending_for(conversation.tools).token
    if any(encode.is_trained(turn) and end in turn.content for turn in turns):
        return Refused(encode.END_INSIDE, end)
    if not any(is_answer(turn, loss_on) for turn in turns):
        return Refused(encode.UNTRAINED)
    if limits.too_long in ("drop", "keep_start"):
        return replace(conversation, turns=_until_beyond(chat, conversation, limits, loss_on)), 0
    if loss_on == "answers":
        turns = until_last_trained(turns)
    shown = partial(encode.render, chat, conversation, prompt=False)
    by_text = limits.too_long == "keep_end"
    turns, dropped = prompts.skip_hopeless(chat, turns, limits.sequence, shown, by_text=by_text)
    return replace(conversation, turns=turns), dropped


def _until_beyond(
    chat: ChatTokenizer, conversation: Conversation, limits: Limits, loss_on: LossOn
) -> Turns:
    """Return the turns up to the first answer whose prompt alone is too long."""
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
            text = encode.render(chat, conversation, before + turns[first:index], prompt=True)
            if encode.room_for(chat, text, limits.sequence) is not None:
                return turns[: index + 1]
        size += len(turns[index].content)
    return turns


def fit_conversation(
    chat: ChatTokenizer,
    conversation: Conversation,
    encoded: Sequence[Encoded | Refused],
    limits: Limits,
    loss_on: LossOn = "answers",
    dropped: int = 0,
) -> Fitted | Refused:
    """Shorten a conversation beyond the sequence limit as `limits.too_long` says.

    It may have lost `dropped` exchanges already, see `skip_old_turns`.
    """
    try:
        return _Fitting(chat, conversation, limits, loss_on).fit(require_encoded(encoded), dropped)
    except Unfit as reason:
        return reason.refused


@dataclass(frozen=True, slots=True)
class _Fitting:
    chat: ChatTokenizer
    conversation: Conversation
    limits: Limits
    loss_on: LossOn

    def fit(self, answers: tuple[Encoded, ...], dropped: int) -> Fitted:
        """Return the conversation within its limits, or raise `Unfit`."""
        limits, record = self.limits, self.conversation
        if not answers:
            raise Unfit(encode.UNTRAINED)
        if longest(answers) <= limits.sequence and not dropped:
            return Fitted(answers)
        before = f"over {limits.sequence}" if dropped else limits.length_in_words(answers)
        if limits.too_long == "drop":
            raise Unfit(BEYOND, f"sequence {before} tokens, max_length {limits.sequence}")
        turns = until_last_trained(record.turns) if self.loss_on == "answers" else record.turns
        if limits.too_long == "keep_start":
            kept = self._keep_start(turns, answers)
        else:
            kept = self._keep_newest(turns, answers, dropped)
        length = f"sequence {before} -> {longest(kept.encoded)} tokens"
        return replace(kept, detail=", ".join(filter(None, (kept.detail, length))))

    def _encoded(self, turns: Turns) -> tuple[Encoded, ...]:
        """Encode what is trained of some turns of the conversation."""
        record, limit = replace(self.conversation, turns=turns), self.limits.sequence
        return require_encoded(encode.encode_conversation(self.chat, record, limit, self.loss_on))

    def _prompt_tokens(self, turns: Turns) -> int:
        """Count the tokens of some turns as a prompt; see `prompt.prompt_tokens`."""
        return prompts.prompt_tokens(self.chat, self.conversation, turns, self.limits.sequence)

    def _cut_prompt(self, turns: Turns, limit: int, *, by_text: bool) -> tuple[Turns, str]:
        cut = prompts.cut_prompt(self.chat, self.conversation, turns, limit, by_text=by_text)
        if cut is None:
            raise Unfit(NOTHING_LEFT, f"the template alone exceeds {limit} tokens")
        return cut

    def _keep_start(self, turns: Turns, answers: tuple[Encoded, ...]) -> Fitted:
        """Cut the end of the sequence; before that its prompt, if that has its own limit."""
        limits = self.limits
        reasons: list[str] = []
        details: list[str] = []
        first = next(i for i, turn in enumerate(turns) if is_answer(turn, self.loss_on))
        if limits.prompt is not None and self._prompt_tokens(turns[:first]) > limits.prompt:
            prompt, reason = self._cut_prompt(turns[:first], limits.prompt, by_text=limits.by_text)
            answers = self._encoded(prompt + turns[first:])
            reasons.append(reason)
            details.append(f"prompt cut to {limits.prompt} tokens")
        kept = [answer for answer in answers if max(answer.start, 1) < limits.sequence]
        if not kept:
            raise Unfit(NOTHING_LEFT, f"the prompt alone fills {limits.sequence} tokens")
        if longest(kept) > limits.sequence:
            reasons.append("answer cut" if self.loss_on == "answers" else "text cut")
        if len(kept) < len(answers):
            reasons.append("later turns dropped")
        return fitted(kept, limits.sequence, reasons, details)

    def _keep_newest(self, turns: Turns, answers: tuple[Encoded, ...], dropped: int) -> Fitted:
        """Drop the oldest exchanges, then cut the beginning of the last one's prompt.

        With `keep_end` the oldest exchange may lose only the beginning of its question.
        """
        limits = self.limits
        reasons: list[str] = []
        details: list[str] = []
        while longest(answers) > limits.sequence and users(turns) > 1:
            if limits.too_long == "keep_end" and (cut := self._cut_oldest(turns)):
                turns = cut
                reasons.append("prompt cut")
            else:
                turns = prompts.without_oldest(turns)
                dropped += 1
            answers = self._encoded(turns)
        if dropped:
            reasons.insert(0, "old turns dropped")
            details.append(f"{dropped} oldest exchange{'s' * (dropped > 1)}")
        if longest(answers) <= limits.sequence:
            return Fitted(answers, " and ".join(reasons), ", ".join(details))
        last = self._last_exchange(turns)
        return fitted(
            last.encoded, limits.sequence, [*reasons, last.reason], [*details, last.detail]
        )

    def _cut_oldest(self, turns: Turns) -> Turns | None:
        """Cut the beginning of the oldest question until the turns fit; None if they never do."""

        def over(turns: Turns) -> int:
            try:
                return longest(self._encoded(turns)) - self.limits.sequence
            except Unfit:
                return self.limits.sequence

        return prompts.cut_turn(self.chat, turns, first_user(turns), self.limits.sequence, over)

    def _last_exchange(self, turns: Turns) -> Fitted:
        """Cut the prompt of the last answer, then (unless answers stay whole) its end."""
        limits, chat, record = self.limits, self.chat, self.conversation
        last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
        answer = turns[last]
        exchange = encode.Exchange(
            turns[:last], answer.content, record.origin, answer.extra, record.tools
        )
        (alone,) = require_encoded(encode.encode_exchanges(chat, [exchange], limits.sequence))
        keep_end = limits.too_long == "keep_end"
        size = alone.size
        trailer = chat.ending_for(record.tools).trailer
        if self.loss_on == "text" and trailer:
            size += len(chat.codec.tokenize([trailer])[0])
        size_in_words = limits.in_words(size, alone)
        room = limits.for_prompt(size)
        if room <= 0:
            raise Unfit(
                ANSWER_BEYOND, f"answer {size_in_words} tokens, max_length {limits.sequence}"
            )
        reasons: list[str] = []
        details: list[str] = []
        answers = self._encoded(turns)
        while True:
            over = longest(answers) - limits.sequence
            if over <= 0 if keep_end else reasons or alone.start <= room:
                break
            if reasons:  # prompt and answer together have a token more than apart
                room -= over
            prompt, reason = self._cut_prompt(turns[:last], room, by_text=keep_end)
            answers = self._encoded(prompt + turns[last:])
            reasons = [reason or "prompt cut"]
            before, tokens = limits.in_words(alone.start, alone), self._prompt_tokens(prompt)
            details = [f"prompt {before} -> {tokens} tokens"]
        if longest(answers) > limits.sequence:
            reasons.append("answer cut")
            kept = limits.sequence - answers[-1].start
            if self.loss_on == "answers":
                details.append(f"answer {size_in_words} -> {kept} tokens")
        return fitted(answers, limits.sequence, reasons, details)
