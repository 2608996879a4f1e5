"""Rows that hold a conversation, for SFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.data.formats.format import Fields, InvalidRecord, spelt, text
from tandem.data.formats.turns import (
    after_system,
    answer_in,
    check_order,
    instruction_in,
    prompt_in,
    prompt_of,
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
    """Return the conversation of a row's turns up to the last answer, behind its `system`."""
    turns = after_system(fields, turns)
    # Nothing after the last answer can influence training.
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise InvalidRecord("no assistant turn")
    turns = turns[: answers[-1] + 1]
    check_order(turns)
    return Conversation(turns, origin)


def read_exchanges(fields: Fields, origin: Origin) -> list[Conversation]:
    """`conversation`: turns as in `messages` (LMSYS), or `input` and `output` (Capybara)."""
    items = fields.get("conversation")
    if isinstance(items, list) and items and all(_exchange(item) for item in items):
        items = [
            {"role": role, "content": item[key]}
            for item in items
            for role, key in (("user", "input"), ("assistant", "output"))
        ]
    turns = turns_in(items, "conversation", "role", "content")
    return [conversation_of(fields, turns, origin)]


def _exchange(item: object) -> bool:
    return isinstance(item, Mapping) and {"input", "output"} <= item.keys() and "role" not in item


# A column that no row has, for a key that a spelling lacks.
_NONE = "\0"
# Names of Alpaca's keys in GSM8K and question sets with a context; MetaMath and ms-swift; Dolly.
QUESTION = {"instruction": "question", "input": "context"}
QUERY = {"instruction": "query", "input": _NONE}
INSTRUCTION = {"input": "context"}
read_question_and_answer = spelt(read_alpaca, **QUESTION, output="answer")
read_query_and_response = spelt(read_alpaca, **QUERY, output="response")
read_instruction_and_response = spelt(read_alpaca, **INSTRUCTION, output="response")
# HelpSteer; OpenOrca.
read_prompt_and_response = spelt(read_completion, completion="response")
read_question_and_response = spelt(
    read_completion, system="system_prompt", prompt="question", completion="response"
)

QUESTION_KEYS = frozenset({"question", "answer", "system", "accepted", "completion"})


@dataclass(frozen=True, slots=True)
class Question:
    """An evaluation record. Any text of `accepted`, which is never empty, makes an answer right.

    `completion` is the beginning of a text that a base model completes with the answer.
    """

    turns: tuple[Turn, ...]
    answer: str
    accepted: tuple[str, ...]
    completion: str | None
    origin: Origin


def read_question(fields: Fields, origin: Origin) -> Question:
    """Read `{"question", "answer", "system"?, "accepted"?, "completion"?}`.

    Raises `InvalidRecord` for missing or empty texts.
    """
    answer = text(fields, "answer")
    accepted = fields.get("accepted")
    if accepted is None:
        accepted = [answer]
    if not isinstance(accepted, list) or not all(isinstance(a, str) and a for a in accepted):
        raise InvalidRecord("`accepted` is not a list of texts")
    completion = None if fields.get("completion") is None else text(fields, "completion")
    turns = prompt_of(fields.get("system"), text(fields, "question"))
    return Question(turns, answer, tuple(accepted) or (answer,), completion, origin)
