"""From a row to a conversation, preference pairs or a question.

Formats are told apart by their keys; extra keys are fine. A row that cannot be used raises
`Unusable` with a short reason, the same for all rows with the same fault, so that reasons count.
"""

from __future__ import annotations

from collections.abc import Callable

from tandem.data.formats.conversations import (
    read_alpaca,
    read_completion,
    read_messages,
    read_sharegpt,
)
from tandem.data.formats.preferences import (
    read_alpaca_pair,
    read_explicit_pair,
    read_implicit_pair,
    read_orca_pair,
    read_sharegpt_pair,
)
from tandem.data.formats.questions import (
    QUESTION_KEYS,
    QUESTION_OPTIONS,
    Question,
    read_question,
)
from tandem.data.formats.rows import Fields, Format, Kind, Reader, Record, Unusable
from tandem.data.formats.scored import read_best_vs_rest, read_best_vs_worst
from tandem.data.formats.spellings import (
    answers_as_texts,
    read_exchanges,
    read_input_pair,
    read_instruction_and_response,
    read_prompt_and_response,
    read_query_and_response,
    read_question_and_answer,
    read_response_pair,
)
from tandem.data.formats.unpaired import is_labelled, read_good_answer, read_joined_pair
from tandem.errors import UserError, nearest

__all__ = [
    "FORMATS",
    "QUESTION_KEYS",
    "QUESTION_OPTIONS",
    "Fields",
    "Format",
    "Kind",
    "Question",
    "Reader",
    "Record",
    "Unusable",
    "describe_formats",
    "detect",
    "format_called",
    "format_with",
    "read_question",
    "variant",
]


def _known(
    name: str,
    kind: Kind,
    keys: str,
    read: Reader,
    optional: str = "",
    *,
    turns: bool = False,
    suits: Callable[[Fields], bool] | None = None,
    completions: str | None = None,
    joins: bool = False,
) -> Format:
    needed, more = frozenset(keys.split()), frozenset(optional.split())
    return Format(name, kind, needed, read, more, turns, suits, completions, joins)


def _labelled(
    name: str, keys: str, suits: Callable[[Fields], bool] | None = None
) -> tuple[Format, Format]:
    """Answers with a label: good ones as conversations, or a good and a bad one as a pair."""
    return (
        _known(
            name, "conversations", keys, read_good_answer, "system", turns=True, suits=suits
        ),
        _known(
            name, "preference pairs", keys, read_joined_pair, "system", turns=True, suits=suits,
            joins=True,
        ),
    )  # fmt: skip


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
    *_labelled("labelled ShareGPT", "conversations label", is_labelled),
    *_labelled("labelled messages", "messages label", is_labelled),
    _known("ShareGPT", "conversations", "conversations", read_sharegpt, "system", turns=True),
    _known("messages", "conversations", "messages", read_messages, "system", turns=True),
    *_labelled("unpaired preference", "prompt completion label"),
    _known(
        "prompt and completion", "conversations", "prompt completion", read_completion, "system",
        turns=True,
    ),
    _known(
        "Alpaca", "conversations", "instruction output", read_alpaca, "input system history"
    ),
    _known("conversation", "conversations", "conversation", read_exchanges, "system", turns=True),
    _known(
        "instruction and response", "conversations", "instruction response",
        read_instruction_and_response, "context system history",
    ),
    _known(
        "prompt and response", "conversations", "prompt response", read_prompt_and_response,
        "system", turns=True,
    ),
    _known(
        "query and response", "conversations", "query response", read_query_and_response, "system"
    ),
    _known(
        "question and answer", "conversations", "question answer", read_question_and_answer,
        "system",
    ),
)  # fmt: skip


def detect(fields: Fields) -> Format | None:
    """The format of a row by its keys and what they hold, or None."""
    return next((known for known in FORMATS if known.fits(fields)), None)


def variant(known: Format, kind: Kind, completions: str | None) -> Format:
    """The format of the same keys that makes records of a kind, if there is one.

    `completions` chooses between those of scored answers: `best_vs_worst` (also None) or
    `best_vs_rest`.
    """
    wanted = (None, completions or "best_vs_worst")
    same = (one for one in FORMATS if one.keys == known.keys and one.kind == kind)
    return next((one for one in same if one.completions in wanted), known)


def format_with(id_: str) -> Format:
    """The known format of that `id`."""
    return next(known for known in FORMATS if known.id == id_)


def format_called(name: str) -> Format:
    """The format that a recipe calls so, in any case and with `_` or `-` for spaces.

    Raises `UserError` for a name that is none, with the nearest one.
    """
    found = next((known for known in FORMATS if _plain(known.name) == _plain(name)), None)
    if found is not None:
        return found
    names = list(dict.fromkeys(known.name for known in FORMATS))
    raise UserError(
        f"data: there is no format {name!r}.{nearest(name, names)} "
        f"Known formats: {', '.join(names)}."
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ").strip()


def describe_formats(kind: Kind) -> str:
    """The known formats of a kind and their keys, for messages."""
    told = (
        f"{known.name} ({', '.join(sorted(known.keys))})" for known in FORMATS if known.kind == kind
    )
    return "; ".join(dict.fromkeys(told))
