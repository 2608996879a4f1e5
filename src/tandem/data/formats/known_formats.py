"""From a row to a conversation, preference pairs or a question.

Formats are told apart by their keys; extra keys are fine. A row that cannot be used raises
`InvalidRecord` with a short reason, the same for all rows with the same fault, so that
reasons count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tandem.data.formats.conversations import (
    INSTRUCTION,
    QUERY,
    QUESTION,
    read_alpaca,
    read_completion,
    read_exchanges,
    read_instruction_and_response,
    read_messages,
    read_prompt_and_response,
    read_query_and_response,
    read_question_and_answer,
    read_question_and_response,
    read_sharegpt,
)
from tandem.data.formats.format import Fields, Format, Kind, Reader, ToUnpaired
from tandem.data.formats.preferences import (
    answers_as_texts,
    read_alpaca_pair,
    read_best_vs_rest,
    read_best_vs_worst,
    read_explicit_pair,
    read_implicit_pair,
    read_input_pair,
    read_orca_pair,
    read_response_pair,
    read_sharegpt_pair,
)
from tandem.data.formats.unpaired import (
    good_answers,
    instruction_to_unpaired,
    is_labelled,
    joined_pairs,
    last_turn_to_unpaired,
    prompt_to_unpaired,
)
from tandem.errors import UserError, nearest


def _known(
    name: str, kind: Kind, keys: str, read: Reader, optional: str = "", **more: Any
) -> Format:
    return Format(name, kind, frozenset(keys.split()), read, frozenset(optional.split()), **more)


def _labelled(
    name: str,
    keys: str,
    optional: str,
    apart: ToUnpaired,
    suits: Callable[[Fields], bool] | None = is_labelled,
) -> tuple[Format, Format]:
    """Answers with a label: good ones as conversations, or a good and a bad one as a pair."""
    needed = frozenset(keys.split())
    more = frozenset(f"system label kto_tag {optional}".split()) - needed
    good, pairs = good_answers(apart), joined_pairs(apart)
    return (
        Format(name, "conversations", needed, good, more, True, suits, to_unpaired=apart),
        Format(
            name,
            "preference pairs",
            needed,
            pairs,
            more,
            True,
            suits,
            to_unpaired=apart,
            joins=True,
        ),
    )


# The first whose keys are all there is the format, so what needs more keys comes first.
# `messages` often lie beside prompt/chosen/rejected; pairs are then what is meant.
FORMATS: tuple[Format, ...] = (
    _known(
        "orca_dpo_pairs", "preference pairs", "question chosen rejected", read_orca_pair, "system",
        suits=answers_as_texts,
    ),
    _known(
        "explicit preference", "preference pairs", "prompt chosen rejected", read_explicit_pair,
        "system", turns=True,
    ),
    _known(
        "ShareGPT preference", "preference pairs", "conversations chosen rejected",
        read_sharegpt_pair, "system", turns=True,
    ),
    _known(
        "Alpaca preference", "preference pairs", "instruction chosen rejected", read_alpaca_pair,
        "input system history", turns=True,
    ),
    _known(
        "input preference", "preference pairs", "input chosen rejected", read_input_pair, "system",
        suits=answers_as_texts,
    ),
    # Without a prompt of its own: what both have in common.
    _known(
        "implicit preference", "preference pairs", "chosen rejected", read_implicit_pair, "system",
        turns=True,
    ),
    _known(
        "response preference", "preference pairs", "instruction chosen_response rejected_response",
        read_response_pair, "input system history",
    ),
    _known(
        "UltraFeedback", "preference pairs", "instruction completions", read_best_vs_worst,
        "system", completions="best_vs_worst",
    ),
    _known(
        "UltraFeedback", "preference pairs", "instruction completions", read_best_vs_rest,
        "system", completions="best_vs_rest",
    ),
    *_labelled("labelled ShareGPT", "conversations", "", last_turn_to_unpaired("conversations")),
    *_labelled("labelled messages", "messages", "", last_turn_to_unpaired("messages")),
    _known("ShareGPT", "conversations", "conversations", read_sharegpt, "system", turns=True),
    _known("messages", "conversations", "messages", read_messages, "system", turns=True),
    *_labelled(
        "unpaired preference", "prompt completion label", "", prompt_to_unpaired("completion"), None
    ),
    _known(
        "prompt and completion", "conversations", "prompt completion", read_completion, "system",
        turns=True,
    ),
    *_labelled(
        "labelled Alpaca", "instruction output", "input history", instruction_to_unpaired("output")
    ),
    _known(
        "Alpaca", "conversations", "instruction output", read_alpaca, "input system history"
    ),
    _known("conversation", "conversations", "conversation", read_exchanges, "system", turns=True),
    *_labelled(
        "labelled instruction and response", "instruction response", "context history",
        instruction_to_unpaired("response", **INSTRUCTION),
    ),
    _known(
        "instruction and response", "conversations", "instruction response",
        read_instruction_and_response, "context system history",
    ),
    *_labelled(
        "labelled prompt and response", "prompt response", "", prompt_to_unpaired("response")
    ),
    _known(
        "prompt and response", "conversations", "prompt response", read_prompt_and_response,
        "system", turns=True,
    ),
    *_labelled(
        "labelled query and response", "query response", "history",
        instruction_to_unpaired("response", **QUERY),
    ),
    _known(
        "query and response", "conversations", "query response", read_query_and_response,
        "system history",
    ),
    _known(
        "question and response", "conversations", "question response", read_question_and_response,
        "system_prompt", turns=True,
    ),
    *_labelled(
        "labelled question and answer", "question answer", "context history",
        instruction_to_unpaired("answer", **QUESTION),
    ),
    _known(
        "question and answer", "conversations", "question answer", read_question_and_answer,
        "context system history",
    ),
)  # fmt: skip


_BY_ID = {one.id: one for known in FORMATS for one in (known, replace(known, stated=True))}


def detect(fields: Fields) -> Format | None:
    """The format of a row by its keys and what they hold, or None."""
    return next((known for known in FORMATS if known.fits(fields)), None)


def overlooked(keys: Sequence[str], known: Format) -> tuple[Format, ...]:
    """The formats that rows with some keys may have, and that say more of them than `known`.

    Those come before it: rows with a verdict on their answer, or with a better and a worse one. A
    source whose first row lacks what tells them is not of theirs, and these rows are not of its.
    """
    if known.stated or known.joins:
        return ()
    names = frozenset(keys)
    before = FORMATS[: [one.name for one in FORMATS].index(known.name)]
    return tuple(
        one
        for one in before
        if one.keys <= names and (one.to_unpaired is not None or one.kind != known.kind)
    )


def variant(known: Format, kind: Kind, completions: str | None) -> Format:
    """The format of the same name that makes records of a kind, if there is one.

    `completions` chooses between those of scored answers: `best_vs_worst` (also None) or
    `best_vs_rest`.
    """
    wanted = (None, completions or "best_vs_worst")
    same = (one for one in FORMATS if one.name == known.name and one.kind == kind)
    found = next((one for one in same if one.completions in wanted), known)
    return replace(found, stated=True) if known.stated else found


def format_with(id_: str) -> Format:
    """The known format of that `id`."""
    return _BY_ID[id_]


def format_called(name: str) -> Format:
    """The format that a recipe states so, in any case and with `_` or `-` for spaces.

    Raises `UserError` for a name that is none, with the nearest one.
    """
    found = next((known for known in FORMATS if _plain(known.name) == _plain(name)), None)
    if found is not None:
        return replace(found, stated=True)
    names = list(dict.fromkeys(known.name for known in FORMATS))
    raise UserError(
        f"data: there is no format {name!r}.{nearest(name, names)} "
        f"Known formats: {', '.join(names)}."
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ").strip()


def describe_formats(kind: Kind) -> str:
    """The known formats of a kind and their keys, for messages."""
    keys = {
        (known.name, *sorted(known.keys | ({"label"} if known.to_unpaired else set()))): None
        for known in FORMATS
        if known.kind == kind
    }
    return "; ".join(f"{name} ({', '.join(some)})" for name, *some in keys)
