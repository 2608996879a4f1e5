"""Rows that hold a better and a worse answer, for DPO."""

from __future__ import annotations

from tandem.data.formats.rows import Fields, Unusable, text
from tandem.data.formats.turns import (
    after_system,
    answer_in,
    check_order,
    dialogue_in,
    instruction_in,
    prompt_in,
    prompt_of,
    said,
    turns_in,
)
from tandem.data.records import Origin, PreferencePair, Turn


def read_orca_pair(fields: Fields, origin: Origin) -> list[PreferencePair]:
    """`system`, `question`, `chosen`, `rejected`, all texts."""
    prompt = prompt_of(fields.get("system"), text(fields, "question"))
    return [pair(prompt, text(fields, "chosen"), text(fields, "rejected"), origin)]


def read_explicit_pair(fields: Fields, origin: Origin) -> list[PreferencePair]:
    """`prompt`, `chosen`, `rejected`, texts or messages."""
    return [_answers_to(prompt_in(fields), fields, origin)]


def read_alpaca_pair(fields: Fields, origin: Origin) -> list[PreferencePair]:
    """Alpaca's `instruction` and `input` with two answers."""
    return [_answers_to(instruction_in(fields), fields, origin)]


def read_sharegpt_pair(fields: Fields, origin: Origin) -> list[PreferencePair]:
    """`conversations` that end with a question, and two answers, texts or turns."""
    turns = turns_in(fields.get("conversations"), "conversations", "from", "value")
    return [_answers_to(after_system(fields, turns), fields, origin)]


def read_implicit_pair(fields: Fields, origin: Origin) -> list[PreferencePair]:
    """Two dialogues in `chosen` and `rejected` that differ in the last answer."""
    chosen, rejected = (dialogue_in(fields, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected follow different prompts")
    return [pair(chosen[:-1], said(chosen[-1]), said(rejected[-1]), origin)]


def pair(prompt: tuple[Turn, ...], chosen: str, rejected: str, origin: Origin) -> PreferencePair:
    """A preference pair; raises `Unusable` for turns or answers that make none."""
    check_order((*prompt, Turn("assistant", chosen)))
    if not rejected.strip():
        raise Unusable("empty answer", "rejected")
    if chosen.strip() == rejected.strip():
        raise Unusable("identical answers")
    return PreferencePair(prompt, chosen, rejected, origin)


def _answers_to(turns: tuple[Turn, ...], fields: Fields, origin: Origin) -> PreferencePair:
    chosen_prompt, chosen = answer_in(fields, "chosen", turns)
    rejected_prompt, rejected = answer_in(fields, "rejected", turns)
    if chosen_prompt != rejected_prompt:
        raise Unusable("chosen and rejected follow different prompts")
    return pair(chosen_prompt, chosen, rejected, origin)
