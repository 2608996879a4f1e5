"""Rows that hold one answer and whether it is a good one, for KTO.

As TRL has them, the answer beside its prompt; or, as others do, at the end of a conversation.
"""

from __future__ import annotations

from tandem.data.formats.conversations import read_completion
from tandem.data.formats.preferences import read_explicit_pair
from tandem.data.formats.rows import Fields, Unusable
from tandem.data.records import Conversation, Origin, PreferencePair

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def label_of(fields: Fields) -> bool:
    """Whether a row's answer is a good one: a truth value, 0 or 1, or one of them as text."""
    label = _LABELS.get(str(fields.get("label")).strip().lower())
    if label is None:
        raise Unusable("`label` is neither true nor false", repr(fields.get("label"))[:80])
    return label


def is_labelled(fields: Fields) -> bool:
    """Whether a row's label is a truth value; beside a conversation others mean other things."""
    return isinstance(fields.get("label"), bool)


def answer_apart(fields: Fields) -> Fields:
    """The row with `prompt` and `completion`, its conversation's last turn being the latter."""
    key = next((key for key in ("messages", "conversations") if key in fields), None)
    if key is None or "completion" in fields:
        return fields
    turns = fields[key]
    if not isinstance(turns, list) or len(turns) < 2:
        raise Unusable(f"`{key}` is not a list of a question and its answer")
    return {**fields, "prompt": turns[:-1], "completion": turns[-1:]}


def read_good_answer(fields: Fields, origin: Origin) -> list[Conversation]:
    """The conversation of a good answer; raises `Unusable` for a bad one."""
    if not label_of(fields):
        raise Unusable("the answer is labelled false")
    return read_completion(answer_apart(fields), origin)


def read_joined_pair(fields: Fields, origin: Origin) -> list[PreferencePair]:
    """The pair of two rows that `joining` has put together, or why a row is still alone."""
    if "chosen" in fields and "rejected" in fields:
        return read_explicit_pair(fields, origin)
    label = label_of(fields)
    read_completion(answer_apart(fields), origin)
    raise Unusable(f"no answer to the same prompt is labelled {str(not label).lower()}")
