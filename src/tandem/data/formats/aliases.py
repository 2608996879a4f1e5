"""Rows of widely used sets that hold what a known format holds, under other keys."""

from __future__ import annotations

from collections.abc import Mapping

from tandem.data.formats.conversations import conversation_of, read_alpaca, read_completion
from tandem.data.formats.format import Fields, InvalidRecord, Reader, Record, named
from tandem.data.formats.preferences import read_alpaca_pair, read_orca_pair
from tandem.data.formats.turns import known_role, turns_in
from tandem.data.records import Conversation, Origin


def spelt(read: Reader, **names: str) -> Reader:
    """A reader for rows that have other names for its keys: `key="name of the data"`.

    Reasons speak of the data's names.
    """

    def reader(fields: Fields, origin: Origin) -> list[Record | InvalidRecord]:
        try:
            return list(read(named(fields, names), origin))
        except InvalidRecord as verdict:
            reason = verdict.reason
            for key, name in names.items():
                reason = reason.replace(f"`{key}`", f"`{name}`")
            raise InvalidRecord(reason, verdict.detail) from verdict

    return reader


def read_exchanges(fields: Fields, origin: Origin) -> list[Conversation]:
    """`conversation`: turns as in `messages` (LMSYS), or `input` and `output` (Capybara)."""
    said = fields.get("conversation")
    if isinstance(said, list) and said and all(_exchange(item) for item in said):
        said = [
            {"role": role, "content": item[key]}
            for item in said
            for role, key in (("user", "input"), ("assistant", "output"))
        ]
    turns = turns_in(said, "conversation", "role", "content")
    return [conversation_of(fields, turns, origin)]


def answers_as_texts(fields: Fields) -> bool:
    """Whether a row's better answer is a text, not messages that bring their prompt."""
    return not isinstance(fields.get("chosen"), list)


def columns_of_turns(fields: Fields) -> list[str]:
    """The keys under which a row has lists of turns."""
    return [
        str(key)
        for key, value in fields.items()
        if isinstance(value, list) and value and all(_turn(item) for item in value)
    ]


def ends_with_answer(turns: object) -> bool:
    """Whether the last of some turns is an assistant's, or of a role that nobody knows."""
    assert isinstance(turns, list)
    name = next(turns[-1][key] for key in ("role", "from") if key in turns[-1])
    return known_role(str(name)) in ("assistant", None)


# A column that rows do not have, for a key that a spelling is without.
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
# distilabel's edition of orca_dpo_pairs; Argilla's edition of UltraFeedback.
read_input_pair = spelt(read_orca_pair, question="input")
read_response_pair = spelt(read_alpaca_pair, chosen="chosen_response", rejected="rejected_response")


def _turn(item: object) -> bool:
    keys = item.keys() if isinstance(item, Mapping) else set()
    return {"role", "content"} <= keys or {"from", "value"} <= keys


def _exchange(item: object) -> bool:
    return isinstance(item, Mapping) and {"input", "output"} <= item.keys() and "role" not in item
