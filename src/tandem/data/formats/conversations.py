"""Rows that hold a conversation, for SFT."""

from __future__ import annotations

from tandem.data.formats.rows import Fields, Unusable, text
from tandem.data.formats.turns import (
    after_system,
    answer_in,
    check_order,
    instruction_in,
    prompt_in,
    turns_in,
)
from tandem.data.records import Conversation, Origin, Turn


def read_sharegpt(fields: Fields, origin: Origin) -> list[Conversation]:
    """`conversations`, a list of `from` and `value`; a text in `system` stands before it."""
    return [_conversation(fields, "conversations", origin, "from", "value")]


def read_messages(fields: Fields, origin: Origin) -> list[Conversation]:
    """`messages`, a list of `role` and `content`; a text in `system` stands before it."""
    return [_conversation(fields, "messages", origin, "role", "content")]


def read_alpaca(fields: Fields, origin: Origin) -> list[Conversation]:
    """`instruction`, `input`, `output`, after `system` and `history`."""
    return [_answered(instruction_in(fields), text(fields, "output"), origin)]


def read_completion(fields: Fields, origin: Origin) -> list[Conversation]:
    """`prompt` and `completion`, texts or messages."""
    prompt, answer = answer_in(fields, "completion", prompt_in(fields))
    return [_answered(prompt, answer, origin)]


def _answered(prompt: tuple[Turn, ...], answer: str, origin: Origin) -> Conversation:
    turns = (*prompt, Turn("assistant", answer))
    check_order(turns)
    return Conversation(turns, origin)


def _conversation(
    fields: Fields, key: str, origin: Origin, role_key: str, text_key: str
) -> Conversation:
    return conversation_of(fields, turns_in(fields.get(key), key, role_key, text_key), origin)


def conversation_of(fields: Fields, turns: tuple[Turn, ...], origin: Origin) -> Conversation:
    """The conversation of a row's turns, up to the last answer, behind its `system`."""
    turns = after_system(fields, turns)
    # Nothing after the last answer can influence training.
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise Unusable("no assistant turn")
    turns = turns[: answers[-1] + 1]
    check_order(turns)
    return Conversation(turns, origin)
