"""Rows that hold one answer and whether it is a good one: TRL's unpaired preference, for KTO."""

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


def read_good_answer(fields: Fields, origin: Origin) -> list[Conversation]:
    """The conversation of a good answer; raises `Unusable` for a bad one."""
    if not label_of(fields):
        raise Unusable("the answer is labelled false")
    return read_completion(fields, origin)


def read_joined_pair(fields: Fields, origin: Origin) -> list[PreferencePair]:
    """The pair of two rows that `joining` has put together, or why a row is still alone."""
    if "chosen" in fields and "rejected" in fields:
        return read_explicit_pair(fields, origin)
    label = label_of(fields)
    read_completion(fields, origin)
    raise Unusable(f"no answer to the same prompt is labelled {str(not label).lower()}")
