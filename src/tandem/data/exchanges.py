"""What of a record is trained: which answers, each after the turns before it, or the whole text."""

from __future__ import annotations

from typing import Literal

from tandem.data.behind_prompt import Refused
from tandem.data.encode import Chat, Encoded, Exchange, encode_exchanges, encode_text
from tandem.data.limits import Limits
from tandem.data.records import Conversation, PreferencePair, Turn

LossOn = Literal["answers", "text"]

UNTRAINED = "every answer has weight 0"


def trained_exchanges(conversation: Conversation) -> list[Exchange]:
    """The answers of a conversation that are trained, each with the turns before it."""
    turns, tools = conversation.turns, conversation.tools
    return [
        Exchange(turns[:index], turn.content, conversation.origin, turn.extra, tools)
        for index, turn in enumerate(turns)
        if is_trained(turn)
    ]


def until_last_trained(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns up to the last trained answer; nothing behind it can influence training."""
    return turns[: 1 + max((i for i, turn in enumerate(turns) if is_trained(turn)), default=-1)]


def is_answer(turn: Turn, loss_on: LossOn) -> bool:
    """Whether it is an answer that is trained, alone or with the text."""
    return turn.role == "assistant" and (turn.trained or loss_on == "text")


def is_trained(turn: Turn) -> bool:
    """Whether it is an answer without weight 0."""
    return turn.role == "assistant" and turn.trained


def pair_exchanges(pair: PreferencePair) -> list[Exchange]:
    """Both answers of a pair after their prompt, chosen first."""
    return [
        Exchange(pair.prompt, text, pair.origin, tools=pair.tools)
        for text in (pair.chosen, pair.rejected)
    ]


def encode_conversation(
    chat: Chat, conversation: Conversation, limits: Limits, loss_on: LossOn = "answers"
) -> list[Encoded | Refused]:
    """A conversation's trained answers, each after its prompt; or its whole text as one."""
    if loss_on == "text":
        return [encode_text(chat, conversation, limits.sequence)]
    exchanges = trained_exchanges(conversation)
    return encode_exchanges(chat, exchanges, limits.sequence)
