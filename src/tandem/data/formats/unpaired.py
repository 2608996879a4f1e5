"""Rows that hold one answer and whether it is a good one, for KTO.

As TRL has them, the answer beside its prompt; or, as others do, in rows of any other format, with
`label` or LLaMA-Factory's `kto_tag` beside them.
"""

from __future__ import annotations

from collections.abc import Mapping

from tandem.data.formats.conversations import read_completion
from tandem.data.formats.preferences import read_explicit_pair
from tandem.data.formats.rows import TOOL_KEYS, Apart, Fields, Reader, Unusable, named, text
from tandem.data.formats.turns import instruction_in
from tandem.data.records import Conversation, Origin, PreferencePair

# The keys of a labelled answer once it is apart from what is before it.
BEFORE = ("prompt", "system", *sorted(TOOL_KEYS))

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def label_of(fields: Fields) -> bool:
    """Whether a row's answer is a good one: a truth value, 0 or 1, or one of them as text."""
    key = _label_key(fields)
    label = _LABELS.get(str(fields.get(key)).strip().lower())
    if label is None:
        raise Unusable(f"`{key}` is neither true nor false", repr(fields.get(key))[:80])
    return label


def is_labelled(fields: Fields) -> bool:
    """Whether a row has a verdict: `kto_tag`, or a `label` that is true or false, also as text.

    Beside answers of formats other than TRL's, other labels mean other things.
    """
    said = str(fields.get("label")).strip().lower()
    return fields.get("kto_tag") is not None or said in ("true", "false")


def last_turn_apart(key: str) -> Apart:
    """The last of the turns in `key` as the answer."""

    def apart(fields: Fields) -> Fields:
        turns = fields.get(key)
        if not isinstance(turns, list) or len(turns) < 2:
            raise Unusable(f"`{key}` is not a list of a question and its answer")
        return _answered(fields, turns[:-1], turns[-1:])

    return apart


def prompt_apart(answer: str) -> Apart:
    """The answer in a key of its own beside `prompt`."""

    def apart(fields: Fields) -> Fields:
        for key in ("prompt", answer):
            if not isinstance(fields.get(key), list | Mapping):
                text(fields, key)
        return _answered(fields, fields["prompt"], fields[answer])

    return apart


def instruction_apart(answer: str, **names: str) -> Apart:
    """The answer behind Alpaca's keys, some of which may have other names."""

    def apart(fields: Fields) -> Fields:
        turns = instruction_in(named(fields, names))
        before = [{"role": turn.role, "content": turn.content} for turn in turns]
        return _answered({**fields, "system": None}, before, text(fields, answer))

    return apart


def good_answers(apart: Apart) -> Reader:
    """A reader of the conversations of good answers; it raises `Unusable` for bad ones."""

    def read(fields: Fields, origin: Origin) -> list[Conversation]:
        if not label_of(fields):
            raise Unusable("the answer is labelled false")
        return read_completion(apart(fields), origin)

    return read


def joined_pairs(apart: Apart) -> Reader:
    """A reader of pairs of two rows that `joining` has put together, or of why one is alone."""

    def read(fields: Fields, origin: Origin) -> list[PreferencePair]:
        if "chosen" in fields and "rejected" in fields:
            return read_explicit_pair(fields, origin)
        label = label_of(fields)
        read_completion(apart(fields), origin)
        raise Unusable(f"no answer to the same prompt is labelled {str(not label).lower()}")

    return read


def _answered(fields: Fields, prompt: object, answer: object) -> Fields:
    kept = {key: fields[key] for key in BEFORE if key in fields}
    label = fields.get(_label_key(fields))
    return {**kept, "prompt": prompt, "completion": answer, "label": label}


def _label_key(fields: Fields) -> str:
    return "kto_tag" if fields.get("kto_tag") is not None else "label"
