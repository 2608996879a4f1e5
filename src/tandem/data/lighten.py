"""Very long conversations: turns that surely cannot stay go before any answer is rendered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from tandem.data.behind_prompt import Refused
from tandem.data.encode import END_INSIDE, Chat, render, room_for
from tandem.data.exchanges import (
    UNTRAINED,
    LossOn,
    is_answer,
    is_trained,
    until_last_trained,
)
from tandem.data.limits import Limits
from tandem.data.records import Conversation
from tandem.data.shorten import Turns, first_user, skip_hopeless, users


@dataclass(frozen=True, slots=True)
class Light:
    """A conversation that can be encoded answer by answer, and how many old exchanges it lost."""

    conversation: Conversation
    dropped: int = 0


def lighten(
    chat: Chat, conversation: Conversation, limits: Limits, loss_on: LossOn = "answers"
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


def _until_beyond(chat: Chat, conversation: Conversation, limits: Limits, loss_on: LossOn) -> Turns:
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
