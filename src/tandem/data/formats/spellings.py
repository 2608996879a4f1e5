"""Rows of widely used sets that hold what a known format holds, under other keys."""

from __future__ import annotations

from collections.abc import Mapping

from tandem.data.formats.conversations import conversation_of, read_alpaca, read_completion
from tandem.data.formats.preferences import read_alpaca_pair, read_orca_pair
from tandem.data.formats.rows import Fields, Reader, Record, Unusable
from tandem.data.formats.turns import turns_in
from tandem.data.records import Conversation, Origin


def spelt(read: Reader, **names: str) -> Reader:
    """A reader for rows that have other names for its keys: `key="name of the data"`.

    Reasons speak of the data's names.
    """

    def reader(fields: Fields, origin: Origin) -> list[Record | Unusable]:
        row = {key: value for key, value in fields.items() if key not in names}
        row |= {key: fields[name] for key, name in names.items() if name in fields}
        try:
            return list(read(row, origin))
        except Unusable as verdict:
            reason = verdict.reason
            for key, name in names.items():
                reason = reason.replace(f"`{key}`", f"`{name}`")
            raise Unusable(reason, verdict.detail) from verdict

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


def column_of_turns(fields: Fields) -> str | None:
    """The key under which a row has a list of turns, if there is one."""
    for key, value in fields.items():
        if isinstance(value, list) and value and all(_turn(item) for item in value):
            return str(key)
    return None


# GSM8K; MetaMath; HelpSteer; Dolly.
read_question_and_answer = spelt(read_completion, prompt="question", completion="answer")
read_query_and_response = spelt(read_completion, prompt="query", completion="response")
read_prompt_and_response = spelt(read_completion, completion="response")
read_instruction_and_response = spelt(read_alpaca, input="context", output="response")
# distilabel's edition of orca_dpo_pairs; Argilla's edition of UltraFeedback.
read_input_pair = spelt(read_orca_pair, question="input")
read_response_pair = spelt(read_alpaca_pair, chosen="chosen_response", rejected="rejected_response")


def _turn(item: object) -> bool:
    keys = item.keys() if isinstance(item, Mapping) else set()
    return {"role", "content"} <= keys or {"from", "value"} <= keys


def _exchange(item: object) -> bool:
    return isinstance(item, Mapping) and {"input", "output"} <= item.keys() and "role" not in item
